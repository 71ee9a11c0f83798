"""A run while it goes: drawn anew each second on a terminal, elsewhere a line for what moves on."""

import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from expunge.report.live import Frame, Stage, as_json, frame

SPARKS = "▁▂▃▄▅▆▇█"
_REFRESH_SECONDS = 1.0
_WIDTH = 16
_TOLD = 10
"""Lines about one piece of work, where there is no terminal to draw on."""

_EVALUATED = 4
"""Numbers of an evaluation during training that have room."""

_STYLES = {"finished": "green", "going": "bold cyan", "stopped": "bold red", "waiting": "dim"}


def watch(root: Path, *, once: bool, json_: bool, out: Console) -> None:
    """Show a run until it has ended or Ctrl-C; `once` and JSON show one frame."""
    shown = frame(root)
    if json_:
        out.print_json(json.dumps(as_json(shown)))
    elif once:
        out.print(drawn(shown))
    else:
        try:
            (_follow if out.is_terminal else _tell)(root, shown, out)
        except KeyboardInterrupt:
            return


def _follow(root: Path, shown: Frame, out: Console) -> None:
    with Live(drawn(shown), console=out, auto_refresh=False) as live:
        while shown.state != "ended":
            time.sleep(_REFRESH_SECONDS)
            shown = frame(root)
            live.update(drawn(shown), refresh=True)


def _tell(root: Path, shown: Frame, out: Console) -> None:
    said: dict[tuple[str, int], tuple[Any, ...]] = {}  # seeds have stages of one name
    before = None
    while True:
        if shown.state != before:
            before = shown.state
            out.print(Text(headline(shown)), soft_wrap=True)
        places: Counter[str] = Counter()
        for stage in shown.stages:
            places[stage.name] += 1
            one = stage.name, places[stage.name]
            share = stage.done / stage.total if stage.done and stage.total else 0.0
            mark = stage.state, stage.at, int(_TOLD * share)
            if stage.state != "waiting" and said.get(one) != mark:
                said[one] = mark
                out.print(Text(told(stage)), soft_wrap=True)
        if shown.state == "ended":
            return
        time.sleep(_REFRESH_SECONDS)
        shown = frame(root)


def told(stage: Stage) -> str:
    """A stage in one line."""
    left = _left(stage)
    parts = [stage.state, *_at(stage).splitlines(), *([f"{left} left"] if left else [])]
    return f"{_name(stage)}: {', '.join(part for part in parts if part)}"


def drawn(shown: Frame) -> Group:
    """A frame as text: the headline, and the table of the stages."""
    table = Table("stage", "", "at", "left", "losses", "GB", box=None, pad_edge=False)
    for stage in shown.stages:
        style = _STYLES[stage.state]
        cells = (
            _name(stage),
            stage.state,
            _at(stage),
            _left(stage),
            _losses(stage),
            _memory(stage),
        )
        table.add_row(*(Text(cell, style=style) for cell in cells))
    return Group(Text(headline(shown), style="bold"), table)


def headline(shown: Frame) -> str:
    """The state of the run in a sentence."""
    quiet = "" if shown.quiet_seconds is None else duration(shown.quiet_seconds)
    said = {
        "going": f"going; something moved {quiet} ago",
        "stopped": f"stopped: nothing has moved for {quiet}; the same command goes on",
        "idle": f"no stage is being built; nothing has moved for {quiet}",
        "ended": f"ended {quiet} ago; expunge report {shown.folder} prints its results",
    }[shown.state]
    return f"{shown.recipe} in {shown.folder}: {said}"


def sparkline(values: Sequence[float], width: int = _WIDTH) -> str:
    """The last values as a row of bars, the least the lowest; what is not finite is a blank."""
    shown = list(values)[-width:]
    finite = [value for value in shown if math.isfinite(value)]
    if not finite:
        return " " * len(shown)
    low, high = min(finite), max(finite)
    step = (high - low) / (len(SPARKS) - 1) or 1.0
    return "".join(SPARKS[round((v - low) / step)] if math.isfinite(v) else " " for v in shown)


def duration(seconds: float) -> str:
    """Seconds as `3 s`, `2 min 5 s` or `1:04:00`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return str(timedelta(seconds=whole))


def _name(stage: Stage) -> str:
    return stage.name if stage.seed is None else f"{stage.name} ({stage.seed})"


def _at(stage: Stage) -> str:
    if stage.state == "finished":
        return "" if stage.wall_seconds is None else f"took {duration(stage.wall_seconds)}"
    parts = [stage.at] if stage.at else []
    if stage.done is not None and stage.total is not None:
        parts.append(f"{stage.done:g}/{stage.total:g} {stage.unit}")
    if stage.evaluated:
        numbers = [(n, v) for n, v in stage.evaluated.items() if n != "step"][:_EVALUATED]
        told = ", ".join(f"{name} {value:.3g}" for name, value in numbers)
        parts.append(f"after step {stage.evaluated['step']:g}: {told}")
    if stage.state == "stopped" and stage.quiet_seconds is not None:
        parts.append(f"nothing moved for {duration(stage.quiet_seconds)}")
    return "\n".join(parts)


def _left(stage: Stage) -> str:
    if stage.state != "going" or stage.seconds_left is None:
        return ""
    return duration(stage.seconds_left)


def _losses(stage: Stage) -> str:
    return "\n".join(
        f"{name} {values[-1]:.3g} {sparkline(values)}" for name, values in stage.losses.items()
    )


def _memory(stage: Stage) -> str:
    held = [bytes_ for bytes_ in (stage.rss_bytes, stage.gpu_bytes) if bytes_]
    return " + ".join(f"{bytes_ / 1e9:.1f}" for bytes_ in held)
