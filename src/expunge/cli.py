"""Commands: read, run, print. No logic.

Each imports what it needs when it is called: torch and transformers take seconds.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expunge.errors import ExpungeError, RecipeError
from expunge.report.commands import print_facts, reading

if TYPE_CHECKING:
    from expunge.pipeline import Pipeline

app = typer.Typer(
    help="Remove chosen content from a language model, keep everything else, and prove both.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data = typer.Typer(help="Make data sets.", no_args_is_help=True)
app.add_typer(data, name="data")
app.add_typer(reading)

RecipePath = Annotated[Path, typer.Argument(help="A recipe in YAML; see recipes/.")]
OutDir = Annotated[Path, typer.Option("--out", help="The run folder.")]
ModelPath = Annotated[
    str | None,
    typer.Option("--model", help="Start from this Hugging Face id, folder or GGUF file instead."),
]
Seed = Annotated[int | None, typer.Option("--seed", help="This seed instead of the recipe's.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a script to read.")]


@app.command()
def run(
    recipe: RecipePath,
    out: OutDir,
    model: ModelPath = None,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Run every stage of RECIPE; what is finished in the run folder is not done again."""
    folders = _pipeline(recipe, out, model, seed).run()
    _print_reports(list(folders.values()), as_json)


@app.command()
def tune(recipe: RecipePath, out: OutDir, model: ModelPath = None, as_json: Json = False) -> None:
    """Make the target: the model that has memorised both halves."""
    target = _pipeline(recipe, out, model, None).target.base
    print_facts({"target": str(target)}, as_json)


@app.command()
def unlearn(
    recipe: RecipePath,
    out: OutDir,
    model: ModelPath = None,
    seed: Seed = None,
    branch: Annotated[str | None, typer.Option(help="Only this branch.")] = None,
    as_json: Json = False,
) -> None:
    """Train the branches."""
    for name, weights in _pipeline(recipe, out, model, seed).branches(branch).items():
        print_facts({name: str(weights.adapter or weights.base)}, as_json)


@app.command()
def merge(
    config: Annotated[
        Path, typer.Argument(help="A recipe, or a merge file (mergekit's YAML too).")
    ],
    folder: Annotated[
        Path | None, typer.Argument(metavar="[OUT]", help="The model folder, for a merge file.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The run folder, for a recipe.")] = None,
    model: ModelPath = None,
    seed: Seed = None,
    look: Annotated[
        bool, typer.Option("--lint", help="Only say what should be looked at before merging.")
    ] = False,
    why: Annotated[
        bool, typer.Option("--explain", help="Only say what the merge does to each tensor.")
    ] = False,
    stochastic: Annotated[
        bool, typer.Option(help="Round at random, in proportion, instead of to the nearest.")
    ] = False,
    shard_gb: Annotated[float, typer.Option(help="Largest shard, in GB.")] = 5.0,
    as_json: Json = False,
) -> None:
    """Merge models as a merge file says, or the branches of a recipe."""
    from expunge.merge.compat import is_merge_file
    from expunge.merge.explain import explain
    from expunge.merge.lint import lint
    from expunge.merge.run import merge_models, plan_of
    from expunge.report.terminal import print_rows

    if not is_merge_file(config):
        for name, weights in _pipeline(config, _given(out, "--out"), model, seed).merges().items():
            print_facts({name: str(weights.adapter or weights.base)}, as_json)
    elif look:
        print_rows([asdict(found) for found in lint(plan_of(config))], as_json)
    elif why:
        print_rows(explain(plan_of(config)), as_json)
    else:
        made = merge_models(
            config,
            _given(folder or out, "OUT"),
            shard_bytes=int(shard_gb * 1e9),
            stochastic=stochastic,
        )
        print_facts(made, as_json)


@app.command()
def statistics(
    model: Annotated[str, typer.Argument(help="An id, folder or GGUF file.")],
    texts: Annotated[str, typer.Argument(help="Documents: a .parquet, .jsonl, .json or .csv.")],
    out: Annotated[Path, typer.Argument(help="The safetensors file to write.")],
    kind: Annotated[str, typer.Option(help="gram, for regmean, or fisher.")] = "gram",
    max_length: Annotated[int, typer.Option(min=2, help="Tokens read of a text.")] = 512,
    as_json: Json = False,
) -> None:
    """Gather over TEXTS what merging by regmean or fisher needs of MODEL."""
    from expunge.merge.statistics import gather

    print_facts(gather(model, texts, out, kind=kind, max_length=max_length), as_json)


@app.command()
def evaluate(
    target: Annotated[str, typer.Argument(help="A recipe, or a model: id, folder or GGUF file.")],
    out: Annotated[Path | None, typer.Option("--out", help="Write numbers and items here.")] = None,
    suite: Annotated[str, typer.Option(help="Of a model: what to measure, by comma.")] = "",
    option: Annotated[
        list[str] | None, typer.Option("-o", "--option", help="suite.field=value, as in YAML.")
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="A LoRA on the model.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    backend: Annotated[
        str, typer.Option(help="What generates: torch, or vllm on a GPU.")
    ] = "torch",
    cache: Annotated[Path | None, typer.Option(help="Where what the model said is kept.")] = None,
    fail_if: Annotated[
        list[str] | None, typer.Option(help="'semeval.mia.auc > 0.6': exit with 3 if it holds.")
    ] = None,
    model: ModelPath = None,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Measure a model by suites, or score every model of a recipe and write the report."""
    if Path(target).suffix in (".yaml", ".yml"):
        if suite or option or adapter or fail_if:
            raise RecipeError("--suite, --option, --adapter and --fail-if belong to a model")
        run_folder = _given(out, "--out")
        folders = _pipeline(Path(target), run_folder, model, seed).run()
        return _print_reports(list(folders.values()), as_json)
    from expunge.evaluate.gates import check_gates, parse_gates
    from expunge.evaluate.run import evaluate_model, numbers_of
    from expunge.evaluate.suites import parse_suites
    from expunge.report.terminal import print_numbers

    gates = parse_gates(fail_if or [])
    results = evaluate_model(
        target,
        parse_suites([name for name in suite.split(",") if name], option or []),
        adapter=adapter,
        dtype=dtype,
        backend=backend,
        cache=cache,
        out=out,
    )
    print_numbers(results, as_json)
    return check_gates(gates, numbers_of(results))


@app.command(name="report")
def print_report(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    rows: Annotated[
        Path | None, typer.Option(help="Add a row for each model to this docs/results.json.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print the results of a finished run."""
    from expunge.report.board import add_rows, rows_of
    from expunge.report.results import read_results
    from expunge.report.terminal import result_folders

    folders = result_folders(run)
    if rows is not None:
        for folder in folders:
            add_rows(rows, rows_of(read_results(folder / "results.json")))
    _print_reports(folders, as_json)


@data.command(name="synthesize")
def synthesize_data(
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    seed: Annotated[int, typer.Option(help="Same seed, same files.")] = 42,
    as_json: Json = False,
) -> None:
    """Write LUME-shaped synthetic forget, retain, member, non-member and neutral sets."""
    from expunge.data.synthetic import Synthetic, synthesize

    out.mkdir(parents=True, exist_ok=True)
    counts = synthesize(Synthetic(seed=seed), out)
    print_facts(counts, as_json)


@app.command()
def methods(as_json: Json = False) -> None:
    """List every method: losses, step rules, merges, metrics."""
    from expunge.methods import method_rows, methods_table
    from expunge.report.terminal import console

    if as_json:
        typer.echo(json.dumps(method_rows(), indent=1))
    else:
        console().print(methods_table())


@app.command()
def doctor(
    recipe: Annotated[Path | None, typer.Argument(help="Say what of this recipe fits.")] = None,
    as_json: Json = False,
) -> None:
    """Say what this machine has, and what of a recipe fits on it."""
    from expunge.doctor import examine
    from expunge.recipe import load_recipe

    facts = examine(load_recipe(recipe) if recipe else None)
    print_facts(facts, as_json)


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from expunge.recipe import Recipe

    typer.echo(json.dumps(Recipe.model_json_schema(), indent=1))


@app.command(hidden=True)
def docs(check: Annotated[bool, typer.Option(help="Only compare.")] = False) -> None:
    """Regenerate docs/methods.md, docs/metrics.md and docs/results.md."""
    from expunge.evaluate.suites import SUITES
    from expunge.methods import method_rows
    from expunge.report.docs import write_docs
    from expunge.report.metrics_page import suite_rows

    write_docs(method_rows(), suite_rows(SUITES), check=check)


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 2, a failed gate 3."""
    try:
        app()
    except ExpungeError as error:
        print(f"expunge: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(error.exit_code)


def _pipeline(recipe: Path, out: Path, model: str | None, seed: int | None) -> Pipeline:
    from expunge.pipeline import Pipeline
    from expunge.recipe import load_recipe, with_model

    read = load_recipe(recipe, **({} if seed is None else {"seeds": (seed,)}))
    return Pipeline(with_model(read, model) if model else read, out)


def _given(path: Path | None, name: str) -> Path:
    if path is None:
        raise RecipeError(f"{name} is missing: say where to write")
    return path


def _print_reports(folders: list[Path], as_json: bool) -> None:
    from expunge.report.terminal import print_results

    for folder in folders:
        if as_json:
            typer.echo((folder / "results.json").read_text(encoding="utf-8"))
        else:
            print_results(folder)
