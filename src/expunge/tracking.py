"""Live trackers: losses, evaluations and scores of a run, told while they are measured.

What is told decides nothing: it is no part of a recipe and of no stage's key. The trackers are
accelerate's, which know TensorBoard, MLflow and Weights & Biases.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge import parallel
from expunge.errors import RecipeError
from expunge.registry import lookup

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker


@dataclass(frozen=True)
class Kind:
    """One row: what it needs, and how it counts."""

    package: str
    """What pip installs and Python imports."""

    own_steps: bool = True
    """Whether each stage may count its steps from 1; else the step is told as one more number."""


@dataclass
class Tracked:
    """The trackers of a run, opened when there is something to tell."""

    names: Sequence[str]
    out: Path
    run: str
    config: Mapping[str, Any]
    opened: dict[str, GeneralTracker] = field(default_factory=dict)

    def tell(self, stage: str, step: int, numbers: Mapping[str, float]) -> None:
        """Tell every tracker numbers of a stage after a step, as `STAGE/NAME`."""
        place = re.sub(r"[^\w.]+", "-", stage).strip("-")
        told = {f"{place}/{name}": float(value) for name, value in numbers.items()}
        for name in self.names:
            if name not in self.opened:
                self.opened[name] = _opened(name, self)
            if TRACKERS[name].own_steps:
                self.opened[name].log(told, step=step)
            else:
                self.opened[name].log({**told, f"{place}/step": step})

    def finish(self) -> None:
        """Close what was opened."""
        for tracker in self.opened.values():
            tracker.finish()


_tracked: ContextVar[Tracked | None] = ContextVar("tracked", default=None)


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that there is not, and one whose package is not installed."""
    for name in names:
        package = lookup(TRACKERS, name, "tracker").package
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:  # a folder of that name is no package
            raise RecipeError(f"--track {name} needs the package {package}: pip install {package}")


@contextmanager
def tracked(names: Sequence[str], out: Path, run: str, config: Mapping[str, Any]) -> Iterator[None]:
    """Within this block what is told goes to the trackers called `names`, from the first rank.

    `run` is the recipe's name; `config` is the recipe, whose fields are told by dotted names.
    """
    check_trackers(names)
    if not names:
        yield
        return
    from accelerate import PartialState

    parallel.barrier()  # the ranks know each other before accelerate asks
    PartialState()  # accelerate's trackers log through it
    made = Tracked(tuple(dict.fromkeys(names)), out, run, flat(config))
    before = _tracked.set(made if parallel.is_main() else None)
    try:
        yield
    finally:
        _tracked.reset(before)
        made.finish()


def tell(stage: str, step: int, numbers: Mapping[str, float]) -> None:
    """Tell the trackers of this run, if it has any, numbers of a stage after a step."""
    now = _tracked.get()
    if now is not None:
        now.tell(stage, step, numbers)


def flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by dotted names; a list is told as JSON."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            found[prefix + name] = json.dumps(value)
        else:
            found[prefix + name] = value
    return found


def _opened(name: str, told: Tracked) -> GeneralTracker:
    from accelerate import tracking

    if name == "tensorboard":
        made = tracking.TensorBoardTracker(name, logging_dir=told.out)
    elif name == "mlflow":
        made = tracking.MLflowTracker(experiment_name=told.run, run_name=str(told.out))
    else:
        made = tracking.WandBTracker(told.run, dir=str(told.out))
    made.start()
    made.store_init_configuration(dict(told.config))
    return made


TRACKERS = {
    "tensorboard": Kind("tensorboard"),
    "mlflow": Kind("mlflow"),
    "wandb": Kind("wandb", own_steps=False),
}
"""Logs of tensorboard go into the run folder's `tensorboard/`; where the others write, and as whom,
their own settings say (MLFLOW_TRACKING_URI, WANDB_MODE and the like)."""
