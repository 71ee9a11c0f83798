"""Commands that hand a model on: its card, and its upload to the Hub.

Each imports what it needs when it is called: torch and transformers take seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expunge.cli.options import Json, Seed
from expunge.report.commands import print_facts

publishing = typer.Typer()

RunDir = Annotated[Path, typer.Argument(help="A run folder.")]
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="A branch, merge or edit of it.")]


@publishing.command()
def card(
    run: RunDir,
    model: ModelName,
    write: Annotated[
        bool, typer.Option("--write", help="Write it beside the model, not to the terminal.")
    ] = False,
    seed: Seed = None,
) -> None:
    """Print the model card of a finished model of RUN: what it is, what was measured of it."""
    from expunge import runs
    from expunge.publish import card

    text, path = card(run, model, seed=seed)
    if write:
        runs.write_text(path, text)
        print_facts({"card": str(path)}, as_json=False)
    else:
        typer.echo(text, nl=False)


@publishing.command()
def push(
    run: RunDir,
    model: ModelName,
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the Hub; made if it is not there.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository a private one.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Upload to this branch.")] = None,
    base: Annotated[
        str | None, typer.Option(help="OWNER/NAME of an adapter's base, where only RUN has it.")
    ] = None,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Even if it collapsed or was never evaluated.")
    ] = False,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Upload a finished model of RUN, with its card, to the Hugging Face Hub."""
    from expunge.publish import Place, push

    place = Place(repo, private=private, revision=revision)
    print_facts(push(run, model, place, seed=seed, base=base, anyway=anyway), as_json)
