"""Remove chosen content from a language model, keep everything else, and prove both.

Each function takes a recipe (a YAML file, a mapping or a `Recipe`) and the folder to work in; what
that folder holds already is not computed again.
"""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import ModuleType

    from expunge import guard as guard
    from expunge import semeval as semeval
    from expunge.cells import Workers
    from expunge.pipeline import Pipeline, RecipeLike

__version__ = "0.1.0"
__all__ = [
    "analyse",
    "calibrate",
    "compare",
    "edit",
    "evaluate",
    "guard",
    "leaks",
    "merge",
    "pick",
    "report",
    "run",
    "semeval",
    "tune",
    "unlearn",
]

# The functions stand in place of the subpackages of the same names, which are therefore imported
# before them; import from those with `from expunge.merge.methods import ...`. What takes long to
# import is imported when it is called for.
for _name in ("analyse", "calibrate", "edit", "evaluate", "merge", "report", "unlearn"):
    importlib.import_module(f"{__name__}.{_name}")


def __getattr__(name: str) -> ModuleType:
    if name in ("guard", "semeval"):
        return importlib.import_module(f"expunge.{name}")
    raise AttributeError(f"module 'expunge' has no attribute {name!r}")


def run(
    recipe: RecipeLike,
    out: Path | str,
    *,
    workers: Workers | None = None,
    budget: float | None = None,
) -> dict[int, Path]:
    """Run every stage of a recipe, on `workers` or here; returns the folder of each seed's report.

    With a `budget`, in seconds, training is cut short so that all of it ends in time: here, not on
    workers. One in which not even one step of each training fits is a `RecipeError`.
    `runner.run_recipes` runs several.
    """
    if budget is not None:
        return _run_in_time(recipe, Path(out), workers, budget)
    from expunge.runner import run_recipes

    (folders,) = run_recipes([recipe], out, workers=workers).values()
    return folders


def tune(recipe: RecipeLike, out: Path | str) -> Path:
    """Make the target of a recipe; returns its folder."""
    return _pipeline(recipe, out).target.base


def unlearn(recipe: RecipeLike, out: Path | str, branch: str | None = None) -> dict[str, Path]:
    """Train the branches of a recipe (or one of them) for its first seed; returns their folders."""
    return {name: w.folder for name, w in _pipeline(recipe, out).branches(branch).items()}


def merge(recipe: RecipeLike, out: Path | str) -> dict[str, Path]:
    """Merge the branches of a recipe for its first seed; returns the merges' folders."""
    return {name: w.folder for name, w in _pipeline(recipe, out).merges().items()}


def calibrate(
    run: Path | str,
    name: str = "calibrated",
    settings: Mapping[str, Any] | None = None,
    *,
    seed: int | None = None,
) -> dict[str, Any]:
    """Choose a merge of a run's branches, for its first seed if none is given; returns every point.

    `settings` are fields of `calibrate.section.Calibrate`, over those of the recipe's calibration
    of that name. That no candidate meets the floors is a `CalibrationError`.
    """
    from expunge.choosing import calibrate_run, changed
    from expunge.pipeline import Pipeline

    pipeline = Pipeline.of_run(run)
    config = changed(pipeline.recipe, name, settings or {})
    number = pipeline.seed(seed)
    found, error = calibrate_run(pipeline, name, config, number)
    if error is not None:
        raise error
    return found


def pick(
    run: Path | str,
    point: int,
    out: Path | str,
    *,
    name: str = "calibrated",
    output: Literal["adapter", "model"] = "adapter",
    seed: int | None = None,
) -> Path:
    """Write a point of a run's last calibration as an adapter or a model; returns its folder."""
    from expunge.choosing import pick_point
    from expunge.pipeline import Pipeline

    pipeline = Pipeline.of_run(run, build=False)
    number = pipeline.seed(seed)
    pick_point(pipeline, name, number, point, Path(out), output=output)
    return Path(out)


def edit(method: str, model: str, out: Path | str, **given: Any) -> dict[str, Any]:
    """Edit a model or an adapter outside a recipe into the folder `out`; returns what was done.

    `given` is what `edit.run.edit_model` takes: adapter, base, others, forget, retain, options.
    """
    from expunge.edit.run import edit_model

    return edit_model(method, model, out, **given)


def evaluate(recipe: RecipeLike, out: Path | str) -> dict[str, dict[str, Any]]:
    """Score every model of a recipe for its first seed; returns each one's scores."""
    pipeline = _pipeline(recipe, out)
    weights = pipeline.models(pipeline.recipe.seeds[0])
    unscored = pipeline.recipe.unscored
    return {n: pipeline.evaluate(n, made)[0] for n, made in weights if n not in unscored}


def report(recipe: RecipeLike, out: Path | str | None = None) -> Path:
    """Write the report of a recipe's first seed; returns its folder.

    Without `out`, `recipe` is the folder of a run, which is reported as far as it got.
    """
    if out is None:
        from expunge.errors import RunError
        from expunge.reporting import write_reports

        if not isinstance(recipe, Path | str) or not Path(recipe).is_dir():
            raise RunError(
                f"{recipe} is no run folder; a recipe needs `out`, the folder of its run"
            )
        return write_reports(Path(recipe))[0][1].parent
    pipeline = _pipeline(recipe, out)
    return pipeline.report(pipeline.recipe.seeds[0])


def compare(*results: Path | str, common: bool = False) -> list[dict[str, Any]]:
    """How each of some results differs from the first, and whether it is more than noise.

    Each is a folder of `expunge evaluate --out`, its results.json, or a run's DIR or DIR:MODEL.
    Items that only one has are an `EvaluationError`; with `common` they are left out.
    """
    from expunge.evaluate.compare import compare_readings
    from expunge.evaluate.readings import read_place

    readings = [one for place in results for one in read_place(str(place))]
    return [one.as_json() for one in compare_readings(readings, common=common)]


def leaks(results: Path | str, **how: Any) -> dict[str, Any]:
    """Which documents a model still gives away, the worst first.

    `how` is what `evaluate.leaks.leaks` takes: suite, metric, group, low, top.
    """
    from expunge.evaluate.leaks import leaks
    from expunge.evaluate.readings import read_one

    return leaks(read_one(str(results)), **how)


def analyse(
    run: Path | str,
    only: str | Sequence[str] = (),
    *,
    seed: int | None = None,
    generations: bool = False,
    generate_limit: int | None = None,
) -> Path:
    """Analyse what is finished of a run folder, or `only` some of it; returns `analysis/` of it.

    `only` names one or several of weights, trajectories, failures. Nothing is trained. With
    `generations` the snapshots of branches write as well, `generate_limit` items for each term.
    """
    from expunge.analysing.run import analyse_run

    limit, only = generate_limit, [only] if isinstance(only, str) else only
    return analyse_run(run, only, seed=seed, generations=generations, generate_limit=limit)


def _run_in_time(
    recipe: RecipeLike, out: Path, workers: Workers | None, budget: float
) -> dict[int, Path]:
    from expunge.errors import RecipeError
    from expunge.plan.outcome import run_as_planned
    from expunge.recipe import load_recipe

    if workers is not None:
        raise RecipeError("a budget is for a run here: leave out workers")
    if not 0 < budget < float("inf"):
        raise RecipeError(f"a budget of {budget} s is no time")
    return run_as_planned(load_recipe(recipe), out, budget, time.monotonic())[0]


def _pipeline(recipe: RecipeLike, out: Path | str) -> Pipeline:
    from expunge.pipeline import Pipeline

    return Pipeline(recipe, out)
