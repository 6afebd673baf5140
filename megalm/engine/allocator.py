"""The C library's memory allocator, told what training is like: the same large tensors again in every step."""

from __future__ import annotations

import ctypes
import logging

log = logging.getLogger(__name__)

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> None:
    """Keep what tensors on a CPU give back, for the next ones, instead of returning it to the system.

    By default each tensor of more than some megabytes is mapped anew and its pages are zeroed by the kernel, in every
    step again; that was a fifth of the time of a step. What the process holds at most does not change, only that it
    keeps holding it. Nothing happens where the C library is another one.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        log.debug("no mallopt here: freed memory goes back to the system")
        return
    mallopt(ctypes.c_int(_M_MMAP_MAX), ctypes.c_int(0))  # nothing is mapped by itself
    mallopt(ctypes.c_int(_M_TRIM_THRESHOLD), ctypes.c_int(-1))  # and the heap is never cut
