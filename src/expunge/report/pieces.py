"""What a report is put together from: the material of a run, and tables, figures and sections."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expunge import runs
from expunge.report.results import Results

Items = Mapping[str, Sequence[Mapping[str, Any]]]
"""Model name to rows {id, half, task, kind, prompt, truth, generation, score}; more is ignored."""

Cell = str | float | int | bool | None


@dataclass(frozen=True)
class Material:
    """What is known of one seed of a run."""

    results: Results
    items: Items = field(default_factory=dict)
    recipe_text: str | None = None

    run: Path | None = None
    """The run folder, whose stages and analyses are looked at."""

    folder: Path | None = None
    """The folder of this seed: the run folder itself, or one within it."""

    missing: tuple[str, ...] = ()
    """What is not there, in words."""

    finished: bool = True
    """False of a run that still goes or was killed."""

    def stage_folder(self, stage: Mapping[str, Any]) -> Path | None:
        """Where a stage of the results lies, if it is still there."""
        if self.run is None or not (self.run / "run.json").is_file():
            return None
        store = runs.store_of(self.run) or self.run
        folder = store / "stages" / f"{stage.get('stage')}-{stage.get('key')}"
        return folder if folder.is_dir() else None


@dataclass(frozen=True)
class Table:
    """Rows of like cells, numbers as they are: shown rounded, written whole."""

    name: str
    """Of its files."""

    caption: str
    header: tuple[str, ...]
    rows: list[tuple[Cell, ...]]

    first: int | None = None
    """Rows that the page shows, where not all; the files have every row."""


@dataclass(frozen=True)
class Figure:
    """A chart, the words beside it, and the numbers that it shows."""

    title: str
    caption: str
    chart: dict[str, Any]
    """A Vega-Lite specification."""

    table: Table


@dataclass(frozen=True)
class Section:
    """One part of the page below the first screen."""

    anchor: str
    title: str
    text: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    deep: bool = False
    """For who digs: it comes after documents and items, and its tables are folded."""
