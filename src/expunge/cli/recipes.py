"""Commands that run a recipe or some of its stages: read, run, print.

Each imports what it needs when it is called: torch and transformers take seconds.
"""

from __future__ import annotations

from typing import Annotated

import typer

from expunge.cli.options import (
    Json,
    ModelPath,
    OutDir,
    RecipePath,
    Seed,
    pipeline_of,
    print_reports,
)
from expunge.report.commands import print_facts

running = typer.Typer()


@running.command()
def run(
    recipe: RecipePath,
    out: OutDir,
    model: ModelPath = None,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Run every stage of RECIPE; what is finished in the run folder is not done again."""
    folders = pipeline_of(recipe, out, model, seed).run()
    print_reports(list(folders.values()), as_json)


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
