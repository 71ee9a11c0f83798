"""A file that is written in any order, past the page cache where the file system allows.

A merge writes as much as it reads: through the page cache that takes a copy and a page's set-up for
every 4 KiB, and pushes the inputs out of it. 2.6 GB to one virtual disk, synced: 0.7 s and
0.1 s of processor time past the cache, 1.1 to 5 s and as much processor time through it.
"""

import errno
import os
from pathlib import Path

import numpy as np

from expunge.memory import BLOCK, aligned

_STAGED = 1 << 22


class OutputFile:
    """A file of `size` bytes, open for writing anywhere in it; what it holds already stays."""

    def __init__(self, path: Path, size: int) -> None:
        self._cached = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _check_room(self._cached, size, path)
            os.ftruncate(self._cached, size)
            self._direct = _open_direct(path)
        except OSError:
            os.close(self._cached)
            raise
        self._staged = aligned(_STAGED)

    def write(self, offset: int, raw: np.ndarray) -> None:
        """Write bytes: whole blocks directly, the ends through the page cache."""
        first = min(-offset % BLOCK, len(raw))
        last = first + (len(raw) - first) // BLOCK * BLOCK
        _write(self._cached, offset, raw[:first])
        self._write_blocks(offset + first, raw[first:last])
        _write(self._cached, offset + last, raw[last:])

    def sync(self) -> None:
        """Put on disk what was written."""
        os.fdatasync(self._cached)

    def close(self) -> None:
        """Close the file, without putting it on disk."""
        os.close(self._cached)
        if self._direct is not None:
            os.close(self._direct)

    def _write_blocks(self, offset: int, raw: np.ndarray) -> None:
        if self._direct is None:
            return _write(self._cached, offset, raw)
        step = _STAGED if raw.ctypes.data % BLOCK else max(1, len(raw))
        for low in range(0, len(raw), step):
            part = raw[low : low + step]
            if part.ctypes.data % BLOCK:
                self._staged[: len(part)] = part
                part = self._staged[: len(part)]
            try:
                _write(self._direct, offset + low, part)
            except OSError as error:
                if error.errno != errno.EINVAL:  # larger blocks, or none past the cache after all
                    raise
                os.close(self._direct)
                self._direct = None
                return _write(self._cached, offset + low, raw[low:])
        return None


def _open_direct(path: Path) -> int | None:
    flag = getattr(os, "O_DIRECT", None)
    if flag is None:
        return None
    try:
        return os.open(path, os.O_WRONLY | flag)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return None


def _check_room(file: int, size: int, path: Path) -> None:
    """Refuse what cannot fit before anything is written."""
    disk, there = os.fstatvfs(file), os.fstat(file).st_blocks * 512
    if size - there > disk.f_bavail * disk.f_frsize:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _write(file: int, offset: int, raw: np.ndarray) -> None:
    left = raw.data
    while len(left):
        written = os.pwrite(file, left, offset)
        left, offset = left[written:], offset + written
