"""The command line: read, run, print. No logic."""

import sys

import typer

from expunge.cli.facts import telling
from expunge.cli.models import handling
from expunge.cli.recipes import running
from expunge.errors import ExpungeError
from expunge.report.commands import reading

app = typer.Typer(
    help="Remove chosen content from a language model, keep everything else, and prove both.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for commands in (running, handling, telling, reading):
    app.add_typer(commands)


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 2, a failed gate 3."""
    try:
        app()
    except ExpungeError as error:
        print(f"expunge: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(error.exit_code)
