"""Balance: how far what was forgotten is from text never seen, by several attacks at once.

Dimensions: M members, N non-members.
"""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from expunge.errors import EvaluationError
from expunge.evaluate.attacks import ATTACKS, Read, attack_score
from expunge.evaluate.membership import auc, auc_interval
from expunge.evaluate.two_sample import ks_test

CHEAP = tuple(name for name, attack in ATTACKS.items() if set(attack.reads) <= {"scores", "text"})
"""Attacks that read nothing but a document and its scores."""

Scored = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""By attack, the scores of members and of non-members."""


def two_sided_auc(member_scores: Sequence[float], nonmember_scores: Sequence[float]) -> float:
    """The AUC of an attacker who looks both ways: members lie farther from what is usual.

        d = |s - μ|,   μ the mean score of the non-members (of the others, for a non-member)

    An AUC of 1/2 can hide half of the members far above unseen text and half far below; this one
    is 1 then. One half where both sides are alike.

    Source: this project; the issue is that of over-unlearning in MUSE, arXiv:2407.06460.
    """
    members, others = np.asarray(member_scores, float), np.asarray(nonmember_scores, float)
    if len(others) < 2 or not len(members):
        raise EvaluationError("the two-sided attack needs a member and two non-members")
    total = others.sum()
    from_others = np.abs(others - (total - others) / (len(others) - 1))
    from_all = np.abs(members - total / len(others))
    return auc(from_all.tolist(), from_others.tolist())


def midway(values: Iterable[float]) -> float:
    """The middle between the greatest and the least of some attacks' numbers.

        (max + min) / 2

    Where that of the AUCs is 1/2, the worst attack is as near 1/2 as it can be brought on a line
    along which all of them rise. Their mean may rest there while one alone gives members away.
    """
    found = list(values)
    return (max(found) + min(found)) / 2


def furthest(values: Iterable[float]) -> float:
    """The value that lies furthest from 1/2, to either side: the worst of some attacks' AUCs."""
    return max(values, key=lambda value: abs(value - 0.5))


def separation_gap(member_scores: Sequence[float], nonmember_scores: Sequence[float]) -> float:
    """How many spreads the members lie above the non-members; 0 is balanced, and it does not end.

        d' = (μ_m - μ_n) / √((σ_m² + σ_n²) / 2)

    Where an AUC is 0 or 1 and says nothing of how far it is off, this still does.

    Source: Green and Swets 1966.
    """
    members, others = np.asarray(member_scores, float), np.asarray(nonmember_scores, float)
    spread = float(np.sqrt((members.var() + others.var()) / 2))
    gap = float(members.mean() - others.mean())
    return gap / spread if spread else float(np.sign(gap)) * 1e9 if gap else 0.0


def attacked(
    members: Sequence[Read], nonmembers: Sequence[Read], attacks: Sequence[str], *, k: float = 20
) -> dict[str, tuple[list[float], list[float]]]:
    """The scores of both sides under each attack."""
    found = {}
    for name in attacks:
        sides = [[attack_score(name, read, k=k) for read in side] for side in (members, nonmembers)]
        kept = [[score for score in side if score is not None] for side in sides]
        found[name] = (kept[0], kept[1])
    return found


def balance(scored: Scored, *, resamples: int = 0) -> dict[str, dict[str, float]]:
    """Of each attack: `auc`, `two_sided`, `ks` and its `ks_p`, `gap`; with `resamples` also
    `auc_low`, `auc_high`, `two_sided_low`, `two_sided_high`, 95 % intervals."""
    found = {}
    for name, (members, others) in scored.items():
        distance, p = ks_test(members, others)
        found[name] = {
            "auc": auc(members, others),
            "two_sided": two_sided_auc(members, others),
            "ks": distance,
            "ks_p": p,
            "gap": separation_gap(members, others),
        }
        if resamples:
            found[name] |= _intervals(name, members, others, resamples)
    return found


def shape(
    member_nll: Sequence[float], nonmember_nll: Sequence[float], *, resamples: int = 0
) -> dict[str, Any]:
    """What an AUC of losses of 1/2 may hide, their `two_sided` AUC and `ks` distance; with
    `resamples` also `two_sided_interval`, 95 %. Nothing of fewer than two non-members."""
    if len(nonmember_nll) < 2:
        return {}
    members, others = ([-nll for nll in side] for side in (member_nll, nonmember_nll))
    found = {"two_sided": two_sided_auc(members, others), "ks": ks_test(members, others)[0]}
    if not resamples:
        return found
    ends = _intervals("loss", members, others, resamples)
    interval = {end: ends[f"two_sided_{end}"] for end in ("low", "high")}
    return {**found, "two_sided_interval": interval}


def _intervals(
    name: str, members: Sequence[float], others: Sequence[float], resamples: int
) -> dict[str, float]:
    m, n = np.asarray(members, float), np.asarray(others, float)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    draws = np.empty((resamples, 2))
    for i in range(resamples):
        a = m[rng.integers(len(m), size=len(m))].tolist()
        b = n[rng.integers(len(n), size=len(n))].tolist()
        draws[i] = auc(a, b), two_sided_auc(a, b)
    found = {}
    for name, value, drawn in (
        ("auc", auc(members, others), draws[:, 0]),
        ("two_sided", two_sided_auc(members, others), draws[:, 1]),
    ):
        found[f"{name}_low"], found[f"{name}_high"] = auc_interval(value, drawn, len(m), len(n))
    return found
