"""Evaluation during training: at chosen steps, stop when it no longer helps, keep the best.

A guard stops it when too much of the retain half is lost, and keeps the last weights before. Every
evaluation is a line of `evaluations.jsonl`. The weights of the best one lie beside it until the
branch, which then consists of them, has been written.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn import Parameter

from expunge import parallel, runs, sharding
from expunge.config import Section
from expunge.disk import safetensors_errors
from expunge.errors import TrainingError
from expunge.registry import did_you_mean
from expunge.tracking import tell

EVALUATIONS = "evaluations.jsonl"

BEST = "best.safetensors"
"""The best weights so far, there until those of the stage have been written."""

LOSSES = ("nll.forget", "nll.retain")
"""What `read: losses` measures, and `read: evaluation` too."""

Measure = Callable[[], dict[str, float]]
"""Numbers of the model as it is now, by name."""


class Until(Section):
    """The stop guard: what ends training at an evaluation. An ascent without a bound needs one."""

    retain_growth: float | None = Field(default=1.1, gt=1)
    """Stop where nll.retain exceeds so many times its value before the first step; null never."""

    retain_nll: float | None = Field(default=None, gt=0)
    """Stop where nll.retain (nats a token) exceeds this; null never."""

    forget_nll: float | None = Field(default=None, gt=0)
    """Stop where nll.forget (nats a token) has come to this: it is forgotten; null never."""

    @model_validator(mode="after")
    def _some(self) -> "Until":
        if self.retain_growth is None and self.retain_nll is None and self.forget_nll is None:
            raise ValueError("until needs retain_growth, retain_nll or forget_nll")
        return self

    def broken(self, numbers: Mapping[str, float], start: Mapping[str, float]) -> bool:
        """Whether too much of the retain half is lost, against the numbers at the start."""
        limits = [self.retain_nll] if self.retain_nll else []
        limits += [self.retain_growth * start["nll.retain"]] if self.retain_growth else []
        return not all(numbers["nll.retain"] <= limit for limit in limits)

    def reached(self, numbers: Mapping[str, float]) -> bool:
        """Whether the forget half is forgotten."""
        return self.forget_nll is not None and numbers["nll.forget"] >= self.forget_nll


class Watch(Section):
    """When a branch is evaluated while it is trained, and what follows from it."""

    every: int = Field(default=0, ge=0)
    """Steps between two evaluations; 0 for none but those of `at`."""

    at: tuple[int, ...] = ()
    """Steps after which it is evaluated, besides; 0 is before the first, and never the best."""

    read: str = Field(default="losses", pattern="^(losses|evaluation)$")
    """`losses` measures nll.forget and nll.retain; `evaluation` all that the recipe evaluates, such
    as semeval.task_aggregate, semeval.mia.auc and collapse.collapsed."""

    sample: int | None = Field(default=None, ge=1)
    """About how many items of each half have their losses read, spread evenly: every second,
    third, …, at least so many; null reads all."""

    until: Until | None = None
    """When training stops, and falls back to the last weights that kept within its limits."""

    metric: str | None = None
    """The number by which the best weights are chosen; null keeps the last weights."""

    best: str | float = "max"
    """What is best of it: max, min, or the number that it should be nearest to."""

    patience: int | None = Field(default=None, ge=1)
    """Stop after so many evaluations in a row that were no better; null never stops."""

    @model_validator(mode="after")
    def _complete(self) -> "Watch":
        if not self.every and not self.at:
            raise ValueError("watch needs every or at: the steps after which to evaluate")
        if self.patience and self.metric is None:
            raise ValueError("patience needs a metric to be patient about")
        if self.metric is not None and not self.every and not any(self.at):
            raise ValueError("the best is none of before the first step; give every or a later at")
        if isinstance(self.best, str) and self.best not in ("max", "min"):
            raise ValueError("best must be max, min or a number")
        if any(step < 0 for step in self.at):
            raise ValueError("at counts steps from 1; 0 is before the first")
        if self.read == "losses" and self.metric not in (None, *LOSSES):
            raise ValueError(
                f"read: losses measures no '{self.metric}'.{did_you_mean(self.metric, LOSSES)} "
                f"Measured: {', '.join(LOSSES)}; read: evaluation measures what the recipe "
                "evaluates"
            )
        return self

    @property
    def retain_readers(self) -> tuple[str, ...]:
        """What of it reads retain items, as a recipe names it."""
        limits = [] if self.until is None else ["retain_growth", "retain_nll"]
        read = [f".until.{name}" for name in limits if getattr(self.until, name) is not None]
        aggregates = ("semeval.task_aggregate", "semeval.final")
        if self.metric is not None and ("retain" in self.metric or self.metric in aggregates):
            read.append(f".metric ({self.metric})")
        return tuple(read)

    def check(self, steps: int, label: str) -> None:
        """Refuse what a branch of so many steps would never come to; a guard looks at its end."""
        last = max(self.every if self.until is None else 0, *self.at, 0)
        if last > steps:
            raise TrainingError(f"{label}: watch names step {last}, and the branch has {steps}")

    def due(self, step: int) -> bool:
        """Whether to evaluate after this step, counted from 1."""
        start = not step and self.until is not None  # what the guard compares with
        return start or step in self.at or bool(self.every and step and step % self.every == 0)

    def looks(self, steps: int) -> list[int]:
        """The steps after which a branch of so many is evaluated, if nothing ends it before."""
        due = [step for step in range(steps + 1) if self.due(step)]
        return [*due, steps] if self.until is not None and due[-1] < steps else due

    def merit(self, value: float) -> float:
        """The greater the better."""
        if isinstance(self.best, str):
            return value if self.best == "max" else -value
        return -abs(value - self.best)


class Watcher:
    """The evaluations of one branch so far, and the weights of the best."""

    def __init__(
        self,
        config: Watch,
        measure: Measure,
        parameters: Mapping[str, Parameter],
        folder: Path,
        label: str = "watch",
    ) -> None:
        self.config, self.measure, self.parameters = config, measure, parameters
        self.folder, self.label = folder, label
        path = folder / EVALUATIONS
        self.found = runs.read_json_lines(path) if path.exists() else []

    def start(self, step: int) -> None:
        """Training begins after this step: what was found beyond it is found again."""
        self.found = [found for found in self.found if found["step"] <= step]
        self._write()

    def due(self, step: int) -> bool:
        """Whether to evaluate the weights after this step; not twice."""
        return self.config.due(step) and all(found["step"] != step for found in self.found)

    def look(self, step: int) -> None:
        """Evaluate, and keep the weights if they are the best so far."""
        numbers = parallel.from_main(self.measure())
        tell(self.label, step, numbers)
        name = self.config.metric
        if name is not None and not math.isfinite(numbers.get(name, math.nan)):
            known = sorted(n for n, value in numbers.items() if math.isfinite(value))
            raise TrainingError(
                f"watch.metric: nothing measured '{name}'.{did_you_mean(name, known)} "
                f"Measured: {', '.join(known)}"
            )
        self.found.append({"step": step, "numbers": numbers})
        if self._best_step() == step:
            self._keep(step)
        self._write()

    @property
    def exhausted(self) -> bool:
        """Whether patience has run out, or the guard stops training."""
        guard = self.config.until
        if guard and any(
            self._broken(one) or guard.reached(one["numbers"]) for one in self._trained
        ):
            return True
        best = self._best_step()
        if self.config.patience is None or best is None:
            return False
        return sum(found["step"] > best for found in self.found) >= self.config.patience

    @torch.no_grad()
    def restore(self, last: int) -> int | None:
        """Put the best weights back; the step that they are of, or None to keep the last.

        A guard looks at the weights after the `last` step too.
        """
        if self.config.until and all(found["step"] != last for found in self.found):
            self.look(last)
        step = self._best_step()
        if step is None and self.config.until:
            raise TrainingError(
                f"watch.until: nll.retain was beyond its limit at the first evaluation, after step "
                f"{self._trained[0]['step']}; evaluate earlier (watch.every), or lower the rate"
            )
        if step is None or (self.config.metric is None and step == last):
            return None
        try:
            with safe_open(self.folder / BEST, "pt") as stored:
                if stored.metadata()["step"] != str(step):  # a later one was cut off with its line
                    raise self._unusable(f"is not of step {step}, the best of {EVALUATIONS}")
                for name, parameter in self.parameters.items():
                    held = parameter.detach()
                    held.copy_(sharding.like(stored.get_tensor(name), held))
        except (SafetensorError, FileNotFoundError) as error:
            raise self._unusable(f"cannot be read ({error})") from None
        parallel.barrier()  # before the first rank removes what the others read
        return step

    def _unusable(self, why: str) -> TrainingError:
        return TrainingError(
            f"{self.folder / BEST} {why}; remove {self.folder} to train the branch anew"
        )

    def _keep(self, step: int) -> None:
        """Write the weights, gathered from all ranks."""
        tensors = {}
        for name, parameter in self.parameters.items():
            whole = sharding.whole(parameter.detach()).view(sharding.shape_of(parameter))
            if parallel.is_main():
                tensors[name] = whole.contiguous()
        if parallel.is_main():
            with runs.replacing(self.folder / BEST) as temporary, safetensors_errors():
                save_file(tensors, temporary, metadata={"step": str(step)})
        parallel.barrier()

    @property
    def _trained(self) -> list[dict[str, Any]]:
        """The evaluations, but for that of the start."""
        return [found for found in self.found if found["step"]]

    def _broken(self, found: dict[str, Any]) -> bool:
        guard = self.config.until
        return guard is not None and guard.broken(found["numbers"], self.found[0]["numbers"])

    def _best_step(self) -> int | None:
        """The step of the best evaluation within the guard's limits, the first of equals; without
        a metric the last within them; None where nothing says."""
        name, good = self.config.metric, [one for one in self._trained if not self._broken(one)]
        if not good or (name is None and self.config.until is None):
            return None
        if name is None:
            return good[-1]["step"]
        return max(good, key=lambda found: self.config.merit(found["numbers"][name]))["step"]

    def _write(self) -> None:
        if not parallel.is_main():
            return
        lines = (json.dumps(found) + "\n" for found in self.found)
        runs.write_text(self.folder / EVALUATIONS, "".join(lines))
