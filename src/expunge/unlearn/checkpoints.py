"""Checkpoints of training: when to write one, what it holds, how a killed run takes it up."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Parameter

from expunge import parallel, runs, sharding
from expunge.disk import safetensors_errors
from expunge.errors import TrainingError
from expunge.unlearn.tensor_files import opened

CHECKPOINT, LOG = "checkpoint.safetensors", "log.jsonl"

SHORTENED = "shortened.json"
"""Written where a deadline cut the schedule: the steps that were done, and of how many."""


class Saver:
    """When to write a checkpoint: at an interval, and never more than a twentieth of the time."""

    def __init__(self, interval: float, size_bytes: int) -> None:
        first_guess = size_bytes / 100e6  # seconds, on a slow disk
        self.interval = max(interval, 20 * first_guess) if interval else 0.0
        self.last = self.start = time.monotonic()

    def due(self) -> bool:
        """Whether to write one now; written within a `with`, it tells how long that takes."""
        return time.monotonic() - self.last >= self.interval

    def __enter__(self) -> None:
        self.start = time.monotonic()

    def __exit__(self, *error: object) -> None:
        self.last = time.monotonic()
        if self.interval:
            self.interval = max(self.interval, 20 * (self.last - self.start))


def note_shortened(folder: Path, steps: int, planned: int) -> None:
    """Say that a deadline cut the schedule."""
    if parallel.is_main():
        runs.write_json(folder / SHORTENED, {"steps": steps, "of": planned})


def save(
    parameters: Mapping[str, Parameter],
    optimizer: torch.optim.Optimizer,
    log: list[dict[str, float]],
    folder: Path,
    state: Mapping[str, float] | None = None,
) -> None:
    """Write weights, moments and the step rule's state, gathered from all ranks, so that any
    number of them can go on."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        parts = {"weight": parameter.detach(), **optimizer.state[parameter]}
        for part in ("weight", "exp_avg", "exp_avg_sq"):
            if part not in parts:
                continue
            gathered = sharding.whole(parts[part])
            if parallel.is_main():
                tensors[f"{name}|{part}"] = gathered.view(sharding.shape_of(parameter)).cpu()
    if not parallel.is_main():
        return
    with runs.replacing(folder / CHECKPOINT) as temporary, safetensors_errors():
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        said = {"step": str(len(log)), "rule": json.dumps(dict(state or {}))}
        save_file(contiguous, temporary, metadata=said)


def resume(
    parameters: Mapping[str, Parameter],
    optimizer: torch.optim.Optimizer,
    folder: Path,
    state: dict[str, float] | None = None,
) -> list[dict[str, float]]:
    """Put a checkpoint's weights, moments and the rule's state back and return its log; nothing
    there is step 0.

    The log is written step by step, so it is ahead of the checkpoint and is cut to it.
    """
    if not parallel.from_main((folder / CHECKPOINT).exists()):
        if parallel.is_main():
            for file in (LOG, SHORTENED):
                (folder / file).unlink(missing_ok=True)
        return []
    with _opened(folder / CHECKPOINT, parameters) as stored:
        step = int(stored.metadata()["step"])
        if state is not None:
            state |= json.loads(stored.metadata().get("rule", "{}"))
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
    log = _logged(folder / LOG)[:step] if step else []
    if len(log) < step:
        raise TrainingError(
            f"{folder / LOG} ends at step {len(log)}, but the checkpoint beside it is of step "
            f"{step}; delete the checkpoint to train from the start"
        )
    parallel.barrier()  # before the first rank writes what the others read
    runs.write_text(folder / LOG, "".join(json.dumps(record) + "\n" for record in log))
    return log


def _logged(path: Path) -> list[dict[str, float]]:
    """The records of a log up to the first line that is none, which a kill or a crash tore."""
    records = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            records.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            break
    return records


@contextmanager
def _opened(path: Path, parameters: Mapping[str, Parameter]) -> Iterator[safe_open]:
    """A checkpoint whose weights are those that are trained, or an error that says what differs."""
    with opened(path, "delete it to train from the start") as stored:
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
