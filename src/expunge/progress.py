"""Progress on a terminal: rate and time left for whatever takes longer than two seconds."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from expunge import parallel

PATIENCE_SECONDS = 2.0


class Bar(Protocol):
    """What work reports its advance to."""

    def __call__(self, amount: float = 1, note: str = "") -> None:
        """Say that `amount` more is done, with a short note such as a loss."""
        ...


@contextmanager
def progress(label: str, total: float, unit: str) -> Iterator[Bar]:
    """A bar on stderr for `total` units of work; nothing where stderr is not a terminal."""
    if not sys.stderr.isatty() or not parallel.is_main():
        yield lambda amount=1, note="": None
        return
    display = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(unit),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        transient=True,
    )
    start, shown = time.monotonic(), False
    task = display.add_task(label, total=total, note="")

    def advance(amount: float = 1, note: str = "") -> None:
        nonlocal shown
        display.update(task, advance=amount, note=note)
        if not shown and time.monotonic() - start > PATIENCE_SECONDS:
            display.start()
            shown = True

    try:
        yield advance
    finally:
        if shown:
            display.stop()


def say(message: str) -> None:
    """One line on stderr, terminal or not: something the user should know of the data."""
    if parallel.is_main():
        print(f"expunge: {message}", file=sys.stderr)


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f} {self.unit}/s" if task.speed else "")
