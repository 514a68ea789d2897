"""Tests, in the layout of the package. One thread per process: as many processes run as there are CPUs."""

import os

# Before torch is imported. Threads of two processes on two CPUs wait for each other at every operation of a tiny model.
# Where a test asks for several threads, idle threads sleep instead of spinning.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
