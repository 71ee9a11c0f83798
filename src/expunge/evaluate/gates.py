"""Gates for automation: a condition on a measured number that ends the program with exit code 3."""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expunge.errors import EvaluationError, GateError
from expunge.registry import did_you_mean

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
    "!=": operator.ne,
}
_GATE = re.compile(r"\s*([\w./-]+)\s*(>=|<=|==|!=|>|<)\s*(\S+)\s*")


@dataclass(frozen=True)
class Gate:
    """`name sign limit` fails where it holds of the number of that name."""

    name: str
    sign: str
    limit: float


def parse_gates(texts: Sequence[str]) -> list[Gate]:
    """Read conditions such as `semeval.forget.Task1.qa > 0.05`, before anything is measured."""
    gates = []
    for text in texts:
        found = _GATE.fullmatch(text)
        try:
            gates.append(Gate(found[1], found[2], float(found[3])))  # pyright: ignore
        except (TypeError, ValueError):
            raise EvaluationError(
                f"--fail-if {text!r} is not of the form 'name > number' "
                f"(signs: {' '.join(_COMPARISONS)})"
            ) from None
    return gates


def check_gates(gates: Sequence[Gate], numbers: Mapping[str, Mapping[str, Any]]) -> None:
    """A `GateError` that names every gate that failed; a number that is not there is an error.

    A name may leave out its suite where only one suite has it.
    """
    failed = []
    for gate in gates:
        name = _full_name(gate.name, numbers)
        value = numbers[name]["value"]
        if value is None:
            raise EvaluationError(f"--fail-if: {name} was not measured")
        if _COMPARISONS[gate.sign](value, gate.limit):
            failed.append(f"{name} is {value:.4g}, and must not be {gate.sign} {gate.limit:g}")
    if failed:
        raise GateError("; ".join(failed))


def _full_name(name: str, numbers: Mapping[str, Any]) -> str:
    if name in numbers:
        return name
    ends = [full for full in numbers if full.partition(".")[2] == name]
    if len(ends) == 1:
        return ends[0]
    reason = f"it may be {' or '.join(ends)}" if ends else did_you_mean(name, numbers)
    raise EvaluationError(f"--fail-if: there is no number {name!r}; {reason}")
