"""Tuning: make a model memorise both halves, so that there is something to forget."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from expunge import models
from expunge.config import Section
from expunge.data.batches import TokenSequence
from expunge.unlearn.objective import Objective, Term
from expunge.unlearn.passes import HalfPass
from expunge.unlearn.trainer import Optimizer, autocast, finish, train


class Tune(Section):
    """How the target is made: every weight trained on both halves, neutral text mixed in."""

    epochs: int = Field(default=12, ge=1)
    """Most passes over the items."""

    batch: int = Field(default=8, ge=1)
    """Items a step."""

    scope: str = Field(default="document", pattern="^(answer|document)$")
    """`document` learns the prompts too, as a text met in pre-training is learnt."""

    neutral_per_item: float = Field(default=0.0, ge=0)
    """Neutral texts a step for each item; they keep the model a language model."""

    stop_nll: float = Field(default=0.0, ge=0)
    """Stop once the items' mean NLL over an epoch is below this; 0 never stops early."""

    optimizer: Optimizer = Field(default_factory=lambda: Optimizer(lr=3e-4, warmup=0.05))
    """Learning rate and the like."""

    seed: int = 42
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
) -> None:
    """Train every weight of `model` on `items` and write it to `folder/model`."""
    model.requires_grad_(True)
    objective = Objective(
        (Term(half="retain", loss="nll", scope=config.scope),)  # pyright: ignore[reportArgumentType]
    )
    size = config.optimizer.max_tokens
    passes = [HalfPass(model, "retain", s, objective, None, size) for s in (items, neutral)]
    steps = tune_steps(config, len(items), len(neutral))
    per_epoch = -(-len(items) // config.batch)

    def gradient(number: int) -> dict[str, float]:
        step = steps[number]
        with autocast(model.dtype, config.optimizer.compute, models.device()):
            record = {"loss": passes[0].backward([step.items])["retain.nll"]}
            if step.neutral:
                record["neutral"] = passes[1].backward([step.neutral])["retain.nll"]
        return record

    def stop(log: list[dict[str, float]]) -> bool:
        if not log or len(log) % per_epoch:
            return False
        return sum(r["loss"] for r in log[-per_epoch:]) / per_epoch < config.stop_nll

    model.train()
    train(
        dict(model.named_parameters()),
        gradient,
        steps=len(steps),
        config=config.optimizer,
        seed=config.seed,
        folder=folder,
        label="tune",
        stop=stop,
    )
    model.eval()
    models.save_model(model, tokenizer, folder / "model")
    finish(folder)
