"""The one primitive: a packed forward pass to per-token log-probabilities, shifted and masked.

Dimensions: B sequences, T tokens of a pack, N scored tokens, d width, V vocabulary.
Logits exist only for the scored tokens, a block at a time; no [T x V] matrix is ever held.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from expunge.packs import Pack, hidden_states, output_head
from expunge.products import product, product_back

BLOCK = 256
"""Scored tokens whose logits are held at once."""


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of the scored tokens of B sequences (float32, natural logs)."""

    token_logps: Tensor  # (N,)
    sequence: Tensor  # (N,) index of the sequence each token belongs to
    count: int  # B
    token_kl: Tensor | None = None  # (N,) KL(reference || current), where asked for

    @property
    def lengths(self) -> Tensor:
        """Scored tokens of each sequence: (B,)."""
        return self.sum_by_sequence(torch.ones_like(self.token_logps))

    @property
    def logps(self) -> Tensor:
        """Log-probability of each whole sequence, the sum over its tokens: (B,)."""
        return self.sum_by_sequence(self.token_logps)

    @property
    def nll(self) -> Tensor:
        """Mean negative log-likelihood a token, of each sequence: (B,)."""
        return -self.logps / self.lengths

    def sum_by_sequence(self, values: Tensor) -> Tensor:
        """Sum per-token `values` (N,) over each sequence: (B,)."""
        return values.new_zeros(self.count).index_add(0, self.sequence, values)

    def span(self, start: int, stop: int) -> "Scores":
        """The scores of sequences start..stop-1 alone."""
        inside = self.where((self.sequence >= start) & (self.sequence < stop))
        return replace(inside, sequence=inside.sequence - start, count=stop - start)

    def where(self, chosen: Tensor) -> "Scores":
        """The scores of the chosen tokens (N,) alone, of all sequences."""
        kl = None if self.token_kl is None else self.token_kl[chosen]
        return Scores(self.token_logps[chosen], self.sequence[chosen], self.count, kl)


def score(
    model: PreTrainedModel,
    pack: Pack,
    *,
    reference_states: Tensor | None = None,
    reference_head: Tensor | None = None,
) -> Scores:
    """Forward `pack` once; per-token log-probs, and KL to the reference if its states are given.

    `reference_states` (N, d) are the reference's final hidden states at the same tokens, and
    `reference_head` (V, d) its head, where that is not the model's own frozen one.
    """
    states = hidden_states(model, pack)
    if torch.is_autocast_enabled(states.device.type):
        states = states.to(torch.get_autocast_dtype(states.device.type))
    head = output_head(model)
    logps = token_logps(states, head, pack.targets)
    kl = None
    if reference_states is not None:
        kl = token_kl(states, reference_states, head, reference_head)
    return Scores(logps, pack.sequence, len(pack.lengths), kl)


def token_logps(states: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """log p(target) for each state, float32, logits a block at a time: (N,).

    log p(y | h) = h·W_y - log Σ_v exp(h·W_v)
    """
    return _TokenLogps.apply(states, head, targets)  # pyright: ignore[reportReturnType]


def token_kl(
    states: Tensor, reference_states: Tensor, head: Tensor, reference_head: Tensor | None = None
) -> Tensor:
    """KL(reference || current) over the whole vocabulary, logits a block at a time: (N,).

        KL = Σ_v q_v (log q_v - log p_v),   p = softmax(W h),  q = softmax(W_ref h_ref)

    Without `reference_head` both go through `head`, which is then taken as frozen.
    """
    if reference_head is None:
        head = reference_head = head.detach() if head.requires_grad else head
    return _TokenKL.apply(states, reference_states, head, reference_head)  # pyright: ignore


class _TokenLogps(torch.autograd.Function):
    """∂/∂h log p(y|h) = W_y - p·W is formed in the forward pass, so backward is one product.

    A trainable head needs its own gradient, Σ g (1_y - p) hᵀ, and logits once more for it.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        logps = torch.empty(len(states), dtype=torch.float32, device=states.device)
        weight = head.to(states.dtype)
        slope = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        for block in _blocks(len(states)):
            log_p = product(states[block], weight).float().log_softmax(-1)
            logps[block] = log_p.gather(1, targets[block, None]).squeeze(1)
            if slope is not None:
                p = log_p.exp_().to(states.dtype)
                slope[block] = weight[targets[block]] - product_back(p, weight)
        ctx.save_for_backward(slope, states if ctx.needs_input_grad[1] else None, head, targets)
        return logps

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, Tensor | None, None]:
        slope, states, head, targets = ctx.saved_tensors
        grad = gradients[0]
        to_states = None if slope is None else slope * grad[:, None].to(slope.dtype)
        if states is None:
            return to_states, None, None
        weight = head.to(states.dtype)
        to_head = torch.zeros_like(head, dtype=torch.float32)
        for block in _blocks(len(states)):
            residual = -product(states[block], weight).float().softmax(-1)
            residual[torch.arange(len(residual)), targets[block]] += 1
            residual *= grad[block, None]
            to_head += product(residual.to(states.dtype).T, states[block].T).float()
        return to_states, to_head.to(head.dtype), None


class _TokenKL(torch.autograd.Function):
    """∂KL/∂h = (p - q)·W is formed in the forward pass; ∂KL/∂W = Σ g (p - q) hᵀ needs p again."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, reference: Tensor, head: Tensor, reference_head: Tensor
    ) -> Tensor:
        weight, old = head.to(states.dtype), reference_head.to(states.dtype)
        reference = reference.to(states.dtype)
        kl = torch.empty(len(states), dtype=torch.float32, device=states.device)
        slope = torch.empty_like(states)
        for block in _blocks(len(states)):
            log_p = product(states[block], weight).float().log_softmax(-1)
            log_q = product(reference[block], old).float().log_softmax(-1)
            q = log_q.exp()
            kl[block] = (q * (log_q - log_p)).sum(-1)
            slope[block] = product_back(log_p.exp_().sub_(q).to(states.dtype), weight)
        ctx.save_for_backward(slope, states, reference, head, reference_head)
        return kl

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, Tensor | None, None]:
        slope, states, reference, head, reference_head = ctx.saved_tensors
        grad = gradients[0]
        to_states = slope * grad[:, None].to(slope.dtype)
        if not ctx.needs_input_grad[2]:
            return to_states, None, None, None
        weight, old = head.to(states.dtype), reference_head.to(states.dtype)
        to_head = torch.zeros_like(head, dtype=torch.float32)
        for block in _blocks(len(states)):
            p = product(states[block], weight).float().softmax(-1)
            q = product(reference[block], old).float().softmax(-1)
            residual = (p - q) * grad[block, None]
            to_head += product(residual.to(states.dtype).T, states[block].T).float()
        return to_states, None, to_head.to(head.dtype), None


def _blocks(count: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]


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
    found = [_of_logits(product(states[b], weight), targets[b])[0] for b in _blocks(len(states))]
    return _joined(found, states.device)


@torch.no_grad()
def head_residuals(
    states: Tensor, head: Tensor, targets: Tensor
) -> tuple[TokenStatistics, list[Tensor]]:
    """token_statistics, and ∂NLL/∂logits = p - 1_y of each token in float32, in blocks (n, V)."""
    weight = head.to(states.dtype)
    found, residuals = [], []
    for block in _blocks(len(states)):
        statistics, residual = _of_logits(product(states[block], weight), targets[block])
        residual[torch.arange(len(residual)), targets[block]] -= 1
        found.append(statistics)
        residuals.append(residual)
    return _joined(found, states.device), residuals


def _of_logits(logits: Tensor, targets: Tensor) -> tuple[TokenStatistics, Tensor]:
    """The statistics of a block of logits (n, V), and its probabilities, in float32."""
    x = logits.float()
    x -= x.amax(-1, keepdim=True)
    odds = x.exp()  # of each token against the likeliest
    total = odds.sum(-1)
    target = x.gather(1, targets[:, None])
    rank = (x > target).sum(-1)
    hit = x.argmax(-1) == targets
    mean = torch.linalg.vecdot(odds, x) / total
    square = torch.linalg.vecdot(odds, x.square_()) / total
    log_total = total.log()
    logp = target.squeeze(1) - log_total
    variance = (square - mean * mean).clamp_min(0)
    return TokenStatistics(logp, rank, hit, log_total - mean, variance), odds.div_(total[:, None])


def _joined(found: list[TokenStatistics], device: torch.device) -> TokenStatistics:
    """The statistics of blocks as one."""
    if not found:
        none = torch.zeros(0, device=device)
        return TokenStatistics(none, none.long(), none.bool(), none, none)
    names = [field.name for field in fields(TokenStatistics)]
    return TokenStatistics(*(torch.cat([getattr(one, name) for one in found]) for name in names))
