"""How the C library gives memory back.

glibc serves large blocks with mmap, which returns them to the system when they are freed; but whenever one is freed it raises the
size from which it does so, up to 32 MB. The activations of a training step then come from the heap, where a few small blocks that
live longer keep the holes between them: 60 MB and more at 1000 tokens of width 2048. A fixed size stops that. What is smaller comes
from the heap still, so the size bounds what holes can take. With checkpointing, where memory is what counts, it is 256 KB: at 1 MB a
run whose block inputs fell just below kept 40 MB of holes. Without, each block keeps what it makes until its backward pass and there
are few holes, while memory from the system costs time: a page fault for every 4 KB.
"""

import ctypes
import sys

SMALL, LARGE = 1 << 18, 1 << 20  # bytes; blocks of this size and more go back to the system at once
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # <malloc.h>


def give_back(size: int = SMALL) -> None:
    """Return blocks of `size` bytes and more when they are freed, from now on, and what is free already now. Only glibc is asked."""
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    if not all(hasattr(library, name) for name in ("mallopt", "malloc_trim", "gnu_get_libc_version")):
        return
    library.mallopt(_MMAP_THRESHOLD, size)
    library.mallopt(_TRIM_THRESHOLD, size)
    library.malloc_trim(0)
