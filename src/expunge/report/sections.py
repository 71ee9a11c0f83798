"""The parts of the page that are there when a run has what they show: one function for each."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from expunge import runs
from expunge.evaluate.run import read_items
from expunge.report.analysis_page import analysis_figures
from expunge.report.calibration_page import calibration
from expunge.report.charts import figures, steps_figure
from expunge.report.pieces import Cell, Figure, Material, Section, Table
from expunge.report.tables import term_label
from expunge.unlearn.watch import EVALUATIONS

ROWS_SHOWN = 60
"""Rows of a table of an analysis that the page shows; the file has them all."""


def sections(material: Material) -> list[Section]:
    """Every section that has something to show, in order."""
    found = (make(material) for make in SECTIONS.values())
    return [section for section in found if section is not None]


def plots(material: Material) -> Section | None:
    """Terms, forgetting against keeping, membership, losses."""
    found = figures(material)
    return Section("plots", "Plots", figures=tuple(found)) if found else None


def trajectories(material: Material) -> Section | None:
    """How the branches that were evaluated while they were trained went."""
    found = list(_trajectories(material))
    if not found:
        return None
    text = "Measured on the way, before the first step where it says step 0."
    return Section("trajectories", "Trajectories", (text,), figures=tuple(found))


def analyses(material: Material) -> Section | None:
    """What the files of `analysis/` beside the results say, and its figures."""
    if material.folder is None:
        return None
    tables = []
    for path in sorted((material.folder / "analysis").glob("*.json")):
        for name, rows in runs.read_json(path)["tables"].items():
            if rows:
                header = tuple(dict.fromkeys(key for row in rows for key in row))
                cells = [tuple(_cell(row.get(key)) for key in header) for row in rows]
                title, caption = f"analysis-{path.stem}-{name}", f"{path.stem}: {name}"
                tables.append(Table(title, caption, header, cells, ROWS_SHOWN))
    if not tables:
        return None
    text = (
        "The tables below the figures open by their names; on paper they stay closed. All are "
        "whole in report/tables/."
    )
    figures = tuple(analysis_figures(material))
    return Section("analysis", "Analysis", (text,), figures, tuple(tables), deep=True)


def terms_table(material: Material) -> Table:
    """Every term of every model with its interval and its items."""
    rows: list[tuple[Cell, ...]] = []
    for name, model in material.results.ordered_models().items():
        for term, value in model.semeval.terms.items():
            interval = model.semeval.intervals.get(term)
            ends = (None, None) if interval is None else (interval.low, interval.high)
            items = model.semeval.counts.get(term), model.semeval.given.get(term)
            rows.append((name, term_label(term), value, *ends, *items))
    header = ("model", "term", "mean", "low", "high", "items", "given")
    return Table("terms", "Each term with its 95 % interval.", header, rows)


SECTIONS: dict[str, Callable[[Material], Section | None]] = {
    "plots": plots,
    "trajectories": trajectories,
    "calibration": calibration,
    "analysis": analyses,
}


def _trajectories(material: Material) -> Iterator[Figure]:
    for stage in material.results.stages:
        folder, name = material.stage_folder(stage), str(stage.get("stage"))
        if folder is None or not (folder / EVALUATIONS).is_file():
            continue
        measured = read_items(folder / EVALUATIONS)
        rows = [
            {"step": one["step"], "measure": measure, "value": value}
            for one in measured
            for measure, value in one["numbers"].items()
            if measure.startswith(("nll.", "semeval."))
        ]
        if rows:
            caption = f"The branch {name} at {len(measured)} moments of its training."
            yield steps_figure(f"trajectory-{folder.name}", name, caption, rows)


def _cell(value: Any) -> Cell:
    if value is None or isinstance(value, str | float | int | bool):
        return value
    return _words(value)


def _words(value: Any) -> str:
    """What holds several values on one line: `constant 22, wordless 6`; without its None."""
    if isinstance(value, Mapping):
        parts = ((f"{key} ", inner) for key, inner in value.items())
    elif isinstance(value, list | tuple):
        parts = (("", inner) for inner in value)
    else:
        return f"{value:.4g}" if isinstance(value, float) else str(value)
    return ", ".join(f"{name}{_words(inner)}" for name, inner in parts if inner is not None)
