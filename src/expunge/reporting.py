"""Reports of runs: of a finished one from its results, of any other as far as it got.

Nothing is trained or evaluated: a stage that is not finished is named on the page.
"""

from pathlib import Path
from typing import Any

from expunge import provenance
from expunge.config import parse_section
from expunge.errors import EvaluationError, RunError, UnfinishedError
from expunge.evaluate.readings import read_place
from expunge.finished import Finished
from expunge.pipeline import Pipeline
from expunge.recipe import KEPT, kept_recipe, recipe_text
from expunge.report.page import write_pages
from expunge.report.pieces import Material
from expunge.report.results import Results, read_results


def write_reports(run: Path, out: Path | None = None) -> list[tuple[Material, Path]]:
    """Write the pages of each seed of a run into its folder, or into `out`; what is on each."""
    if out is not None and out.suffix.lower() in (".html", ".htm"):
        raise RunError(
            f"--out takes a folder, and {out} is a file by its name; the page is report.html"
        )
    written = []
    for material in materials(run):
        assert material.folder is not None
        place = (out or run) / material.folder.relative_to(run)
        written.append((material, write_pages(material, place)))
    return written


def materials(run: Path) -> list[Material]:
    """What is known of each seed of a run: those with results, then those as far as they got.

    A folder of several runs stands for each of them.
    """
    inner = sorted(path.parent for path in run.glob("*/run.json"))
    if inner and not (run / "run.json").is_file():
        return [material for one in inner for material in materials(one)]
    paths = (run / "results.json", *sorted(run.glob("*/results.json")))
    finished = [path.parent for path in paths if path.is_file()]
    found = [_finished(folder, run) for folder in finished]
    if run in finished or (finished and not (run / KEPT).is_file()):
        return found
    if not (run / KEPT).is_file():
        raise RunError(f"there are no results in {run}; expunge run makes them")
    seeds = kept_recipe(run).seeds
    folders = {seed: run if len(seeds) == 1 else run / f"seed-{seed}" for seed in seeds}
    return found + [_as_far(run, s, f) for s, f in folders.items() if f not in finished]


def _finished(folder: Path, run: Path) -> Material:
    """From the results and the items beside them; items that are gone are named."""
    results = read_results(folder / "results.json")
    items: dict[str, Any] = {}
    missing = []
    for name, model in results.ordered_models().items():
        if not model.semeval.terms:
            continue
        try:
            (reading,) = read_place(f"{folder}:{name}")
            rows = reading.suites["semeval"].items.values()  # documents and questions beside
            items[name] = [row for row in rows if "half" in row]
        except EvaluationError as error:
            missing.append(str(error))
    recipe = folder if (folder / KEPT).is_file() else run
    text = recipe_text(kept_recipe(recipe)) if (recipe / KEPT).is_file() else None
    return Material(results, items, text, recipe, folder, tuple(missing))


def _as_far(run: Path, seed: int, folder: Path) -> Material:
    """From the stages that are finished."""
    recipe = kept_recipe(run)
    kept = Finished(run)
    pipeline = Pipeline(recipe, run, kept)
    entries: dict[str, Any] = {}
    items: dict[str, Any] = {}
    missing = []
    for name in recipe.models:
        try:
            weights = pipeline.weights(name, seed)
        except UnfinishedError as error:
            missing.append(f"{name} is not made: {_state(error)}")
            continue
        entries[name] = {}
        if name in recipe.unscored:
            continue
        try:
            entries[name], items[name] = pipeline.evaluate(name, weights)
        except UnfinishedError as error:
            missing.append(f"{name} is made, not measured: {_state(error)}")
    results = parse_section(
        {
            "recipe": recipe.name,
            "seed": seed,
            "commit": provenance.git_commit(),
            "created": provenance.now(),
            "models": entries,
            "stages": kept.provenance(),
        },
        Results,
        origin="results",
    )
    return Material(
        results, items, recipe_text(recipe), run, folder, tuple(missing), finished=False
    )


def _state(error: UnfinishedError) -> str:
    """How far a stage got, in words."""
    begun = error.folder.with_name(error.folder.name + ".partial").is_dir()
    return f"{error.folder.name.rpartition('-')[0]} was {'' if begun else 'not '}begun"
