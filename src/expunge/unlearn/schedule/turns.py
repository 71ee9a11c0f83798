"""Schedules whose halves take turns: a micro-batch holds items of one half alone."""

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from expunge.config import Section
from expunge.unlearn.schedule.phases import (
    Cycle,
    MeanOver,
    MicroBatch,
    Phase,
    chunks,
    shuffled,
)


class Sugd(Section):
    """Sequential unlearning with gradient difference: chunk by chunk, one forget item, R retain."""

    kind: Literal["sugd"]
    """A name in SCHEDULES."""

    chunk: int = Field(default=32, ge=1)
    """Forget items of a phase."""

    epochs: int = Field(default=7, ge=1)
    """Passes over a chunk and the retain items that stand in it."""

    retain_per_forget: int = Field(default=7, ge=1)
    """Retain items after each forget item, drawn in a cycle."""

    batch: int = Field(default=1, ge=1)
    """Items a step, in their order; each is a micro-batch, so that all weigh the same."""


class Agad(Section):
    """Ascent on a chunk and annealing on a share of retain in turns; then a full annealing."""

    kind: Literal["agad"]
    """A name in SCHEDULES."""

    chunk: int = Field(default=64, ge=1)
    """Forget items of a phase of ascent."""

    epochs: int = Field(default=3, ge=1)
    """Passes over a chunk."""

    batch: int = Field(default=16, ge=1)
    """Items a step, whose loss is formed together."""

    anneal_share: float = Field(default=0.25, gt=0, le=1)
    """Share of the retain set that each chunk is followed by, drawn in a cycle."""

    anneal_epochs: int = Field(default=1, ge=1)
    """Passes over that share."""

    anneal_lr: float = Field(default=1.0, gt=0)
    """Factor of the learning rate in annealing."""

    final_epochs: int = Field(default=1, ge=0)
    """Passes over the whole retain set at the end."""


class Alternate(Section):
    """Epochs of one half after epochs of the other."""

    kind: Literal["alternate"]
    """A name in SCHEDULES."""

    epochs: int = Field(default=3, ge=1)
    """Passes over each half."""

    micro_batch: int = Field(default=8, ge=1)
    """Items whose loss is formed together."""

    accumulation: int = Field(default=1, ge=1)
    """Micro-batches a step."""

    mean_over: MeanOver = Field(default="micro_batch", exclude_if=lambda of: of == "micro_batch")
    """`micro_batch` takes the mean of the losses of a step's micro-batches; `step` takes that over
    all items of the step, so that only micro_batch times accumulation matters."""


def sugd(config: Sugd, forget: Sequence[str], retain: int, *, seed: int) -> list[Phase]:
    """Chunk after chunk, each with an optimiser of its own: one forget item, then R retain items.

        f_1 r_1 … r_R  f_2 r_{R+1} … r_{2R}  …        epochs times a chunk

    With losses -NLL on forget and 0.5 NLL on retain items, forget to retain weighs 1 to R/2. The
    last chunk has the last word: it can wear off what the first ones did.

    Source: AILS-NTUA at SemEval-2025 Task 4, iraklis07/llm-unlearning, methods/sequential.py.
    Differs: both halves are shuffled once, by the seed.
    """
    drawn = Cycle(shuffled(range(retain), f"{seed}:retain"))
    phases = []
    for chunk in chunks(shuffled(range(len(forget)), f"{seed}:forget"), config.chunk):
        order = []
        for item in chunk:
            order.append(MicroBatch(forget=(item,)))
            order += [MicroBatch(retain=(r,)) for r in drawn.take(config.retain_per_forget)]
        steps = config.epochs * chunks(order, config.batch)
        phases.append(Phase(steps, epochs=config.epochs))
    return phases


def agad(config: Agad, forget: Sequence[str], retain: int, *, seed: int) -> list[Phase]:
    """Alternating ascent and descent: forget a chunk, anneal on a share of retain, and so on.

    Each phase has an optimiser of its own; the last one anneals on the whole retain set.

    Source: AILS-NTUA at SemEval-2025 Task 4, iraklis07/llm-unlearning.
    Differs: the shares are drawn in a cycle over the shuffled retain set.
    """
    drawn = Cycle(shuffled(range(retain), f"{seed}:retain"))
    share = math.ceil(config.anneal_share * retain)
    phases = []
    for number, chunk in enumerate(
        chunks(shuffled(range(len(forget)), f"{seed}:forget"), config.chunk)
    ):
        ascent = _epochs("forget", chunk, config.epochs, config.batch, f"{seed}:f{number}")
        phases.append(Phase(ascent, epochs=config.epochs))
        beside = drawn.take(share)
        descent = _epochs("retain", beside, config.anneal_epochs, config.batch, f"{seed}:r{number}")
        phases.append(Phase(descent, config.anneal_lr, config.anneal_epochs))
    if config.final_epochs:
        last = _epochs("retain", range(retain), config.final_epochs, config.batch, f"{seed}:last")
        phases.append(Phase(last, config.anneal_lr, config.final_epochs))
    return phases


def alternate(config: Alternate, forget: Sequence[str], retain: int, *, seed: int) -> list[Phase]:
    """An epoch over the retain set, an epoch over the forget set, and so on, one optimiser for all.

    Source: EUL, Chen & Yang 2023, arXiv:2310.20150.
    Differs: the order of its epochs alone; what is trained, and by which losses, is the recipe's.
    """
    steps = []
    for epoch in range(config.epochs):
        for half, count in (("retain", retain), ("forget", len(forget))):
            key = f"{seed}:{epoch}:{half}"
            batches = _epochs(half, range(count), 1, config.micro_batch, key)
            steps += chunks([batch for (batch,) in batches], config.accumulation)
    return [Phase(steps, epochs=config.epochs)]


def _epochs(
    half: str, items: Sequence[int], epochs: int, size: int, key: str
) -> list[list[MicroBatch]]:
    """Steps of one micro-batch of one half, each epoch in an order of its own."""
    return [
        [MicroBatch(**{half: tuple(chosen)})]
        for epoch in range(epochs)
        for chosen in chunks(shuffled(items, f"{key}:{epoch}"), size)
    ]
