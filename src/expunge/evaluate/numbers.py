"""Numbers with their uncertainty: what was measured, over how many items, how far it may be off.

Dimensions: n items, R resamples.
"""

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from expunge.errors import EvaluationError

RESAMPLES = 1000

Z = 1.959963984540054
"""How many standard errors a 95 % interval reaches, to either side."""


@dataclass(frozen=True, slots=True)
class Number:
    """A measured number; None of nothing. `low` and `high` bound its 95 % interval."""

    value: float | None
    n: int
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Behind:
    """The items that a number is made of, and how."""

    metric: str | tuple[str, ...]
    """One, or for `harmonic` several."""

    groups: tuple[str, ...] = ()
    """Theirs; every group's where none is named."""

    how: Literal["pooled", "means", "aggregate", "harmonic", "auc", "two_sided"] = "pooled"
    """`pooled`: the mean of all; `means`: of the groups' means; `aggregate`: their harmonic mean,
    of forget groups 1 - v; `harmonic`: that of every metric's mean in every group; `auc` and
    `two_sided`: of two groups, members first, by -v where the metric is `nll`."""

    scale: float = 1.0
    shift: float = 0.0
    """The number is scale · that + shift."""


@dataclass
class Measured:
    """What one suite measured of one model."""

    numbers: dict[str, Number] = field(default_factory=dict)
    """By dotted name, as in `forget.knowledge`."""

    items: list[dict[str, Any]] = field(default_factory=list)
    """One row for each given item: `group`, `id` and its metrics; None where not measured."""

    facts: dict[str, Any] = field(default_factory=dict)
    """What is no number: reasons, settings, counts."""

    behind: dict[str, Behind] = field(default_factory=dict)
    """The items that a number is made of, where its name does not say: it is that of their group,
    or GROUP.METRIC."""

    def as_json(self) -> dict[str, Any]:
        """For results.json, without the items."""
        numbers = {name: asdict(number) for name, number in self.numbers.items()}
        behind = {name: asdict(one) for name, one in self.behind.items()}
        return {"numbers": numbers, "facts": self.facts, "behind": behind}


def flat_numbers(entry: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Every number in nested results by its dotted name; what is no number is left out."""
    found: dict[str, float] = {}
    for name, value in entry.items():
        if isinstance(value, Mapping):
            found |= flat_numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float):
            found[prefix + name] = float(value)
    return found


def estimate(values: Sequence[float], *, name: str, resamples: int = RESAMPLES) -> Number:
    """The mean of items' scores with its 95 % interval; drawn by the number's name.

    Scores that are all 0 or 1 are hits and misses, whose interval is `wilson`'s: were all alike,
    every resample would be too, and 0 leaks of 2 would be "0 to 0". Others are `resampled`.
    NaN is an `EvaluationError`: an item that could not be scored is never left out silently.
    """
    hits = [float(value) for value in values]
    if hits and set(hits) <= {0.0, 1.0}:
        return Number(sum(hits) / len(hits), len(hits), *wilson(sum(hits), len(hits)))
    return resampled(values, name=name, resamples=resamples)


def wilson(hits: float, n: float) -> tuple[float, float]:
    """The 95 % interval of a share of n > 0 items, of which so many are hits.

        (p + z²/2n ± z √(p (1 - p) / n + z²/4n²)) / (1 + z²/n),    p = hits / n, z = 1.96

    Wider than 0 even where all or none are hits, and good from a handful of items on.

    Source: Wilson 1927; Brown, Cai and DasGupta 2001, who recommend it for small n.
    """
    p, square = hits / n, Z * Z / n
    middle = p + square / 2
    reach = math.sqrt(p * (1 - p) * square + square * square / 4)
    low, high = ((middle + side) / (1 + square) for side in (-reach, reach))
    return (low if hits else 0.0), (high if hits < n else 1.0)


def resampled(values: Sequence[float], *, name: str, resamples: int = RESAMPLES) -> Number:
    """The mean of what is no share (losses, lengths, differences), with its bootstrap interval."""
    if not len(values):
        return Number(None, 0)
    return bootstrap({"": values}, lambda means: means[""], name=name, resamples=resamples)


def bootstrap(
    groups: Mapping[str, Sequence[float]],
    combine: Callable[[dict[str, float]], float | None],
    *,
    name: str,
    resamples: int = RESAMPLES,
) -> Number:
    """A function of the means of several groups of items, each resampled by itself.

    Groups that hold nothing are left out of what `combine` is given. Where none holds more than
    one item every resample is the same, so there is no interval.
    """
    arrays = {group: np.asarray(values, float) for group, values in groups.items() if len(values)}
    for group, values in arrays.items():
        if np.isnan(values).any():
            where = f"{name} of {group}" if group else name
            raise EvaluationError(f"{where}: item {int(np.isnan(values).argmax())} is NaN")
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    value = combine({group: float(values.mean()) for group, values in arrays.items()})
    n = sum(map(len, arrays.values()))
    if value is None or max(map(len, arrays.values())) == 1:
        return Number(value, n)
    draws = {group: _means(values, rng, resamples) for group, values in arrays.items()}
    found = [
        combine({group: float(drawn[i]) for group, drawn in draws.items()})
        for i in range(resamples)
    ]
    low, high = np.quantile([x for x in found if x is not None], [0.025, 0.975])
    return Number(value, n, float(low), float(high))


def mean_of(numbers: Sequence[Number]) -> Number:
    """The mean of T numbers that were measured apart, with its interval.

        m = (1/T) Σ_t v_t,    low = m - (1/T) √(Σ_t (v_t - low_t)²), and high likewise

    Those without a value are left out. Without an interval where any has none.

    Source: Zou and Donner 2008.
    """
    known = [(one.value, one) for one in numbers if one.value is not None]
    if not known:
        return Number(None, 0)
    value, n = sum(v for v, _ in known) / len(known), sum(one.n for _, one in known)
    below = [max(0.0, v - one.low) for v, one in known if one.low is not None]
    above = [max(0.0, one.high - v) for v, one in known if one.high is not None]
    if len(below) < len(known) or len(above) < len(known):
        return Number(value, n)
    low, high = (math.hypot(*ends) / len(known) for ends in (below, above))
    return Number(value, n, value - low, value + high)


def harmonic_mean(values: Sequence[float]) -> float | None:
    """n / Σ 1/v; 0 if any is 0 or less, None of nothing."""
    if not values:
        return None
    return 0.0 if min(values) <= 0 else len(values) / sum(1 / value for value in values)


def _means(values: np.ndarray, rng: np.random.Generator, resamples: int) -> np.ndarray:
    """The mean of each resample: (R,), without holding R · n numbers for large n."""
    step = max(1, (1 << 22) // len(values))
    drawn = [
        values[rng.integers(len(values), size=(min(step, resamples - i), len(values)))].mean(1)
        for i in range(0, resamples, step)
    ]
    return np.concatenate(drawn)
