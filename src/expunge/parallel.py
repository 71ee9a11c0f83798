"""Several processes that work as one: what each does, what is summed, what the first decides.

`accelerate launch` and torchrun say in the environment how many there are. A rank is one of them;
in one process every function here returns what it is given.
"""

from __future__ import annotations

import atexit
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from expunge.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

T = TypeVar("T")

TIMEOUT = "EXPUNGE_RANK_TIMEOUT"
"""The environment's name for the seconds that a rank waits for the others; default an hour."""

_LONGEST = 1e9
"""Seconds; torch counts what it waits for in nanoseconds, of 64 bits."""

BUCKET = 1 << 24
"""Elements of gradients that are summed at once."""

_alone = False


@contextmanager
def alone() -> Iterator[None]:
    """Within this block the process is the only one: the other ranks wait for its end."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def world() -> int:
    """How many ranks there are."""
    if _alone:
        return 1
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of the ranks this process is, from 0."""
    return int(os.environ.get("RANK", "0")) if world() > 1 else 0


def is_main() -> bool:
    """Whether this is the rank that writes files and speaks."""
    return rank() == 0


def device() -> str:
    """Where this rank computes: `cuda`, its own if there are several, or `cpu`."""
    import torch

    if os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        return "cpu"
    if not torch.cuda.is_available():
        return "cpu"
    if world() > 1:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return "cuda"


def refuse_lone_launch() -> None:
    """Refuse `accelerate launch --cpu --num_processes N`, which starts one process and no more."""
    alone = "WORLD_SIZE" not in os.environ and "MASTER_PORT" in os.environ
    if alone and "ACCELERATE_MIXED_PRECISION" in os.environ:
        raise RunError(
            "accelerate launch --cpu starts one process only; without --cpu, with --config_file "
            "configs/accelerate/ddp.yaml, it starts all of them"
        )


def refuse_several(what: str) -> None:
    """Refuse what is done in one process and would be done by each of several."""
    if world() > 1:
        raise RunError(f"{what} runs in one process; start it without accelerate launch")


def gather(value: T) -> list[T]:
    """What each rank gives, in the order of ranks; waits for all of them."""
    if world() == 1:
        return [value]
    found: list[Any] = [None] * world()
    _distributed().all_gather_object(found, value)
    return found


def from_main(value: T) -> T:
    """What the first rank gives, on every rank."""
    if world() == 1:
        return value
    held = [value]
    _distributed().broadcast_object_list(held, src=0)
    return held[0]


def barrier() -> None:
    """Wait until every rank is here."""
    gather(None)


@contextmanager
def main_first() -> Iterator[None]:
    """The first rank goes through the block alone, then the others, who find what it made."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def total(record: Mapping[str, float]) -> dict[str, float]:
    """The sum over ranks of each number; every rank gives the same names."""
    if world() == 1:
        return dict(record)
    import torch

    values = torch.tensor([record[name] for name in sorted(record)], dtype=torch.float64)
    _distributed().all_reduce(values)
    return dict(zip(sorted(record), values.tolist(), strict=True))


def sum_gradients(parameters: Iterable[Parameter]) -> None:
    """Sum over ranks the gradients of parameters that every rank holds whole.

    One that no rank has a gradient of is left without. Those of sharded parameters were summed
    when they were scattered.
    """
    if world() == 1:
        return
    bucket: list[Tensor] = []
    for parameter in _reached(parameters):
        if parameter.grad is None:
            parameter.grad = parameter.new_zeros(parameter.shape)
        bucket.append(parameter.grad)
        if sum(held.numel() for held in bucket) >= BUCKET:
            _sum(bucket)
            bucket = []
    _sum(bucket)


def deal(sizes: Sequence[int], parts: int) -> list[list[int]]:
    """Numbers 0, 1 … of things of some sizes, dealt out so that the parts are about as large."""
    hands: list[list[int]] = [[] for _ in range(parts)]
    held = [0] * parts
    for number in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        least = held.index(min(held))
        hands[least].append(number)
        held[least] += sizes[number]
    return [sorted(hand) for hand in hands]


def speaks() -> bool:
    """Whether this rank should say why the run ends: the first that asks, and no other."""
    if world() == 1:
        return True
    store = _distributed().distributed_c10d._get_default_store()
    return store.add("expunge/ends", 1) == 1


def lost_a_rank(error: RuntimeError) -> bool:
    """Whether an error says that another rank is gone or does not answer."""
    if world() == 1:
        return False
    import torch.distributed as dist

    signs = ("gloo", "Connection closed by peer", "Connection reset", "NCCL", "timed out")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)


def _reached(parameters: Iterable[Parameter]) -> list[Parameter]:
    """Of the parameters held whole, those that some rank has a gradient of."""
    import torch
    from torch.distributed.tensor import DTensor

    whole = [p for p in parameters if not isinstance(p, DTensor)]
    counts = torch.tensor([p.grad is not None for p in whole], dtype=torch.int32)
    _distributed().all_reduce(counts)
    return [p for p, count in zip(whole, counts.tolist(), strict=True) if count]


def _sum(gradients: list[Tensor]) -> None:
    if not gradients:
        return
    import torch

    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    _distributed().all_reduce(flat)
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


@cache
def _distributed() -> Any:
    """torch.distributed, its group of all ranks started; what is on a CPU goes through gloo."""
    import torch.distributed as dist

    given = os.environ.get(TIMEOUT, "3600")
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= _LONGEST:
        raise RunError(f"{TIMEOUT} must be a number of seconds up to {_LONGEST:g}, not {given!r}")
    backend = "cpu:gloo,cuda:nccl" if device() == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=seconds))
    atexit.register(dist.destroy_process_group)
    return dist
