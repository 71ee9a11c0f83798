"""Progress: on a terminal for what takes longer than two seconds, and as lines beside a stage."""

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Protocol

import psutil
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

PROGRESS = "progress.jsonl"
"""In the folder of a stage while it is built: what it is at, about a line a second."""

_KEEP_SECONDS = 1.0
_kept: ContextVar[Path | None] = ContextVar("kept", default=None)
"""The folder of the stage that is being built."""


class Bar(Protocol):
    """What work reports its advance to."""

    def __call__(self, amount: float = 1, note: str = "") -> None:
        """Say that `amount` more is done, with a short note such as a loss."""
        ...


@contextmanager
def progress(label: str, total: float, unit: str) -> Iterator[Bar]:
    """A bar on stderr for `total` units of work, where that is a terminal.

    Within `kept_in` lines are written too, terminal or not.
    """
    with _shown(label, total, unit) as shown:
        yield _keeping(shown, label, total, unit)


@contextmanager
def kept_in(folder: Path) -> Iterator[None]:
    """Within this block progress is written into `folder`; when all is done the lines go."""
    if not parallel.is_main():
        yield
        return
    before = _kept.set(folder)
    try:
        _keep()
        yield
        (folder / PROGRESS).unlink(missing_ok=True)
    finally:
        _kept.reset(before)


def _keeping(shown: Bar, label: str, total: float, unit: str) -> Bar:
    """The same bar, each second of which is a line too."""
    if _kept.get() is None:
        return shown
    done, last = 0.0, -_KEEP_SECONDS

    def advance(amount: float = 1, note: str = "") -> None:
        nonlocal done, last
        done += amount
        shown(amount, note)
        if time.monotonic() - last >= _KEEP_SECONDS or done >= total:
            last = time.monotonic()
            _keep(label=label, done=done, total=total, unit=unit, note=note)

    advance(0)
    return advance


def _keep(**said: Any) -> None:
    """Append a line; what a full disk refuses is not missed."""
    folder, torch = _kept.get(), sys.modules.get("torch")
    gpu = torch.cuda.memory_reserved() if torch and torch.cuda.is_initialized() else 0
    who = {"time": round(time.time(), 2), "pid": os.getpid(), "host": socket.gethostname()}
    memory = {"rss_bytes": psutil.Process().memory_info().rss, "gpu_bytes": gpu}
    if folder is not None:
        with contextlib.suppress(OSError), (folder / PROGRESS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({**who, **memory, **said}) + "\n")


@contextmanager
def _shown(label: str, total: float, unit: str) -> Iterator[Bar]:
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
