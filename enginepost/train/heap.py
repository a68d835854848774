"""How the C library gives memory back.

glibc serves large blocks with mmap, which returns them to the system when they are freed; but whenever one is freed it raises the
size from which it does so, up to 32 MB. The activations of a training step then come from the heap, where a few small blocks that
live longer keep the holes between them: 60 MB and more at 1000 tokens of width 2048. A fixed size stops that. What is smaller still
comes from the heap, so the size bounds what holes can take: at 1 MB a run whose block inputs fell just below kept 40 MB of them.
"""

import ctypes
import sys

FROM = 1 << 18  # bytes; blocks of this size and more go back to the system at once
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # <malloc.h>


def give_back() -> None:
    """Return large blocks when they are freed, from now on, and what is free already now. Only glibc is asked to."""
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    if not all(hasattr(library, name) for name in ("mallopt", "malloc_trim", "gnu_get_libc_version")):
        return
    library.mallopt(_MMAP_THRESHOLD, FROM)
    library.mallopt(_TRIM_THRESHOLD, FROM)
    library.malloc_trim(0)
