"""A branch that names its objective, as terms and sections."""

from collections.abc import Mapping
from typing import Any

from expunge.registry import did_you_mean, lookup
from expunge.unlearn.objective_row import Named
from expunge.unlearn.objectives import OBJECTIVES


def filled_in(fields: Any) -> Any:
    """The fields of a branch with `objective` put into terms, step and companions.

    What the branch says itself goes before what the row says, field by field; a list of terms
    beside an objective, and a term that the objective does not have, are a `ValueError`.
    """
    if not isinstance(fields, dict):
        return fields
    if fields.get("objective") is None:
        if isinstance(fields.get("terms"), dict):
            raise ValueError("terms by name change those of an objective; give objective too")
        return fields
    name = str(fields["objective"])
    row = lookup(OBJECTIVES, name, "objective")
    changes = fields.get("terms", {})
    if not isinstance(changes, dict):
        raise ValueError(
            "give objective or a list of terms, not both; terms: {retain: {weight: 2}} changes a "
            "term of the objective"
        )
    terms = _changed(row, changes, name)
    return {**_over(row.beside, fields), "objective": None, "terms": terms}


def _changed(row: Named, changes: Mapping[str, Any], objective: str) -> list[dict[str, Any]]:
    """The terms of the row, those that `changes` names with the fields it gives."""
    terms = [dict(term) for term in row.terms]
    changed = set[int]()
    for name, fields in changes.items():
        place = _place(row, name, objective)
        if not isinstance(fields, dict):
            raise ValueError(f"terms.{name} takes fields of a term, such as {{weight: 2}}")
        fixed = [field for field in ("half", "loss") if field in fields]
        if fixed:
            raise ValueError(
                f"terms.{name}: the {fixed[0]} of a term is the objective's; give a list of terms "
                "in place of objective"
            )
        if place in changed:
            raise ValueError(f"terms.{name} names a term of {objective} that is changed already")
        changed.add(place)
        terms[place] = _over(terms[place], fields)
    return terms


def _place(row: Named, name: str, objective: str) -> int:
    """Which term of the row is meant by its set, its loss, or both: `retain`, `kl`, `retain.kl`."""
    names = [(t["half"], t["loss"], f"{t['half']}.{t['loss']}") for t in row.terms]
    found = [place for place, own in enumerate(names) if name in own]
    if len(found) == 1:
        return found[0]
    if found:
        those = " or ".join(names[place][2] for place in found)
        raise ValueError(f"terms.{name} names {len(found)} terms of {objective}; say {those}")
    near = did_you_mean(name, [each for own in names for each in own])
    known = ", ".join(own[2] for own in names)
    raise ValueError(f"the objective {objective} has no term '{name}'.{near} Its terms: {known}")


def _over(row: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` over `row`, field by field; a section of another rule or kind stands by itself."""
    made = {**row, **given}
    for name, under in row.items():
        over = made[name]
        if isinstance(under, dict) and isinstance(over, dict):
            other = any(over.get(tag, under.get(tag)) != under.get(tag) for tag in ("rule", "kind"))
            made[name] = over if other else _over(under, over)
    return made
