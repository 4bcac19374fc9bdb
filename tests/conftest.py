"""What all tests share: one thread each, for them and their children; two that share a core wait for each other."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
