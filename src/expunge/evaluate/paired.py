"""The difference of a number between two models, item by item.

Dimensions: n items of a group that both models were asked; columns are the two models, A and B.
"""

import zlib
from collections.abc import Mapping

import numpy as np

from expunge.evaluate.membership import auc
from expunge.evaluate.numbers import RESAMPLES, Behind, Number
from expunge.evaluate.semeval import task_aggregate


def statistic(behind: Behind, groups: Mapping[str, np.ndarray]) -> np.ndarray:
    """The number itself of k models: (k,), of each group's values (n, k)."""
    if behind.how == "pooled":
        return np.concatenate(list(groups.values())).mean(0)
    if behind.how == "auc":
        sign = -1 if behind.metric == "nll" else 1
        members, others = (sign * groups[name] for name in behind.groups)
        sides = zip(members.T.tolist(), others.T.tolist(), strict=True)
        return np.array([auc(*side) for side in sides])
    means = {name: values.mean(0) for name, values in groups.items()}
    if behind.how == "means":
        return np.mean(list(means.values()), 0)
    terms = [name.replace(".", "/") for name in means]
    columns = (
        dict(zip(terms, column, strict=True)) for column in zip(*means.values(), strict=True)
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
