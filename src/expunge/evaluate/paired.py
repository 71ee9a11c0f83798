"""The difference of a number between two models, item by item.

Dimensions: n items of a group that both models were asked; columns are the two models, A and B;
m metrics of an item, where several stand behind a number.
"""

import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from expunge.evaluate.balance import two_sided_auc
from expunge.evaluate.membership import auc
from expunge.evaluate.numbers import RESAMPLES, Behind, Number, harmonic_mean
from expunge.evaluate.semeval import task_aggregate


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


def paired_statistic(behind: Behind, groups: Mapping[str, np.ndarray], *, name: str) -> Number:
    """B - A of a number, with its interval: the same items drawn again for both models.

        d = s(b) - s(a),    95 % interval: each group's n items drawn with replacement

    Of groups that hold one item each there is no interval.

    Source: Efron 1979 (bootstrap); pairs as in Koehn 2004.
    """
    before, after = statistic(behind, groups)
    count = sum(map(len, groups.values()))
    if max(map(len, groups.values())) < 2:
        return Number(float(after - before), count)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    draws = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        again = {
            group: values[rng.integers(len(values), size=len(values))]
            for group, values in groups.items()
        }
        one, other = statistic(behind, again)
        draws[i] = other - one
    low, high = np.quantile(draws, [0.025, 0.975]).tolist()
    return Number(float(after - before), count, low, high)
