"""Several results side by side on one page: headlines, numbers, differences, items."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from expunge import runs
from expunge.evaluate.compare import Comparison
from expunge.evaluate.readings import Reading, Row
from expunge.report.charts import differences_figure
from expunge.report.compared import judgement, told
from expunge.report.documents import explorer
from expunge.report.drawing import shown
from expunge.report.pieces import Cell, Section, Table
from expunge.report.rendering import render
from expunge.report.results import read_results
from expunge.report.verdict import verdict


def write_comparison(
    path: Path, readings: Sequence[Reading], found: Sequence[Comparison], places: Sequence[str]
) -> None:
    """Write the page of a comparison of every reading with the first."""
    runs.write_text(path, comparison_page(readings, found, verdicts_of(places)))


def comparison_page(
    readings: Sequence[Reading],
    found: Sequence[Comparison],
    verdicts: Mapping[str, str],
) -> str:
    """One self-contained page."""
    parts = [_section(number, one) for number, one in enumerate(found, 1)]
    items = {one.name: rows for one in readings if (rows := _rows(one))}
    data = None
    if items:
        data = explorer(items, whole="the items.jsonl of each of the results")
        data |= {"before": 0, "after": len(items) - 1}
    return render(
        "compare.html.jinja",
        title="Comparison: " + ", ".join(one.name for one in readings),
        figures=[figure for part in parts for figure in part.figures],
        items=data,
        names=[one.name for one in readings],
        verdicts=verdicts,
        headlines=[headline(one) for one in found],
        numbers=numbers_table(readings),
        sections=parts,
    )


def verdicts_of(places: Sequence[str]) -> dict[str, str]:
    """The headline of each run among the places; folders of one model have none."""
    found = {}
    for place in places:
        folder = Path(place).expanduser()
        if not folder.is_dir():
            folder = Path(place.rpartition(":")[0]).expanduser()
        if "models" in runs.read_json(folder / "results.json"):
            found[str(folder)] = verdict(read_results(folder / "results.json"))[0]
    return found


def headline(found: Comparison) -> str:
    """How many of the numbers differ, in words."""
    return f"{found.b} against {found.a}. {told(found)}"


def numbers_table(readings: Sequence[Reading]) -> Table:
    """Every number over the readings, with its interval."""
    names = dict.fromkeys(
        (suite, name)
        for one in readings
        for suite, read in one.suites.items()
        for name in read.numbers
    )
    rows: list[tuple[Cell, ...]] = [
        (f"{suite}.{name}", *(_number(one, suite, name) for one in readings))
        for suite, name in names
    ]
    header = ("number", *(one.name for one in readings))
    return Table("numbers", "Every number, with its 95 % interval.", header, rows)


def _number(reading: Reading, suite: str, name: str) -> Cell:
    read = reading.suites.get(suite)
    number = None if read is None else read.numbers.get(name)
    if read is None or number is None or number.value is None:
        return None
    if read.facts.get("collapsed") and name in read.facts.get("aggregates", ()):
        return "collapsed"
    if number.low is None or number.high is None:
        return number.value
    return f"{shown(number.value)} ({number.low:.2f} to {number.high:.2f})"


def _section(number: int, found: Comparison) -> Section:
    header = ("number", "A", "B", "B - A", "low", "high", "items", "says")
    rows: list[tuple[Cell, ...]] = [
        (one.name, one.a, one.b, one.difference, one.low, one.high, one.n, judgement(one))
        for one in found.differences
    ]
    text = f"A is {found.a}, B is {found.b}."
    name = f"differences-{number}"
    table = Table(
        name, "Each difference with its 95 % interval, over the items of both.", header, rows
    )
    figure = differences_figure(f"{name}-plot", found)
    figures = () if figure is None else (figure,)
    return Section(name, f"{found.b} against {found.a}", (text, *found.notes), figures, (table,))


def _rows(reading: Reading) -> list[dict[str, Any]]:
    """The items that have a text or a score, in the form that the page lists."""
    return [
        _row(suite, group, row)
        for suite, read in reading.suites.items()
        for (group, _), row in read.items.items()
        if row.get("generation") is not None or row.get("score") is not None
    ]


def _row(suite: str, group: str, row: Row) -> dict[str, Any]:
    half, task, kind = [*group.split("."), "", ""][:3]
    return {
        "id": row["id"],
        "document": row.get("document"),
        "half": half or suite,
        "task": task or suite,
        "kind": kind or suite,
        "prompt": str(row.get("prompt") or ""),
        "truth": str(row.get("truth") or ""),
        "generation": row.get("generation"),
        "score": row.get("score"),
        "nll": row.get("nll"),
    }
