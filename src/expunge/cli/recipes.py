"""Commands that run a recipe or some of its stages: read, run, print.

Each imports what it needs when it is called: torch and transformers take seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expunge.cli.options import (
    Cpus,
    Json,
    ModelPath,
    OutDir,
    Ray,
    RecipePath,
    Seed,
    pipeline_of,
    print_reports,
    recipe_of,
    workers_of,
)
from expunge.report.commands import print_facts

running = typer.Typer()


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
    as_json: Json = False,
) -> None:
    """Run every stage of RECIPES; what is finished in the run folder is not done again."""
    from expunge.progress import say
    from expunge.runner import parse_sweep, run_recipes, swept

    workers = workers_of(ray, cpus_per_cell)
    read = [recipe_of(path, model, seed) for path in recipes]
    if sweep:
        read = [one for recipe in read for one in swept(recipe, parse_sweep(sweep), say=say)]
    made = run_recipes(read, out, workers=workers)
    print_reports([folder for seeds in made.values() for folder in seeds.values()], as_json)


@running.command()
def tune(recipe: RecipePath, out: OutDir, model: ModelPath = None, as_json: Json = False) -> None:
    """Make the target: the model that has memorised both halves."""
    target = pipeline_of(recipe, out, model, None).target.base
    print_facts({"target": str(target)}, as_json)


@running.command()
def unlearn(
    recipe: RecipePath,
    out: OutDir,
    model: ModelPath = None,
    seed: Seed = None,
    branch: Annotated[str | None, typer.Option(help="Only this branch.")] = None,
    as_json: Json = False,
) -> None:
    """Train the branches."""
    for name, weights in pipeline_of(recipe, out, model, seed).branches(branch).items():
        print_facts({name: str(weights.adapter or weights.base)}, as_json)
