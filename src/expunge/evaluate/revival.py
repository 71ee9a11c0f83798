"""Attacks that change a copy of the model to bring back what it no longer says.

A model that hides a text, and does not lack it, gives it back after a little of what these do; one
that never read the text gains no more than of any other text.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from pydantic import Field
from torch import Tensor

from expunge import lora, models, parallel, sharding
from expunge.config import Section, SeedNumber
from expunge.data.batches import TokenSequence
from expunge.errors import DivergedError, EvaluationError, TrainingError
from expunge.linear import is_linear, is_transposed
from expunge.unlearn.fit import readable_out_of_memory
from expunge.unlearn.footprint import Demand
from expunge.unlearn.objective import Objective, Term
from expunge.unlearn.optimizer import Optimizer
from expunge.unlearn.passes import HalfData, Passes
from expunge.unlearn.trainer import autocast, recompute_blocks, train

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RelearnOptimizer(Optimizer):
    """As of a branch, with a rate and a decay of its own."""

    lr: float = Field(default=2e-4, gt=0)
    """Peak learning rate."""

    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""


class Relearn(Section):
    """How the model is trained on some of what it was to forget."""

    share: float = Field(default=0.25, gt=0, lt=1)
    """Share of the forget documents that it is trained on; the others are measured."""

    epochs: int = Field(default=5, ge=1)
    """Passes over them."""

    batch: int = Field(default=4, ge=1)
    """Items a step."""

    rank: int = Field(default=16, ge=1)
    """Of the adapter that is trained."""

    targets: tuple[str, ...] | None = Field(
        default=None, min_length=1, exclude_if=lambda named: named is None
    )
    """Last names of the linear layers that it lies on; null means every one but the head."""

    optimizer: RelearnOptimizer = RelearnOptimizer()
    """Learning rate and the like."""

    seed: SeedNumber = Field(default=0, ge=0)
    """Draws the documents, the order and the adapter."""

    @property
    def adapter(self) -> lora.Lora:
        """What is trained: scale 2, no dropout."""
        alpha = 2.0 * self.rank
        return lora.Lora(rank=self.rank, alpha=alpha, dropout=0.0, targets=self.targets)

    def trained_on(self, documents: int) -> int:
        """How many of so many documents it is trained on; none or all is an `EvaluationError`."""
        count = round(self.share * documents)
        if not 0 < count < documents:
            raise EvaluationError(
                f"relearn.share {self.share:g} of {documents} forget documents is {count}: some "
                "must be trained on, and some left to be measured"
            )
        return count


class Quantise(Section):
    """How coarsely the weights are rounded."""

    bits: int = Field(default=4, ge=2, le=8)
    """Bits a weight."""

    group: int = Field(default=64, ge=1)
    """Inputs of a row that share a scale."""


def relearn(
    model: PreTrainedModel,
    known: Sequence[TokenSequence],
    how: Relearn,
    *,
    label: str = "relearn",
) -> None:
    """Relearning: train a fresh adapter on a few of the forgotten texts, and ask for the others.

        minimise (1/B) Σ_b NLL(y_b | x_b) over A, B of every linear layer

    `model` is left with the adapter on it. A loss that is not finite is a `DivergedError`.

    Source: Hu et al. 2024, arXiv:2406.13356; Lynch et al. 2024, arXiv:2402.16835.
    Differs: an adapter is trained, not every weight.
    """
    parallel.refuse_several("relearning")
    lora.add_adapter(model, how.adapter, seed=how.seed)
    if how.optimizer.checkpointing:
        recompute_blocks(model)
    weights: models.Dtype = "float32" if model.dtype == torch.float32 else "bfloat16"
    demand = relearn_demand(how, [len(text.tokens) for text in known], weights)
    objective = Objective((Term(half="retain", loss="nll"),))
    passes = Passes(model, {"retain": HalfData(known)}, objective, how.optimizer.max_tokens)
    steps = _batches(len(known), how)
    parameters = sharding.trainable(model)

    def gradient(number: int) -> dict[str, float]:
        with autocast(model.dtype, how.optimizer.compute, models.device()):
            return {"loss": passes.backward([{"retain": steps[number]}])["retain.nll"]}

    model.train()
    told = {"config": how.optimizer, "seed": how.seed, "label": label}
    with (
        tempfile.TemporaryDirectory() as folder,
        torch.enable_grad(),
        readable_out_of_memory(label, model, demand),
    ):
        try:
            train(parameters, gradient, steps=len(steps), folder=Path(folder), **told)
        except TrainingError as error:
            said = str(error).partition("; the weights before")[0]
            raise DivergedError(f"{said}; a lower relearn.optimizer.lr may help") from None
    model.eval()


def relearn_demand(how: Relearn, lengths: Sequence[int], weights: models.Dtype) -> Demand:
    """What `relearn` asks of memory on texts of so many tokens, if the longest come together."""
    longest = sorted(lengths, reverse=True)[: how.batch]
    return Demand(
        optimizer=how.optimizer,
        weights=weights,
        passes=(tuple(longest),),
        piece=longest[0],
        longest=longest[0],
        rank=how.rank,
    )


@torch.no_grad()
def quantise(model: PreTrainedModel, how: Quantise) -> None:
    """Quantisation: round the weights of every linear layer but the head.

        W_g ← s · round(W_g / s),   s = max |W_g| / (2^(bits - 1) - 1),   g a group of inputs

    Small updates are rounded away, and what they hid comes back.

    Source: Zhang et al. 2024, arXiv:2410.16454 (round to nearest).
    """
    head = model.get_output_embeddings()
    for layer in model.modules():
        if is_linear(layer) and layer is not head:
            weight = cast(Tensor, layer.weight)
            own = weight.T if is_transposed(layer) else weight
            own.copy_(rounded(own, how))


def rounded(weight: Tensor, how: Quantise) -> Tensor:
    """A weight (out, in) as so many bits hold it, in its own type; see `quantise`."""
    width, most = weight.shape[1], 2 ** (how.bits - 1) - 1
    found = torch.empty_like(weight)
    for start in range(0, width, how.group):
        part = weight[:, start : start + how.group].float()
        scale = (part.abs().amax(1, keepdim=True) / most).clamp_min(torch.finfo(torch.float32).tiny)
        found[:, start : start + how.group] = (part / scale).round().mul_(scale).to(weight.dtype)
    return found


def _batches(count: int, how: Relearn) -> list[tuple[int, ...]]:
    steps = []
    for epoch in range(how.epochs):
        order = list(range(count))
        random.Random(f"{how.seed}:{epoch}").shuffle(order)
        steps += [tuple(order[i : i + how.batch]) for i in range(0, count, how.batch)]
    return steps
