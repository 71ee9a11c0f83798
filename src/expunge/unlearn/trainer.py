"""The loop: gradient, clip, AdamW, log, checkpoint. A killed run goes on with the same weights.

Every step is a pure function of (weights, optimiser state, step number): its random numbers are
seeded by the step, so a checkpoint holds only tensors and a step count.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import get_total_norm

from expunge import parallel, runs, sharding
from expunge.config import Section
from expunge.errors import TrainingError
from expunge.memory import release_freed_memory
from expunge.models import Dtype
from expunge.progress import progress

CHECKPOINT, LOG = "checkpoint.safetensors", "log.jsonl"

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
    `time.monotonic`) the schedule is shortened to the steps that the time allows.
    """
    optimizer = torch.optim.AdamW(
        list(parameters.values()), lr=config.lr, weight_decay=config.weight_decay, fused=True
    )
    log = _resume(parameters, optimizer, folder)
    size = 3 * sum(p.numel() * p.element_size() for p in parameters.values())
    saver = _Saver(config.checkpoint_seconds, size)
    clock = _Clock(deadline, len(log))
    with progress(label, steps, "steps") as bar:
        bar(len(log))
        while len(log) < steps and not stop(log):
            number = len(log)
            if deadline is not None:
                steps = parallel.from_main(clock.affordable(number, steps))
            if number >= steps:
                break
            _set_rate(optimizer, config, number, steps)
            torch.manual_seed(seed * 1_000_003 + number + (parallel.rank() << 40))
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
            if parallel.is_main():
                with (folder / LOG).open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(log[-1]) + "\n")
            bar(1, f"loss {record.get('forget', record.get('loss', math.nan)):.3f}")
            if len(log) % RELEASE_EVERY == 0:
                release_freed_memory()
            if parallel.from_main(saver.due()):
                with saver:
                    _save(parameters, optimizer, log, folder)
    if not log:
        raise TrainingError(f"{label}: the time allows no step of training; give it more")
    return log


def finish(folder: Path) -> None:
    """Remove the checkpoint of a stage whose weights have been written; the log stays."""
    if parallel.is_main():
        (folder / CHECKPOINT).unlink(missing_ok=True)


def autocast(weights: torch.dtype, compute: Dtype, device: str) -> AbstractContextManager:
    """Mixed precision where the weights are float32 and the products are to be narrower."""
    if compute == "float32" or weights != torch.float32:
        return nullcontext()
    kind = {"bfloat16": torch.bfloat16, "float16": torch.float16}[compute]
    # With several ranks, weights may be sharded, and a cache would hold all of them.
    return torch.autocast(device, dtype=kind, cache_enabled=parallel.world() == 1)


class _Clock:
    """How many steps a deadline allows, from the time that the steps so far took."""

    def __init__(self, deadline: float | None, first: int) -> None:
        self.deadline = deadline
        self.first = first
        self.start = time.monotonic()

    def affordable(self, number: int, steps: int) -> int:
        """The least of `steps` and those that fit; `number` steps are done."""
        now = time.monotonic()
        if self.deadline is None:
            return steps
        if now >= self.deadline:
            return number
        done = number - self.first
        if not done:
            return steps
        seconds = (now - self.start) / done
        return min(steps, number + int((self.deadline - now) / max(seconds, 1e-9)))


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


def _set_rate(optimizer: torch.optim.Optimizer, config: Optimizer, step: int, total: int) -> None:
    warm = math.ceil(config.warmup * total)
    factor = step / warm if step < warm else (total - step) / max(1, total - warm)
    for group in optimizer.param_groups:
        group["lr"] = config.lr * factor


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


def _save(
    parameters: Mapping[str, Parameter],
    optimizer: torch.optim.Optimizer,
    log: list[dict[str, float]],
    folder: Path,
) -> None:
    """Write weights and moments, gathered from all ranks, so that any number of them can go on."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        parts = {"weight": parameter.detach(), **optimizer.state[parameter]}
        for part in ("weight", "exp_avg", "exp_avg_sq"):
            if part not in parts:
                continue
            gathered = sharding.whole(parts[part])
            if parallel.is_main():
                tensors[f"{name}|{part}"] = gathered.view(sharding.shape_of(parameter))
    if not parallel.is_main():
        return
    with runs.replacing(folder / CHECKPOINT) as temporary, runs.safetensors_errors():
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, temporary, metadata={"step": str(len(log))})


def _resume(
    parameters: Mapping[str, Parameter], optimizer: torch.optim.Optimizer, folder: Path
) -> list[dict[str, float]]:
    """Put a checkpoint's weights and moments back and return its log; nothing there is step 0.

    The log is written step by step, so it is ahead of the checkpoint and is cut to it.
    """
    if not parallel.from_main((folder / CHECKPOINT).exists()):
        if parallel.is_main():
            (folder / LOG).unlink(missing_ok=True)
        return []
    with _opened(folder / CHECKPOINT, parameters) as stored:
        step = int(stored.metadata()["step"])
        for name, parameter in parameters.items():
            held = parameter.detach()
            held.copy_(sharding.like(stored.get_tensor(f"{name}|weight"), held))
            if f"{name}|exp_avg" not in stored.keys():  # noqa: SIM118 - not a dict
                continue
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step), device=parameter.device),
                "exp_avg": sharding.like(stored.get_tensor(f"{name}|exp_avg"), held),
                "exp_avg_sq": sharding.like(stored.get_tensor(f"{name}|exp_avg_sq"), held),
            }
    lines = (folder / LOG).read_text(encoding="utf-8").splitlines()[:step] if step else []
    if len(lines) < step:
        raise TrainingError(
            f"{folder / LOG} ends at step {len(lines)}, but the checkpoint beside it is of step "
            f"{step}; delete the checkpoint to train from the start"
        )
    parallel.barrier()  # before the first rank writes what the others read
    runs.write_text(folder / LOG, "".join(line + "\n" for line in lines))
    return [json.loads(line) for line in lines]


@contextmanager
def _opened(path: Path, parameters: Mapping[str, Parameter]) -> Iterator[safe_open]:
    """A checkpoint whose weights are those that are trained, or an error that says what differs."""
    try:
        stored = safe_open(path, "pt")
    except SafetensorError as error:
        raise TrainingError(
            f"{path} cannot be read ({error}); delete it to train from the start"
        ) from None
    with stored:
        found = {n.removesuffix("|weight") for n in stored.keys() if n.endswith("|weight")}  # noqa: SIM118
        odd = sorted(found ^ set(parameters))
        odd += [
            name
            for name, parameter in parameters.items()
            if name in found
            and stored.get_slice(f"{name}|weight").get_shape() != list(sharding.shape_of(parameter))
        ]
        if odd:
            raise TrainingError(
                f"{path} is of another model or adapter: {odd[0]} and {len(odd) - 1} more weights "
                "do not fit; delete it to train from the start"
            )
        yield stored
