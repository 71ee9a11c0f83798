"""Commands over models: merge them, edit them, gather statistics of them, measure them.

Each imports what it needs when it is called: torch and transformers take seconds.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from expunge.cli.options import (
    Cpus,
    FailIf,
    Json,
    ModelPath,
    Ray,
    Seed,
    gates_of,
    given,
    names_of,
    pipeline_of,
    print_gated,
    recipe_of,
    workers_of,
)
from expunge.errors import RecipeError
from expunge.report.commands import print_facts

handling = typer.Typer()


@handling.command()
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
    ray: Ray = None,
    cpus_per_cell: Cpus = None,
    as_json: Json = False,
) -> None:
    """Merge models as a merge file says, or the branches of a recipe (of one seed)."""
    from expunge.merge.compat import is_merge_file, read_merge_file
    from expunge.merge.explain import explain
    from expunge.merge.lint import lint
    from expunge.merge.plan import Plan
    from expunge.merge.run import merge_models
    from expunge.report.terminal import print_rows

    workers = workers_of(ray, cpus_per_cell)
    if not 1e-9 <= shard_gb < math.inf:
        raise RecipeError(f"--shard-gb is the size of the largest shard, not {shard_gb:g}")
    if seed is not None and seed < 0:
        raise RecipeError(f"--seed is a whole number from 0, not {seed}")
    if look and why:
        raise RecipeError("give either --lint or --explain")
    if not is_merge_file(config):
        if folder is not None:
            raise RecipeError("OUT belongs to a merge file; the merges of a recipe go into --out")
        if look or why or stochastic:
            raise RecipeError("--lint, --explain and --stochastic belong to a merge file")
        if workers:
            raise RecipeError("--ray merges a merge file; a recipe: expunge run RECIPE --ray")
        merges = pipeline_of(config, given(out, "--out"), model, seed).merges()
        print_facts({name: str(one.adapter or one.base) for name, one in merges.items()}, as_json)
        return
    if folder is not None and out is not None:
        raise RecipeError("give the folder to write once: as OUT or as --out")
    if model is not None:
        raise RecipeError("--model belongs to a recipe; a merge file names its models itself")
    file = read_merge_file(config)
    if seed is not None:
        file = file.model_copy(update={"seed": seed})
    if look:
        print_rows([asdict(found) for found in lint(Plan(file))], as_json)
    elif why:
        print_rows(explain(Plan(file)), as_json)
    else:
        made = merge_models(
            file,
            given(folder or out, "OUT"),
            shard_bytes=int(shard_gb * 1e9),
            stochastic=stochastic,
            workers=workers,
        )
        print_facts(made, as_json)


@handling.command()
def edit(
    method: Annotated[str, typer.Argument(help="A name that `expunge methods` gives.")],
    model: Annotated[str, typer.Argument(help="An id, folder or GGUF file.")],
    out: Annotated[Path, typer.Argument(help="The model or adapter folder to write.")],
    adapter: Annotated[Path | None, typer.Option(help="Edit this adapter on MODEL.")] = None,
    base: Annotated[str | None, typer.Option(help="What MODEL was trained from.")] = None,
    other: Annotated[
        list[str] | None, typer.Option(help="A further model or, with --adapter, adapter.")
    ] = None,
    forget: Annotated[str | None, typer.Option(help="A file of items to forget.")] = None,
    retain: Annotated[str | None, typer.Option(help="A file of items to keep.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--set", help="option=value, as in YAML.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seeds what is drawn.")] = 42,
    as_json: Json = False,
) -> None:
    """Edit MODEL without training: negate, repair, prune, move tokens down."""
    from expunge.config import read_options
    from expunge.edit.run import edit_model

    told = {"options": read_options(option or [], "--set"), "others": other or [], "seed": seed}
    sets = {"forget": forget, "retain": retain}
    print_facts(edit_model(method, model, out, adapter=adapter, base=base, **sets, **told), as_json)


@handling.command()
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


@handling.command()
def evaluate(
    target: Annotated[str, typer.Argument(help="A recipe, or a model: id, folder or GGUF file.")],
    out: Annotated[Path | None, typer.Option("--out", help="Write numbers and items here.")] = None,
    suite: Annotated[str, typer.Option(help="Of a model: what to measure, by comma.")] = "",
    option: Annotated[
        list[str] | None, typer.Option("-o", "--option", help="suite.field=value, as in YAML.")
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="A LoRA on the model.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 (unless it is given), bfloat16 or float16.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="What generates: torch, or vllm on a GPU.")
    ] = None,
    guard: Annotated[Path | None, typer.Option(help="Ask through this guard's folder.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Where what the model said is kept.")] = None,
    max_batch: Annotated[
        int | None, typer.Option(min=1, help="Prompts continued at once, 64 at most unless given.")
    ] = None,
    fail_if: FailIf = None,
    model: ModelPath = None,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Measure a model by suites, or score every model of a recipe and write the report."""
    if Path(target).suffix in (".yaml", ".yml"):
        own = (suite, option, adapter, guard, dtype, backend, cache, max_batch)
        if any(one is not None and one != "" for one in own):
            raise RecipeError(
                "--suite, --option, --adapter, --guard, --dtype, --backend, --cache and "
                "--max-batch belong to a model"
            )
        from expunge.runner import run_pipelines

        run_folder = given(out, "--out")
        gates = gates_of(fail_if, recipe_of(Path(target), model, seed))
        (folders,) = run_pipelines([pipeline_of(Path(target), run_folder, model, seed)]).values()
        return print_gated(list(folders.values()), gates, as_json)
    if model is not None or seed is not None:
        raise RecipeError("--model and --seed belong to a recipe")
    from expunge.evaluate.gates import check_gates, gated, parse_gates, refuse_unasked
    from expunge.evaluate.generate import MAX_BATCH
    from expunge.evaluate.run import evaluate_model
    from expunge.evaluate.suites import parse_suites
    from expunge.report.terminal import print_numbers

    gates = parse_gates(fail_if or [])
    sections = parse_suites(names_of(suite), option or [])
    if sections:
        refuse_unasked(gates, list(sections))
    results = evaluate_model(
        target,
        sections,
        adapter=adapter,
        dtype=dtype or "float32",
        backend=backend or "torch",
        cache=cache,
        out=out,
        guard=guard,
        max_batch=max_batch or MAX_BATCH,
    )
    print_numbers(results, as_json)
    return check_gates(gates, gated(results))
