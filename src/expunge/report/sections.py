"""The parts of the page that are there when a run has what they show: one function for each."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from expunge import runs
from expunge.evaluate.run import read_items
from expunge.report.charts import figures, steps_figure
from expunge.report.pieces import Cell, Figure, Material, Section, Table
from expunge.report.tables import term_label
from expunge.unlearn.watch import EVALUATIONS

ROWS_SHOWN = 60
"""Rows of a list of objects that a section shows; the file has them all."""


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


def calibration(material: Material) -> Section | None:
    """What `calibration.json` of the run folder says."""
    return _told(material, Path("calibration.json"), "calibration", "Calibration")


def analyses(material: Material) -> Section | None:
    """What the files of the run folder's `analysis/` say."""
    if material.run is None:
        return None
    files = sorted((material.run / "analysis").glob("*.json"))
    told = [_told(material, Path("analysis") / f.name, f"analysis-{f.stem}", f.stem) for f in files]
    tables = [table for one in told if one is not None for table in one.tables]
    text = [line for one in told if one is not None for line in one.text]
    return Section("analysis", "Analysis", tuple(text), tables=tuple(tables)) if tables else None


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


def _told(material: Material, path: Path, anchor: str, title: str) -> Section | None:
    """What a JSON file says, as tables: its lists of objects as rows, all else by its names."""
    if material.run is None or not (material.run / path).is_file():
        return None
    content = runs.read_json(material.run / path)
    tables = list(_tables(content if isinstance(content, dict) else {"": content}, anchor, title))
    return Section(anchor, title, (f"From {path}.",), tables=tuple(tables))


def _tables(content: Mapping[str, Any], anchor: str, title: str) -> Iterator[Table]:
    facts: list[tuple[Cell, ...]] = [
        (key, _cell(value)) for key, value in content.items() if not _is_rows(value)
    ]
    if facts:
        yield Table(anchor, title, ("name", "value"), facts)
    for key, value in content.items():
        if _is_rows(value):
            header = tuple(dict.fromkeys(name for row in value for name in row))
            cells = [tuple(_cell(row.get(name)) for name in header) for row in value[:ROWS_SHOWN]]
            more = f" (the first {ROWS_SHOWN} of {len(value)})" if len(value) > ROWS_SHOWN else ""
            number = list(content).index(key)
            yield Table(f"{anchor}-{number}", f"{title}: {key}{more}", header, cells)


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(r, dict) for r in value)


def _cell(value: Any) -> Cell:
    if value is None or isinstance(value, str | float | int | bool):
        return value
    return json.dumps(value, ensure_ascii=False)
