"""Gates for automation: a condition on a measured number that ends the program with exit code 3."""

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expunge.errors import EvaluationError, GateError
from expunge.evaluate.numbers import Number
from expunge.evaluate.run import numbers_of
from expunge.evaluate.semeval_suite import entry_numbers
from expunge.evaluate.suites import SUITES, may_make
from expunge.registry import did_you_mean

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
    "!=": operator.ne,
}
_VERDICT = ".collapsed"
"""How the names end that say the one verdict on a model, as every suite of it does."""

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
        limit = _number(found[3]) if found else None
        if found is None or limit is None:
            raise EvaluationError(
                f"--fail-if {text!r} is not of the form 'name > number' "
                f"(signs: {' '.join(_COMPARISONS)})"
            )
        gates.append(Gate(found[1], found[2], limit))
    return gates


def gated(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What gates may name of some results: every number, and `SUITE.collapsed`, which is 0 or 1."""
    numbers = numbers_of(results)
    for suite, measured in results["suites"].items():
        if "collapsed" in measured["facts"]:
            numbers[f"{suite}.collapsed"] = {"value": float(measured["facts"]["collapsed"])}
    return numbers


def gated_models(models: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What gates may name of a run's models, `MODEL.` before each: the official numbers,
    `collapsed`, `relearn.recovered`, `relearn.left`, and of a side of the documents its own, as in
    `merged.test.mia.auc`, and its attacks', as in `merged.test.loss.two_sided`."""
    found: dict[str, dict[str, Any]] = {}
    for model, entry in models.items():
        if not entry["semeval"]["terms"]:
            continue
        numbers = _values("", entry_numbers(entry))
        if entry["collapse"]["collapsed"] is not None:
            numbers["collapsed"] = float(entry["collapse"]["collapsed"])
        relearn = entry.get("relearn")
        if relearn is not None:
            numbers |= {f"relearn.{n}": relearn[n] for n in ("recovered", "left")}
        for side, fold in entry["folds"].items():
            numbers |= _values(f"{side}.", entry_numbers(fold))
            for attack, read in fold["membership"].items():
                numbers |= {f"{side}.{attack}.{key}": read[key] for key in read}
        found |= {f"{model}.{n}": {"value": v, "model": model} for n, v in numbers.items()}
    return found


def refuse_unmade(gates: Sequence[Gate], models: Sequence[str]) -> None:
    """Before hours of work: a gate that begins with none of the models that will be measured."""
    for gate in gates:
        if not any(gate.name.startswith(f"{model}.") for model in models):
            raise EvaluationError(
                f"--fail-if {gate.name} begins with no measured model of the recipe, as "
                f"{models[-1]}.{gate.name} would. Known: {', '.join(models)}"
            )


def refuse_unasked(gates: Sequence[Gate], suites: Sequence[str]) -> None:
    """Before a model is read: a gate on a number that none of the suites asked for can have.

    `collapse` is asked as well where no suite says whether the model has collapsed.
    """
    for gate in gates:
        asked = [*suites, "collapse"]
        own = [gate.name.removeprefix(f"{suite}.") for suite in asked]
        if any(n == "collapsed" or may_make(s, n) for s, n in zip(asked, own, strict=True)):
            continue
        suite = gate.name.partition(".")[0]
        reason = (
            f"; --suite does not name {suite}" if suite in SUITES and suite not in suites else ""
        )
        raise EvaluationError(
            f"--fail-if: there is no number {gate.name!r} of {', '.join(suites)}{reason}"
        )


def check_gates(gates: Sequence[Gate], numbers: Mapping[str, Mapping[str, Any]]) -> None:
    """A `GateError` that names every gate that failed; a number that is not there is an error,
    or named too where another gate failed.

    A name may leave out its suite where only one suite has it. A destroyed model has forgotten all
    and would pass most gates, so with any gate a collapsed model fails too, unless a gate names a
    `collapsed` of it.
    """
    if failed := _failures(gates, numbers):
        raise GateError("; ".join(failed))


def check_runs(gates: Sequence[Gate], runs: Mapping[str, Mapping[str, Any]]) -> None:
    """`check_gates` of the models of some results, by what they are called.

    Only of the models that a gate names: that another one collapsed fails nothing.
    """
    failed = []
    for name, models in runs.items() if gates else ():
        numbers = gated_models(models)
        asked = {numbers[_full_name(gate.name, numbers)]["model"] for gate in gates}
        own = {name: number for name, number in numbers.items() if number["model"] in asked}
        where = f"{name}: " if len(runs) > 1 else ""
        failed += [where + failure for failure in _failures(gates, own)]
    if failed:
        raise GateError("; ".join(failed))


def _failures(gates: Sequence[Gate], numbers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    failed, unmeasured = [], []
    asked = [(_full_name(gate.name, numbers), gate) for gate in gates]
    said = {numbers[name].get("model") for name, _ in asked if name.endswith(_VERDICT)}
    for name, number in numbers.items():
        model = number.get("model")
        if gates and name.endswith(_VERDICT) and number["value"] and model not in said:
            failed.append(f"{name} is 1: the model no longer writes language")
            said.add(model)
    for name, gate in asked:
        value = numbers[name]["value"]
        if value is None:
            unmeasured.append(f"{name} was not measured")
        elif _COMPARISONS[gate.sign](value, gate.limit):
            failed.append(f"{name} is {value:.4g}, and must not be {gate.sign} {gate.limit:g}")
    if unmeasured and not failed:
        raise EvaluationError(f"--fail-if: {'; '.join(unmeasured)}")
    return failed + unmeasured


def _values(prefix: str, numbers: Mapping[str, Number]) -> dict[str, float | None]:
    return {f"{prefix}{name}": number.value for name, number in numbers.items()}


def _full_name(name: str, numbers: Mapping[str, Any]) -> str:
    if name in numbers:
        return name
    ends = [full for full in numbers if full.partition(".")[2] == name]
    verdict = name == _VERDICT[1:] and len({numbers[full].get("model") for full in ends}) == 1
    if len(ends) == 1 or verdict:
        return ends[0]
    reason = f"; it may be {' or '.join(ends)}" if ends else f".{did_you_mean(name, numbers)}"
    raise EvaluationError(f"--fail-if: there is no number {name!r}{reason}")


def _number(text: str) -> float | None:
    try:
        found = float(text)
    except ValueError:
        return None
    return found if math.isfinite(found) else None
