"""Write a model folder tensor by tensor: places are known beforehand, so a killed write goes on.

The folder is built beside its final name as `.NAME.partial`: shards of their full size, a journal
of the tensors that are safely on disk, and the identity of what is written. When all is there,
synced, it takes its name.
"""

import json
import os
import shutil
import struct
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from expunge import runs
from expunge.disk import readable_errors
from expunge.errors import MergeError
from expunge.memory import BLOCK
from expunge.merge.checkpoint import INDEX, ITEM_BYTES, SINGLE
from expunge.merge.direct import OutputFile

SHARD_BYTES = 5_000_000_000
_SYNC_BYTES, _SYNC_SECONDS = 1 << 30, 3.0  # of writing, between two entries of the journal
_QUEUED = 3  # writes that wait while the next slice is worked on
_JOURNAL, _IDENTITY = "journal.jsonl", "identity.json"


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size on disk."""
        return int(np.prod(self.shape, dtype=np.int64)) * ITEM_BYTES[self.dtype]


class ShardWriter:
    """The shards of one folder, open for writing anywhere in them; or one of them alone.

    Several processes may write one folder, each its own shards and journal.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Sequence[Planned],
        shard_bytes: int,
        *,
        only: int | None = None,
    ) -> None:
        """`only` is the number of the one shard to write, from 0."""
        self.folder = folder
        self._journal = folder / (_JOURNAL if only is None else f"{only}-{_JOURNAL}")
        self.done: dict[str, Any] = {}
        """What was noted of each tensor that is on disk."""

        self._places: dict[str, tuple[OutputFile, int]] = {}
        self._files: list[OutputFile] = []
        self._noted: dict[str, Any] = {}
        self._unsynced, self._synced = 0, time.monotonic()
        self._thread = ThreadPoolExecutor(1)
        self._begun: deque[Future[None]] = deque()
        self.weight_map: dict[str, str] = {}
        groups = grouped(tensors, shard_bytes)
        for number, group in enumerate(groups):
            if only in (None, number):
                name = SINGLE if len(groups) == 1 else _shard_name(number + 1, len(groups))
                self._open(name, group)
        self.read_journals()
        if len(groups) > 1 and only is None:
            total = sum(tensor.nbytes for tensor in tensors)
            index = {"metadata": {"total_size": total}, "weight_map": self.weight_map}
            runs.write_json(folder / INDEX, index)

    def write(self, name: str, offset: int, raw: np.ndarray) -> None:
        """Write bytes at an offset within a tensor, while the caller goes on computing."""
        file, start = self._places[name]
        self._wait(_QUEUED)
        self._begun.append(self._thread.submit(file.write, start + offset, raw))
        self._unsynced += len(raw)

    def finished(self, name: str, note: Any) -> None:
        """All of a tensor has been written; `note` is kept with it."""
        self._noted[name] = note
        if self._unsynced >= _SYNC_BYTES or time.monotonic() - self._synced >= _SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Have what was written put on disk, then the journal say so, while the caller goes on."""
        noted, self._noted, self._unsynced = self._noted, {}, 0
        self._synced = time.monotonic()
        self._begun.append(self._thread.submit(self._sync, noted, tuple(self._begun)))

    def close(self) -> None:
        """Wait for everything, and close the shards."""
        try:
            self.sync()
            self._wait()
        finally:
            self._thread.shutdown()
            for file in self._files:
                file.close()
            self._files = []

    def _sync(self, noted: dict[str, Any], writes: Sequence[Future[None]]) -> None:
        for write in writes:  # all have ended, for they were begun before; one may have failed
            write.result()
        for file in self._files:
            file.sync()
        with self._journal.open("a", encoding="utf-8") as journal:
            for name, note in noted.items():
                journal.write(json.dumps([name, note]) + "\n")
            journal.flush()
            os.fsync(journal.fileno())

    def _wait(self, left: int = 0) -> None:
        """Until at most so many of the writes that were begun are left, the oldest first."""
        while len(self._begun) > left:
            self._begun.popleft().result()

    def _open(self, name: str, group: Sequence[Planned]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for tensor in group:
            span = [offset, offset + tensor.nbytes]
            header[tensor.name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": span,
            }
            offset = span[1]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % BLOCK)
        begin = 8 + len(text)
        file = OutputFile(self.folder / name, begin + offset)
        self._files.append(file)
        head = struct.pack("<Q", len(text)) + text
        file.write(0, np.frombuffer(head, np.uint8))
        for tensor in group:
            self.weight_map[tensor.name] = name
            self._places[tensor.name] = (file, begin)
            begin += tensor.nbytes

    def read_journals(self) -> None:
        """Learn what is on disk: of a killed process, or of others that write this folder."""
        for journal in self.folder.glob(f"*{_JOURNAL}"):
            for line in journal.read_text(encoding="utf-8").splitlines(keepends=True):
                if line.endswith("\n"):  # the last line of a killed process may be torn
                    name, note = json.loads(line)
                    self.done[name] = note


@contextmanager
def model_folder(out: Path, identity: str) -> Iterator[Path]:
    """A folder to build `out` in: what a killed build of the same identity left, or a new one.

    When the block ends, what serves the building alone is removed and the folder becomes `out`;
    when it fails, all of it is removed; interrupted, it is left, to be gone on with.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MergeError(f"{out} exists and is not empty; choose another folder")
    partial = out.with_name(f".{out.name}.partial")
    lock = out.with_name(f".{out.name}.lock")
    with readable_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with runs.locked(lock, f"{out}"):
            kept = False
            try:
                _begin(partial, identity)
                yield partial
                for path in (*partial.glob(f"*{_JOURNAL}"), partial / _IDENTITY):
                    path.unlink(missing_ok=True)
                runs.sync(partial)
                if out.is_dir():
                    out.rmdir()
                partial.rename(out)
                runs.sync(out.parent)
                kept = True
            except (KeyboardInterrupt, SystemExit):
                kept = True
                raise
            finally:
                if not kept:
                    shutil.rmtree(partial, ignore_errors=True)
                lock.unlink(missing_ok=True)


def _begin(partial: Path, identity: str) -> None:
    mark = partial / _IDENTITY
    if partial.is_dir() and mark.is_file() and mark.read_text(encoding="utf-8") == identity:
        return
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    mark.write_text(identity, encoding="utf-8")


def grouped(tensors: Iterable[Planned], shard_bytes: int) -> list[list[Planned]]:
    """Shards of at most `shard_bytes`, of whole blocks and wide types first: all are aligned."""
    return list(_groups(tensors, shard_bytes))


def _groups(tensors: Iterable[Planned], shard_bytes: int) -> Iterator[list[Planned]]:
    group: list[Planned] = []
    size = 0
    for tensor in tensors:
        if group and size + tensor.nbytes > shard_bytes:
            yield _aligned(group)
            group, size = [], 0
        group.append(tensor)
        size += tensor.nbytes
    if group:
        yield _aligned(group)


def _aligned(group: list[Planned]) -> list[Planned]:
    return sorted(group, key=lambda t: (t.nbytes % BLOCK != 0, -ITEM_BYTES[t.dtype]))


def _shard_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"
