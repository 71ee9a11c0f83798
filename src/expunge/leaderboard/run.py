"""Run a leaderboard: try each method's settings, then make and score it once for each seed.

Every model is a stage of a recipe, so a killed run goes on, and methods share the target, the
reference scores and the tables of what a model said.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any

from expunge import models
from expunge.cells import Workers
from expunge.errors import ExpungeError, RecipeError, TrainingError
from expunge.inputs import check_parts
from expunge.leaderboard.section import Board
from expunge.pipeline import Pipeline
from expunge.recipe import Recipe
from expunge.registry import lookup
from expunge.report.results import ModelResults, read_results
from expunge.report.standings import Standing, standing_of
from expunge.runner import run_pipelines


def run_leaderboard(
    board: Board,
    out: Path,
    *,
    only: Sequence[str] = (),
    seeds: Sequence[int] = (),
    workers: Workers | None = None,
    say: Callable[[str], None] = lambda said: None,
    keep: Callable[[list[Standing]], None] = lambda rows: None,
) -> list[Standing]:
    """Run the chosen methods and seeds (all, where none is named); a row for each of them, with
    the reason alone where it cannot be trained.

    Seed by seed, so that a run that is cut off has compared every method on the first. `keep` is
    given the rows of each method as soon as they are measured.
    """
    for name in only:
        lookup(board.config.methods, name, "method of this leaderboard")
    for seed in seeds:
        if seed not in board.config.seeds:
            known = ", ".join(map(str, board.config.seeds))
            raise RecipeError(f"the leaderboard has no seed {seed}. Known: {known}")
    chosen = list(only) or list(board.config.methods)
    for one in (board, board.trying):
        _check_fit(one, chosen)
    rows = [] if only else _before(board, out, workers)
    keep(rows)
    settings: dict[str, dict[str, Any]] = {}
    for seed in seeds or board.config.seeds:
        for name in chosen:
            if name not in settings:
                settings[name] = _tuned(board, name, out, workers, say)
            recipe = board.recipe(name, settings[name], seeds=[seed], label=f"{name}-{seed}")
            made = _standings(board, recipe, out, workers, name, settings[name])
            rows += made
            keep(made)
    return rows


def _check_fit(board: Board, chosen: Sequence[str]) -> None:
    """Refuse a method that the board's model lacks something for, before any is run."""
    model = board.before().model
    base = models.resolve(model.path, model.revision)
    for name in chosen:
        for settings in board.config.methods[name].trials:
            try:
                check_parts(board.recipe(name, settings), base)
            except ExpungeError as error:
                raise type(error)(f"methods.{name}: {error}") from None


def _tuned(
    board: Board,
    name: str,
    out: Path,
    workers: Workers | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The best of a method's settings by `merit`; one whose training fails is passed over. The
    first where none can be trained."""
    trials = board.config.methods[name].trials
    if len(trials) == 1:
        return trials[0]
    seeds = [board.config.tuning.seed]
    recipes = [
        board.trying.recipe(name, settings, seeds=seeds, label=f"{name}-trial-{number}", trial=True)
        for number, settings in enumerate(trials, 1)
    ]
    folders: dict[str, dict[int, Path]] = {}
    if workers is not None:
        with suppress(TrainingError):  # of one of them, which ends all: then one after another
            folders = run_pipelines([_pipeline(recipe, out) for recipe in recipes], workers)
    found = []
    for recipe, settings in zip(recipes, trials, strict=True):
        said = ", ".join(f"{place}={value}" for place, value in settings.items())
        try:
            made = folders or run_pipelines([_pipeline(recipe, out)], workers)
        except TrainingError as error:
            say(f"{recipe.name}: {said}: {error}")
            continue
        found.append((merit(_scored(recipe, made[recipe.name][seeds[0]])), settings))
        say(f"{recipe.name}: {said}: {_told(found[-1][0])}")
    return max(found, key=lambda one: one[0])[1] if found else trials[0]


def merit(model: ModelResults) -> tuple[bool, float]:
    """How good a setting is, the greater the better: not collapsed, then the mean of task
    aggregate, MIA score and the plain mean of the terms (forget ones as 1 - v).

    The plain mean tells settings apart whose aggregates are both 0, which one lost term is enough
    for. MMLU has no say: on a sample its noise is greater than what tuning moves.
    """
    semeval = model.semeval
    terms = [
        1 - value if term.startswith("forget") else value
        for term, value in semeval.terms.items()
        if value is not None
    ]
    parts = [semeval.task_aggregate or 0.0, semeval.mia.score if semeval.mia else 0.0]
    parts.append(fmean(terms) if terms else 0.0)
    return not model.collapse.collapsed, fmean(parts)


def _told(judged: tuple[bool, float]) -> str:
    whole, score = judged
    return f"merit {score:.3f}" + ("" if whole else ", COLLAPSED")


def _standings(
    board: Board,
    recipe: Recipe,
    out: Path,
    workers: Workers | None,
    name: str,
    settings: dict[str, Any],
) -> list[Standing]:
    entry = board.config.methods[name]
    known: dict[str, Any] = {"method": name, "board": board.name, "settings": settings}
    known |= {"trials": len(entry.trials), "note": entry.note}
    try:
        folders = run_pipelines([_pipeline(recipe, out)], workers)[recipe.name]
    except TrainingError as error:
        return [Standing(**known, seed=seed, failed=str(error)) for seed in recipe.seeds]
    return [
        standing_of(read_results(folder / "results.json"), entry.model or name, seed=seed, **known)
        for seed, folder in folders.items()
    ]


def _before(board: Board, out: Path, workers: Workers | None) -> list[Standing]:
    recipe = board.before()
    seed = recipe.seeds[0]
    folder = run_pipelines([_pipeline(recipe, out)], workers)[recipe.name][seed]
    results = read_results(folder / "results.json")
    return [standing_of(results, "target", method="target", board=board.name, seed=seed)]


def _pipeline(recipe: Recipe, out: Path) -> Pipeline:
    return Pipeline(recipe, out / recipe.name, store=out)


def _scored(recipe: Recipe, folder: Path) -> ModelResults:
    """The one model of a recipe that is scored."""
    models = read_results(folder / "results.json").models
    return next(models[name] for name in recipe.models if name not in recipe.unscored)
