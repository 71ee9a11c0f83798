"""Gradient norms: one backward pass a text, each computed once and kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from expunge.affine_heads import output_head
from expunge.data.batches import TokenSequence, pack
from expunge.errors import EvaluationError
from expunge.evaluate.reader import Reader
from expunge.evaluate.scoring import COLUMNS
from expunge.evaluate.tables import key_of, looked_up, sequence_key
from expunge.heads import blocks
from expunge.lora import adapters_of
from expunge.packs import Pack, hidden_states
from expunge.products import product, product_back
from expunge.progress import progress
from expunge.scores import TokenStatistics, head_residuals, joined_statistics

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
        found, slope, of_head = _of_head(states.detach(), head.detach(), packed)
        gradients = torch.autograd.grad(states, parameters, slope / len(states), allow_unused=True)
    squares += [_square(g) for g in gradients if g is not None]
    embedded = next((g for p, g in zip(parameters, gradients, strict=True) if p is head), None)
    squares += of_head.squares(embedded)
    norm = float(torch.stack(squares).sum().sqrt())
    if not norm < float("inf"):
        raise EvaluationError(f"the gradient of {sequence.id!r} is not finite; the model is broken")
    return norm, found


@dataclass
class _Head:
    """The gradient of the head of a text's mean NLL, G = Rᵀ H / N (V, d), as far as it is needed:
    R (N, V) are the residuals, H (N, d) the states."""

    square: Tensor
    """‖Rᵀ H‖²."""
    rows: Tensor
    """Rows of Rᵀ H, in float32."""
    some: Tensor | slice
    """The ids that they are of."""
    count: int
    """N."""

    def squares(self, embedded: Tensor | None) -> list[Tensor]:
        """‖G‖², and 2 ⟨G, E⟩ where E (V, d) is the gradient of the same matrix as embedding: other
        than 0 in the rows of the text's tokens alone."""
        found = [self.square / self.count**2]
        if embedded is not None:
            both = self.rows * embedded[self.some].float()
            found.append(2 * both.sum(dtype=torch.float64) / self.count)
        return found


def _of_head(states: Tensor, head: Tensor, packed: Pack) -> tuple[TokenStatistics, Tensor, _Head]:
    """What the head says of the tokens, ∂(Σ NLL)/∂H (N, d), and its own gradient.

    Of a text shorter than the width ‖Rᵀ H‖² = Σ_st (r_s · r_t)(h_s · h_t), and the residuals are
    kept for it; of a longer one Rᵀ H is formed block by block. So float32 numbers are held for no
    more than the head has.
    """
    count, width = states.shape
    weight, short = head.to(states.dtype), count < width
    some = packed.tokens.unique() if short else slice(None)
    found, slopes, kept, rows = [], [], [], None
    square = states.new_zeros((), dtype=torch.float64)
    read = head_residuals(states, head, packed.targets)
    for block, (statistics, residual) in zip(blocks(count), read, strict=True):
        found.append(statistics)
        slopes.append(product_back(residual.to(states.dtype), weight))
        h = states[block].float()
        more = product(residual[:, some].T, h.T)
        rows = more if rows is None else rows.add_(more)
        if short:
            square = square + _paired(_inner(residual), _inner(h))
            for r, other in kept:
                square = square + 2 * _dot(product(residual, r), product(h, other))
            kept.append((residual, h))
    assert rows is not None
    own = _Head(square if short else _square(rows), rows, some, count)
    return joined_statistics(found, states.device), torch.cat(slopes), own


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
    a, between, b = map(_dot, one, two)
    return a + 2 * between + b


def _dot(one: Tensor, two: Tensor) -> Tensor:
    return (one * two).sum(dtype=torch.float64)


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
