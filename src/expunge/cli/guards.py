"""The command that makes a guard.

It imports what it needs when it is called: torch and transformers take seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expunge.cli.options import Json
from expunge.report.commands import print_facts

guarding = typer.Typer()


@guarding.command()
def guard(
    kind: Annotated[str, typer.Argument(help="prefix, input_filter, output_filter, icul, uld …")],
    model: Annotated[str, typer.Argument(help="An id, folder or GGUF file.")],
    out: Annotated[Path, typer.Argument(help="The guard's folder to write.")],
    forget: Annotated[Path | None, typer.Option(help="Items to forget.")] = None,
    retain: Annotated[Path | None, typer.Option(help="Items to keep.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="A LoRA on the model.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("-o", "--option", help="field=value, as in YAML.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    separator: Annotated[str, typer.Option(help="Stands between prompt and answer.")] = " ",
    as_json: Json = False,
) -> None:
    """Write a guard of MODEL into OUT; helpers are given as folders: -o assistant=PATH."""
    from expunge.guard.files import guard_of_files

    made = guard_of_files(
        kind,
        model,
        out,
        options=option or [],
        forget=forget,
        retain=retain,
        adapter=adapter,
        dtype=dtype,
        separator=separator,
    )
    print_facts({"guard": str(out), "kind": made.kind}, as_json)
