"""Gradient norms: one backward pass a text, each computed once and kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from expunge.data.batches import TokenSequence, pack
from expunge.errors import EvaluationError
from expunge.evaluate.reader import Reader
from expunge.evaluate.tables import key_of, looked_up
from expunge.lora import adapters_of
from expunge.products import product
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
    model: PreTrainedModel, parameters: Sequence[nn.Parameter], sequence: TokenSequence
) -> float:
    device = next(model.parameters()).device
    with torch.enable_grad(), _squares_of_layers(model) as squares:
        nll = score(model, pack([sequence], "answer", device)).nll.sum()
        gradients = torch.autograd.grad(nll, parameters, allow_unused=True)
    squares += [_square(g) for g in gradients if g is not None]
    norm = float(torch.stack(squares).sum().sqrt())
    if not norm < float("inf"):
        raise EvaluationError(f"the gradient of {sequence.id!r} is not finite; the model is broken")
    return norm


@contextmanager
def _squares_of_layers(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """While the block lasts, backward passes add each layer's ‖∂L/∂W‖² to the list.

    For x (T, in) and g = ∂L/∂y (T, out) that is ‖gᵀ x‖², or without ever forming the gradient
    Σ_st (g_s · g_t)(x_s · x_t), which takes less where the text is short.
    """
    squares: list[Tensor] = []
    called: set[nn.Module] = set()

    def watch(layer: nn.Module, given: tuple[Tensor, ...], y: Tensor) -> None:
        if layer in called:
            raise EvaluationError(
                f"a layer of {type(model).__name__} is used twice in one pass, so the norm of its "
                "gradient is not a sum over uses; leave out the attack 'gradient_norm'"
            )
        called.add(layer)
        x = given[0].detach().flatten(0, -2)
        y.register_hook(lambda g: add(layer, x, g.flatten(0, -2)))

    def add(layer: nn.Module, x: Tensor, g: Tensor) -> None:
        length, width = len(x), x.shape[1] + g.shape[1]
        if length * width < x.shape[1] * g.shape[1]:
            squares.append((product(g, g) * product(x, x)).sum(dtype=torch.float64))
        else:
            squares.append(_square(product(g.T, x.T)))
        if layer.bias is not None:
            squares.append(_square(g.sum(0)))

    hooks = [layer.register_forward_hook(watch) for layer in _layers(model)]  # pyright: ignore
    try:
        yield squares
    finally:
        for hook in hooks:
            hook.remove()


def _layers(model: PreTrainedModel) -> list[nn.Linear]:
    """Linear layers whose weight nothing else uses."""
    users = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    head = model.get_output_embeddings()  # scored without its forward pass
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    return [m for m in linear if users[id(m.weight)] == 1]


def _square(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values.float(), dim=-1).double().square().sum()


@contextmanager
def _trainable(model: PreTrainedModel) -> Iterator[list[nn.Parameter]]:
    """The parameters that a merged model would have, its linear layers' left out, which are
    summed as they pass; alone with a gradient while the block lasts."""
    apart = {id(p) for m in adapters_of(model).values() for p in (m.lora_A, m.lora_B)}
    apart |= {id(p) for layer in _layers(model) for p in (layer.weight, layer.bias)}
    parameters = [p for p in model.parameters() if id(p) not in apart]
    before = {p: p.requires_grad for p in model.parameters()}
    try:
        for parameter in before:
            parameter.requires_grad_(id(parameter) not in apart)
        yield parameters
    finally:
        for parameter, wanted in before.items():
            parameter.requires_grad_(wanted)
