"""Commands that run a recipe or some of its stages: read, run, print.

Each imports what it needs when it is called: torch and transformers take seconds.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expunge.cli.options import (
    Cpus,
    FailIf,
    Json,
    ModelPath,
    OutDir,
    Ray,
    RecipePath,
    Seed,
    Track,
    gates_of,
    names_of,
    numbers_of,
    pipeline_of,
    print_gated,
    recipe_of,
    tracking,
    workers_of,
)
from expunge.errors import RecipeError
from expunge.report.commands import print_facts

if TYPE_CHECKING:
    from expunge.recipe import Recipe

running = typer.Typer()


Budget = Annotated[
    str | None, typer.Option(help="End within this time: 90s, 30m, 1h, 1h30m or seconds.")
]


@running.command()
def run(
    recipes: Annotated[list[Path], typer.Argument(help="Recipes in YAML; see recipes/.")],
    out: OutDir,
    model: ModelPath = None,
    seed: Seed = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(help="branches.weak.optimizer.lr=1e-4,3e-4: a run for each value."),
    ] = None,
    ray: Ray = None,
    cpus_per_cell: Cpus = None,
    budget: Budget = None,
    fail_if: FailIf = None,
    track: Track = None,
    as_json: Json = False,
) -> None:
    """Run every stage of RECIPES; what is finished in the run folder is not done again."""
    from expunge.progress import say
    from expunge.runner import parse_sweep, run_recipes, swept

    start = time.monotonic()
    workers = workers_of(ray, cpus_per_cell)
    if track and (len(recipes) > 1 or sweep or workers is not None):
        raise RecipeError("--track is for one recipe, run here: leave out --sweep and --ray")
    read = [recipe_of(path, model, seed) for path in recipes]
    if sweep:
        read = [one for recipe in read for one in swept(recipe, parse_sweep(sweep), say=say)]
    gates = gates_of(fail_if, *read)
    planned = len(read) == 1 and workers is None and (out / "plan.json").exists()
    if budget is None and not planned:
        with tracking(track, read[0], out):
            made = run_recipes(read, out, workers=workers)
        folders = [folder for seeds in made.values() for folder in seeds.values()]
        return print_gated(folders, gates, as_json)
    if len(read) > 1 or workers is not None:
        raise RecipeError("--budget is for one recipe, run here: leave out --sweep and --ray")
    from expunge.plan.budget import parse_budget
    from expunge.plan.outcome import run_as_planned

    seconds = None if budget is None else parse_budget(budget)
    with tracking(track, read[0], out):
        folders, errors = run_as_planned(read[0], out, seconds, start)
    if errors and not as_json:
        from expunge.report.terminal import print_rows

        print_rows(errors, as_json=False)
    return print_gated(list(folders.values()), gates, as_json)


@running.command()
def leaderboard(
    board: Annotated[Path, typer.Argument(help="A leaderboard in YAML; recipes/leaderboard.yaml.")],
    out: OutDir,
    on: Annotated[
        Path | None, typer.Option(help="A recipe whose model and data take the board's place.")
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="Only these methods, by name: npo,simnpo.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Only these of its seeds: 42,43.")] = None,
    rows: Annotated[
        Path | None, typer.Option(help="Put each row into this docs/leaderboard.json.")
    ] = None,
    ray: Ray = None,
    cpus_per_cell: Cpus = None,
    as_json: Json = False,
) -> None:
    """Run methods × seeds on one target; what is finished in the run folder is not done again."""
    from expunge.leaderboard.run import run_leaderboard
    from expunge.leaderboard.section import Board
    from expunge.progress import say
    from expunge.report.standings import add_standings
    from expunge.report.terminal import print_leaderboard

    made = run_leaderboard(
        Board(board, on),
        out,
        only=names_of(only),
        seeds=numbers_of(seeds, "--seeds"),
        workers=workers_of(ray, cpus_per_cell),
        say=say,
        keep=lambda found: None if rows is None else add_standings(rows, found),
    )
    print_leaderboard(made, as_json)


@running.command()
def plan(
    recipe: RecipePath,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The run's folder: what is finished counts nothing."),
    ] = None,
    model: ModelPath = None,
    seed: Seed = None,
    budget: Budget = None,
    write: Annotated[
        Path | None, typer.Option(help="Write the recipe with the picked settings here.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Foretell time and memory of each stage of RECIPE here, and pick settings that fit.

    A few steps are timed, in a temporary folder. With --out the plan is kept there, and the next
    run says how wrong it was; without, nothing does.
    """
    from expunge.plan.budget import parse_budget
    from expunge.plan.predict import plan, write_plan
    from expunge.plan.settings import write_recipe
    from expunge.plan.shown import print_plan

    read = recipe_of(recipe, model, seed)
    made = plan(read, out, budget=None if budget is None else parse_budget(budget))
    if out is not None:
        write_plan(made, out)
    if write is not None:
        write_recipe(read, made.settings, write)
    print_plan(made, as_json, kept=out is not None)


@running.command()
def tune(
    recipe: RecipePath,
    out: OutDir,
    model: ModelPath = None,
    track: Track = None,
    as_json: Json = False,
) -> None:
    """Make the target: the model that has memorised both halves."""
    read = recipe_of(recipe, model, None)
    with tracking(track, read, out):
        target = pipeline_of(recipe, out, model, None).target.base
    print_facts({"target": str(target)}, as_json)
    _print_errors(read, out, as_json)


@running.command()
def unlearn(
    recipe: RecipePath,
    out: OutDir,
    model: ModelPath = None,
    seed: Seed = None,
    branch: Annotated[str | None, typer.Option(help="Only this branch.")] = None,
    track: Track = None,
    as_json: Json = False,
) -> None:
    """Train the branches, of one seed: that of --seed, or the recipe's first."""
    read = recipe_of(recipe, model, seed)
    with tracking(track, read, out):
        made = pipeline_of(recipe, out, model, seed).branches(branch)
    print_facts({n: str(weights.adapter or weights.base) for n, weights in made.items()}, as_json)
    _print_errors(read, out, as_json)


def _print_errors(recipe: Recipe, out: Path, as_json: bool) -> None:
    """How wrong the run folder's plan was of what is finished; nothing where there is none."""
    from expunge.plan.outcome import add_outcome
    from expunge.report.terminal import print_rows

    rows = add_outcome(recipe, out)
    if rows and not as_json:
        print_rows(rows, as_json=False)
