"""Causal attention of short sequences, forward and backward, on a CPU.

Sequences lie in bins of a few widths, so that a handful of large products serve many short ones:
each product of its own costs more to set up than to compute.

Dimensions: T tokens of a pack, H query and G key-value heads, w their width; S bins of C places.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

NARROWEST, STEP = 128, 64
"""Places of a bin: as many where the sequences fit, else the longest's in whole steps."""

PLACES = 1024
"""That are worked on at once: what is not kept of them is as large as what is."""


def short_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: float
) -> Tensor:
    """softmax(scale · Q Kᵀ + causal mask) V for each of the packed sequences: (1, H, T, w)."""
    return _ShortAttention.apply(query, key, value, lengths, scale)  # pyright: ignore


class _ShortAttention(torch.autograd.Function):
    """`attended` of heads that stand before tokens: (1, H, T, w)."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: float
    ) -> Tensor:
        q, k, v = (heads[0].transpose(0, 1) for heads in (query, key, value))
        out, kept = attended(q, k, v, lengths, scale)
        ctx.save_for_backward(*kept)
        ctx.lengths, ctx.scale = lengths, scale
        return out.transpose(0, 1)[None]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, Tensor, None, None]:
        grad = gradients[0][0].transpose(0, 1)
        found = attended_back(grad, list(ctx.saved_tensors), ctx.lengths, ctx.scale)
        query, key, value = (one.transpose(0, 1)[None] for one in found)
        return query, key, value, None, None


def attended(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: float
) -> tuple[Tensor, list[Tensor]]:
    """P V with P = softmax(scale · Q Kᵀ + mask), and what `attended_back` reads.

    Queries (T, H, w), keys and values (T, G, w), to (T, H, w). In bins, keys are (S · G, C, w) and
    queries (S · G, C · H/G, w), the H/G heads that share a key-value head side by side.
    """
    layout, groups = _layout(lengths), key.shape[1]
    laid = [heads.contiguous().index_select(0, layout.tokens) for heads in (query, key, value)]
    out, kept, none = [], [], query.new_zeros(())
    for shelf in layout.shelves:
        q, k, v = (shelf.by_group(heads, groups) for heads in laid)
        logits = torch.baddbmm(none, q, k.transpose(1, 2), beta=0, alpha=scale)
        shelf.with_heads_apart(logits, groups).add_(shelf.mask(query.dtype))
        p = logits.softmax(-1)
        out.append(shelf.by_place(torch.bmm(p, v), groups))
        kept += [q, k, v, p]
    return layout.by_token(out), kept


def attended_back(
    grad: Tensor, kept: list[Tensor], lengths: tuple[int, ...], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `attended` to queries, keys and values, four products for each width:

    ∂V = Pᵀ ∂O,   S = P ∘ (∂O Vᵀ - rowsum(P ∘ ∂O Vᵀ)),   ∂Q = scale · S K,   ∂K = scale · Sᵀ Q
    """
    layout, left = _layout(lengths), list(kept)
    groups = grad.shape[1] * kept[1].numel() // kept[0].numel()
    laid = grad.contiguous().index_select(0, layout.tokens)
    found: tuple[list[Tensor], ...] = ([], [], [])
    for shelf in layout.shelves:
        q, k, v, p, *left = left
        g = shelf.by_group(laid, groups)
        inner = torch.bmm(g, v.transpose(1, 2))
        slope = torch.ops.aten._softmax_backward_data(inner, p, -1, p.dtype)
        back = slope.transpose(1, 2)
        made = torch.bmm(slope, k), torch.bmm(back, q), torch.bmm(p.transpose(1, 2), g)
        for one, of_all in zip(made, found, strict=True):
            of_all.append(shelf.by_place(one, groups))
    to_query, to_key, to_value = map(layout.by_token, found)
    return to_query.mul_(scale), to_key.mul_(scale), to_value


@dataclass(frozen=True)
class _Shelf:
    """S bins of one width."""

    first: int
    width: int
    owners: Tensor
    """(S, C), whose place each is: a sequence's number, and another below 0 for every empty one."""

    def by_group(self, heads: Tensor, groups: int) -> Tensor:
        """Heads of all places, (places, H, w), as (S · G, C · H/G, w) of these bins, laid anew."""
        count, width = len(self.owners), heads.shape[2]
        here = heads[self.first : self.first + self.owners.numel()]
        return (
            here.view(count, self.width, groups, -1)
            .transpose(1, 2)
            .reshape(count * groups, -1, width)
        )

    def by_place(self, grouped: Tensor, groups: int) -> Tensor:
        """(S · G, C · H/G, w) as the heads of these places, (S · C, H, w)."""
        count, width = len(self.owners), grouped.shape[2]
        apart = grouped.view(count, groups, self.width, -1).transpose(1, 2)
        return apart.reshape(count * self.width, -1, width)

    def with_heads_apart(self, grouped: Tensor, groups: int) -> Tensor:
        """(S · G, C · H/G, C) as a view (S, G, C, H/G, C)."""
        return grouped.view(len(self.owners), groups, self.width, -1, self.width)

    def mask(self, kind: torch.dtype) -> Tensor:
        """-inf where a token is later or another sequence's, 0 elsewhere: (S, 1, C, 1, C).

        An empty place sees itself, and no other sees it.
        """
        if kind not in self._masks:
            same = self.owners[:, :, None] == self.owners[:, None]
            mask = torch.zeros(same.shape, dtype=kind).masked_fill_(~same.tril(), float("-inf"))
            self._masks[kind] = mask[:, None, :, None]
        return self._masks[kind]

    @cached_property
    def _masks(self) -> dict[torch.dtype, Tensor]:
        return {}


@dataclass(frozen=True)
class _Layout:
    """Where the tokens of a pack lie in bins."""

    shelves: list[_Shelf]
    tokens: Tensor
    """The token of each place, 0 for an empty one."""
    places: Tensor
    """(T,) the place of each token."""

    def by_token(self, shelves: list[Tensor]) -> Tensor:
        """The heads of every shelf's places as those of the tokens: (T, H, w)."""
        whole = shelves[0] if len(shelves) == 1 else torch.cat(shelves)
        return whole.index_select(0, self.places)


@lru_cache(maxsize=16)
def _layout(lengths: tuple[int, ...]) -> _Layout:
    """The longest first, each into the first bin that has room for it."""
    least = min(NARROWEST, _whole(sum(lengths)))
    bins: list[tuple[int, list[int]]] = []
    room: list[int] = []  # of each bin
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[number]
        place = next((i for i, left in enumerate(room) if left >= length), len(bins))
        if place == len(bins):
            room.append(max(least, _whole(length)))
            bins.append((room[place], []))
        bins[place][1].append(number)
        room[place] -= length
    starts = list(accumulate(lengths, initial=0))
    with torch.inference_mode(False):
        shelves, tokens = [], []
        for width, rows in _shelved(bins):
            first, owners = len(tokens), torch.arange(-width, 0).repeat(len(rows), 1)
            for row, held in enumerate(rows):
                here = [starts[i] + place for i in held for place in range(lengths[i])]
                whose = [i for i in held for _ in range(lengths[i])]
                owners[row, : len(here)] = torch.tensor(whose)
                tokens += here + (width - len(here)) * [0]
            shelves.append(_Shelf(first, width, owners))
        taken = torch.cat([shelf.owners.flatten() for shelf in shelves]) >= 0
        all_tokens = torch.tensor(tokens)
        places = torch.empty(sum(lengths), dtype=torch.int64)
        places[all_tokens[taken]] = taken.nonzero().squeeze(1)
        return _Layout(shelves, all_tokens, places)


def _shelved(bins: list[tuple[int, list[int]]]) -> Iterator[tuple[int, list[list[int]]]]:
    """Bins of one width side by side, of PLACES at most or one."""
    for width in sorted({width for width, _ in bins}):
        rows, count = [held for of, held in bins if of == width], max(1, PLACES // width)
        for start in range(0, len(rows), count):
            yield width, rows[start : start + count]


def places(longest: int) -> int:
    """Places of a bin that holds a sequence of `longest` tokens, where there are others too."""
    return max(NARROWEST, _whole(longest))


def _whole(length: int) -> int:
    """A width that holds a sequence: rows of it leave no remainder to vector instructions."""
    step = 32 if length <= NARROWEST else STEP
    return -(-length // step) * step
