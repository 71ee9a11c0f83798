"""Memory of this process: freed blocks are kept for the next step rather than handed back."""

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names in malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
_LIMIT = 2**31 - 1  # mallopt takes an int


def keep_freed_memory() -> None:
    """Serve large blocks from the heap and keep what is freed, where the C library is glibc.

    Otherwise each step maps its buffers anew and the kernel fills them with zeros page by page:
    a forward pass of SmolLM2 over 710 tokens takes 0.8 s instead of 0.55 s.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    library = ctypes.CDLL(None)
    library.mallopt(_MMAP_THRESHOLD, 2**30)
    library.mallopt(_TRIM_THRESHOLD, _LIMIT)
