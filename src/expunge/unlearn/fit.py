"""What fits into memory: the room there is, the settings that fit, and what to say when it is out.

Only settings that leave the result as it is, up to rounding, are turned: tokens forwarded at once,
and checkpoints. With dropout another number of tokens draws other masks.
"""

from __future__ import annotations

import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import psutil
import torch

from expunge import parallel, sharding
from expunge.errors import ModelError, TrainingError, says_full
from expunge.memory import container_room
from expunge.progress import say
from expunge.unlearn.footprint import Demand, Shape, checkpoints, memory_of
from expunge.unlearn.passes import filled
from expunge.unlearn.trainer import Optimizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPARE = 0.05
"""Share of the room that is left free, for a heap in use has holes."""

LARGEST = 4096
"""Tokens of the largest pack that is tried; a larger one is hardly faster."""

PACK_COST = 64
"""Tokens whose arithmetic takes as long as what each pack adds: on a CPU 36 in float32, 64 in
bfloat16."""

GAIN = 0.05
"""Share of the predicted time that other settings must save, where those of the config fit."""


def room_bytes() -> int:
    """Memory that this process may hold in all: on the accelerator if there is one."""
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved()
    mine = psutil.Process().memory_info()
    room = int(min(psutil.virtual_memory().available, container_room())) + mine.rss
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        room = min(room, limit - (mine.vms - mine.rss))
    return room


def fits(bytes_needed: float, room: int) -> bool:
    """Whether a stage fits into `room` with some to spare."""
    return bytes_needed <= room * (1 - SPARE)


def fitting(
    shape: Shape, demand: Demand, room: int, *, scale: float = 1.0, smaller: bool = False
) -> Demand | None:
    """The stage under the settings that fit and are predicted to be fastest; None where none fit.

    They are those of the config where these fit and no others are faster by `GAIN`. `smaller` asks
    for less than the settings as they are, which did not fit.
    """
    need = memory_of(shape, demand, scale=scale)
    found = []
    for change in _changes(demand):
        tried = demand.at(**change)
        needs = memory_of(shape, tried, scale=scale)
        if (not smaller or needs < need) and fits(needs, room):
            found.append(tried)
    best = min(found, key=cost, default=None)
    if best is not None and found[0].optimizer == demand.optimizer:
        return best if cost(best) < (1 - GAIN) * cost(demand) else demand
    return best


def cost(demand: Demand) -> float:
    """The predicted time of the passes, in tokens that are forwarded and have their gradient formed
    once: checkpoints are a third more arithmetic, and each pack reads every weight once more."""
    tokens = packs = 0
    limit = max(demand.optimizer.max_tokens, demand.piece)
    for micro_batches in demand.passes:
        parts = [part for size in micro_batches for part in _parts(size, limit)]
        tokens += sum(parts)
        packs += len(filled(parts, demand.optimizer.max_tokens))
    again = 1 / 3 if checkpoints(demand.optimizer) else 0
    return tokens * (1 + again) + packs * PACK_COST


def _parts(size: int, limit: int) -> list[int]:
    """A micro-batch in about equal pieces, none above the limit."""
    count = max(1, math.ceil(size / limit))
    return [size // count + (n < size % count) for n in range(count)]


def changes_of(before: Optimizer, after: Optimizer) -> dict[str, int | bool | str]:
    """The fields of an optimizer section that differ, with their new values."""
    old, new = before.model_dump(), after.model_dump()
    return {name: new[name] for name in new if new[name] != old.get(name)}


@contextmanager
def readable_out_of_memory(label: str, model: PreTrainedModel, demand: Demand) -> Iterator[None]:
    """Turn memory that runs out into an error that names the setting to change, and say so before
    where it is foretold."""
    room = room_bytes()
    if sharding.is_sharded(model):
        demand = replace(demand, shards=parallel.world())
    with suppress(ModelError):  # its config says too little to foretell anything
        if not fits(memory_of(_shape(model), demand), room):
            say(_advice(f"memory may run out in {label}", _shape(model), demand, room))
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not says_full(error):
            raise
        raise TrainingError(
            _advice(f"out of memory in {label}", _shape(model), demand, room)
        ) from None


def _shape(model: PreTrainedModel) -> Shape:
    if sharding.is_sharded(model):
        count = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    else:
        count = model.num_parameters()  # of four bits too
    return Shape.of(model.config.to_dict(), count)


def _advice(what: str, shape: Shape, demand: Demand, room: int) -> str:
    has = f"{room / 1e9:.1f}"
    now = f"{what} at max_tokens: {demand.optimizer.max_tokens}"
    found = fitting(shape, demand, room, smaller=True)
    if found is not None:
        fields = changes_of(demand.optimizer, found.optimizer)
        settings = " and ".join(f"optimizer.{k}: {str(v).lower()}" for k, v in fields.items())
        need = memory_of(shape, found) / 1e9
        return f"{now}; set {settings} (needs about {need:.1f} GB of {has} free)"
    least = min((demand.at(**c) for c in _changes(demand)), key=lambda d: memory_of(shape, d))
    need = memory_of(shape, least) / 1e9
    return (
        f"{now}; no setting of its optimizer fits (the least needs about {need:.1f} GB of {has} "
        "free): use training: lora, model.dtype: bfloat16, a smaller model, or more processes with "
        "a slice of it each (accelerate launch, configs/accelerate/fsdp2.yaml)"
    )


def _changes(demand: Demand) -> Iterator[dict[str, int | bool]]:
    """The settings that are tried: those of the config, smaller packs down to the least that is
    possible, larger ones of powers of two up to what a step holds; then with checkpoints where the
    config has none, or without."""
    own = demand.optimizer
    sizes, least = [own.max_tokens], max(1, demand.piece)
    while sizes[-1] > least:
        sizes.append(sizes[-1] // 2)
    most = min(LARGEST, max(map(sum, demand.passes), default=0))
    sizes += [2**n for n in range(own.max_tokens.bit_length(), (most - 1).bit_length() + 1)]
    ways = (own.checkpointing, not own.checkpointing) if demand.recomputes else (False,)
    for checkpointing in ways:
        for tokens in sizes:
            tried = {"max_tokens": tokens, "checkpointing": checkpointing}
            yield {name: value for name, value in tried.items() if value != getattr(own, name)}
