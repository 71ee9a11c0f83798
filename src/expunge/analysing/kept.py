"""What an analysis is told, what it found, and where that is kept."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from expunge import parallel, runs
from expunge.analyse.tables import Tables, as_csv
from expunge.analysing.looked import Looked
from expunge.config import Section

_FOUND = "found.json"


class Look(Section):
    """What is looked at, and how closely."""

    generations: bool = False
    """Whether snapshots write as well, beside what they say of given answers."""

    generate_limit: int | None = Field(default=None, ge=1)
    """Items that a snapshot writes for each of the twelve terms; null takes the recipe's."""


@dataclass(frozen=True)
class Analysis:
    """What one analysis found."""

    name: str
    about: Mapping[str, Any]
    """What was looked at, and the numbers of the whole."""

    tables: Tables


def kept(
    looked: Looked,
    name: str,
    section: Section,
    inputs: Mapping[str, str],
    make: Callable[[], tuple[Mapping[str, Any], Tables]],
) -> Analysis:
    """An analysis as a stage of the run: found, or made from its inputs and kept."""

    def build(work: Path) -> None:
        about, tables = make()
        write_plain(work / _FOUND, {"about": about, "tables": tables})

    done = looked.builder.stage(f"analyse-{name}", section, inputs, build)
    found = runs.read_json(done / _FOUND)
    return Analysis(name, found["about"], found["tables"])


def folder_of(looked: Looked, seed: int) -> Path:
    """`analysis/` beside the report of a seed."""
    root = looked.folder.root
    return (root if len(looked.recipe.seeds) == 1 else root / f"seed-{seed}") / "analysis"


def write(looked: Looked, seed: int, analysis: Analysis) -> None:
    """NAME.json with all of it, and NAME-TABLE.csv for each table that has rows."""
    folder = folder_of(looked, seed)
    content = {"analysis": analysis.name, "recipe": looked.recipe.name, "seed": seed}
    write_plain(
        folder / f"{analysis.name}.json", {**content, **analysis.about, "tables": analysis.tables}
    )
    for name, rows in analysis.tables.items():
        path = folder / f"{analysis.name}-{name}.csv"
        if rows:
            runs.write_text(path, as_csv(rows))
        elif parallel.is_main():
            path.unlink(missing_ok=True)


def write_plain(path: Path, content: Any) -> None:
    """Write JSON on one line, whole or not at all: tables are long."""
    runs.write_text(path, json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n")
