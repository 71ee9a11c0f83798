"""Commands that choose a merge, and take one that was tried.

Each imports what it needs when it is called: torch and transformers take seconds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from expunge.cli.options import Json, Seed, names_of
from expunge.errors import RecipeError
from expunge.report.commands import print_facts

choosing = typer.Typer()

RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder with branches.")]
Name = Annotated[str, typer.Option(help="The recipe's calibration to start from, or a new name.")]
CALIBRATED = "calibrated"


@choosing.command()
def calibrate(
    run: RunDir,
    name: Name = CALIBRATED,
    objective: Annotated[
        str | None, typer.Option(help="balanced, final, aggregate, membership, two_sided …")
    ] = None,
    floors: Annotated[
        str | None, typer.Option(help="What must be kept: retain=0.9,neutral=1.15,mmlu=0.01.")
    ] = None,
    of: Annotated[str | None, typer.Option(help="Only these branches: deep,shallow.")] = None,
    methods: Annotated[str | None, typer.Option(help="Merge methods: linear,ties.")] = None,
    attacks: Annotated[str | None, typer.Option(help="Membership attacks to balance.")] = None,
    trials: Annotated[int | None, typer.Option(help="Lines that are tried.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("-o", "--option", help="field=value, as in YAML.")
    ] = None,
    storage: Annotated[str | None, typer.Option(help="Optuna's storage, for many workers.")] = None,
    seed: Seed = None,
    every: Annotated[bool, typer.Option("--all", help="Show every candidate.")] = False,
    as_json: Json = False,
) -> None:
    """Find the merge of RUN's branches whose forgotten text looks like text never seen.

    With --json a line for each seed: what RUN/calibration/ keeps of it.
    """
    from expunge.choosing import calibrate_run, changed
    from expunge.config import read_options
    from expunge.pipeline import Pipeline
    from expunge.report.calibration import calibration_rows, calibration_sentences
    from expunge.report.terminal import console, print_rows

    pipeline = Pipeline.of_run(run)
    given = {"objective": objective, "trials": trials, "storage": storage}
    lists = {"of": of, "methods": methods, "attacks": attacks}
    changes: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    changes |= {k: tuple(names_of(v)) for k, v in lists.items() if v is not None}
    changes |= read_options(option or [], "--option")
    if floors is not None:
        changes["floors"] = read_options(floors.split(","), "--floors")
    config = changed(pipeline.recipe, name, changes)
    failed = []
    for number in pipeline.recipe.seeds if seed is None else (pipeline.seed(seed),):
        found, error = calibrate_run(pipeline, name, config, number)
        if as_json:
            typer.echo(json.dumps(found, ensure_ascii=False))
        else:
            print_rows(calibration_rows(found, every=every), as_json=False)
            for sentence in calibration_sentences(found):
                console().print(sentence, markup=False)
        failed += [] if error is None else [error]
    if failed:
        raise failed[0]


@choosing.command()
def pick(
    run: RunDir,
    point: Annotated[int, typer.Option(help="Its number, as expunge calibrate lists them.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to write.")],
    name: Name = CALIBRATED,
    form: Annotated[
        str, typer.Option("--as", metavar="adapter|model", help="What to write.")
    ] = "adapter",
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Write a candidate of RUN's last calibration as an adapter or a whole model."""
    from expunge.choosing import pick_point
    from expunge.pipeline import Pipeline

    if form not in ("adapter", "model"):
        raise RecipeError(f"--as is adapter or model, not '{form}'")
    pipeline = Pipeline.of_run(run, build=False)
    number = pipeline.seed(seed)
    label = pick_point(pipeline, name, number, point, out, output=form)
    print_facts({form: str(out), "point": point, "merge": label}, as_json)
