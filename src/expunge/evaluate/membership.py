"""Membership: can the losses of whole documents tell what the model was trained on?

Dimensions: M members, N non-members, R resamples.
"""

from collections.abc import Sequence

import numpy as np

from expunge.errors import EvaluationError


def auc(member_scores: Sequence[float], nonmember_scores: Sequence[float]) -> float:
    """The chance that a member outscores a non-member, ties counting half.

        AUC = P(m > n) + P(m = n) / 2  =  U / (M N)

    Exact, by ranks; source: Mann and Whitney 1947.
    """
    members, others = np.asarray(member_scores, float), np.asarray(nonmember_scores, float)
    for name, values in (("member", members), ("non-member", others)):
        if not len(values):
            raise EvaluationError(f"the membership test has no {name} documents; it needs both")
        if np.isnan(values).any():
            count, place = int(np.isnan(values).sum()), int(np.isnan(values).argmax())
            raise EvaluationError(
                f"{count} of {len(values)} {name} scores are NaN (first: number {place}); "
                "the model is broken"
            )
    others = np.sort(others)
    below = np.searchsorted(others, members, side="left")  # (M,)
    up_to = np.searchsorted(others, members, side="right")  # (M,)
    return float((below + up_to).mean() / (2 * len(others)))


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
    }
