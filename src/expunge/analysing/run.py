"""Analyse what is finished of a run: what `expunge analyse RUN` does.

Nothing is trained. What an analysis finds is a stage of the run, found again while its inputs are
the same, and is copied into `analysis/` beside the results.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from expunge import parallel, runs
from expunge.analysing.failures import analyse_failures
from expunge.analysing.kept import Analysis, Look, folder_of, write
from expunge.analysing.landscape import analyse_landscape
from expunge.analysing.looked import Looked
from expunge.analysing.trajectories import analyse_trajectories
from expunge.analysing.weights import analyse_weights
from expunge.errors import UnfinishedError
from expunge.registry import lookup


def analyse_run(
    run: Path | str,
    only: Sequence[str] = (),
    *,
    seed: int | None = None,
    generations: bool = False,
    generate_limit: int | None = None,
) -> Path:
    """Analyse what is finished of a run folder, or `only` some of it; returns `analysis/` of it.

    Without `only`, what nothing is there for yet is left out, and so is what is COSTLY.
    """
    for name in only:
        lookup(ANALYSES, name, "analysis")
    look = Look(generations=generations, generate_limit=generate_limit)
    looked = Looked(run)
    chosen = looked.seed(seed)
    found, unfinished = 0, []
    for name in only or [name for name in ANALYSES if name not in COSTLY]:
        try:
            write(looked, chosen, ANALYSES[name](looked, chosen, look))
            found += 1
        except UnfinishedError as error:
            if only:
                raise
            unfinished.append(error)
    if not found:
        raise unfinished[0]
    parallel.barrier()
    return folder_of(looked, chosen)


def overview(folder: Path, only: Sequence[str] = ()) -> list[dict[str, Any]]:
    """A row for each table that analyses wrote to `folder`: how long it is, and its file."""
    rows = []
    for analysis in only or ANALYSES:
        if (folder / f"{analysis}.json").is_file():
            tables = runs.read_json(folder / f"{analysis}.json")["tables"]
            rows += [
                {
                    "analysis": analysis,
                    "table": name,
                    "rows": len(found),
                    "file": str(folder / f"{analysis}-{name}.csv"),
                }
                for name, found in tables.items()
                if found
            ]
    return rows


ANALYSES: dict[str, Callable[[Looked, int, Look], Analysis]] = {
    "weights": analyse_weights,
    "trajectories": analyse_trajectories,
    "failures": analyse_failures,
    "landscape": analyse_landscape,
}

COSTLY = ("landscape",)
"""Analyses that are made only where they are asked for by name."""
