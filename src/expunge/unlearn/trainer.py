"""The loop: gradient, clip, AdamW, log, checkpoint. A killed run goes on with the same weights.

Every step is a pure function of (weights, optimiser state, step number): its random numbers are
seeded by the step, so a checkpoint holds only tensors and a step count.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path

import torch
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Parameter

from expunge import runs
from expunge.config import Section
from expunge.errors import TrainingError
from expunge.memory import release_freed_memory
from expunge.models import Dtype
from expunge.progress import progress

CHECKPOINT, LOG = "checkpoint.safetensors", "log.jsonl"

SHORTENED = "shortened.json"
"""Written where a deadline cut the schedule: the steps that were done, and of how many."""

RELEASE_EVERY = 8
"""Steps after which freed memory is handed back, for packs of unequal size fragment the heap."""


class Optimizer(Section):
    """AdamW with a linear schedule."""

    lr: float = Field(default=1e-4, gt=0)
    """Peak learning rate."""

    warmup: float = Field(default=0.0, ge=0, le=1)
    """Share of the steps over which the rate rises from 0; it then falls linearly to 0."""

    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay."""

    clip: float | None = Field(default=1.0, gt=0)
    """Largest norm of the gradient; null never clips."""

    compute: Dtype = "bfloat16"
    """Type of the matrix products while weights are kept in float32 (autocast)."""

    max_tokens: int = Field(default=2048, ge=1)
    """Tokens forwarded at once; memory grows with it, results do not change."""

    checkpoint_seconds: float = Field(default=30, ge=0)
    """Write a checkpoint when this long has passed since the last, or longer where writing is
    slow, so that it takes at most a twentieth of the time; 0 writes one every step."""


Gradient = Callable[[int], dict[str, float]]
"""Leaves the gradient of step number n in `.grad` and returns what to log."""


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
) -> list[dict[str, float]]:
    """Run the steps that `folder` does not hold yet; returns the log of all, a record a step.

    `stop(log)` is asked after each step and ends training early. With a `deadline` (a time of
    `time.monotonic`) the schedule is shortened to the steps that the time allows, and
    `shortened.json` says so.
    """
    optimizer = torch.optim.AdamW(
        list(parameters.values()), lr=config.lr, weight_decay=config.weight_decay, fused=True
    )
    log = _resume(parameters, optimizer, folder)
    size = 3 * sum(p.numel() * p.element_size() for p in parameters.values())
    saver = _Saver(config.checkpoint_seconds, size)
    clock = _Clock(deadline, len(log))
    planned = steps
    with progress(label, steps, "steps") as bar:
        bar(len(log))
        while len(log) < steps and not stop(log):
            number = len(log)
            steps = clock.affordable(number, planned)
            if steps < planned and not (folder / SHORTENED).exists():
                _note_shortened(folder, steps, planned)
            if number >= steps:
                break
            _set_rate(optimizer, config, number, steps)
            torch.manual_seed(seed * 1_000_003 + number)
            optimizer.zero_grad(set_to_none=True)
            try:
                record = gradient(number)
                record["norm"] = _clip(parameters, config.clip)
            except TrainingError as error:
                _save(parameters, optimizer, log, folder)
                raise TrainingError(
                    f"{label}, step {number + 1} of {steps}: {error}; the weights before it are "
                    f"kept in {folder / CHECKPOINT}. A lower learning rate may help"
                ) from None
            optimizer.step()
            log.append({"step": number + 1, "lr": optimizer.param_groups[0]["lr"], **record})
            with (folder / LOG).open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(log[-1]) + "\n")
            bar(1, f"loss {record.get('forget', record.get('loss', math.nan)):.3f}")
            if len(log) % RELEASE_EVERY == 0:
                release_freed_memory()
            if saver.due():
                with saver:
                    _save(parameters, optimizer, log, folder)
    if not log:
        raise TrainingError(f"{label}: the time allows no step of training; give it more")
    if (folder / SHORTENED).exists():
        _note_shortened(folder, len(log), planned)
    return log


def finish(folder: Path) -> None:
    """Remove the checkpoint of a stage whose weights have been written; the log stays."""
    (folder / CHECKPOINT).unlink(missing_ok=True)


def autocast(weights: torch.dtype, compute: Dtype, device: str) -> AbstractContextManager:
    """Mixed precision where the weights are float32 and the products are to be narrower."""
    if compute == "float32" or weights != torch.float32:
        return nullcontext()
    kind = {"bfloat16": torch.bfloat16, "float16": torch.float16}[compute]
    return torch.autocast(device, dtype=kind)


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


class _Saver:
    """When to write a checkpoint: at an interval, and never more than a twentieth of the time."""

    def __init__(self, interval: float, size_bytes: int) -> None:
        first_guess = size_bytes / 100e6  # seconds, on a slow disk
        self.interval = max(interval, 20 * first_guess) if interval else 0.0
        self.last = self.start = time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self.last >= self.interval

    def __enter__(self) -> None:
        self.start = time.monotonic()

    def __exit__(self, *error: object) -> None:
        self.last = time.monotonic()
        if self.interval:
            self.interval = max(self.interval, 20 * (self.last - self.start))


def _note_shortened(folder: Path, steps: int, planned: int) -> None:
    runs.write_json(folder / SHORTENED, {"steps": steps, "of": planned})


def _set_rate(optimizer: torch.optim.Optimizer, config: Optimizer, step: int, total: int) -> None:
    warm = math.ceil(config.warmup * total)
    factor = step / warm if step < warm else (total - step) / max(1, total - warm)
    for group in optimizer.param_groups:
        group["lr"] = config.lr * factor


def _clip(parameters: Mapping[str, Parameter], limit: float | None) -> float:
    """Clip the gradient to `limit` and return its norm before."""
    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), math.inf if limit is None else limit)
    if not math.isfinite(float(norm)):
        raise TrainingError("the gradient is not finite")
    return float(norm)


def _save(
    parameters: Mapping[str, Parameter],
    optimizer: torch.optim.Optimizer,
    log: list[dict[str, float]],
    folder: Path,
) -> None:
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"{name}|weight"] = parameter.detach()
        for part in ("exp_avg", "exp_avg_sq"):
            if part in optimizer.state[parameter]:
                tensors[f"{name}|{part}"] = optimizer.state[parameter][part]
    with runs.replacing(folder / CHECKPOINT) as temporary, runs.safetensors_errors():
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, temporary, metadata={"step": str(len(log))})


def _resume(
    parameters: Mapping[str, Parameter], optimizer: torch.optim.Optimizer, folder: Path
) -> list[dict[str, float]]:
    """Put a checkpoint's weights and moments back and return its log; nothing there is step 0.

    The log is written step by step, so it is ahead of the checkpoint and is cut to it.
    """
    if not (folder / CHECKPOINT).exists():
        for file in (LOG, SHORTENED):
            (folder / file).unlink(missing_ok=True)
        return []
    with safe_open(folder / CHECKPOINT, "pt") as stored:
        step = int(stored.metadata()["step"])
        for name, parameter in parameters.items():
            parameter.detach().copy_(stored.get_tensor(f"{name}|weight"))
            if f"{name}|exp_avg" not in stored.keys():  # noqa: SIM118 - not a dict
                continue
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step), device=parameter.device),
                "exp_avg": stored.get_tensor(f"{name}|exp_avg").to(parameter.device),
                "exp_avg_sq": stored.get_tensor(f"{name}|exp_avg_sq").to(parameter.device),
            }
    lines = (folder / LOG).read_text(encoding="utf-8").splitlines()[:step] if step else []
    runs.write_text(folder / LOG, "".join(line + "\n" for line in lines))
    return [json.loads(line) for line in lines]
