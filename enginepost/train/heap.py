"""How the C library treats the memory that a step frees. Only glibc is asked.

A step takes and frees tensors of the same sizes as the step before. glibc serves large blocks with mmap, and what is returned to
the system with each of them is taken page by page again: 6 % of a LoRA step on a CPU went into page faults. `keep` lets the heap
hold on to everything up to the 32 MB that glibc allows; in exchange a few small blocks that live longer keep holes between them, 20
to 60 MB. `give_back`, for runs that save memory in any other way (checkpointing is one), returns blocks of a megabyte and more at
once. (Left alone, glibc begins like that and raises its threshold with each block that is freed.)
"""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # <malloc.h>
LARGE = 1 << 20  # bytes: blocks of this size and more go back to the system at once
KEPT, ALL = 32 << 20, 1 << 30  # blocks of up to KEPT, the most that glibc takes, stay, and so does the end of the heap


def give_back() -> None:
    """Return large blocks when they are freed, from now on."""
    _set(LARGE, LARGE)


def keep() -> None:
    """Hold on to what is freed, from now on, but for blocks of more than 32 MB."""
    _set(KEPT, ALL)


def _set(mmap_from: int, trim_above: int) -> None:
    """... and return what is free already now."""
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    if not all(hasattr(library, name) for name in ("mallopt", "malloc_trim", "gnu_get_libc_version")):
        return
    library.mallopt(_MMAP_THRESHOLD, mmap_from)
    library.mallopt(_TRIM_THRESHOLD, trim_above)
    library.malloc_trim(0)
