"""Commands that say what is there: results, methods, the machine; and that make data.

Each imports what it needs when it is called: torch and transformers take seconds.
"""

from __future__ import annotations

import json
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from expunge.cli.options import FailIf, Json, Seed, gates_of, names_of
from expunge.report.commands import print_facts

telling = typer.Typer()
data = typer.Typer(help="Make data sets.", no_args_is_help=True)
telling.add_typer(data, name="data")


@telling.command(name="report")
def print_report(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the page into this folder, not the run's."),
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    rows: Annotated[
        Path | None, typer.Option(help="Add a row for each model to this docs/results.json.")
    ] = None,
    fail_if: FailIf = None,
    as_json: Json = False,
) -> None:
    """Print the results of a run, finished or as far as it got, and write its page."""
    from expunge.evaluate.gates import check_runs
    from expunge.report.board import add_rows, rows_of
    from expunge.report.terminal import print_found
    from expunge.reporting import write_reports

    gates = gates_of(fail_if)
    written = write_reports(run, out)
    for material, page in written:
        if rows is not None:
            add_rows(rows, rows_of(material.results))
        if as_json:
            typer.echo(material.results.model_dump_json(indent=1))
        else:
            print_found(material.results, page, missing=material.missing)
        if show:
            webbrowser.open(page.absolute().as_uri())
    found = {str(page.parent): material.results for material, page in written}
    check_runs(gates, {name: one.model_dump()["models"] for name, one in found.items()})


@telling.command()
def watch(
    run: Annotated[Path, typer.Argument(help="A run folder, whether the run goes or not.")],
    once: Annotated[bool, typer.Option("--once", help="Print how it stands, and end.")] = False,
    as_json: Json = False,
) -> None:
    """Show a run while it goes: stages, steps, losses, memory, time left. Ctrl-C leaves."""
    from expunge.report.dashboard import watch
    from expunge.report.terminal import console

    watch(run, once=once, json_=as_json, out=console())


@telling.command()
def analyse(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    only: Annotated[
        str | None, typer.Option(help="Only these, by comma: weights,trajectories,failures.")
    ] = None,
    seed: Seed = None,
    generations: Annotated[
        bool, typer.Option(help="Let snapshots write too, beside scoring given answers.")
    ] = False,
    generate_limit: Annotated[
        int | None, typer.Option(min=1, help="Items that a snapshot writes for each term.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Analyse what is finished of a run: weights, trajectories, failures. Nothing is trained."""
    from expunge.analysing.run import analyse_run, overview
    from expunge.report.terminal import console, print_rows

    limit = generate_limit
    told = {"seed": seed, "generations": generations, "generate_limit": limit}
    chosen = names_of(only)
    folder = analyse_run(run, chosen, **told)
    rows = overview(folder, chosen)
    if as_json:
        return print_rows(rows, as_json)
    print_rows([{"table": Path(row["file"]).name, "rows": row["rows"]} for row in rows], as_json)
    console().print(f"In {folder}, each beside its JSON.", markup=False, soft_wrap=True)
    return None


@data.command(name="synthesize")
def synthesize_data(
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same files.")] = 42,
    as_json: Json = False,
) -> None:
    """Write LUME-shaped synthetic forget, retain, member, non-member and neutral sets."""
    from expunge.data.synthetic import Synthetic, synthesize

    counts = synthesize(Synthetic(seed=seed), out, replace=False)
    print_facts(counts, as_json)


@data.command()
def standins(
    file: Annotated[str, typer.Argument(help="Documents, or a forget set; data:FILE too.")],
    out: Annotated[Path, typer.Argument(help="The JSON lines to write.")],
    count: Annotated[int, typer.Option(help="How many to make.")],
    seed: Annotated[int, typer.Option(help="Same seed, same file.")] = 0,
    as_json: Json = False,
) -> None:
    """Write stand-ins for unseen texts: the documents of FILE with all their facts replaced.

    Same form, other facts. A model that learnt the documents knows the frames of their sentences
    too, so an AUC against stand-ins is biased.
    """
    from expunge.data.standins import write_stand_ins

    print_facts(write_stand_ins(file, out, count=count, seed=seed), as_json)


@telling.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="All that is known of this one.")] = None,
    as_json: Json = False,
) -> None:
    """List every method: objectives, losses, steps, masks, schedules, edits, merges, guards …"""
    from expunge.methods import method_card, method_rows, methods_table, rows_called
    from expunge.report.terminal import console

    rows = method_rows() if name is None else rows_called(name)
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    elif name is None:
        console().print(methods_table())
    else:
        typer.echo("\n\n".join(map(method_card, rows)))


@telling.command()
def doctor(
    recipe: Annotated[Path | None, typer.Argument(help="Say what of this recipe fits.")] = None,
    as_json: Json = False,
) -> None:
    """Say what this machine has, and what of a recipe fits on it."""
    from expunge.doctor import examine
    from expunge.recipe import load_recipe

    facts = examine(load_recipe(recipe) if recipe else None)
    print_facts(facts, as_json)


@telling.command()
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from expunge.recipe import Recipe

    typer.echo(json.dumps(Recipe.model_json_schema(), indent=1))


@telling.command(hidden=True)
def docs(check: Annotated[bool, typer.Option(help="Only compare.")] = False) -> None:
    """Regenerate docs/methods.md, docs/metrics.md and docs/results.md."""
    from expunge.evaluate.suites import SUITES
    from expunge.methods import every_method
    from expunge.report.docs import write_docs
    from expunge.report.metrics_page import suite_rows

    write_docs(every_method(), suite_rows(SUITES), check=check)
