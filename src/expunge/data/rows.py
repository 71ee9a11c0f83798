"""Rows of a data file: parquet, JSON lines, JSON and CSV, each read as untrusted input.

Nothing here unpickles or evaluates, and a damaged file is a `DataError` that names the place.
What the fields mean is decided in `sources`.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from expunge.errors import DataError


class Row(NamedTuple):
    """One record, and how an error refers to it ("line 7", "row 7")."""

    place: str
    fields: dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """Every record of the file at `path`, read by the ending of its name."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path} ends in '{path.suffix}', which is no known format. "
            f"Known: {', '.join(sorted(READERS))}"
        )
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"there is no data file at {path}") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    rows = reader(path, content)
    if not rows:
        raise DataError(f"{path} holds no rows")
    return rows


def numbered(records: Iterable[Any], origin: str) -> list[Row]:
    """Records as rows, counted from 1; what is not a record of named fields is refused."""
    return [
        Row(place, _as_record(record, f"{origin}, {place}"))
        for place, record in ((f"row {number}", record) for number, record in enumerate(records, 1))
    ]


def _parquet_rows(path: Path, content: bytes) -> list[Row]:
    try:
        # Parsed from memory: a reader given the path would take columns from the folders' names.
        table = pq.ParquetFile(pa.BufferReader(content)).read()
        return numbered(table.to_pylist(), str(path))
    except (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path} is not readable as parquet: {reason}") from None


def _json_rows(path: Path, content: bytes) -> list[Row]:
    """One JSON value, or one a line: both kinds are found under both endings."""
    text = _text(path, content)
    if not text.strip():
        return []
    try:
        value = _parse(text)
    except (ValueError, RecursionError) as error:
        one_value = path.suffix.lower() == ".json" and getattr(error, "msg", "") != "Extra data"
        if one_value:
            raise _broken_json(error, path, getattr(error, "lineno", 1)) from None
        return _json_line_rows(path, text)
    if isinstance(value, list):
        return numbered(value, str(path))
    record = _as_record(value, str(path))
    if record and all(map(_is_column, record.values())):
        return _column_rows(path, record)
    return [Row("line 1", record)]


def _json_line_rows(path: Path, text: str) -> list[Row]:
    rows = []
    # Split at line feeds only: other line ends of Unicode may stand within a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = _parse(line)
        except (ValueError, RecursionError) as error:
            raise _broken_json(error, path, number) from None
        rows.append(Row(f"line {number}", _as_record(value, f"{path}, line {number}")))
    return rows


def _broken_json(error: ValueError | RecursionError, path: Path, line: int) -> DataError:
    reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    return DataError(f"{path}, line {line}: broken JSON ({reason})")


def _is_column(value: Any) -> bool:
    """Whether a field of an object may be a column of many rows; the turns of one chat are none."""
    turns = isinstance(value, list) and value and isinstance(value[0], dict) and "role" in value[0]
    return isinstance(value, dict | list) and not turns


def _column_rows(path: Path, columns: dict[str, Any]) -> list[Row]:
    """One object of columns, each a list or a mapping from row label to value (as of pandas)."""
    values = {
        name: column if isinstance(column, dict) else dict(enumerate(column))
        for name, column in columns.items()
    }
    (first, labels), *others = ((name, list(column)) for name, column in values.items())
    for name, found in others:
        if found != labels:
            raise DataError(
                f"{path}: the columns {first!r} ({len(labels)} rows) and {name!r} "
                f"({len(found)} rows) do not hold the same rows"
            )
    return numbered(
        ({name: column[label] for name, column in values.items()} for label in labels), str(path)
    )


def _csv_rows(path: Path, content: bytes) -> list[Row]:
    csv.field_size_limit(max(csv.field_size_limit(), len(content)))  # a document may be long
    reader = csv.reader(io.StringIO(_text(path, content), newline=""), strict=True)
    rows = []
    try:
        header = next(reader, [])
        _refuse_twins(header, path)
        for record in reader:
            if not record:
                continue
            place = f"line {reader.line_num}"
            if len(record) != len(header):
                raise DataError(
                    f"{path}, {place}: {len(record)} values under {len(header)} column names"
                )
            rows.append(Row(place, dict(zip(header, record, strict=True))))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: broken CSV ({error})") from None
    return rows


def _refuse_twins(header: Sequence[str], path: Path) -> None:
    for name in header:
        if header.count(name) > 1:
            raise DataError(f"{path} has two columns called {name!r}")


def _text(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not valid UTF-8 ({error.reason})") from None


def _parse(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique_keys)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twin!r} is given twice")
    return record


def _as_record(value: Any, origin: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{origin}: expected named fields, found {type(value).__name__}")
    return value


READERS: dict[str, Callable[[Path, bytes], list[Row]]] = {
    ".parquet": _parquet_rows,
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
}


def file_path(path: str) -> Path:
    """The place that a path names, `~` and all; one that can name none is a `DataError`."""
    place = Path(path)
    try:
        place.expanduser().is_file()
    except (RuntimeError, OSError, ValueError) as error:  # no such user; too long; a null byte
        raise DataError(f"{path[:80]!r} names no file: {error}"[:300]) from None
    return place.expanduser()
