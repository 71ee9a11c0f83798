"""What commands share: their common options, the pipeline of a recipe, how results are said."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expunge import parallel
from expunge.cells import Workers
from expunge.errors import RecipeError

if TYPE_CHECKING:
    from expunge.evaluate.gates import Gate
    from expunge.pipeline import Pipeline
    from expunge.recipe import Recipe

RecipePath = Annotated[Path, typer.Argument(help="A recipe in YAML; see recipes/.")]
OutDir = Annotated[Path, typer.Option("--out", help="The run folder.")]
ModelPath = Annotated[
    str | None,
    typer.Option("--model", help="Start from this Hugging Face id, folder or GGUF file instead."),
]
Seed = Annotated[int | None, typer.Option("--seed", help="This seed instead of the recipe's.")]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="auto|local|HOST:PORT",
        help="Side by side on a Ray cluster: the running one, this machine, or that address.",
    ),
]
Cpus = Annotated[
    int | None,
    typer.Option("--cpus-per-cell", min=1, help="With --ray: CPUs, and threads, of each cell."),
]
Track = Annotated[
    str | None,
    typer.Option("--track", help="Tell these while it goes: tensorboard, mlflow, wandb, by comma."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a script to read.")]
FailIf = Annotated[
    list[str] | None,
    typer.Option(
        help="'mia.auc > 0.6', of a run 'merged.mia.auc > 0.6': exit with 3 if so, or if collapsed."
    ),
]


def recipe_of(path: Path, model: str | None, seed: int | None) -> Recipe:
    """A recipe, with what the command line changes of it."""
    from expunge.recipe import load_recipe, with_model

    read = load_recipe(path, **({} if seed is None else {"seeds": (seed,)}))
    return with_model(read, model) if model else read


def pipeline_of(recipe: Path, out: Path, model: str | None, seed: int | None) -> Pipeline:
    """The stages of a recipe, with what the command line changes of it."""
    from expunge.pipeline import Pipeline

    return Pipeline(recipe_of(recipe, model, seed), out)


@contextmanager
def tracking(track: str | None, recipe: Recipe, out: Path) -> Iterator[None]:
    """Within this block the trackers that an option names are told how the recipe's run goes."""
    from expunge.tracking import tracked

    with tracked(names_of(track), out, recipe.name, recipe.model_dump(mode="json")):
        yield


def workers_of(ray: str | None, cpus_per_cell: int | None) -> Workers | None:
    """Where cells are done; None is here, one after another."""
    if ray is None and cpus_per_cell is not None:
        raise RecipeError("--cpus-per-cell goes with --ray")
    return None if ray is None else Workers(ray, cpus_per_cell)


def given(path: Path | None, name: str) -> Path:
    """The path that an option gives, or an error that names it."""
    if path is None:
        raise RecipeError(f"{name} is missing: say where to write")
    return path


def print_reports(folders: list[Path], as_json: bool) -> None:
    """Print the results of finished runs; as JSON an object, or of several a list of them."""
    from expunge.report.terminal import print_results

    if as_json and len(folders) > 1:
        from expunge.runs import read_json

        made = [read_json(folder / "results.json") for folder in folders]
        return typer.echo(json.dumps(made, indent=1, ensure_ascii=False))
    for folder in folders if parallel.is_main() else ():
        if as_json:
            typer.echo((folder / "results.json").read_text(encoding="utf-8"))
        else:
            print_results(folder)
    return None


def gates_of(fail_if: list[str] | None, *recipes: Recipe) -> list[Gate]:
    """The conditions of --fail-if, each of which begins with a model of every recipe."""
    from expunge.evaluate.gates import parse_gates, refuse_unmade

    gates = parse_gates(fail_if or [])
    for recipe in recipes if gates else ():
        refuse_unmade(gates, [name for name in recipe.models if name not in recipe.unscored])
        for gate in gates if recipe.relearn is None else ():
            if ".relearn." in gate.name:
                raise RecipeError(
                    f"--fail-if {gate.name} needs an attack, which {recipe.name} does not ask for; "
                    "add relearn: {} to it"
                )
    return gates


def print_gated(folders: list[Path], gates: list[Gate], as_json: bool) -> None:
    """`print_reports`, and then the gates that failed, as a `GateError`."""
    from expunge.evaluate.gates import check_runs
    from expunge.runs import read_json

    print_reports(folders, as_json)
    check_runs(gates, {one.name: read_json(one / "results.json")["models"] for one in folders})


def names_of(text: str | None) -> list[str]:
    """The names of an option that takes several, with commas between them."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def numbers_of(text: str | None, option: str) -> list[int]:
    """The whole numbers of an option that takes several."""
    names = names_of(text)
    for name in names:
        if not name.isdecimal():
            raise RecipeError(
                f"{option} takes whole numbers with commas between them, not '{name}'"
            )
    return [int(name) for name in names]
