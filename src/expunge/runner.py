"""Run recipes: what each is made of as cells, done in this process or on a Ray cluster.

data ──▶ target ──▶ branch × seed ──▶ merge × seed ──▶ edit × seed, and the scores of each of them.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from expunge.cells import Cell, Workers, do_here
from expunge.config import BROKEN_YAML, parse_section, put_field
from expunge.data.folds import Folds
from expunge.errors import RecipeError, RunError
from expunge.on_ray import do_on_ray
from expunge.pipeline import Pipeline, RecipeLike
from expunge.recipe import Recipe, load_recipe


@dataclass(frozen=True)
class Stage:
    """A stage of a recipe, as another machine can take it up."""

    recipe: str
    """As JSON."""

    folder: Path
    store: Path
    original_hash: str
    """So that not every worker reads the whole model for it."""

    model: str
    """Its name in the results; none stands for the data."""

    seed: int
    scored: bool = False
    """Score the model, not make it."""


def run_recipes(
    recipes: Sequence[RecipeLike], out: Path | str, *, workers: Workers | None = None
) -> dict[str, dict[int, Path]]:
    """Run every stage of every recipe; the folder of each seed's report, by the recipe's name.

    One recipe has `out` for itself. Several have `out/NAME` each and share the stages in `out`, so
    what they have in common is done once; one of them alone finds its place there again. Every
    recipe is checked before anything runs.
    """
    read = [load_recipe(recipe) for recipe in recipes]
    names = [recipe.name for recipe in read]
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(f"two recipes are called '{name}'; give one another name")
    out = Path(out)
    if len(read) > 1 or any((out / name / "run.json").exists() for name in names):
        if (out / "run.json").exists():
            raise RunError(f"{out} belongs to one recipe; choose another --out for several")
        pipelines = [Pipeline(recipe, out / recipe.name, store=out) for recipe in read]
    else:
        pipelines = [Pipeline(recipe, out) for recipe in read]
    return run_pipelines(pipelines, workers)


def run_pipelines(
    pipelines: Sequence[Pipeline], workers: Workers | None = None
) -> dict[str, dict[int, Path]]:
    """Do the cells of all pipelines, then write the reports."""
    _share_hashes(pipelines)
    cells = list({cell.name: cell for one in pipelines for cell in cells_of(one)}.values())
    if workers is None:
        known = {one.folder.root.absolute(): one for one in pipelines}
        do_here(cells, lambda stage: _do(stage, known[stage.folder]))
    else:
        do_on_ray(cells, do_stage, workers)
    return {
        one.recipe.name: {seed: one.report(seed) for seed in one.recipe.seeds} for one in pipelines
    }


def cells_of(pipeline: Pipeline) -> Iterator[Cell[Stage]]:
    """The stages of a recipe in order; two recipes that share a stage give it one name."""
    recipe, run = pipeline.recipe, pipeline.folder
    text = recipe.model_dump_json(exclude_unset=True)
    folder, store = run.root.absolute(), run.store.absolute()

    def cell(model: str, seed: int, needs: list[str], scored: bool = False) -> Cell[Stage]:
        name = _name(recipe, model, seed, scored)
        stage = Stage(text, folder, store, pipeline.original_hash, model, seed, scored)
        gpu = bool(model) and (scored or model not in recipe.merges)
        return Cell(name, tuple(need for need in needs if need in made), stage, gpu)

    made: set[str] = set()
    for seed in recipe.seeds:
        for model in ("", *recipe.models):
            before = [_name(recipe, other, seed) for other in _made_from(recipe, model)]
            itself = cell(model, seed, before)
            if itself.name not in made and _is_made(recipe, model):
                made.add(itself.name)
                yield itself
            score = cell(model, seed, [*before, itself.name], scored=True)
            if model and model not in recipe.unscored and score.name not in made:
                made.add(score.name)
                yield score


def do_stage(stage: Stage) -> None:
    """Do a stage in a worker, which finds the run folder where the driver made it."""
    if not (stage.folder / "run.json").is_file():
        raise RunError(
            f"a worker cannot see the run folder {stage.folder}; "
            "it must lie on a file system that every node shares"
        )
    recipe = parse_section(json.loads(stage.recipe), Recipe, origin="recipe")
    pipeline = Pipeline(
        recipe,
        stage.folder,
        store=stage.store,
        wait=True,
        original_hash=stage.original_hash,
    )
    _do(stage, pipeline)


def swept(
    recipe: Recipe,
    changes: Mapping[str, Sequence[Any]],
    *,
    say: Callable[[str], None] = lambda said: None,
) -> list[Recipe]:
    """A recipe for every combination of values: NAME-1, NAME-2 …, and which is which is said.

    `changes` maps the path of a field, such as `branches.strong.optimizer.lr`, to its values.
    """
    fields = recipe.model_dump(mode="json", exclude_unset=True)
    made = []
    for number, values in enumerate(itertools.product(*changes.values()), 1):
        one = json.loads(json.dumps(fields))
        given = dict(zip(changes, values, strict=True))
        for path, value in given.items():
            put_field(one, path, value, origin="--sweep")
        said = ", ".join(f"{path}={value}" for path, value in given.items())
        one["name"] = f"{recipe.name}-{number}"
        made.append(parse_section(one, Recipe, origin=f"--sweep {said}"))
        say(f"{one['name']}: {said}")
    return made


def parse_sweep(texts: Sequence[str]) -> dict[str, list[Any]]:
    """`path=value,value` for each field that is swept, values as in YAML."""
    changes: dict[str, list[Any]] = {}
    for text in texts:
        path, equals, values = text.partition("=")
        if not (path and equals and values.strip(" ,")):
            raise RecipeError(f"--sweep takes path=value,value; '{text}' is not that")
        if path in changes:
            raise RecipeError(f"--sweep names {path} twice; give all its values at once")
        try:
            changes[path] = yaml.safe_load(f"[{values}]")
        except BROKEN_YAML:
            raise RecipeError(f"--sweep {path}: '{values}' are no values as in YAML") from None
    return changes


def _share_hashes(pipelines: Sequence[Pipeline]) -> None:
    """A model that several recipes start from is read once for its hash."""
    known: dict[Path, str] = {}
    for one in pipelines:
        if one.original.base in known:
            one.original_hash = known[one.original.base]
        known[one.original.base] = one.original_hash


def _do(stage: Stage, pipeline: Pipeline) -> None:
    if not stage.model:
        assert pipeline.sets
        return
    weights = pipeline.weights(stage.model, stage.seed)
    if stage.scored:
        pipeline.evaluate(stage.model, weights)


def _is_made(recipe: Recipe, model: str) -> bool:
    """Whether a model is a stage: the one that a recipe starts from is not."""
    if not model:
        return recipe.data.synthetic is not None
    return recipe.maker(model) is not None


def _made_from(recipe: Recipe, model: str) -> list[str]:
    """What must be there before a model; none stands for the data."""
    return ["", *recipe.made_from(model)] if model else []


def _name(recipe: Recipe, model: str, seed: int, scored: bool = False) -> str:
    """The name of a stage's cell: the same in two recipes that make the same of the same."""
    told: list[Any] = _told(recipe, model, seed)
    if scored:
        told.append(recipe.evaluate.model_dump_json())
        if recipe.relearn is not None:
            told.append(recipe.relearn.model_dump_json())
        if recipe.folds is not None or recipe.calibrate:
            told.append(_folds(recipe))
    digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:8]
    return f"{'evaluate-' if scored else ''}{model or 'data'}-{digest}"


def _told(recipe: Recipe, model: str, seed: int) -> list[Any]:
    """All of a recipe that decides a model."""
    told: list[Any] = [recipe.data.model_dump_json()]
    if not model:
        return told
    told += [model, recipe.model.model_dump_json()]
    maker = recipe.maker(model)
    if maker is not None:
        told.append(maker.model_dump_json())
    told += _judged_by(recipe, model)
    if model not in ("original", "target"):
        told.append(seed)
    return told + [_told(recipe, other, seed) for other in recipe.made_from(model)]


def _judged_by(recipe: Recipe, model: str) -> list[str]:
    """What decides a model besides its section and what it is made of: how it is chosen."""
    if model in recipe.calibrate:
        return [_folds(recipe), recipe.evaluate.model_dump_json()]
    watch = recipe.branches[model].watch if model in recipe.branches else None
    watched = watch is not None and watch.read == "evaluation"
    return [recipe.evaluate.model_dump_json()] if watched else []


def _folds(recipe: Recipe) -> str:
    return (recipe.folds or Folds()).model_dump_json()
