"""Commands that read results: each reads, asks, prints.

Each imports what it needs when it is called.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from expunge.errors import EvaluationError

reading = typer.Typer()

Json = Annotated[bool, typer.Option("--json", help="Print JSON for a script to read.")]


@reading.command()
def compare(
    results: Annotated[
        list[str],
        typer.Argument(help="Folders of expunge evaluate --out, or of runs: DIR or DIR:MODEL."),
    ],
    common: Annotated[
        bool, typer.Option("--common", help="Compare only the items that both have.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write them as one page, too.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say how each of RESULTS differs from the first, and whether that is more than noise."""
    from expunge.evaluate.compare import compare_readings
    from expunge.evaluate.readings import read_place
    from expunge.report.compared import print_comparison

    if out is not None and out.suffix != ".html":
        raise EvaluationError(f"--out takes a file that ends in .html, and {out} does not")
    readings = [one for place in results for one in read_place(place)]
    found = compare_readings(readings, common=common)
    if out is not None:
        from expunge.report.compared_page import write_comparison

        write_comparison(out, readings, found, results)
    if as_json:
        typer.echo(json.dumps([one.as_json() for one in found], indent=1, ensure_ascii=False))
        return
    for number, one in enumerate(found):
        if number:
            typer.echo()
        print_comparison(one)


@reading.command()
def leaks(
    results: Annotated[
        str, typer.Argument(help="A folder of expunge evaluate --out, or a model of a run.")
    ],
    suite: Annotated[str | None, typer.Option(help="Whose items.")] = None,
    metric: Annotated[str | None, typer.Option(help="What says how much an item leaks.")] = None,
    group: Annotated[str, typer.Option(help="Items of which groups.")] = "forget",
    low: Annotated[bool, typer.Option("--low", help="Low values are worst.")] = False,
    top: Annotated[int, typer.Option(min=1, help="How many documents.")] = 10,
    as_json: Json = False,
) -> None:
    """Show which documents still leak, the worst first."""
    from expunge.evaluate.leaks import leaks
    from expunge.evaluate.readings import read_one
    from expunge.report.compared import print_leaks

    worst = leaks(read_one(results), suite=suite, metric=metric, group=group, low=low, top=top)
    if as_json:
        typer.echo(json.dumps(worst, indent=1, ensure_ascii=False))
    else:
        print_leaks(worst)


def print_facts(facts: Mapping[str, Any], as_json: bool) -> None:
    """A line for each fact, or one object."""
    lines = "\n".join(f"{name}: {value}" for name, value in facts.items())
    typer.echo(json.dumps(facts, indent=1) if as_json else lines)
