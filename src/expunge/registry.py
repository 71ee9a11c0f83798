"""Find a name in a method table, or say what was meant."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TypeVar

from expunge.errors import RecipeError

Row = TypeVar("Row")


def lookup(table: Mapping[str, Row], name: str, kind: str) -> Row:
    """Return `table[name]`; an unknown name is a `RecipeError` that lists the known ones."""
    if name in table:
        return table[name]
    known = ", ".join(sorted(table))
    raise RecipeError(f"no {kind} is called '{name}'.{did_you_mean(name, table)} Known: {known}.")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence that names the nearest known name, or nothing."""
    near = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""
