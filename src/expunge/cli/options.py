"""What commands share: their common options, the pipeline of a recipe, how results are said."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expunge.errors import RecipeError

if TYPE_CHECKING:
    from expunge.pipeline import Pipeline
    from expunge.recipe import Recipe

RecipePath = Annotated[Path, typer.Argument(help="A recipe in YAML; see recipes/.")]
OutDir = Annotated[Path, typer.Option("--out", help="The run folder.")]
ModelPath = Annotated[
    str | None,
    typer.Option("--model", help="Start from this Hugging Face id, folder or GGUF file instead."),
]
Seed = Annotated[int | None, typer.Option("--seed", help="This seed instead of the recipe's.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a script to read.")]


def pipeline_of(recipe: Path, out: Path, model: str | None, seed: int | None) -> Pipeline:
    """The stages of a recipe, with what the command line changes of it."""
    from expunge.pipeline import Pipeline

    return Pipeline(recipe_of(recipe, model, seed), out)


def recipe_of(recipe: Path, model: str | None, seed: int | None) -> Recipe:
    """A recipe, with what the command line changes of it."""
    from expunge.recipe import load_recipe, with_model

    read = load_recipe(recipe, **({} if seed is None else {"seeds": (seed,)}))
    return with_model(read, model) if model else read


def given(path: Path | None, name: str) -> Path:
    """The path that an option gives, or an error that names it."""
    if path is None:
        raise RecipeError(f"{name} is missing: say where to write")
    return path


def print_reports(folders: list[Path], as_json: bool) -> None:
    """Print the results of finished runs."""
    from expunge.report.terminal import print_results

    for folder in folders:
        if as_json:
            typer.echo((folder / "results.json").read_text(encoding="utf-8"))
        else:
            print_results(folder)
