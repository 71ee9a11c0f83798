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
from expunge.evaluate.scoring import COLUMNS
from expunge.evaluate.tables import key_of, looked_up, sequence_key
from expunge.heads import BLOCK
from expunge.lora import adapters_of
from expunge.packs import hidden_states, output_head
from expunge.products import product, product_back
from expunge.progress import progress
from expunge.scores import TokenStatistics, head_residuals

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEPT_NORMS = 8
"""Texts between two writes of the table."""


def gradient_norms(
    reader: Reader, sequences: Sequence[TokenSequence], *, label: str = "gradients"
) -> list[float]:
    """The norm of the gradient of each text's mean NLL, over all parameters of the model.

    An adapter counts as merged: ∂L/∂W is the same whether W or its low-rank term would move. The
    texts' scores, which the same pass finds, are kept too.
    """
    keys = [key_of("gradients", s.tokens, s.scored_from("answer")) for s in sequences]

    def compute(missing: list[int]) -> Iterator[list[dict[str, Any]]]:
        reader.forwards += len(missing)
        with progress(label, len(missing), "texts") as bar, _trainable(reader.model) as parameters:
            for low in range(0, len(missing), KEPT_NORMS):
                rows, scores = [], []
                for number in missing[low : low + KEPT_NORMS]:
                    norm, found = _norm(reader.model, parameters, sequences[number])
                    rows.append({"key": keys[number], "norm": norm})
                    columns = {name: getattr(found, name).tolist() for name in COLUMNS}
                    scores.append({"key": sequence_key(sequences[number]), **columns})
                    bar(1)
                reader.keep_scores(scores)
                yield rows

    sizes = [len(sequence.tokens) for sequence in sequences]
    return [row["norm"] for row in looked_up(reader.gradients, keys, compute, sizes)]


def _norm(
    model: PreTrainedModel, parameters: Sequence[nn.Parameter], sequence: TokenSequence
) -> tuple[float, TokenStatistics]:
    """The norm of a text's gradient, and what the model says of its tokens."""
    packed = pack([sequence], "answer", next(model.parameters()).device)
    head = output_head(model)
    with torch.enable_grad(), _squares_of_layers(model) as squares:
        states = hidden_states(model, packed)
        found, residuals = head_residuals(states.detach(), head, packed.targets)
        weight = head.detach().to(states.dtype)
        slope = torch.cat([product_back(r.to(states.dtype), weight) for r in residuals])
        gradients = torch.autograd.grad(states, parameters, slope / len(states), allow_unused=True)
    squares += [_square(g) for g in gradients if g is not None]
    embedded = next((g for p, g in zip(parameters, gradients, strict=True) if p is head), None)
    squares += _squares_of_head(states.detach(), residuals, embedded, packed.tokens)
    norm = float(torch.stack(squares).sum().sqrt())
    if not norm < float("inf"):
        raise EvaluationError(f"the gradient of {sequence.id!r} is not finite; the model is broken")
    return norm, found


def _squares_of_head(
    states: Tensor, residuals: list[Tensor], embedded: Tensor | None, tokens: Tensor
) -> list[Tensor]:
    """What the head adds: ‖G‖² for its gradient G = Rᵀ H / N, and 2 ⟨G, E⟩.

    R (N, V) the residuals, H (N, d) the states; ‖Rᵀ H‖² = Σ_st (r_s · r_t)(h_s · h_t) for a text
    shorter than the width. E (V, d) is the gradient of the same matrix as embedding, if it is one:
    other than 0 in the rows of `tokens` alone.
    """
    count, width, h = *states.shape, states.float()
    if count < width:
        r = torch.cat(residuals)
        squares = [_paired(_inner(r), _inner(h)) / count**2]
        some = tokens.unique()
        rows = product(r[:, some].T, h.T)
    else:
        rows = h.new_zeros(residuals[0].shape[1], width)
        for residual, part in zip(residuals, h.split(BLOCK), strict=True):
            rows += product(residual.T, part.T)
        squares = [_square(rows) / count**2]
        some = slice(None)
    if embedded is not None:
        squares.append(2 * (rows * embedded[some].float()).sum(dtype=torch.float64) / count)
    return squares


@contextmanager
def _squares_of_layers(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """While the block lasts, backward passes add each layer's ‖∂L/∂W‖² to the list.

    For x (T, in) and g = ∂L/∂y (T, out) that is ‖gᵀ x‖², or without ever forming the gradient
    Σ_st (g_s · g_t)(x_s · x_t), which takes less where the text is short.
    """
    squares: list[Tensor] = []
    called: set[nn.Module] = set()
    known: dict[object, tuple[Tensor, list[Tensor]]] = {}  # layers such as q, k and v read one x

    def watch(layer: nn.Module, given: tuple[Tensor, ...], y: Tensor) -> None:
        if layer in called:
            raise EvaluationError(
                f"a layer of {type(model).__name__} is used twice in one pass, so the norm of its "
                "gradient is not a sum over uses; leave out the attack 'gradient_norm'"
            )
        called.add(layer)
        y.register_hook(lambda g: add(layer, given[0].detach(), g.flatten(0, -2)))

    def add(layer: nn.Module, whole: Tensor, g: Tensor) -> None:
        x = whole.flatten(0, -2)
        length, width = len(x), x.shape[1] + g.shape[1]
        if length * width < x.shape[1] * g.shape[1]:
            place = whole.data_ptr(), whole.shape, whole.stride()
            if place not in known:
                known[place] = whole, _inner(x)
            squares.append(_paired(_inner(g), known[place][1]))
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


def _inner(rows: Tensor) -> list[Tensor]:
    """The inner products of rows (T, d) with one another, but for those that are there turned
    round: of the first half (h, h), of the second with the first, and of the second."""
    half = len(rows) // 2
    first, second = rows[:half], rows[half:]
    return [product(first, first), product(second, first), product(second, second)]


def _paired(one: Sequence[Tensor], two: Sequence[Tensor]) -> Tensor:
    """Σ_st (g_s · g_t)(x_s · x_t), of what `_inner` gives of g and of x."""
    a, between, b = ((p * q).sum(dtype=torch.float64) for p, q in zip(one, two, strict=True))
    return a + 2 * between + b


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
