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
from expunge.config import Section
from expunge.data.batches import TokenSequence
from expunge.linear import is_linear, is_transposed
from expunge.unlearn.objective import Objective, Term
from expunge.unlearn.passes import HalfData, Passes
from expunge.unlearn.trainer import Optimizer, autocast, train

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Relearn(Section):
    """How the model is trained on some of what it was to forget."""

    share: float = Field(default=0.25, gt=0, lt=1)
    """Share of the forget documents that it is trained on; the others are measured."""

    epochs: int = Field(default=5, ge=1)
    """Passes over them."""

    batch: int = Field(default=4, ge=1)
    """Items a step."""

    rank: int = Field(default=16, ge=1)
    """Of the adapter on every linear layer."""

    optimizer: Optimizer = Field(default_factory=lambda: Optimizer(lr=2e-4, weight_decay=0.0))
    """Learning rate and the like."""

    seed: int = Field(default=0, ge=0)
    """Draws the documents, the order and the adapter."""


class Quantise(Section):
    """How coarsely the weights are rounded."""

    bits: int = Field(default=4, ge=2, le=8)
    """Bits a weight."""

    group: int = Field(default=64, ge=1)
    """Inputs of a row that share a scale."""


def relearn(model: PreTrainedModel, known: Sequence[TokenSequence], how: Relearn) -> None:
    """Relearning: train a fresh adapter on a few of the forgotten texts, and ask for the others.

        minimise (1/B) Σ_b NLL(y_b | x_b) over A, B of every linear layer

    `model` is left with the adapter on it.

    Source: Hu et al. 2024, arXiv:2406.13356; Lynch et al. 2024, arXiv:2402.16835.
    Differs: an adapter is trained, not every weight.
    """
    parallel.refuse_several("relearning")
    adapters = lora.Lora(rank=how.rank, alpha=2.0 * how.rank, dropout=0.0)
    lora.add_adapter(model, adapters, seed=how.seed)
    objective = Objective((Term(half="retain", loss="nll"),))
    passes = Passes(model, {"retain": HalfData(known)}, objective, how.optimizer.max_tokens)
    steps = _batches(len(known), how)
    parameters = sharding.trainable(model)

    def gradient(number: int) -> dict[str, float]:
        with autocast(model.dtype, how.optimizer.compute, models.device()):
            return {"loss": passes.backward([{"retain": steps[number]}])["retain.nll"]}

    model.train()
    with tempfile.TemporaryDirectory() as folder, torch.enable_grad():
        train(
            parameters,
            gradient,
            steps=len(steps),
            config=how.optimizer,
            seed=how.seed,
            folder=Path(folder),
            label="relearn",
        )
    model.eval()


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
