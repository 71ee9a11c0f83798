"""Records of benchmarks: sets of a Hub data set or a folder, with columns of their own."""

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from expunge.data.rows import READERS, Row
from expunge.data.sources import Source, filled, locate_folder, source_rows
from expunge.errors import DataError

_SHARD = "-00000-of-00001.parquet"


def part(
    path: str, subset: str, *, split: str | None = None, revision: str | None = None
) -> Source:
    """One set of a benchmark that `path` names: a data set of the Hub, or a folder.

    On the Hub it is a subset, and perhaps a split of it; in a folder the file `subset.jsonl`, or
    `subset/split.jsonl` (or another known ending, or the one parquet shard of a download).
    """
    if path.startswith("hub:"):
        return Source(path=path, subset=subset, split=split, revision=revision)
    folder = locate_folder(path)
    name = subset if split is None else f"{subset}/{split}"
    found = [
        folder / f"{name}{ending}"
        for ending in (*READERS, _SHARD)
        if (folder / f"{name}{ending}").is_file()
    ]
    if not found:
        raise DataError(f"{path} holds no {name}.jsonl (nor .parquet, .json, .csv)")
    if len(found) > 1:
        raise DataError(f"{path} holds {found[0].name} and {found[1].name}; which is meant?")
    return Source(path=str(found[0]))


def read_records(
    source: Source, texts: Sequence[str], lists: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The `id` of each row (else its number from 0), its filled texts, and its lists of them."""
    records, seen = [], set()
    for number, row in enumerate(source_rows(source)):
        record: dict[str, Any] = {"id": str(row.fields.get("id", number))}
        if record["id"] in seen:
            raise DataError(f"{source.path}, {row.place}: the id {record['id']!r} is there twice")
        seen.add(record["id"])
        for name in (*texts, *lists):
            _check_column(row, name, source.path)
        record |= {name: filled(row, name, source.path) for name in texts}
        record |= {name: _filled_list(row, name, source.path) for name in lists}
        records.append(record)
    return records


def sample(count: int, limit: int | None, *, name: str, seed: int) -> set[int]:
    """Numbers of at most `limit` of `count` records, drawn by seed and name; all without one."""
    if limit is None:
        return set(range(count))
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return set(rng.permutation(count)[:limit].tolist())


def _filled_list(row: Row, name: str, origin: str) -> tuple[str, ...]:
    values = row.fields[name]
    if not isinstance(values, list | tuple) or not values:
        raise DataError(f"{origin}, {row.place}: '{name}' must be a list that holds a text")
    return tuple(filled(Row(row.place, {name: value}), name, origin) for value in values)


def _check_column(row: Row, name: str, origin: str) -> None:
    if name not in row.fields:
        found = ", ".join(repr(column)[:60] for column in list(row.fields)[:20]) or "none"
        raise DataError(f"{origin}, {row.place} lacks the column '{name}'. Found: {found}")
