"""How a process uses the machine: which cores there are, one thread for small networks, and memory that is kept."""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


COMPILER = "torch._dynamo"
"""Two thousand modules that `torch.optim` and `torch.func` import at their first use, 2 CPU-s: a fork server that has
them spares every worker that time, and a search with a budget of CPU seconds its beginning."""


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def full_precision() -> None:
    """Float32 on a GPU and nothing shorter: torch rounds convolutions to 10 bits (TF32) unless it is told not to."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def prepare_for_small_networks() -> None:
    """One thread, and no memory given back between steps. For worker processes, and the CPU runs of this one.

    Small convolutions are 10-50x slower with more threads than free cores. And glibc returns the memory of every
    freed activation to the kernel, only to ask for it again in the next step: page faults were 35-45 % of the CPU
    time of training a small network (measured; 1.6x faster without).
    """
    import torch

    torch.set_num_threads(1)
    if not sys.platform.startswith("linux"):
        return
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)
    except (OSError, AttributeError):
        return  # another C library: only the speed is lost
