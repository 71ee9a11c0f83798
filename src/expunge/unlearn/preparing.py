"""A branch made ready: its parameters, data, reference scores, gradient and demand of memory."""

from __future__ import annotations

import copy
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import Parameter

from expunge import lora, models, sharding
from expunge.errors import TrainingError
from expunge.unlearn.companions import on_sides
from expunge.unlearn.footprint import Demand
from expunge.unlearn.gradient import step_gradient
from expunge.unlearn.halves import Halves
from expunge.unlearn.hidden import freeze_beyond
from expunge.unlearn.masks import check_mask, mask
from expunge.unlearn.objective import Half, Objective, check_model
from expunge.unlearn.optimizer import Span
from expunge.unlearn.passes import Passes
from expunge.unlearn.readings import HalfData, weights_of
from expunge.unlearn.reference import Reference, cached_reference, trains_head
from expunge.unlearn.schedule import Phase, epoch_ends, mean_over
from expunge.unlearn.section import Branch
from expunge.unlearn.sets import SIDES, Side, units
from expunge.unlearn.steps import State
from expunge.unlearn.trainer import (
    Gradient,
    Optimizer,
    recompute_blocks,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prepared:
    """A branch ready to be trained."""

    parameters: dict[str, Parameter]
    gradient: Gradient
    """Leaves the gradient of a step in them."""
    spans: list[Span]
    """The phases, as the optimiser sees them."""
    ends: tuple[int, ...]
    """Steps after which an epoch of a phase ends."""
    passes: Passes
    masks: dict[str, torch.Tensor]
    """Which weights of a parameter may move, where not all may."""
    state: State
    """What the step rule carries from step to step."""


def prepared(
    model: PreTrainedModel,
    halves: Halves,
    config: Branch,
    *,
    seed: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    folder: Path | None = None,
    made: list[Phase] | None = None,
    begun: Path | None = None,
) -> Prepared:
    """What the loop needs of a branch: its parameters, its gradient, its phases.

    `made` are phases over `halves` in place of the schedule's. A mask is kept in `folder`. The
    adapter begins with that of the folder `begun`, if one is given.
    The `tokenizer` is for terms that weigh tokens by what they say.
    """
    objective = Objective(config.terms)
    check_companions(objective, halves)
    check_model(config.terms, model.config)
    config.step.check_model(model)
    if sharding.is_sharded(model) and not config.rule.sharded:
        raise TrainingError(
            f"the step rule {config.step.rule} needs whole weights, and each process holds a slice "
            "of them; launch without FSDP and ZeRO-3"
        )
    model.requires_grad_(config.training == "full")
    masks = {}
    if config.mask is not None:
        given = halves.forget, halves.retain, config.optimizer
        told = {"seed": seed, "folder": folder, "deepest": objective.deepest}
        masks = mask(model, config.mask, *given, **told)
    own = len(halves.retain)
    if made is None:
        made, halves = halves.planned(config.schedule, seed=seed)
    data: dict[Half, HalfData] = {}
    for half in halves.names:
        reference = _reference(model, objective, half, halves, config.optimizer)
        alone = own if half == "retain" else None
        levels = halves.levels if half == "forget" else None
        weights = weights_of(objective, half, halves.of(half), reference, tokenizer, levels)
        data[half] = HalfData(halves.of(half), reference, weights, alone, levels)
    parameters = _trainable(model, config, seed, begun)
    means = mean_over(config.schedule)
    passes = Passes(model, data, objective, config.optimizer.max_tokens, means)
    steps = halves.steps(made)
    if config.optimizer.checkpointing:
        recompute_blocks(model)
    note = {"unguarded": 1.0} if config.unguarded else {}
    given = passes, parameters, steps, config.step, config.optimizer
    gradient, state = step_gradient(*given, seed=seed, note=note, masks=masks)
    spans = [Span(len(phase.steps), phase.lr) for phase in made]
    return Prepared(parameters, gradient, spans, epoch_ends(made), passes, masks, state)


def branch_demand(
    config: Branch,
    halves: Halves,
    *,
    seed: int,
    weights: models.Dtype,
    quantized: bool = False,
    made: list[Phase] | None = None,
) -> Demand:
    """The memory that training a branch asks for, with the model held in the type `weights`, or its
    linear layers `quantized`.

    `made` are phases over `halves` in place of the schedule's.
    """
    if made is None:
        made, halves = halves.planned(config.schedule, seed=seed)
    objective, full = Objective(config.terms), config.training == "full"
    lengths = {half: [len(s.tokens) for s in halves.of(half)] for half in halves.names}
    together: list[tuple[Side, ...]] = [("forget",), ("retain",)] if config.rule.apart else [SIDES]
    passes, piece = set(), max(*lengths["forget"], *lengths["retain"], 0)

    def tokens(half: Half, items: tuple[int, ...]) -> int:
        return sum(lengths[half][index] for index in items)

    for step in halves.steps(made):
        for sides in together:
            read = [objective.read(on_sides(batch, sides)) for batch in step]
            passes.add(tuple(sum(tokens(h, batch[h]) for h in batch) for batch in read))
            for batch in read:
                for half, items in batch.items():
                    parts = units(half, items) if objective.divisible(half) else [items]
                    piece = max([piece, *(tokens(half, part) for part in parts)])
    return Demand(
        optimizer=config.optimizer,
        weights="float32" if full else weights,
        quantized=quantized and not full,
        passes=tuple(sorted(passes)),
        piece=piece,
        longest=max(max(found, default=0) for found in lengths.values()),
        rank=None if full else config.lora.rank,
        mask=config.mask,
        dropout=not full and config.lora.dropout > 0,
        kl=any(
            objective.needs_kl(half)
            or objective.needs_standardized(half)
            or objective.reads(half, "logits")
            for half in halves.names
        ),
        kept=sum(objective.asks(half).vectors * sum(lengths[half]) for half in halves.names),
        recomputes=config.step.recomputes,
        buffers=1 + config.rule.buffers,  # the weights at the start; what the rule holds
    )


def check_fit(config: Branch, outline: PreTrainedModel) -> None:
    """Refuse a branch that this model cannot be trained by: blocks, layers, a rule, a mask.

    `outline` is the model without weights, or its first blocks where the branch names blocks, so
    that nothing has been computed yet.
    """
    check_model(config.terms, outline.config)
    config.step.check_model(outline)
    if config.training == "lora":
        check_adapter(outline, config.lora)
    if config.mask is not None:
        check_mask(outline, config.mask, Objective(config.terms).deepest)


def check_adapter(outline: PreTrainedModel, config: lora.Lora) -> None:
    """Refuse an adapter whose layers this model lacks, or whose weights it reads itself."""
    lora.target_names(outline, config)
    if getattr(outline, "_is_stateful", False):  # recurrent layers may read weights themselves
        _try_adapter(outline, config)


def _try_adapter(outline: PreTrainedModel, config: lora.Lora) -> None:
    """Raise what a model says of an adapter that it would leave out; nothing is computed."""
    tried = copy.deepcopy(outline).train()
    lora.add_adapter(tried, config, seed=0)
    place = next(tried.parameters()).device
    with suppress(RuntimeError):  # what a model does beyond shapes cannot be tried without weights
        tried(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=place), use_cache=False)


def check_companions(objective: Objective, halves: Halves) -> None:
    """Refuse terms on sets that whoever trains did not hand over."""
    for half in objective.halves:
        if half not in halves.names:
            raise TrainingError(f"a term reads {half}, and no such items were given to training")
    if objective.needs_level("forget"):
        if halves.levels is None:
            raise TrainingError("a term reads levels, and none were given to training")
        lengths = [len(sequence.tokens) - 1 for sequence in halves.forget]
        assert lengths == [len(levels) for levels in halves.levels]


def _reference(
    model: PreTrainedModel,
    objective: Objective,
    half: Half,
    halves: Halves,
    config: Optimizer,
) -> Reference | None:
    asked = objective.asks(half)
    if not asked:
        return None
    scope = objective.scope(half)
    which = half if half in ("forget", "retain") else f"{half}-{halves.companions[half].key}"
    name = f"{halves.cache_key}-{which}-{scope}{asked.label(trains_head(model))}.safetensors"
    return cached_reference(
        model,
        halves.of(half),
        scope,
        asked=asked,
        file=halves.cache / name,
        max_tokens=config.max_tokens,
    )


def _trainable(
    model: PreTrainedModel, config: Branch, seed: int, begun: Path | None
) -> dict[str, Parameter]:
    if config.training == "lora":
        lora.add_adapter(model, config.lora, seed=seed)
    if begun is not None:
        lora.start_from(model, begun)
    deepest = Objective(config.terms).deepest
    if deepest is not None:
        freeze_beyond(model, deepest)
    return sharding.trainable(model)
