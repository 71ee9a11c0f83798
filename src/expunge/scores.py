"""The one primitive: a packed forward pass to per-token log-probabilities, shifted and masked.

Dimensions: B sequences, T tokens of a pack, N scored tokens, d width, V vocabulary.
Logits exist only for the scored tokens, a block at a time; no [T x V] matrix is ever held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from expunge.affine_heads import output_head
from expunge.heads import Anchor, blocks, token_kl, token_logps, token_logps_and_kl
from expunge.packs import Pack, hidden_states
from expunge.products import product
from expunge.softmax import in_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST_WEIGHT = 1e-12
"""Weights of tokens that add up to less count as none."""


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of the scored tokens of B sequences (float32, natural logs)."""

    token_logps: Tensor  # (N,)
    sequence: Tensor  # (N,) index of the sequence each token belongs to
    count: int  # B
    token_kl: Tensor | None = None  # (N,) KL(reference || current), where asked for
    weights: Tensor | None = None  # (N,) each token's part in sums and means; 1 where not given
    more: Mapping[str, Tensor] = field(default_factory=dict)  # (N, ...) other readings, by name

    @property
    def lengths(self) -> Tensor:
        """Scored tokens of each sequence, or the sum of their weights: (B,)."""
        return self.sum_by_sequence(torch.ones_like(self.token_logps))

    @property
    def logps(self) -> Tensor:
        """Log-probability of each whole sequence, the sum over its tokens: (B,)."""
        return self.sum_by_sequence(self.token_logps)

    @property
    def nll(self) -> Tensor:
        """Mean negative log-likelihood a token, of each sequence: (B,)."""
        return -self.mean_by_sequence(self.token_logps)

    def sum_by_sequence(self, values: Tensor) -> Tensor:
        """Sum per-token `values` (N,) over each sequence: (B,)."""
        if self.weights is not None:
            values = values * self.weights
        return values.new_zeros(self.count).index_add(0, self.sequence, values)

    def mean_by_sequence(self, values: Tensor) -> Tensor:
        """Mean of per-token `values` (N,) over each sequence, 0 where nothing weighs: (B,)."""
        return self.sum_by_sequence(values) / self._safe(self.lengths)

    def mean(self, values: Tensor) -> Tensor:
        """Mean of per-token `values` (N,) over all tokens, 0 where nothing weighs: ()."""
        if self.weights is None:
            return values.mean()
        return (values * self.weights).sum() / self._safe(self.weights.sum())

    def span(self, start: int, stop: int) -> Scores:
        """The scores of sequences start..stop-1 alone."""
        inside = self.where((self.sequence >= start) & (self.sequence < stop))
        return replace(inside, sequence=inside.sequence - start, count=stop - start)

    def where(self, chosen: Tensor) -> Scores:
        """The scores of the chosen tokens (N,) alone, of all sequences."""
        return Scores(
            self.token_logps[chosen],
            self.sequence[chosen],
            self.count,
            None if self.token_kl is None else self.token_kl[chosen],
            None if self.weights is None else self.weights[chosen],
            {name: values[chosen] for name, values in self.more.items()},
        )

    def weighted(self, weights: Tensor | None) -> Scores:
        """The same scores, with these weights of the tokens (N,) in sums and means."""
        return replace(self, weights=weights)

    def _safe(self, total: Tensor) -> Tensor:
        """A divisor; what it divides is 0 where all weights are."""
        return total if self.weights is None else total.clamp_min(LEAST_WEIGHT)


def score(
    model: PreTrainedModel,
    pack: Pack,
    *,
    anchor: Anchor | None = None,
    anchored: Tensor | None = None,
) -> Scores:
    """Forward `pack` once; per-token log-probs, and the KL to an anchor if one is given.

    `anchored` (N,) marks the tokens that the anchor speaks of, in order; all, where not given. The
    KL of the others is 0.
    """
    states, head = narrowed(hidden_states(model, pack)), output_head(model)
    logps, kl = logps_and_kl(states, head, pack.targets, anchor, anchored)
    return Scores(logps, pack.sequence, len(pack.lengths), kl)


def narrowed(states: Tensor) -> Tensor:
    """Final hidden states in the type of the products that read them."""
    if torch.is_autocast_enabled(states.device.type):
        return states.to(torch.get_autocast_dtype(states.device.type))
    return states


def logps_and_kl(
    states: Tensor, head: Tensor, targets: Tensor, anchor: Anchor | None, anchored: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """log p(target) of states (N, d), and the KL to the anchor of those it speaks of: both (N,)."""
    if anchor is None:
        return token_logps(states, head, targets), None
    inside = slice(None) if anchored is None else anchored
    kl = states.new_zeros(len(states), dtype=torch.float32)
    if anchor.head is not None:
        kl[inside] = token_kl(states[inside], head, anchor)
        return token_logps(states, head, targets), kl
    logps = torch.zeros_like(kl)
    logps[inside], kl[inside] = token_logps_and_kl(states[inside], head, targets[inside], anchor)
    if anchored is not None and not anchored.all():
        logps[~anchored] = token_logps(states[~anchored], head, targets[~anchored])
    return logps, kl


@dataclass(frozen=True)
class TokenStatistics:
    """What the model's distribution says of each target token (N,), natural logs."""

    logp: Tensor  # float32, log p(target)
    rank: Tensor  # int64, how many tokens are likelier
    hit: Tensor  # bool, whether the target is the arg-max (the lowest id among equals)
    entropy: Tensor  # float32, -Σ p log p
    variance: Tensor  # float32, Σ p (log p)² - (Σ p log p)²


@torch.inference_mode()
def token_statistics(states: Tensor, head: Tensor, targets: Tensor) -> TokenStatistics:
    """Everything that offline metrics read of a token, from one product with the head.

    states (N, d), head (V, d), targets (N,); logits a block at a time.
    """
    weight = head.to(states.dtype)
    return logits_statistics(states, targets, lambda block: product(block, weight))


@torch.inference_mode()
def logits_statistics(
    states: Tensor, targets: Tensor, logits_of: Callable[[Tensor], Tensor]
) -> TokenStatistics:
    """token_statistics, with logits (n, V) as a function gives them of a block of states."""
    found = []
    for block in blocks(len(states)):
        logits, chosen = logits_of(states[block]), targets[block]
        found += [_of_rows(logits[rows].float(), chosen[rows])[0] for rows in in_cache(logits)]
    return joined_statistics(found, states.device)


@torch.no_grad()
def head_residuals(
    states: Tensor, head: Tensor, targets: Tensor
) -> Iterator[tuple[TokenStatistics, Tensor]]:
    """token_statistics, and ∂NLL/∂logits = p - 1_y in float32 (n, V), a block at a time."""
    weight = head.to(states.dtype)
    for block in blocks(len(states)):
        logits, found = product(states[block], weight), []
        residual = torch.empty(logits.shape, device=logits.device)
        for rows in in_cache(residual):
            statistics, odds, total = _of_rows(logits[rows].float(), targets[block][rows])
            torch.div(odds, total[:, None], out=residual[rows])
            found.append(statistics)
        residual[torch.arange(len(residual)), targets[block]] -= 1
        yield joined_statistics(found, states.device), residual


def _of_rows(x: Tensor, targets: Tensor) -> tuple[TokenStatistics, Tensor, Tensor]:
    """The statistics of logits (n, V) in float32, which are overwritten; each token's odds against
    the likeliest, and their sums."""
    x -= x.amax(-1, keepdim=True)
    odds = x.exp()
    total = odds.sum(-1)
    target = x.gather(1, targets[:, None])
    scratch = torch.empty_like(x)  # sums of comparisons are faster in float32, and as exact
    above = torch.gt(x, target, out=scratch).sum(-1)
    level = torch.ge(x, target, out=scratch).sum(-1)
    hit = above == 0
    for row in (hit & (level > 1)).nonzero().flatten():
        hit[row] = x[row].argmax() == targets[row]
    mean = torch.mul(odds, x, out=scratch).sum(-1) / total
    square = scratch.mul_(x).sum(-1) / total
    log_total = total.log()
    logp = target.squeeze(1) - log_total
    variance = (square - mean * mean).clamp_min(0)
    return TokenStatistics(logp, above.long(), hit, log_total - mean, variance), odds, total


def joined_statistics(found: list[TokenStatistics], device: torch.device) -> TokenStatistics:
    """The statistics of blocks as one."""
    if not found:
        none = torch.zeros(0, device=device)
        return TokenStatistics(none, none.long(), none.bool(), none, none)
    names = [field.name for field in fields(TokenStatistics)]
    return TokenStatistics(*(torch.cat([getattr(one, name) for one in found]) for name in names))
