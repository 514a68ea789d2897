"""Tests, in the layout of the package."""

import os

# Read when torch is imported. The suite runs in two processes, each of whose OpenMP threads would otherwise spin while
# the other process uses the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
