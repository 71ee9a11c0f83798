"""Merge methods: one procedure, and a table with one row of choices for each method.

Dimensions: M branches, S the shape of one tensor, n its number of entries, r rank.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Vote = Literal["unweighted", "weighted"]
Sparsify = Callable[[Tensor, float, torch.Generator], Tensor]


def combine(
    deltas: Tensor,
    method: "Method",
    rng: torch.Generator,
    *,
    weights: Sequence[float],
    density: float,
    vote: Vote = "unweighted",
    normalize: bool = False,
) -> Tensor:
    """Merge the deltas of one tensor: (M, *S) to (*S).

        τ_i = sparsify(δ_i)
        plain sum:       Σ_i w_i τ_i
        elected signs:   (Σ_i w_i τ_i [sign(v_i) = σ]) / (Σ_i [sign(v_i) = σ]),   σ = sign(Σ_i v_i)

    entry by entry, with v_i = τ_i (unweighted vote) or w_i τ_i (weighted); a sum of 0 elects +.
    `normalize` divides by the |w_i| that took part: all of them in a plain sum,
    those that agree under elected signs. With weights of 1 an elected mean is already normalized.

    Source: TIES, arXiv:2306.01708; peft's choices (unweighted vote, division by count).
    Differs: trims within each tensor, so that it can stream; TIES trims the whole model.
    """
    sparse = torch.stack([method.sparsify(delta, density, rng) for delta in deltas])  # (M, *S)
    each = torch.tensor(weights, dtype=sparse.dtype, device=sparse.device)
    each = each.view(-1, *[1] * (sparse.dim() - 1))  # (M, 1…)
    weighted = sparse * each  # (M, *S)
    if not method.elect_sign:
        total = weighted.sum(0)
        return total / each.abs().sum() if normalize else total
    votes = weighted if vote == "weighted" else sparse
    elected = (votes.sum(0) >= 0).to(votes.dtype) * 2 - 1  # (*S), +1 or -1
    agrees = (votes * elected > 0).to(votes.dtype)  # (M, *S); a zero agrees with nobody
    share = agrees * each.abs() if normalize else agrees  # (M, *S)
    least = torch.finfo(share.dtype).tiny  # where nobody agrees, 0 / least = 0
    return (weighted * agrees).sum(0) / share.sum(0).clamp_min(least)  # (*S)


def tensor_rng(seed: int, name: str) -> torch.Generator:
    """The randomness of one tensor: a function of seed and name alone, so order cannot matter."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def keep_all(delta: Tensor, density: float, rng: torch.Generator) -> Tensor:
    """Leave the delta as it is."""
    return delta


def keep_largest(delta: Tensor, density: float, rng: torch.Generator) -> Tensor:
    """Keep the ⌊density · n⌋ entries of largest magnitude, exactly that many; zero the rest.

    Among entries equal to the threshold, those of lowest index stay.

    Source: TIES, arXiv:2306.01708.
    Differs: peft's topk leaves open which of several equal entries stay.
    """
    keep = int(density * delta.numel())
    if keep == delta.numel():
        return delta
    if keep == 0:
        return torch.zeros_like(delta)
    magnitude = delta.abs().flatten()  # (n,)
    place = delta.numel() - keep
    threshold = float(np.partition(magnitude.cpu().numpy(), place)[place])
    kept = magnitude >= threshold
    equal = (magnitude == threshold).nonzero().flatten()
    surplus = int(kept.count_nonzero()) - keep
    kept[equal[len(equal) - surplus :]] = False
    return torch.where(kept.view_as(delta), delta, 0)


def drop_at_random(delta: Tensor, density: float, rng: torch.Generator) -> Tensor:
    """Keep each entry with probability `density`, rescaled so that the mean is unchanged.

        τ = δ · Bernoulli(density) / density

    Source: DARE, arXiv:2311.03099.
    """
    kept = (torch.rand(delta.shape, generator=rng) < density).to(delta)
    return delta * kept / density


def truncated(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest product B A of the given rank (Frobenius): A (r, in), B (out, r).

    The eigenvectors of the smaller Gram matrix span what an SVD would keep, at a small part of
    its cost; in float64, so that squaring costs no accuracy that float32 could show.

    Source: Eckart and Young 1936.
    """
    if delta.shape[0] > delta.shape[1]:
        b, a = truncated(delta.T, rank)
        return a.T, b.T
    wide = delta.double()
    u = torch.linalg.eigh(wide @ wide.T).eigenvectors[:, -rank:]  # (out, r)
    return (u.T @ wide).to(delta.dtype), u.to(delta.dtype)


@dataclass(frozen=True)
class Method:
    """One row: what it does to each delta, and how the deltas meet."""

    source: str
    sparsify: Sparsify = keep_all
    elect_sign: bool = False
    """Average the entries of the majority's sign instead of summing all."""
    fidelity: str = "exact"
    """exact · as-released quirk · adapted · inspired · own."""
    differs: str = ""
    """Where the code departs from the source."""
    needs: tuple[str, ...] = ()
    """What must be given beyond the branches."""
    cost: str = "one pass over each tensor"
    test: str = "tests/merge/test_methods.py, tests/merge/test_peft_parity.py"

    @property
    def random(self) -> bool:
        """Draws from the generator."""
        return self.sparsify is drop_at_random

    @property
    def linear(self) -> bool:
        """Is a weighted sum, so low-rank deltas stay low-rank exactly."""
        return self.sparsify is keep_all and not self.elect_sign


_PER_TENSOR = "trims each tensor by itself (so does peft), not the model as a whole"
_SELECTION = "one pass and one O(n) selection per tensor and branch"

METHODS = {
    "linear": Method(source="peft add_weighted_adapter"),
    "task_arithmetic": Method(
        source="arXiv:2212.04089", differs="the same sum as linear; the scale is in the weights"
    ),
    "ties": Method(
        sparsify=keep_largest,
        elect_sign=True,
        source="arXiv:2306.01708",
        fidelity="adapted",
        differs=_PER_TENSOR,
        needs=("density",),
        cost=_SELECTION,
    ),
    "dare_linear": Method(
        sparsify=drop_at_random, source="arXiv:2311.03099", needs=("density", "seed")
    ),
    "dare_ties": Method(
        sparsify=drop_at_random,
        elect_sign=True,
        source="arXiv:2311.03099",
        fidelity="adapted",
        differs="drops at random in place of the trim of TIES, as peft and mergekit do",
        needs=("density", "seed"),
    ),
    "magnitude_prune": Method(
        sparsify=keep_largest,
        source="peft add_weighted_adapter",
        needs=("density",),
        cost=_SELECTION,
    ),
}
