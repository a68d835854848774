"""How much pinned host memory a buffer takes. torch's allocator of pinned memory rounds every request up to a power of two, so a
buffer just above one takes twice its size; cut into a few powers of two and a small rest it takes an eighth more at most.
"""


def taken(nbytes: int) -> int:
    """Bytes that the allocator takes for one buffer."""
    return 1 << max(0, nbytes - 1).bit_length()


def pieces(count: int, most: int = 4) -> list[int]:
    """Elements of the buffers that hold `count` elements between them, at most so many: the largest powers of two, then the rest.

    >>> pieces(1000), pieces(1024), pieces(0)
    ([512, 256, 128, 104], [1024], [])
    """
    found: list[int] = []
    while count > 0:
        largest = count if len(found) == most - 1 else 1 << (count.bit_length() - 1)
        found.append(largest)
        count -= largest
    return found
