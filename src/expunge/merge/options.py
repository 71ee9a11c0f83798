"""The options of a merge method: which there are, what they may be, what they default to."""

from collections.abc import Mapping
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
            known = ", ".join(sorted(method.options)) or "none"
            raise RecipeError(
                f"{name} has no option '{option}'.{did_you_mean(option, method.options)} "
                f"Known: {known}."
            )
        _check(name, option, value)


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


def _check(name: str, option: str, value: Any) -> None:
    if option in _WORDS:
        if value not in _WORDS[option]:
            raise RecipeError(
                f"{name}: {option} is one of {', '.join(_WORDS[option])}, not {value!r}"
            )
    elif isinstance(value, str):
        raise RecipeError(f"{name}: {option} is a number, not {value!r}")
    elif option in _SHARES and not 0 <= value <= 1:
        raise RecipeError(f"{name}: {option} is a share from 0 to 1, not {value:g}")
