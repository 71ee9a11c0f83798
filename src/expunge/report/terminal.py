"""A finished run on the terminal: its verdict and its table."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from expunge.report.leaderboard import leaderboard_table
from expunge.report.results import Results, read_results
from expunge.report.standings import Standing
from expunge.report.tables import GAP, NOT_MEASURED, packed, results_tables
from expunge.report.verdict import verdict

_SHORT = {
    "method": "method",
    "final ↑": "final",
    "Pareto": "★",
    "task aggregate ↑": "task",
    "forget completion ↓": "forget sc",
    "forget knowledge ↓": "qa",
    "retain completion ↑": "retain sc",
    "retain knowledge ↑": "qa ",
    "MIA AUC → 0.5": "AUC",
    "MMLU ↑": "MMLU",
    "minutes": "min",
    "peak GB": "GB",
}
"""Columns of a leaderboard that fit a terminal, and their names there."""

_FOLDED = 36
"""Text longer than this is folded where a table would be too wide."""


def console() -> Console:
    """Standard output; names and numbers in it are not coloured by guess."""
    return Console(highlight=False)


def print_results(folder: Path, out: Console | None = None) -> None:
    """Print the table of one results.json, and under it the verdict and where the page lies."""
    print_found(read_results(folder / "results.json"), folder / "report.html", out)


def print_found(
    results: Results, page: Path, out: Console | None = None, *, missing: Sequence[str] = ()
) -> None:
    """Print the table of some results, under it the verdict, what is not there, and the page."""
    out = out or console()
    for table in results_tables(results, out.width):
        out.print(table)
    for sentence in verdict(results):
        out.print(sentence, markup=False)
    for line in missing:
        out.print(f"Not there: {line}", markup=False)
    out.print(f"{page} shows what each model says.", markup=False)


def print_numbers(results: Mapping[str, Any], as_json: bool) -> None:
    """Print what each suite measured; of a collapsed model, that instead of its aggregates."""
    out = console()
    if as_json:
        return out.print_json(json.dumps(results))
    table = Table("number", "value", "95 % interval", "n", box=None, pad_edge=False)
    reasons: dict[str, None] = {}
    for suite, measured in results["suites"].items():
        facts = measured["facts"]
        for name, number in measured["numbers"].items():
            value, interval = _cell(number["value"]), ""
            if number["low"] is not None:
                interval = f"{_cell(number['low'])} to {_cell(number['high'])}"
            if facts.get("collapsed") and name in facts.get("aggregates", ()):
                value, interval = "collapsed", ""
            table.add_row(escape(f"{suite}.{name}"), value, interval, str(number["n"]))
        if facts.get("collapsed"):
            reasons |= dict.fromkeys(facts["reasons"])
    out.print(table)
    if reasons:
        out.print(f"The model has collapsed: {'; '.join(reasons)}", markup=False)
    out.print(f"{results['read']} texts were read; the rest was known.", markup=False)
    return None


def print_rows(rows: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    """Print rows of like fields as a table, or as JSON."""
    out = console()
    if as_json:
        out.print_json(json.dumps(rows))
    elif not rows:
        out.print("nothing found")
    else:
        for table in _tables(list(rows[0]), [[_cell(v) for v in r.values()] for r in rows], out):
            out.print(table)


def _tables(names: list[str], body: list[list[str]], out: Console) -> list[Table]:
    """One table if all columns fit, else several that begin with the first column.

    Long text is folded; numbers, and names in the first column, are not.
    """
    widest = [max(len(n), *(len(row[place]) for row in body)) for place, n in enumerate(names)]
    widths = [GAP + (min(_FOLDED, wide) if place else wide) for place, wide in enumerate(widest)]
    made = []
    for group in packed(widths[1:], out.width - widths[0]):
        places = [0, *(place + 1 for place in group)]
        shown = [Column(names[p], overflow="fold", min_width=widths[p] - GAP) for p in places]
        shown[0].no_wrap = True  # names are looked for by eye
        table = Table(*shown, box=None, pad_edge=False)
        for row in body:
            table.add_row(*(escape(row[place]) for place in places))
        made.append(table)
    return made


def print_leaderboard(rows: Sequence[Standing], as_json: bool) -> None:
    """Print a leaderboard, the best method first, or every row as JSON."""
    if as_json:
        return print_rows([row.model_dump(mode="json") for row in rows], as_json)
    header, body = leaderboard_table(rows)
    shown = [dict(zip(header, cells, strict=True)) for cells in body]
    return print_rows(
        [{short: row[name] for name, short in _SHORT.items()} for row in shown], False
    )


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(_cell, value))
    if value is None:
        return NOT_MEASURED
    return f"{value:.3g}" if isinstance(value, float) else str(value)
