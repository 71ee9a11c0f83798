"""The command line: read, run, print. No logic."""

import sys
from typing import Annotated, NoReturn, cast

import typer

from expunge import __version__, parallel
from expunge.cli.calibration import choosing
from expunge.cli.facts import telling
from expunge.cli.guards import guarding
from expunge.cli.models import handling
from expunge.cli.publishing import publishing
from expunge.cli.recipes import running
from expunge.errors import ExpungeError, says_full
from expunge.report.commands import reading

OUT_OF_MEMORY = (
    "out of memory; expunge plan RECIPE says what each stage needs. Less is needed with "
    "model.dtype: bfloat16, a smaller evaluate.max_batch or optimizer.max_tokens, a smaller model"
)

_Usage = cast(type[typer.BadParameter], typer.BadParameter.__base__)
"""What click raises of any wrong word; typer names this one of its errors alone."""

app = typer.Typer(
    help="Remove chosen content from a language model, keep everything else, and prove both.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for commands in (running, choosing, handling, guarding, publishing, telling, reading):
    app.add_typer(commands)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"expunge {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 2, a failed gate 3.

    Of several ranks only the first prints, and only the first that fails says why.
    """
    if not parallel.is_main():
        sys.stdout = None  # what is printed goes nowhere
    try:
        parallel.refuse_lone_launch()
        code = app(standalone_mode=False)
        if isinstance(code, int):  # of Ctrl-C; commands return nothing
            sys.exit(code)
    except _Usage as error:
        _end(_usage(error), 2)
    except ExpungeError as error:
        _end(" ".join(str(error).split()), error.exit_code)
    except (MemoryError, RuntimeError, OSError) as error:
        if says_full(error):
            _end(OUT_OF_MEMORY, 2)
        if isinstance(error, OSError) and error.filename:
            _end(f"{error.filename}: {error.strerror}", 2)
        if not isinstance(error, RuntimeError) or not parallel.lost_a_rank(error):
            raise
        _end(
            "another rank has ended or does not answer, so all end; the same command goes on from "
            "the last checkpoint",
            1,
        )


def _usage(error: typer.BadParameter) -> str:
    """A wrong word on the command line as one line, with where to look."""
    message = error.format_message()
    if not message:  # a group without a command, whose help stands on the screen
        sys.exit(2)
    where = f"{error.ctx.command_path if error.ctx else 'expunge'} --help"
    return f"{message} See {where}" if message[-1] in ".?" else f"{message}; see {where}"


def _end(message: str, code: int) -> NoReturn:
    if parallel.speaks():
        print(f"expunge: {message}", file=sys.stderr)
    sys.exit(code)
