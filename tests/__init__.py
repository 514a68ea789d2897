"""Tests, which mirror the package. One thread per process: as many processes run as there are CPUs."""

import os

# Before torch is imported. Threads of two processes on two CPUs wait for each other at every operation of a tiny model.
os.environ.setdefault("OMP_NUM_THREADS", "1")
