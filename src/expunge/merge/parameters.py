"""A parameter of a merge file for one tensor: a value, a gradient over layers, or by filters."""

import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from expunge.errors import RecipeError

Setting = Any
"""A scalar, a list of numbers, or a list of {filter, value}."""
Parameters = Mapping[str, Setting]


def evaluate(name: str, scopes: Iterable[Parameters], tensor: str, t: float, default: Any) -> Any:
    """The value of a parameter for one tensor: from the first scope that has one for it."""
    for scope in scopes:
        if name in scope:
            value = _value(name, scope[name], tensor, t)
            if value is not None:
                return value
    return default


def _value(name: str, setting: Setting, tensor: str, t: float) -> Any:
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list | tuple):
        return _scalar(setting)
    if all(isinstance(entry, Mapping) for entry in setting) and setting:
        for entry in setting:
            unknown = entry.keys() - {"filter", "value"}
            if unknown or "value" not in entry:
                raise RecipeError(f"parameter {name}: {entry} needs value, and may have filter")
            wanted = entry.get("filter")
            if not isinstance(wanted, str | None):
                said = f"filter is a part of a tensor's name, not {wanted!r}"
                raise RecipeError(f"parameter {name}: {said}")
            if wanted in (None, "*") or wanted in tensor:
                return _value(name, entry["value"], tensor, t)
        return None
    values = [_scalar(entry) for entry in setting]
    if not values:
        return None
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        return values[int(t * (len(values) - 1))]
    place = t * (len(values) - 1)
    low = int(place)
    high, share = min(len(values) - 1, low + 1), place - low
    return (1 - share) * values[low] + share * values[high]


def _scalar(value: Any) -> Any:
    """A scalar; text that is a number in scientific notation, which YAML leaves as text, is one."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int) and abs(value) <= sys.float_info.max:
        return value
    raise RecipeError(f"a parameter is a number, true or false, or a word, not {value!r}")


def weight_of(value: Any, tensor: str) -> float:
    """A model's weight for one tensor: a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecipeError(f"weight is a number, not {value!r} (for {tensor})")
    if not math.isfinite(value):
        raise RecipeError(f"weight is a finite number, not {value} (for {tensor})")
    return float(value)


def switch_of(name: str, value: Any, tensor: str) -> bool:
    """A parameter that is on or off."""
    if value not in (True, False):  # 0 and 1 too
        raise RecipeError(f"{name} is true or false, not {value!r} (for {tensor})")
    return bool(value)


def within(inner: Parameters, outer: Parameters) -> dict[str, Setting]:
    """Parameters of a narrower place over those of a wider one, which hold where no filter fits."""
    both = {**outer, **inner}
    for name in inner.keys() & outer.keys():
        if _filters(inner[name]):
            rest = outer[name] if _filters(outer[name]) else [{"value": outer[name]}]
            both[name] = [*inner[name], *rest]
    return both


def _filters(setting: Setting) -> bool:
    return isinstance(setting, list) and all(isinstance(entry, Mapping) for entry in setting)
