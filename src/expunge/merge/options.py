"""The options of a merge method: which there are, what they may be, what they default to."""

import math
from collections.abc import Collection, Mapping
from typing import Any

from expunge.errors import RecipeError
from expunge.merge.families import REQUIRED, Method
from expunge.registry import did_you_mean

_WORDS = {
    "vote": ("unweighted", "weighted"),
    "divide": ("none", "count", "weights"),
    "rescale": ("none", "chance", "l1"),
    "trim": ("tensor", "model"),
}
_SHARES = ("density", "gamma", "select_topk")


def check_options(name: str, method: Method, options: Mapping[str, Any]) -> None:
    """Refuse options that the method does not have, or values that they cannot take."""
    for option, value in options.items():
        if option not in method.options:
            raise RecipeError(no_option(name, option, method.options))
        _check(name, option, value, method.options[option])


def no_option(name: str, option: str, known: Collection[str]) -> str:
    """That a method has no such option, and which it has."""
    listed = ", ".join(sorted(known)) or "none"
    return f"{name} has no option '{option}'.{did_you_mean(option, known)} Known: {listed}."


def resolved(
    name: str, method: Method, given: Mapping[str, Any], models: int, *, where: str
) -> dict[str, Any]:
    """Every option of the method: given or default, a tuple where it is one a model."""
    options = {}
    for option, default in method.options.items():
        value = given.get(option, default)
        if value is REQUIRED:
            raise RecipeError(f"{name} needs the option '{option}', which is not given for {where}")
        if method.each(option) and not isinstance(value, tuple):
            value = (value,) * models
        options[option] = value
    return options


def _check(name: str, option: str, value: Any, default: Any) -> None:
    if option in _WORDS:
        if value not in _WORDS[option]:
            raise RecipeError(
                f"{name}: {option} is one of {', '.join(_WORDS[option])}, not {value!r}"
            )
    elif isinstance(default, bool):
        if value not in (True, False):  # 0 and 1 too
            raise RecipeError(f"{name}: {option} is true or false, not {value!r}")
    elif isinstance(value, str | bool):
        raise RecipeError(f"{name}: {option} is a number, not {value!r}")
    elif not math.isfinite(value):
        raise RecipeError(f"{name}: {option} is a finite number, not {value}")
    elif option in _SHARES and not 0 <= value <= 1:
        raise RecipeError(f"{name}: {option} is a share from 0 to 1, not {value:g}")
