"""Tables of an analysis: rows of like fields, as JSON and as CSV."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Tables = Mapping[str, Sequence[Row]]
"""The rows of each table, by its name."""


def as_csv(rows: Sequence[Row]) -> str:
    """Rows as CSV, a column for each field that any of them has; what is null is empty.

    A mapping within a row becomes a column for each of its fields (`won.strong`), a list one cell
    with spaces between.
    """
    flat = [dict(_flat(row)) for row in rows]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _flat(row: Row, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            yield prefix + name, " ".join(map(str, value))
        else:
            yield prefix + name, "" if value is None else value
