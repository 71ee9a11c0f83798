"""Comparisons and leaks on the terminal."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from expunge.evaluate.compare import Comparison, Difference
from expunge.report.tables import NOT_MEASURED
from expunge.report.terminal import console

TEXT_SHOWN = 200
"""Characters of a text that the terminal shows; --json has it whole."""


def print_comparison(found: Comparison, out: Console | None = None) -> None:
    """Print what differs, which of it is beyond noise, and the notes."""
    out = out or console()
    out.print(f"A: {found.a}", markup=False)
    out.print(f"B: {found.b}", markup=False)
    for suite, rows in groupby(found.differences, key=lambda row: row.name.partition(".")[0]):
        # Where there is little room names are folded, and numbers are not cut.
        table = Table(Column(suite, overflow="fold"), box=None, pad_edge=False)
        for title in ("A", "B", "B - A", "95 % interval", "n"):
            table.add_column(title, justify="right", no_wrap=True)
        table.add_column("says", no_wrap=True)
        for row in rows:
            table.add_row(escape(row.name.partition(".")[2]), *_cells(row))
        out.print(table)
    out.print(told(found), markup=False)
    if any(row.how == "unpaired" for row in found.differences):
        out.print("* unpaired: from the intervals of the two numbers, not item by item.")
    for note in found.notes:
        out.print(f"Note: {note}", markup=False)


def told(found: Comparison) -> str:
    """How many numbers differ, and how many would by chance, for a reader of no statistics."""
    judged = [row for row in found.differences if row.within_noise is not None]
    if not judged:
        return "There are too few items to say of any number whether it differs."
    beyond, chance = sum(not row.within_noise for row in judged), round(len(judged) * 0.05)
    numbers = "1 number" if len(judged) == 1 else f"{len(judged)} numbers"
    differ = f"{beyond or 'none'} {'differ' if beyond > 1 else 'differs'}"
    return (
        f"Of {numbers} that can be judged, {differ} by more than the choice of items explains. "
        f"Were the two models alike, {f'about {chance}' if chance else 'hardly any'} would seem to "
        "by chance."
    )


def print_leaks(found: Mapping[str, Any], out: Console | None = None) -> None:
    """Print the documents that leak most, each with its items."""
    out = out or console()
    metric = found["metric"]
    out.print(
        f"{found['model']}: {found['suite']}, {metric}, {found['worst_is']} is worst; the worst "
        f"{len(found['documents'])} of {found['of']} documents of {found['group']}",
        markup=False,
    )
    for document in found["documents"]:
        out.print(
            f"\n{document['document']}: worst {document['worst']:.3g}, mean "
            f"{document['mean']:.3g} of {len(document['items'])}",
            markup=False,
        )
        for item in document["items"]:
            out.print(f"  {item[metric]:.3g}  {item['id']}", markup=False)
            for part in ("prompt", "truth", "generation"):
                if item[part] is not None:
                    out.print(f"        {part}: {_shortened(item[part])}", markup=False)
            for leak in item.get("leaks") or ():
                out.print(f"        says {leak['kind']}: {leak['value']}", markup=False)
    if found["not_measured"]:
        out.print(f"\n{found['not_measured']} of {found['items']} items were not measured.")


def judgement(row: Difference) -> str:
    """Whether a difference is more than noise, in a word; a star where it is not item by item."""
    verdict = {True: "noise", False: "differs", None: "too few"}[row.within_noise]
    if row.low is None:
        verdict = "unknown"
    return verdict + ("*" if row.how == "unpaired" else "")


def _cells(row: Difference) -> Sequence[str]:
    interval = ""
    if row.low is not None and row.high is not None:
        interval = f"{_cell(row.low, '+')} to {_cell(row.high, '+')}"
    return (
        _cell(row.a),
        _cell(row.b),
        _cell(row.difference, "+"),
        interval,
        str(row.n),
        judgement(row),
    )


def _cell(value: float | None, sign: str = "") -> str:
    """Three decimals; the first digit of a number below 0.01."""
    if value is None:
        return NOT_MEASURED
    return f"{value:{sign}.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:{sign}.1g}"


def _shortened(text: str) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= TEXT_SHOWN else f"{line[:TEXT_SHOWN]} …"
