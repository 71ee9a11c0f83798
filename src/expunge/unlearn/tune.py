"""Tuning: make a model memorise both halves, so that there is something to forget."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field
from torch.nn import Parameter

from expunge import models, parallel, sharding
from expunge.config import Section, SeedNumber
from expunge.data.batches import Scope, TokenSequence
from expunge.unlearn.fit import readable_out_of_memory
from expunge.unlearn.footprint import Demand, sizes
from expunge.unlearn.objective import Objective, Term
from expunge.unlearn.passes import HalfData, Passes
from expunge.unlearn.reference import cached_reference
from expunge.unlearn.trainer import (
    Gradient,
    Optimizer,
    autocast,
    finish,
    recompute_blocks,
    train,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_REFERENCE = "neutral-reference.safetensors"


class TuneOptimizer(Optimizer):
    """As of a branch, with a rate and a warm-up of its own."""

    lr: float = Field(default=3e-4, gt=0)
    """Peak learning rate."""

    warmup: float = Field(default=0.05, ge=0, le=1)
    """Share of the steps over which the rate rises from 0; it then falls linearly to 0."""


class Tune(Section):
    """How the target is made: every weight trained on both halves, neutral text mixed in."""

    epochs: int = Field(default=12, ge=1)
    """Most passes over the items."""

    batch: int = Field(default=8, ge=1)
    """Items a step."""

    scope: Scope = "document"
    """`document` learns the prompts too, as a text met in pre-training is learnt."""

    neutral_per_item: float = Field(default=0.0, ge=0)
    """Neutral texts a step for each item; they keep the model a language model."""

    neutral_loss: Literal["nll", "kl"] = "nll"
    """`nll` learns the neutral texts; `kl` holds the model to what it said of them before, which
    does not end in memorising them."""

    neutral_weight: float = Field(default=1.0, gt=0)
    """Its factor beside the items' NLL."""

    stop_nll: float = Field(default=0.0, ge=0)
    """Stop once the items' mean NLL over an epoch is below this; 0 never stops early."""

    optimizer: TuneOptimizer = TuneOptimizer()
    """Learning rate and the like."""

    seed: SeedNumber = 42
    """Order of the items; one target serves every seed of the branches."""


@dataclass(frozen=True)
class TuneStep:
    """Indices of the items and of the neutral texts of one step."""

    items: tuple[int, ...]
    neutral: tuple[int, ...]


def tune_steps(config: Tune, items: int, neutral: int) -> list[TuneStep]:
    """Every step: an epoch is one shuffled pass over the items; neutral texts go round in turn."""
    steps = []
    share = round(config.neutral_per_item * config.batch) if neutral else 0
    for epoch in range(config.epochs):
        order = list(range(items))
        random.Random(f"{config.seed}:{epoch}").shuffle(order)
        for start in range(0, items, config.batch):
            first = len(steps) * share
            texts = tuple((first + k) % neutral for k in range(share))
            steps.append(TuneStep(tuple(order[start : start + config.batch]), texts))
    return steps


def tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[TokenSequence],
    neutral: Sequence[TokenSequence],
    config: Tune,
    *,
    folder: Path,
    deadline: float | None = None,
) -> None:
    """Train every weight of `model` on `items` and write it to `folder/model`, if it is not there.

    A `deadline` (a time of `time.monotonic`) shortens the schedule to the steps that fit.
    """
    result = folder / "model"
    if parallel.from_main(result.exists()):  # it was killed just before its stage was sealed
        finish(folder, _REFERENCE)
        return
    per_epoch = -(-len(items) // config.batch)

    def stop(log: list[dict[str, float]]) -> bool:
        if not log or len(log) % per_epoch:
            return False
        return sum(r["loss"] for r in log[-per_epoch:]) / per_epoch < config.stop_nll

    with readable_out_of_memory("the target", model, tune_demand(config, items, neutral)):
        parameters, gradient, count = tune_gradient(model, items, neutral, config, folder=folder)
        model.train()
        train(
            parameters,
            gradient,
            steps=count,
            config=config.optimizer,
            seed=config.seed,
            folder=folder,
            label="tune",
            stop=stop,
            deadline=deadline,
        )
    model.eval()
    models.save_model(model, tokenizer, result)
    finish(folder, _REFERENCE)


def tune_gradient(
    model: PreTrainedModel,
    items: Sequence[TokenSequence],
    neutral: Sequence[TokenSequence],
    config: Tune,
    *,
    folder: Path,
) -> tuple[dict[str, Parameter], Gradient, int]:
    """The parameters, what leaves the gradient of a step of tuning in them, and how many steps."""
    model.requires_grad_(True)
    size = config.optimizer.max_tokens
    passes = [
        Passes(model, {"retain": HalfData(items)}, _objective("nll", 1.0, config.scope), size),
        _neutral_pass(model, neutral, config, folder),
    ]
    steps = tune_steps(config, len(items), len(neutral))
    parameters = sharding.trainable(model)
    if config.optimizer.checkpointing:
        recompute_blocks(model)

    def gradient(number: int) -> dict[str, float]:
        step = steps[number]
        with autocast(model.dtype, config.optimizer.compute, models.device()):
            record = {"loss": passes[0].backward([{"retain": step.items}])["retain.nll"]}
            if step.neutral:
                neutral_loss = passes[1].backward([{"retain": step.neutral}])
                record["neutral"] = neutral_loss[f"retain.{config.neutral_loss}"]
        parallel.sum_gradients(parameters.values())
        return record

    return parameters, gradient, len(steps)


def tune_demand(
    config: Tune, items: Sequence[TokenSequence], neutral: Sequence[TokenSequence]
) -> Demand:
    """The memory that tuning asks for."""
    kl = config.neutral_loss == "kl" and config.neutral_per_item > 0 and bool(neutral)
    passes = set()
    item_lengths, neutral_lengths = ([len(text.tokens) for text in s] for s in (items, neutral))
    for step in tune_steps(config, len(items), len(neutral)):
        for chosen, of in ((step.items, item_lengths), (step.neutral, neutral_lengths)):
            passes.add(sizes([chosen], of))
    longest = max(len(text.tokens) for text in [*items, *neutral])
    return Demand(
        optimizer=config.optimizer,
        weights="float32",
        passes=tuple(sorted(passes)),
        piece=longest,
        longest=longest,
        kl=kl,
        kept=sum(len(text.tokens) for text in neutral) if kl else 0,
    )


def _objective(loss: str, weight: float, scope: str) -> Objective:
    term = Term(half="retain", loss=loss, weight=weight, scope=scope)  # pyright: ignore[reportArgumentType]
    return Objective((term,))


def _neutral_pass(
    model: PreTrainedModel, neutral: Sequence[TokenSequence], config: Tune, folder: Path
) -> Passes:
    """The pass over neutral texts, with what `model` says of them now where KL asks for it."""
    objective = _objective(config.neutral_loss, config.neutral_weight, "document")
    size, reference = config.optimizer.max_tokens, None
    if neutral and config.neutral_per_item and config.neutral_loss == "kl":
        with autocast(model.dtype, config.optimizer.compute, models.device()):
            reference = cached_reference(
                model,
                neutral,
                "document",
                kl=True,
                file=folder / _REFERENCE,
                max_tokens=size,
            )
    return Passes(model, {"retain": HalfData(neutral, reference)}, objective, size)
