"""docs/methods.md: every method of every table, described by its own docstring."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from expunge.needs import Needs
from expunge.report.tables import NOT_MEASURED, markdown

_NOTHING = Needs(access=None)


@dataclass(frozen=True)
class Description:
    """What a docstring says of a method."""

    summary: str
    """The first sentence or paragraph, on one line."""

    equation: str = ""
    """The indented lines, as they stand."""

    notes: str = ""
    """What else is worth knowing, as paragraphs."""

    source: str = ""
    """What follows `Source:`."""

    differs: str = ""
    """What follows `Differs:`."""


@dataclass(frozen=True)
class MethodRow:
    """One method as docs/methods.md lists it."""

    name: str
    """Its name in a recipe."""

    kind: str
    """Which table it stands in."""

    summary: str = ""
    equation: str = ""
    notes: str = ""
    source: str = ""
    fidelity: str = ""
    """exact, as-released quirk, adapted, inspired or own."""

    differs: str = ""
    """Where the code departs from its source."""

    needs: Needs = _NOTHING
    """Data, other models, access to the model, and what else."""

    cost: str = ""
    test: str = ""


def describe(function: Callable[..., Any]) -> Description:
    """Read a docstring: a summary, an indented equation, notes, `Source:` and `Differs:`."""
    summary, *paragraphs = _paragraphs(inspect.getdoc(function) or "") or [""]
    found = {"equation": [], "notes": [], "source": [], "differs": []}
    for paragraph in paragraphs:
        for part in _parts(paragraph):
            label, _, rest = part.partition(":")
            if part.startswith(" "):
                found["equation"].append(inspect.cleandoc("\n" + part))
            elif label in ("Source", "Differs"):
                found[label.lower()].append(_on_one_line(rest))
            else:
                found["notes"].append(_on_one_line(part))
    return Description(
        _on_one_line(summary), **{name: "\n\n".join(texts) for name, texts in found.items()}
    )


def method_row(
    name: str, kind: str, row: Any, *, function: Callable[..., Any] | None = None
) -> MethodRow:
    """The row of `name`: what its table says, filled up from the docstring of its function.

    The function is `row` itself, its `fn`, or `function` where the table names none. Of the row's
    own fields `source`, `fidelity`, `differs`, `needs`, `cost` and `test` are read.
    """
    function = row if inspect.isfunction(row) else getattr(row, "fn", None) or function
    said = describe(function) if function else Description("")
    return MethodRow(
        name=name,
        kind=kind,
        summary=getattr(row, "summary", "") or said.summary,
        equation=getattr(row, "equation", "") or said.equation,
        notes=said.notes,
        source=getattr(row, "source", "") or said.source,
        fidelity=getattr(row, "fidelity", ""),
        differs=getattr(row, "differs", "") or said.differs,
        needs=_needs(row),
        cost=getattr(row, "cost", ""),
        test=getattr(row, "test", ""),
    )


def method_rows(tables: Mapping[str, Mapping[str, Any]]) -> list[MethodRow]:
    """The rows of several tables, given by kind; each maps a name to a row or a function."""
    return [
        method_row(name, kind, row) for kind, table in tables.items() for name, row in table.items()
    ]


def methods_page(rows: Iterable[MethodRow], guide: str = "") -> str:
    """The whole page: a guide, then for each kind a table and the equations."""
    parts = method_parts(rows) or ["No methods yet.\n"]
    return "\n".join([_HEAD, *([guide] if guide else []), *parts])


def method_parts(rows: Iterable[MethodRow]) -> list[str]:
    """For each kind a table, and a section for each method that needs one."""
    parts = []
    for kind, members in groupby(rows, key=lambda row: row.kind):
        methods = list(members)
        body = [_cells(row) for row in methods]
        table = markdown(_COLUMNS, body, text_columns=len(_COLUMNS))
        parts.append(f"## {kind[:1].upper()}{kind[1:]}\n\n{table}")
        parts.extend(_section(row) for row in methods if row.equation or row.notes or row.differs)
    return parts


_HEAD = """\
<!-- Written by `make docs` from the method tables; do not edit by hand. -->
# Methods
"""

_LABELS = ("Source:", "Differs:")
_COLUMNS = ["name", "what it does", "source", "fidelity", "needs", "cost", "tested by"]


def _cells(row: MethodRow) -> list[str]:
    cells = [row.summary, row.source, row.fidelity, str(row.needs), row.cost, row.test]
    return [f"`{row.name}`", *(_on_one_line(cell) or NOT_MEASURED for cell in cells)]


def _section(row: MethodRow) -> str:
    equation = f"\n```\n{row.equation}\n```\n" if row.equation else ""
    notes = f"\n{row.notes}\n" if row.notes else ""
    differs = f"\nDiffers: {row.differs}\n" if row.differs else ""
    return f"### {row.name}\n{equation}{notes}{differs}"


def _needs(row: Any) -> Needs:
    """As the row gives them; of a merge, beside the models, and of a metric alone, words."""
    needs = getattr(row, "needs", _NOTHING)
    if isinstance(needs, Needs):
        return needs
    if isinstance(needs, str):
        return Needs(access=None, besides=(needs,))
    return Needs(models=(row.merges,), besides=tuple(needs))


def _paragraphs(text: str) -> list[str]:
    """Split at blank lines."""
    lines = [line.rstrip() for line in text.splitlines()]
    return ["\n".join(group) for filled, group in groupby(lines, key=bool) if filled]


def _parts(paragraph: str) -> list[str]:
    """Split a paragraph where a label begins, or before one where indentation starts or ends."""
    parts: list[list[str]] = []
    for line in paragraph.splitlines():
        label = line.startswith(_LABELS)
        turns = bool(parts) and line.startswith(" ") != parts[-1][-1].startswith(" ")
        if not parts or label or (turns and not parts[-1][0].startswith(_LABELS)):
            parts.append([])
        parts[-1].append(line)
    return ["\n".join(part) for part in parts]


def _on_one_line(text: str) -> str:
    return " ".join(text.split())
