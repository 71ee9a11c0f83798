"""Memory of this process: freed blocks are kept for the next step, and little else is."""

import contextlib
import ctypes
import gc
import math
import os
import platform
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

BLOCK = 4096
"""Bytes of a page of memory, and of what disks write at once."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names in malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
_KERNELS = 128
"""Shapes of products that a training step has, and some more."""

CGROUPS = Path("/sys/fs/cgroup")
"""Where Linux says what the container of this process may hold."""

_LIMITS = (
    ("memory.max", "memory.current", "memory.stat", ""),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_",
    ),
)
"""Of cgroups v2 and v1: the files of the limit, of what is held, of its kinds; how these begin."""

_POPULATE_READ = 22  # of madvise
_LIMIT = 2**31 - 1  # mallopt takes an int
_LIBRARY = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def keep_freed_memory() -> None:
    """Serve large blocks from the heap and keep what is freed, where the C library is glibc.

    Otherwise each step maps its buffers anew and the kernel fills them with zeros page by page:
    a forward pass of SmolLM2 over 710 tokens takes 0.8 s instead of 0.55 s.
    """
    if _LIBRARY is not None:
        _LIBRARY.mallopt(_MMAP_THRESHOLD, 2**30)
        _LIBRARY.mallopt(_TRIM_THRESHOLD, _LIMIT)


def keep_few_kernels() -> None:
    """Keep machine code for the last products only, unless the user has said for how many.

    oneDNN writes code for every shape of a product, half a megabyte, and keeps that of the last
    1024. Packs of text are of ever new lengths: what a step used is of no use to the next, and
    hundreds of megabytes gather. Has an effect before the first product only.

    Source: oneDNN, developer guide, "Primitive Cache".
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(_KERNELS))


def release_freed_memory() -> None:
    """Collect what is dropped and hand it back: after a model, or a file written from memory."""
    gc.collect()
    hand_back()


def hand_back() -> None:
    """Hand back what is freed, without a collection: that looks through all that is imported, a
    quarter of a second, and a training step leaves nothing to it."""
    if _LIBRARY is not None:
        _LIBRARY.malloc_trim(0)


@contextlib.contextmanager
def imports_set_aside() -> Iterator[None]:
    """Within it the garbage collector passes over what is there already.

    With torch and transformers imported a whole collection looks through a third of a million
    objects, 0.16 s, and a merge that takes a second makes enough of its own to bring one about.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def forget_peak() -> None:
    """Begin to count peak memory anew; where the system cannot, it stays that of the process."""
    if _uses_cuda():
        sys.modules["torch"].cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Most memory that this process has held since `forget_peak`."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_device_bytes() -> int | None:
    """Most memory that this process has held on a GPU since `forget_peak`; None without one."""
    return sys.modules["torch"].cuda.max_memory_allocated() if _uses_cuda() else None


def container_room(folder: Path = CGROUPS) -> float:
    """Bytes that the container may take beyond what it holds; infinite where nothing limits it.

    Pages of files, which it gives up when others ask for them, are not counted as held.
    """
    for limit, used, what, begins in _LIMITS:
        try:
            most, held = ((folder / name).read_text().strip() for name in (limit, used))
            kinds = dict(line.split() for line in (folder / what).read_text().splitlines())
        except OSError:
            continue
        if most == "max":
            return math.inf
        files = sum(int(kinds.get(f"{begins}{kind}_file", 0)) for kind in ("active", "inactive"))
        return max(0, int(most) - int(held) + files)
    return math.inf


def _uses_cuda() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()


def map_in(raw: np.ndarray) -> None:
    """Map the pages of bytes that lie in a mapped file, and read them if they are not in memory.

    Where the system cannot (before Linux 5.14), they are met one by one when they are read.
    """
    if _LIBRARY is not None and len(raw):
        first = raw.ctypes.data // BLOCK * BLOCK
        size = raw.ctypes.data + raw.nbytes - first
        _LIBRARY.madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), _POPULATE_READ)


def aligned(size: int) -> np.ndarray:
    """Bytes that begin at the beginning of a page, not set to anything: (size,) uint8."""
    buffer = np.empty(size + BLOCK, np.uint8)
    first = -buffer.ctypes.data % BLOCK
    return buffer[first : first + size]
