"""The difference of a number between two models, item by item.

Dimensions: n items of a group that both models were asked; columns are the two models, A and B;
m metrics of an item, where several stand behind a number.
"""

import math
import zlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from expunge.errors import EvaluationError
from expunge.evaluate.balance import two_sided_auc
from expunge.evaluate.drawing import Draws, Owners
from expunge.evaluate.membership import auc
from expunge.evaluate.numbers import RESAMPLES, Behind, Number, harmonic_mean
from expunge.evaluate.semeval import task_aggregate


@dataclass(frozen=True)
class Pairs:
    """What A and B say of the items behind a number, by group."""

    values: Mapping[str, np.ndarray]  # (n, 2), or (n, 2, m) of m metrics
    owners: Mapping[str, Owners]
    """The document of each item."""

    def evidence(self, behind: Behind) -> int:
        """How many documents have another score of B than of A; of an AUC on no more than the
        smaller of its sides, each a sample of its own."""
        others: set[Hashable] = set()
        for group, values in self.values.items():
            differ = (values[:, 0] != values[:, 1]).reshape(len(values), -1).any(1)
            others |= {self.owners[group][i] for i in differ.nonzero()[0]}
        if behind.how in ("auc", "two_sided"):
            return min(len(others), *map(len, self.values.values()))
        return len(others)


def value_of(behind: Behind, row: Mapping[str, Any]) -> float | list[float] | None:
    """What an item gives to a number: its metric, or of several all (m); None where one lacks."""
    if isinstance(behind.metric, str):
        return row.get(behind.metric)
    values = [row.get(name) for name in behind.metric]
    return None if None in values else values  # pyright: ignore[reportReturnType]


def makes(
    behind: Behind, items: Mapping[tuple[str, str], Mapping[str, Any]], number: Number
) -> bool:
    """Whether a model's number is what all of these items of its own make."""
    groups: dict[str, list[list[Any]]] = {name: [] for name in behind.groups}
    for (group, _), row in items.items():
        value = value_of(behind, row)
        if value is not None and (not behind.groups or group in behind.groups):
            groups.setdefault(group, []).append([value])
    if number.value is None or not groups or not all(groups.values()):
        return False
    (value,) = statistic(behind, {group: np.array(v, float) for group, v in groups.items()})
    return math.isclose(number.value, value, rel_tol=1e-9, abs_tol=1e-12)


def statistic(behind: Behind, groups: Mapping[str, np.ndarray]) -> np.ndarray:
    """The number itself of k models: (k,), of each group's values (n, k), or (n, k, m)."""
    return behind.scale * _statistic(behind, groups) + behind.shift


def _statistic(behind: Behind, groups: Mapping[str, np.ndarray]) -> np.ndarray:
    if behind.how == "pooled":
        return np.concatenate(list(groups.values())).mean(0)
    if behind.how in ("auc", "two_sided"):
        area = auc if behind.how == "auc" else two_sided_auc
        sign = -1 if behind.metric == "nll" else 1
        members, others = (sign * groups[name] for name in behind.groups)
        sides = zip(members.T.tolist(), others.T.tolist(), strict=True)
        return np.array([area(*side) for side in sides])
    means = {name: values.mean(0) for name, values in groups.items()}
    if behind.how == "means":
        return np.mean(list(means.values()), 0)
    if behind.how == "harmonic":
        terms = np.concatenate(list(means.values()), -1)  # (k, groups · m)
        return np.array([harmonic_mean(column) for column in terms.tolist()], float)
    names = [name.replace(".", "/") for name in means]
    columns = (
        dict(zip(names, column, strict=True)) for column in zip(*means.values(), strict=True)
    )
    return np.array([task_aggregate(column, partial=True) for column in columns], float)


def paired_statistic(behind: Behind, pairs: Pairs, *, name: str) -> Number:
    """B - A of a number, with its interval: the same documents drawn again for both models.

        d = s(b) - s(a),    95 % interval: the documents of the groups drawn with replacement

    Of one document there is no interval. A mean of values that are not finite is an
    `EvaluationError`.

    Source: Efron 1979 (bootstrap); pairs as in Koehn 2004.
    """
    groups = pairs.values
    if behind.how == "pooled":
        _check_finite(groups, name)
    before, after = statistic(behind, groups)
    count, draws = sum(map(len, groups.values())), Draws({g: pairs.owners[g] for g in groups})
    if draws.most < 2:
        return Number(float(after - before), count)
    rng, found = np.random.default_rng(zlib.crc32(name.encode())), []
    for _ in range(RESAMPLES):
        places = draws.again(rng)
        if all(map(len, places.values())):
            one, other = statistic(
                behind, {group: groups[group][places[group]] for group in groups}
            )
            found.append(other - one)
    low, high = np.quantile(found, [0.025, 0.975]).tolist()
    return Number(float(after - before), count, low, high)


def paired_difference(
    a: Sequence[float], b: Sequence[float], owners: Owners | None = None, *, name: str
) -> Number:
    """The mean difference of the same items under two models.

        d = (1/n) Σ_i (b_i - a_i),    95 % interval: their documents drawn again with replacement

    An item that is hard for both models adds nothing to the spread, so that the interval is far
    narrower than that of two separate means. `owners` name the document of each item, where several
    are of one. Of one document there is no interval.

    Source: Efron 1979 (bootstrap); pairs as in Koehn 2004.
    """
    if not len(a):
        return Number(None, 0)
    values = {"": np.array(list(zip(a, b, strict=True)), float)}
    pairs = Pairs(values, {"": range(len(a)) if owners is None else owners})
    return paired_statistic(Behind(""), pairs, name=name)


def unpaired_difference(a: Number, b: Number) -> Number:
    """The difference of two numbers, from their intervals, as if they were independent.

        d = b - a,    low = d - √((b - b.low)² + (a.high - a)²)
                      high = d + √((b.high - b)² + (a - a.low)²)

    Models that were asked the same items tend to err alike, which this cannot see: the interval is
    then too wide, and a difference that it calls noise may be one. Without either interval there
    is none.

    Source: Newcombe 1998 (method 10); Zou and Donner 2008.
    """
    if a.value is None or b.value is None:
        return Number(None, 0)
    d, n = b.value - a.value, min(a.n, b.n)
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return Number(d, n)
    low = d - math.hypot(b.value - b.low, a.high - a.value)
    high = d + math.hypot(b.high - b.value, a.value - a.low)
    return Number(d, n, low, high)


def _check_finite(groups: Mapping[str, np.ndarray], name: str) -> None:
    whole = np.concatenate(list(groups.values()))
    if np.isinf(whole).any():
        raise EvaluationError(f"{name} holds an infinite value, so no mean can be compared")
    if np.isnan(whole).any():
        raise EvaluationError(f"{name}: item {int(np.isnan(whole).any(1).argmax())} is NaN")
