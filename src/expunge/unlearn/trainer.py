"""The loop: gradient, clip, optimiser, log, checkpoint. A killed run goes on with the same weights.

Every step is a pure function of (weights, optimiser state, step number): its random numbers are
seeded by the step, so a checkpoint holds only tensors and a step count.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import get_total_norm

from expunge import parallel, sharding
from expunge.errors import TrainingError
from expunge.memory import hand_back
from expunge.models import Dtype
from expunge.progress import progress, say
from expunge.tracking import tell
from expunge.unlearn.checkpoints import (
    CHECKPOINT,
    LOG,
    SHORTENED,
    Saver,
    note_shortened,
    resume,
    save,
)
from expunge.unlearn.optimizer import Optimizer, Span, Stepper
from expunge.unlearn.watch import BEST, Watcher

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RELEASE_EVERY = 8
"""Steps after which freed memory is handed back, for packs of unequal size fragment the heap."""


Gradient = Callable[[int], dict[str, float]]
"""Leaves the gradient of step number n in `.grad` and returns what to log."""


class AtSteps(Protocol):
    """What is done after chosen steps, each time with a checkpoint of the step already written."""

    def start(self, step: int) -> None:
        """Training begins after this step."""

    def due(self, step: int) -> bool:
        """Whether there is something to do after this step."""
        ...

    def take(self, step: int) -> None:
        """Do it; a killed run may ask again after the same step."""


def train(
    parameters: Mapping[str, Parameter],
    gradient: Gradient,
    *,
    steps: int,
    config: Optimizer,
    seed: int,
    folder: Path,
    label: str,
    stop: Callable[[list[dict[str, float]]], bool] = lambda log: False,
    deadline: float | None = None,
    watcher: Watcher | None = None,
    others: Sequence[AtSteps] = (),
    spans: Sequence[Span] = (),
    masks: Mapping[str, Tensor] | None = None,
    state: dict[str, float] | None = None,
) -> list[dict[str, float]]:
    """Run the steps that `folder` does not hold yet; returns the log of all, a record a step.

    `stop(log)` is asked after each step and ends training early. With a `deadline` (a time of
    `time.monotonic`) the schedule is shortened to the steps that the time allows, and
    `shortened.json` says so. A `watcher` evaluates at its steps, may end training, and leaves the
    best weights. The `others` have their own steps and come before it. The optimiser starts anew
    with each of the `spans`, the last of which a deadline leaves out first. `masks` says which
    weights of a parameter may move, where not all may. `state` is what the gradient carries from
    step to step; its `rate`, where it has one, is the learning rate of the step that set it.
    """
    state = {} if state is None else state
    stepper = Stepper(parameters, config, spans or [Span(steps)], masks)
    log = resume(parameters, stepper.torch, folder, state)
    stepper.resume(len(log))
    size = 3 * sum(p.numel() * p.element_size() for p in parameters.values())
    saver = Saver(config.checkpoint_seconds, size)
    clock = _Clock(deadline, len(log))
    for other in others:
        other.start(len(log))
        if other.due(len(log)):  # it was killed between this step and what is done after it
            other.take(len(log))
    if watcher is not None:
        watcher.start(len(log))
        if watcher.due(len(log)):  # it was killed between this step and its evaluation
            watcher.look(len(log))
    planned = steps
    with progress(label, steps, "steps") as bar:
        bar(len(log))
        while len(log) < steps and not stop(log):
            number = len(log)
            if watcher is not None and watcher.exhausted:
                break
            if deadline is not None:
                steps = parallel.from_main(clock.affordable(number, planned))
            if steps < planned and not (folder / SHORTENED).exists():
                note_shortened(folder, steps, planned)
            if number >= steps:
                break
            span = stepper.begin(number, steps)
            torch.manual_seed(seed * 1_000_003 + number + (parallel.rank() << 40))
            stepper.torch.zero_grad(set_to_none=True)
            before = dict(state)
            try:
                record = gradient(number)
                stepper.hold()
                record["norm"] = _clip(parameters, config.clip)
            except TrainingError as error:
                save(parameters, stepper.torch, log, folder, before)
                raise TrainingError(
                    f"{label}, step {number + 1} of {steps}: {error}; the weights before it are "
                    f"kept in {folder / CHECKPOINT}. A lower learning rate may help"
                ) from None
            stepper.step(state.get("rate"))
            phase = {"phase": span + 1} if len(spans) > 1 else {}
            log.append({"step": number + 1, **phase, "lr": stepper.rate, **record})
            if parallel.is_main():
                with (folder / LOG).open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(log[-1]) + "\n")
                tell(label, number + 1, {n: v for n, v in log[-1].items() if n != "step"})
            bar(1, f"loss {record.get('forget', record.get('loss', math.nan)):.3f}")
            if len(log) % RELEASE_EVERY == 0:
                hand_back()
            looks = watcher is not None and watcher.due(len(log))
            due = [other for other in others if other.due(len(log))]
            if looks or due or parallel.from_main(saver.due()):
                with saver:
                    save(parameters, stepper.torch, log, folder, state)
            for other in due:
                other.take(len(log))
            if watcher is not None and looks:
                watcher.look(len(log))
    if not log:
        raise TrainingError(f"{label}: the time allows no step of training; give it more")
    if (folder / SHORTENED).exists():
        note_shortened(folder, len(log), planned)
    if watcher is not None:
        kept = watcher.restore(len(log))
        if kept is not None and kept < len(log):
            say(f"{label}: the weights after step {kept} of {len(log)} are the best")
    return log


def finish(folder: Path, *more: str) -> None:
    """Remove what goes on with a stage whose weights have been written, `more` files among it; the
    log stays."""
    if parallel.is_main():
        for file in (CHECKPOINT, BEST, *more):
            (folder / file).unlink(missing_ok=True)


def autocast(weights: torch.dtype, compute: Dtype, device: str) -> AbstractContextManager:
    """Mixed precision where the weights are float32 and the products are to be narrower."""
    if compute == "float32" or weights != torch.float32:
        return nullcontext()
    kind = {"bfloat16": torch.bfloat16, "float16": torch.float16}[compute]
    # With several ranks, weights may be sharded, and a cache would hold all of them.
    return torch.autocast(device, dtype=kind, cache_enabled=parallel.world() == 1)


def recompute_blocks(model: PreTrainedModel) -> None:
    """From now on training keeps each block's input alone, and computes the rest again."""
    if not model.supports_gradient_checkpointing:
        raise TrainingError(
            f"{type(model).__name__} cannot compute its blocks again; set optimizer.checkpointing: "
            "false, and a smaller optimizer.max_tokens to save memory"
        )
    model.activation_checkpointing_enable()
    model.disable_input_require_grads()  # frozen embeddings need no gradient


class _Clock:
    """How many steps a deadline allows, from the time that the steps so far took.

    The first steps are slow (memory is mapped in, products are set up), so the pace is judged
    without the first and not before the third; until then only a step that cannot fit is left out.
    """

    def __init__(self, deadline: float | None, first: int) -> None:
        self.deadline = deadline
        self.first = first
        self.times: list[float] = []

    def affordable(self, number: int, steps: int) -> int:
        """The least of `steps` and those that fit; `number` steps are done."""
        if self.deadline is None:
            return steps
        now = time.monotonic()
        self.times.append(now)
        left, done = self.deadline - now, number - self.first
        if left <= 0:
            return number
        if not done:
            return steps
        if done < 3:
            fastest = min(b - a for a, b in pairwise(self.times))
            return steps if fastest <= left else number
        seconds = (now - self.times[1]) / (done - 1)
        return min(steps, number + int(left / max(seconds, 1e-9)))


def _clip(parameters: Mapping[str, Parameter], limit: float | None) -> float:
    """Clip the gradient to `limit` and return its norm before."""
    gradients = [p.grad for p in parameters.values() if p.grad is not None]
    local = [sharding.local(gradient) for gradient in gradients]
    norm = get_total_norm(local)
    norm.fill_(sharding.norm_of_all(float(norm), gradients))
    if not math.isfinite(float(norm)):
        raise TrainingError("the gradient is not finite")
    if limit is not None:
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)
        for gradient in local:
            gradient.mul_(factor)
    return float(norm)
