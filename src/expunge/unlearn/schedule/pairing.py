"""Schedules whose micro-batches hold both halves: each forget item beside retain items."""

import re
from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from expunge.errors import TrainingError
from expunge.unlearn.schedule.phases import (
    Cycle,
    MicroBatch,
    Paired,
    Phase,
    chunks,
    parts,
    shuffled,
)


class Pairing(Paired):
    """The released order: an epoch is one pass over the forget set, shuffled."""

    kind: Literal["pairing"] = "pairing"
    """What is meant where no kind is given."""


class Layered(Paired):
    """Unlearning in layers: fold after fold, while the folds to come are kept."""

    kind: Literal["layered"]
    """A name in SCHEDULES."""

    folds: int = Field(default=3, ge=2)
    """Parts of the forget set; stage k unlearns the first k of them."""

    keep_per_forget: int = Field(default=1, ge=1)
    """Items of the folds to come beside each forget item, read by the retain terms."""


class Sequential(Paired):
    """Requests to delete that come one after another, each with a phase of its own."""

    kind: Literal["sequential"]
    """A name in SCHEDULES."""

    requests: int | None = Field(default=None, ge=2)
    """So many parts of the forget set, of equal size; or `by`."""

    by: str | None = None
    """A regular expression: what it finds in an item's id names its request, such as `^[^-]+`;
    requests come in the order of the forget set."""

    again: bool = False
    """Whether a request trains those before it too."""

    @model_validator(mode="after")
    def _one_way(self) -> "Sequential":
        if (self.requests is None) == (self.by is None):
            raise ValueError("sequential needs one of requests (how many) and by (a pattern)")
        try:
            re.compile(self.by or "")
        except re.error as error:
            raise ValueError(f"by is not a regular expression: {error}") from None
        return self


def pairing(config: Pairing, forget: Sequence[str], retain: int, *, seed: int) -> list[Phase]:
    """Forget item i is trained beside retain items i·k … i·k+k-1, modulo their number, or alone.

    The last step of an epoch may be smaller. With k > 1 each epoch shifts by k-1 items, so that
    more of the retain set is seen; with k = 1 the pairs are those of the released system.

    Source: zjunlp/unlearn, semeval25 (arXiv:2503.21088).
    """
    k = config.retain_per_forget
    steps = []
    for epoch in range(config.epochs):
        batches = [
            MicroBatch(
                forget=tuple(chosen),
                retain=tuple(
                    (i * k + j + epoch * (k - 1)) % retain
                    for i in chosen
                    for j in range(k if retain else 0)
                ),
            )
            for chosen in chunks(
                shuffled(range(len(forget)), f"{seed}:{epoch}"), config.micro_batch
            )
        ]
        steps.extend(chunks(batches, config.accumulation))
    return [Phase(steps, epochs=config.epochs)]


def layered(config: Layered, forget: Sequence[str], retain: int, *, seed: int) -> list[Phase]:
    """Stage k unlearns folds 1 … k while the folds after k are kept.

        forget terms: F_1 ∪ … ∪ F_k,    retain terms: R ∪ F_{k+1} ∪ … ∪ F_n

    Meant to stop what relearning one fold brings back of the others. An item of fold j is
    unlearned in n-j+1 stages, `epochs` times in each; the optimiser starts anew with each stage.

    Source: Layered Unlearning, arXiv:2505.09500.
    Differs: written from the abstract; folds are drawn at random, and beside each forget item stand
    `retain_per_forget` retain items and `keep_per_forget` items of later folds, in a cycle.
    """
    if config.folds > len(forget):
        raise _too_many("folds", config.folds, len(forget))
    folds = parts(shuffled(range(len(forget)), f"{seed}:folds"), config.folds)
    kept_beside = Cycle(shuffled(range(retain), f"{seed}:retain"))
    phases = []
    for stage in range(1, config.folds + 1):
        chosen = [item for fold in folds[:stage] for item in fold]
        later = Cycle([retain + item for fold in folds[stage:] for item in fold])
        steps = _beside(chosen, config, kept_beside, later, f"{seed}:{stage}")
        phases.append(Phase(steps, epochs=config.epochs))
    return phases


def sequential(config: Sequential, forget: Sequence[str], retain: int, *, seed: int) -> list[Phase]:
    """Requests one after another, as they would arrive; the optimiser starts anew with each.

    What it does to the earlier ones is what it is for: with `again` they are trained on, without
    they are not seen any more.

    Source: this project.
    """
    requests = _requests(config, forget, seed)
    drawn = Cycle(shuffled(range(retain), f"{seed}:retain"))
    phases = []
    for number in range(len(requests)):
        first = 0 if config.again else number
        chosen = [item for request in requests[first : number + 1] for item in request]
        steps = _beside(chosen, config, drawn, Cycle([]), f"{seed}:{number}")
        phases.append(Phase(steps, epochs=config.epochs))
    return phases


def _beside(
    items: Sequence[int], config: Layered | Sequential, retain: Cycle, later: Cycle, key: str
) -> list[list[MicroBatch]]:
    """Epochs over forget items, each beside the next items of two cycles."""
    keep = config.keep_per_forget if isinstance(config, Layered) else 0
    steps = []
    for epoch in range(config.epochs):
        batches = []
        for chosen in chunks(shuffled(items, f"{key}:{epoch}"), config.micro_batch):
            beside = retain.take(config.retain_per_forget * len(chosen))
            beside += later.take(keep * len(chosen))
            batches.append(MicroBatch(tuple(chosen), beside))
        steps.extend(chunks(batches, config.accumulation))
    return steps


def _requests(config: Sequential, forget: Sequence[str], seed: int) -> list[list[int]]:
    if config.requests is not None:
        if config.requests > len(forget):
            raise _too_many("requests", config.requests, len(forget))
        return parts(shuffled(range(len(forget)), f"{seed}:requests"), config.requests)
    found: dict[str, list[int]] = {}
    for number, name in enumerate(forget):
        match = re.search(config.by or "", name)
        if match is None:
            raise TrainingError(f"schedule.by '{config.by}' finds nothing in the id '{name}'")
        found.setdefault(match[0], []).append(number)
    return list(found.values())


def _too_many(field: str, count: int, items: int) -> TrainingError:
    return TrainingError(f"schedule.{field} is {count}, and there are {items} forget items")
