"""Membership: how well a score of whole documents tells what the model was trained on.

The scores themselves are in attacks.py. Dimensions: M members, N non-members, R resamples.
"""

import math
import zlib
from collections.abc import Sequence

import numpy as np

from expunge.errors import EvaluationError
from expunge.evaluate.numbers import RESAMPLES, Number


def auc(member_scores: Sequence[float], nonmember_scores: Sequence[float]) -> float:
    """The chance that a member outscores a non-member, ties counting half.

        AUC = P(m > n) + P(m = n) / 2  =  U / (M N)

    Exact, by ranks; source: Mann and Whitney 1947.
    """
    members, others = _sides(member_scores, nonmember_scores)
    others = np.sort(others)
    below = np.searchsorted(others, members, side="left")  # (M,)
    up_to = np.searchsorted(others, members, side="right")  # (M,)
    return float((below + up_to).mean() / (2 * len(others)))


def tpr(
    member_scores: Sequence[float], nonmember_scores: Sequence[float], *, fpr: float = 0.01
) -> float:
    """The share of members found where at most a share `fpr` of non-members is taken for one.

        TPR = mean(m > t),   t the (a + 1)-th highest non-member score,   a = floor(fpr · N)

    No lower threshold keeps to `fpr`, and nothing is interpolated. With fewer than 1 / fpr
    non-members a is 0: members count that outscore every non-member. Ties count as not found.

    Source: Carlini et al. 2022, arXiv:2112.03570.
    """
    members, others = _sides(member_scores, nonmember_scores)
    allowed = math.floor(fpr * len(others) + 1e-9)  # 0.07 · 100 is 7.000000000000001
    if allowed >= len(others):
        return 1.0
    return float((members > np.sort(others)[-1 - allowed]).mean())


def separation(
    member_scores: Sequence[float],
    nonmember_scores: Sequence[float],
    *,
    fpr: float = 0.01,
    name: str,
    resamples: int = RESAMPLES,
) -> tuple[Number, Number]:
    """AUC and TPR with their 95 % intervals; both sides are resampled, drawn by `name`."""
    members, others = list(member_scores), list(nonmember_scores)
    values = auc(members, others), tpr(members, others, fpr=fpr)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    draws = np.empty((resamples, 2))
    for i in range(resamples):
        m = [members[j] for j in rng.integers(len(members), size=len(members))]
        n = [others[j] for j in rng.integers(len(others), size=len(others))]
        draws[i] = auc(m, n), tpr(m, n, fpr=fpr)
    low, high = np.quantile(draws, [0.025, 0.975], axis=0).tolist()
    count = len(members) + len(others)
    first, second = (Number(values[i], count, low[i], high[i]) for i in range(2))
    return first, second


def mia(
    member_nll: Sequence[float],
    nonmember_nll: Sequence[float],
    *,
    seed: int,
    resamples: int = 2000,
) -> dict[str, float | int]:
    """The AUC of -NLL, with its 95 % bootstrap interval, and the score 1 - 2 |AUC - 1/2|.

    AUC near 1: the members are still known; near 0: so far unlearned that it gives them away.
    Both sides are resampled.
    """
    members, others = -np.asarray(member_nll, float), -np.asarray(nonmember_nll, float)
    value = auc(members.tolist(), others.tolist())
    rng = np.random.default_rng(seed)
    wins = (members[:, None] > others) + 0.5 * (members[:, None] == others)  # (M, N)
    m, n = wins.shape
    draws = np.empty(resamples)
    for i in range(resamples):
        # How often each document is drawn, so that a draw is two small products: u·W·v / (M N)
        u = np.bincount(rng.integers(m, size=m), minlength=m)
        v = np.bincount(rng.integers(n, size=n), minlength=n)
        draws[i] = u @ wins @ v / (m * n)
    low, high = np.quantile(draws, [0.025, 0.975])
    return {
        "auc": value,
        "score": 1 - 2 * abs(value - 0.5),
        "low": float(low),
        "high": float(high),
        "n": m + n,
        "members": m,
        "nonmembers": n,
    }


def _sides(
    member_scores: Sequence[float], nonmember_scores: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Both sides as arrays; an empty one, or NaN, is refused."""
    sides = np.asarray(member_scores, float), np.asarray(nonmember_scores, float)
    for name, values in zip(("member", "non-member"), sides, strict=True):
        if not len(values):
            raise EvaluationError(f"the membership test has no {name} documents; it needs both")
        if np.isnan(values).any():
            count, place = int(np.isnan(values).sum()), int(np.isnan(values).argmax())
            raise EvaluationError(
                f"{count} of {len(values)} {name} scores are NaN (first: number {place}); "
                "the model is broken"
            )
    return sides
