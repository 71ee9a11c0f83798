"""Membership: how well a score of whole documents tells what the model was trained on.

The scores themselves are in attacks.py. Dimensions: M members, N non-members, R resamples.
"""

import math
import zlib
from collections.abc import Sequence

import numpy as np

from expunge.errors import EvaluationError
from expunge.evaluate.numbers import RESAMPLES, Number, Z, wilson


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
    count, sizes = len(members) + len(others), (len(members), len(others))
    area = Number(values[0], count, *auc_interval(values[0], draws[:, 0], *sizes))
    low, high = np.quantile(draws[:, 1], [0.025, 0.975]).tolist()
    if low == high:
        low, high = wilson(values[1] * sizes[0], sizes[0])
    return area, Number(values[1], count, low, high)


def auc_interval(value: float, draws: np.ndarray, m: int, n: int) -> tuple[float, float]:
    """The 95 % interval of an AUC of m members and n non-members: what holds 95 % of `draws` (R,).

    Where all draws are alike, as where the scores of one side all lie above the other's, it is
    what this holds for, with θ the AUC and k = (m + n)/2 - 1:

        (θ - value)² ≤ z² θ (1 - θ) (1 + k ((1 - θ)/(2 - θ) + θ/(1 + θ))) / (m n),    z = 1.96

    which is not 0 wide: three of each that are told apart say little of the next.

    Source: Newcombe 2006, Statistics in Medicine 25, method 5; Hanley and McNeil 1982.
    """
    low, high = np.quantile(draws, [0.025, 0.975]).tolist()
    if low < high:
        return low, high
    return _bound(value, 0.0, m, n), _bound(value, 1.0, m, n)


def _bound(value: float, end: float, m: int, n: int) -> float:
    """Where the inequality of `auc_interval` ends between `value` and `end`, by bisection."""
    inside, outside, k = value, end, (m + n) / 2 - 1
    for _ in range(60):
        theta = (inside + outside) / 2
        spread = theta * (1 - theta) * (1 + k * ((1 - theta) / (2 - theta) + theta / (1 + theta)))
        if (theta - value) ** 2 > Z * Z * spread / (m * n):
            outside = theta
        else:
            inside = theta
    return outside


def mia(
    member_nll: Sequence[float],
    nonmember_nll: Sequence[float],
    *,
    seed: int,
    resamples: int = 2000,
) -> dict[str, float | int]:
    """The AUC of -NLL, with its 95 % interval, and the score 1 - 2 |AUC - 1/2|.

    AUC near 1: the members are still known; near 0: so far unlearned that it gives them away.
    Both sides are resampled (see `auc_interval`).
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
    low, high = auc_interval(value, draws, m, n)
    return {
        "auc": value,
        "score": 1 - 2 * abs(value - 0.5),
        "low": low,
        "high": high,
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
