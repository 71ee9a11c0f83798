"""What the disk refuses, in words."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from expunge.errors import RunError

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EFBIG: "the file is too large for this disk or this user",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
    errno.EEXIST: "a file of that name is in the way",
    errno.EISDIR: "a folder of that name is in the way",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "the path goes through links without end",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
}


@contextlib.contextmanager
def readable_errors(path: Path) -> Iterator[None]:
    """Turn what the file system refuses into a `RunError`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REASONS:
            raise
        named = error.errno != errno.EISDIR  # which is said of a file that was to be renamed
        where = (named and error.filename) or path
        raise RunError(f"cannot write {where}: {_REASONS[error.errno]}") from None


@contextlib.contextmanager
def safetensors_errors() -> Iterator[None]:
    """Give what safetensors says of a failed write the form that the file system gives it."""
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        if not found:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1]))) from None
