"""The report's files: results.json, report.md, report.html, and report/ with figures and tables.

report.html needs nothing beside it: no network, no other file, at most 5 MB.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge import parallel, runs
from expunge.evaluate.numbers import Number
from expunge.report.certainty import Change, changes, doubts
from expunge.report.documents import explorer, items_table
from expunge.report.drawing import write_figures, write_tables
from expunge.report.pieces import Cell, Items, Material, Section, Table
from expunge.report.rendering import render
from expunge.report.results import Interval, Mia, Mmlu, Results
from expunge.report.sections import sections, terms_table
from expunge.report.story import models_compared
from expunge.report.tables import (
    COLLAPSED,
    column_names,
    final_cell,
    lines,
    markdown_table,
    number,
    term_words,
    terms_in,
)
from expunge.report.verdict import verdict

BESIDE = "report"
"""The folder of figures and tables beside the page."""


@dataclass(frozen=True)
class Card:
    """One number of the first screen."""

    name: str
    value: str
    note: str = ""
    bad: bool = False


@dataclass(frozen=True)
class Heat:
    """One term of one model: its mean, and in words its interval and items."""

    value: float | None
    notes: list[str]


def write_report(
    results: Results,
    items: Items,
    folder: Path,
    *,
    run: Path | None = None,
    recipe_text: str | None = None,
) -> None:
    """Write results.json and the pages into `folder`, each file whole or not at all.

    `run` is the run folder, where that is another one.
    """
    runs.make_folder(folder)
    runs.write_json(folder / "results.json", results.model_dump(mode="json"))
    if parallel.is_main():
        write_pages(Material(results, items, recipe_text, run or folder, folder), folder)


def write_pages(material: Material, folder: Path) -> Path:
    """Write report.md, report.html, and the figures and tables beside them; the page's path."""
    runs.make_folder(folder)
    runs.write_text(folder / "report.md", markdown_report(material.results))
    found = sections(material)
    write_figures([f for one in found for f in one.figures], folder / BESIDE / "figures")
    tables = [table for one in found for table in (*one.tables, *(f.table for f in one.figures))]
    whole = [*tables, terms_table(material), measures_table(material.results)]
    whole += [items_table(material.items)] if material.items else []
    write_tables(whole, folder / BESIDE / "tables")
    page = folder / "report.html"
    runs.write_text(page, html_page(material, found))
    return page


def markdown_report(results: Results) -> str:
    """The verdict, its reasons one by one, and the table as Markdown."""
    facts = f"Recipe {results.recipe}, seed {results.seed}, commit {results.commit}."
    claim, *reasons = verdict(results)
    parts = ["# What was forgotten, what was kept", f"**{claim}**"]
    parts += ["\n".join(f"- {reason}" for reason in reasons)] if reasons else []
    return "\n\n".join([*parts, facts, ""]) + markdown_table(results)


def html_page(material: Material, found: Sequence[Section]) -> str:
    """One self-contained page, with these sections below the first screen."""
    results, items = material.results, None
    names = models_compared(results)
    if material.items:
        items = explorer(material.items, whole=f"{BESIDE}/tables/items.csv")
        items |= _sides(list(material.items), names)
    return render(
        "page.html.jinja",
        title=f"{results.recipe}: what was forgotten, what was kept",
        figures=[figure for one in found for figure in one.figures],
        items=items,
        results=results,
        missing=material.missing,
        finished=material.finished,
        sentences=verdict(results),
        cards=list(cards(material)),
        doubts=doubts(material),
        sections=found,
        heat_header=[term_words(term) for term in terms_in(results)],
        heat=list(_heat(results)),
        columns=column_names(results),
        lines=lines(results),
        collapsed=COLLAPSED,
        stages=_stages(results),
        recipe_text=material.recipe_text,
    )


def cards(material: Material) -> Iterator[Card]:
    """The numbers of the first screen: collapse, each half, membership, MMLU, the final score."""
    names = models_compared(material.results)
    if names is None:
        return
    before, after = (material.results.models[name] for name in names)
    destroyed = bool(after.collapse.collapsed)
    collapsed = {True: "yes", False: "no", None: "not measured"}
    reasons = "; ".join(after.collapse.reasons)
    yield Card(f"{names[1]} collapsed", collapsed[after.collapse.collapsed], reasons, destroyed)
    for change in changes(material):
        kind = "completion" if change.kind == "sc" else "knowledge"
        values = _both((change.before.value, change.after.value))
        yield Card(f"{change.half} half, {kind}", values, _change_note(change))
    aucs = [None if one.semeval.mia is None else one.semeval.mia.auc for one in (before, after)]
    if aucs[1] is not None:
        notes = [*_after(after.semeval.mia), "0.50 is guessing"]
        yield Card("membership AUC", _both(aucs), "; ".join(notes))
    known = [None if m.semeval.mmlu is None else m.semeval.mmlu.accuracy for m in (before, after)]
    if known[1] is not None:
        asked = _questions(before.semeval.mmlu, after.semeval.mmlu)
        notes = [*_after(after.semeval.interval("mmlu")), *([asked] if asked else [])]
        yield Card("MMLU", _both(known), "; ".join(notes))
    if after.semeval.final is not None:
        was, now = (final_cell(model) for model in (before, after))
        notes = [] if destroyed else _after(after.semeval.interval("final"))
        yield Card("final score", f"{was} → {now}", "; ".join(notes), destroyed)


def measures_table(results: Results) -> Table:
    """Every measure over the models, as the terminal shows it."""
    rows: list[tuple[Cell, ...]] = [(line.label, *line.cells) for line in lines(results)]
    return Table("measures", "All measures.", ("measure", *column_names(results)), rows)


def _change_note(change: Change) -> str:
    parts = _after(change.after)
    if change.unchanged:
        parts.append("did not change")
    elif change.within_noise is not None:
        parts.append("no more than noise" if change.within_noise else "more than noise")
    return "; ".join(parts)


def _after(found: Number | Interval | Mia | None) -> list[str]:
    """The interval of a number after, in words; none where there is none."""
    if found is None or found.low is None or found.high is None:
        return []
    return [f"after: {found.low:.2f} to {found.high:.2f}"]


def _both(values: Sequence[float | None]) -> str:
    return " → ".join(number(value, 2) for value in values)


def _questions(before: Mmlu | None, after: Mmlu | None) -> str:
    """How many were asked, of both models where that differs."""
    counts = dict.fromkeys(mmlu.n for mmlu in (before, after) if mmlu is not None and mmlu.n)
    return f"{' → '.join(map(str, counts))} questions" if counts else ""


def _heat(results: Results) -> Iterator[tuple[str, list[Heat]]]:
    for name, model in results.measured_models().items():
        cells = []
        for term in terms_in(results):
            interval, n = model.semeval.intervals.get(term), model.semeval.counts.get(term)
            parts = [] if interval is None else [f"{interval.low:.2f}–{interval.high:.2f}"]
            parts += [f"n {n}"] if n else []
            cells.append(Heat(model.semeval.terms.get(term), parts))
        yield name, cells


def _sides(models: list[str], names: tuple[str, str] | None) -> dict[str, int]:
    """Places of the models before and after among those that have items."""
    before, after = names or (models[0], models[-1])
    return {
        "before": models.index(before) if before in models else 0,
        "after": models.index(after) if after in models else len(models) - 1,
    }


def _place(stage: Mapping[str, Any]) -> object:
    """What computed: the accelerator, else the processor; an older stage knows its kind alone."""
    return stage.get("accelerator") or stage.get("processor") or stage.get("machine")


def _stages(results: Results) -> Table:
    header = ("stage", "finished", "seconds", "peak GB", "commit", "torch", "machine")
    rows: list[tuple[Cell, ...]] = [
        (
            str(stage.get("stage", "stage")),
            *(_plain(stage.get(name)) for name in ("finished", "wall_seconds")),
            _gigabytes(stage.get("peak_rss_bytes")),
            *(_plain(stage.get(name)) for name in ("commit", "torch")),
            f"{_place(stage)}, {stage.get('cpus')} CPUs",
        )
        for stage in results.stages
    ]
    return Table("stages", "Every stage, in the order they ended.", header, rows)


def _gigabytes(value: Any) -> Cell:
    return round(value / 1e9, 2) if isinstance(value, int | float) else None


def _plain(value: Any) -> Cell:
    return value if value is None or isinstance(value, str | float | int | bool) else str(value)
