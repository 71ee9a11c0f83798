"""Gradient norms: one backward pass a text, each computed once and kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from expunge.data.batches import TokenSequence, pack
from expunge.errors import EvaluationError
from expunge.evaluate.reader import Reader
from expunge.evaluate.tables import key_of, looked_up
from expunge.lora import adapters_of
from expunge.progress import progress
from expunge.scores import score

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEPT_NORMS = 8
"""Texts between two writes of the table."""


def gradient_norms(
    reader: Reader, sequences: Sequence[TokenSequence], *, label: str = "gradients"
) -> list[float]:
    """The norm of the gradient of each text's mean NLL, over all parameters of the model.

    An adapter counts as merged: ∂L/∂W is the same whether W or its low-rank term would move.
    """
    keys = [key_of("gradients", s.tokens, s.scored_from("answer")) for s in sequences]

    def compute(missing: list[int]) -> Iterator[list[dict[str, Any]]]:
        reader.forwards += len(missing)
        rows = []
        with progress(label, len(missing), "texts") as bar, _trainable(reader.model) as parameters:
            for number in missing:
                norm = _norm(reader.model, parameters, sequences[number])
                rows.append({"key": keys[number], "norm": norm})
                bar(1)
                if len(rows) == KEPT_NORMS:
                    yield rows
                    rows = []
        yield rows

    return [row["norm"] for row in looked_up(reader.gradients, keys, compute)]


def _norm(
    model: PreTrainedModel, parameters: Sequence[torch.nn.Parameter], sequence: TokenSequence
) -> float:
    device = next(model.parameters()).device
    with torch.enable_grad():
        nll = score(model, pack([sequence], "answer", device)).nll.sum()
        gradients = torch.autograd.grad(nll, parameters, allow_unused=True)
    squares = [g.float().square().sum(dtype=torch.float64) for g in gradients if g is not None]
    norm = float(torch.stack(squares).sum().sqrt())
    if not norm < float("inf"):
        raise EvaluationError(f"the gradient of {sequence.id!r} is not finite; the model is broken")
    return norm


@contextmanager
def _trainable(model: PreTrainedModel) -> Iterator[list[torch.nn.Parameter]]:
    """The parameters that a merged model would have, with a gradient while the block lasts."""
    low_rank = {id(p) for m in adapters_of(model).values() for p in (m.lora_A, m.lora_B)}
    parameters = [p for p in model.parameters() if id(p) not in low_rank]
    before = [p.requires_grad for p in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield parameters
    finally:
        for parameter, wanted in zip(parameters, before, strict=True):
            parameter.requires_grad_(wanted)
