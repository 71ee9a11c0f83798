"""A run as its files show it now: what is finished, what is being built, what waits. Reads only.

Imports nothing that takes long. A line that is half written is left out.
"""

import json
import math
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from expunge.config import read_yaml
from expunge.errors import RunError
from expunge.progress import PROGRESS

LOG, EVALUATIONS = "log.jsonl", "evaluations.jsonl"
"""As `unlearn.checkpoints` and `unlearn.watch` name them, whose import takes seconds."""

QUIET_SECONDS = 60.0
"""Another machine's process cannot be looked for: it counts as gone after so long a silence."""

LOSSES = 60
"""Last losses of each kind that are told."""

_TAIL_BYTES = 1 << 16
_NO_LOSS = ("step", "phase", "lr", "norm", "unguarded")
_PARTIAL = ".partial"

StageState = Literal["finished", "going", "stopped", "waiting"]
RunState = Literal["going", "stopped", "idle", "ended"]


@dataclass(frozen=True)
class Stage:
    """One stage of a run, now."""

    name: str
    state: StageState
    seed: int | None = None
    wall_seconds: float | None = None
    """What it took, once finished."""

    quiet_seconds: float | None = None
    """How long ago a file of it last changed."""

    at: str = ""
    """What it is at, in its own words."""

    done: float | None = None
    total: float | None = None
    unit: str = ""
    seconds_left: float | None = None
    """Of what it is `at`, as fast as in the last lines."""

    losses: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """The last of each kind, the newest at the end."""

    evaluated: Mapping[str, float] = field(default_factory=dict)
    """The last evaluation during training, its `step` among the numbers."""

    rss_bytes: int | None = None
    gpu_bytes: int | None = None


@dataclass(frozen=True)
class Frame:
    """A run, now."""

    folder: str
    recipe: str
    state: RunState
    quiet_seconds: float | None
    """How long ago anything moved."""

    stages: tuple[Stage, ...]


def frame(root: Path, now: float | None = None) -> Frame:
    """What a run folder shows at the time `now`; a folder that holds no run is a `RunError`."""
    now = time.time() if now is None else now
    mark = _json(root / "run.json")
    if mark is None or not (root / "recipe.yaml").is_file():
        lacking = "run.json" if mark is None else "recipe.yaml"
        raise RunError(f"{root} is no run folder: it holds no {lacking}{_inside(root)}")
    store = root / mark["store"] if mark.get("store") else root
    recipe = read_yaml(root / "recipe.yaml")
    stages = tuple(_stages(store, recipe, now))
    reports = [root / "results.json", *root.glob("seed-*/results.json")]
    written = sum(path.is_file() for path in reports) >= len(recipe.get("seeds") or (1,))
    state = _state(stages, written)
    moving = [store / "stages", *(store / "stages").glob(f"*{_PARTIAL}/*")]
    # Stages that are made of a run that has ended, of an analysis say, are none of its own.
    quiet = _quiet(reports if state == "ended" else [*moving, *reports], now)
    return Frame(str(root), str(mark["recipe"]), state, quiet, stages)


def as_json(shown: Frame) -> dict[str, Any]:
    """A frame for a script: numbers that are none are null."""
    return _finite({**vars(shown), "stages": [vars(stage) for stage in shown.stages]})


def _state(stages: tuple[Stage, ...], written: bool) -> RunState:
    states = {stage.state for stage in stages}
    if "going" in states:
        return "going"
    if "stopped" in states:
        return "stopped"
    return "ended" if written and "waiting" not in states else "idle"


def _stages(store: Path, recipe: Mapping[str, Any], now: float) -> Iterator[Stage]:
    """Every stage that there is of those that a recipe names, in its order, then what waits."""
    found: dict[str, list[Stage]] = {}
    for folder in sorted((store / "stages").glob("*-*"), key=_changed):
        name = folder.name.removesuffix(_PARTIAL).rpartition("-")[0]
        seen = _begun(name, folder, now) if folder.suffix == _PARTIAL else _finished(name, folder)
        if seen is not None:
            found.setdefault(name, []).append(seen)
    planned = dict(_planned(recipe))
    for name, count in planned.items():
        yield from found.get(name, ())
        yield from [Stage(name, "waiting")] * max(0, count - len(found.get(name, ())))


def _planned(recipe: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """The stages of a recipe and how many there are of each: one for each seed."""
    seeds = len(recipe.get("seeds") or (42,))
    unscored = recipe.get("unscored") or ()
    parts = ("branches", "merges", "calibrate", "edits", "guards")
    made = [name for part in parts for name in recipe.get(part) or ()]
    tuned = recipe.get("tune") is not None
    if (recipe.get("data") or {}).get("synthetic") is not None:
        yield "data", 1
    for name in ("alternates", "levels"):  # not every recipe has them; those made are shown
        yield name, 0
    for name in (*(("original",) if tuned else ()), "target", *made):
        if name in made or (name == "target" and tuned):
            yield name, seeds if name in made else 1
        if name not in unscored:
            yield f"evaluate-{name}", seeds if name in made else 1
            if recipe.get("relearn") is not None and name not in (recipe.get("guards") or ()):
                yield f"relearn-{name}", seeds if name in made else 1


def _finished(name: str, folder: Path) -> Stage | None:
    said = _json(folder / "stage.json")
    if said is None:
        return None
    seed = (said.get("inputs") or {}).get("seed")
    took, peak = said.get("wall_seconds"), said.get("peak_rss_bytes")
    return Stage(name, "finished", int(seed) if seed else None, wall_seconds=took, rss_bytes=peak)


def _begun(name: str, folder: Path, now: float) -> Stage:
    lines = tail(folder / PROGRESS)
    last = lines[-1] if lines else {}
    quiet = _quiet([folder, *folder.iterdir()] if folder.is_dir() else [], now)
    evaluations = tail(folder / EVALUATIONS)
    evaluated: dict[str, float] = {}
    if evaluations:
        evaluated = {"step": evaluations[-1]["step"], **evaluations[-1]["numbers"]}
    return Stage(
        name,
        "going" if is_alive(last, quiet) else "stopped",
        quiet_seconds=quiet,
        at=str(last.get("label", "")),
        done=last.get("done"),
        total=last.get("total"),
        unit=str(last.get("unit", "")),
        seconds_left=seconds_left(lines),
        losses=losses(tail(folder / LOG)),
        evaluated=evaluated,
        rss_bytes=last.get("rss_bytes"),
        gpu_bytes=last.get("gpu_bytes") or None,
    )


def is_alive(line: Mapping[str, Any], quiet: float | None) -> bool:
    """Whether the process that wrote a line still runs: looked for here, guessed elsewhere."""
    if line.get("host") != socket.gethostname():
        return quiet is not None and quiet < QUIET_SECONDS
    try:
        process = psutil.Process(line["pid"])
        born, status = process.create_time(), process.status()
    except psutil.Error:
        return False
    return born <= line["time"] + 1 and status != psutil.STATUS_ZOMBIE


def seconds_left(lines: list[dict[str, Any]]) -> float | None:
    """(total - done) / rate, over the last lines of one piece of work by one process."""
    if not lines or not lines[-1].get("total"):
        return None
    last, first = lines[-1], lines[-1]
    for line in reversed(lines):
        if any(line.get(name) != last.get(name) for name in ("pid", "label", "total")):
            break
        if line["done"] > first["done"]:  # the same work was begun again
            break
        if line["done"]:  # the time before the first is that of setting up
            first = line
    seconds, done = last["time"] - first["time"], last["done"] - first["done"]
    if seconds <= 0 or done <= 0:
        return None
    return (last["total"] - last["done"]) * seconds / done


def losses(log: list[dict[str, Any]]) -> dict[str, tuple[float, ...]]:
    """The last losses of each kind; only the sums of the halves, where there are such."""
    if not log:
        return {}
    names = [name for name in log[-1] if name not in _NO_LOSS]
    sums = [name for name in names if name in ("loss", "forget", "retain")]
    chosen = sums or names[:3]
    return {name: tuple(r[name] for r in log[-LOSSES:] if name in r) for name in chosen}


def tail(path: Path) -> list[dict[str, Any]]:
    """The last whole lines of a JSONL file; none where there is no file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:  # it was finished and taken away just now
        return []
    return [line for line in map(_parsed, text.splitlines()) if line is not None]


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None


def _json(path: Path) -> dict[str, Any] | None:
    try:
        return _parsed(path.read_text(encoding="utf-8"))
    except OSError:
        return None


def _quiet(paths: list[Path], now: float) -> float | None:
    changed = [time for time in map(_changed, paths) if time]
    return max(0.0, now - max(changed)) if changed else None


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _inside(root: Path) -> str:
    """The runs that a folder of several holds."""
    names = sorted(path.parent.name for path in root.glob("*/run.json"))
    return f"; it holds the runs {', '.join(names)}: name one" if names else ""


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
