"""A named objective: terms that papers put together, and what stands beside them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from expunge.needs import Needs
from expunge.unlearn.sets import SETS

_TEST = "tests/unlearn/test_objectives.py::test_it_forgets_beside_a_control_that_remembers"


@dataclass(frozen=True)
class Named:
    """One row: terms as a recipe gives them, and where they come from."""

    summary: str
    source: str
    terms: tuple[Mapping[str, Any], ...]
    beside: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the branch."""
    fidelity: str = "exact"
    differs: str = ""
    cost: str = "1 C a term's set"
    test: str = _TEST

    @property
    def needs(self) -> Needs:
        """The sets of the recipe, and those that the program makes of them."""
        halves = dict.fromkeys(term["half"] for term in self.terms)
        data = [name for half in halves for name in SETS[half].data]
        if "mismatch" in halves:
            data.append(self.beside["companions"]["mismatch"]["of"])
        made = tuple(f"{half}: made by the program" for half in halves if half not in data)
        known = ("forget", "retain", "neutral")
        return Needs(tuple(sorted({*data}, key=known.index)), besides=made)

    @property
    def equation(self) -> str:
        """The sum of its terms, and the step rule that follows it where it is not plain descent."""
        rule = dict(self.beside.get("step", {}))
        named = f", by the step rule {rule.pop('rule')}" if rule else ""
        return "L = " + " + ".join(map(_said, self.terms)) + named + _listed(rule, " with ")


def _said(term: Mapping[str, Any]) -> str:
    places = {name: term[name] for name in ("layer", "scope") if name in term}
    weighting = dict(term.get("weighting", {}))
    places |= {"weighting": weighting.pop("kind")} if weighting else {}
    places |= {name: "/".join(map(str, value)) for name, value in weighting.items()}
    weight = f"{term['weight']} " if term.get("weight", 1) != 1 else ""
    told = _listed({**places, **term.get("options", {})}, "; ")
    return f"{weight}{term['loss']}({term['half']}{told})"


def _listed(told: Mapping[str, Any], before: str) -> str:
    return (before if told else "") + ", ".join(f"{name} {value}" for name, value in told.items())
