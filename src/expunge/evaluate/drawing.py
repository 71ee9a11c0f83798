"""Items drawn again for intervals, those of one document together.

Several items of one document, as a person's questions in LUME, tend to go right or wrong together,
so that they tell less than as many of different documents. Dimensions: n items, D documents.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from expunge.data.examples import Example
from expunge.evaluate.numbers import wilson

Owners = Sequence[Hashable]
"""The document of each item of a group."""


def document_of(row: Mapping[str, Any]) -> str:
    """The document of an item: as it says itself, or its id without the kind at its end.

    An id that is a number alone is that of a row, which another group has too: the group is told.
    """
    if row.get("document"):
        return str(row["document"])
    name, group = str(row["id"]), row.get("group")
    return f"{group} {name}" if group and name.isdecimal() else Example(name, "", "").document


class Draws:
    """Groups of items, whose documents are drawn again with replacement.

    Groups that share a document are drawn together, so that its items stay with one another; of
    others each has as many documents as before.
    """

    def __init__(self, owners: Mapping[str, Owners]) -> None:
        self._parts: list[tuple[int, dict[str, np.ndarray]]] = []
        for names in _joined(owners):
            places: dict[Hashable, int] = {}
            numbered = {
                name: np.array([places.setdefault(one, len(places)) for one in owners[name]])
                for name in names
            }
            self._parts.append((len(places), numbered))

    @property
    def most(self) -> int:
        """Documents of the largest part: of 1 every resample is the same."""
        return max((count for count, _ in self._parts), default=0)

    def again(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """The places of each group's items in a resample."""
        found = {}
        for count, groups in self._parts:
            times = np.bincount(rng.integers(count, size=count), minlength=count)
            for name, numbers in groups.items():
                found[name] = np.repeat(np.arange(len(numbers)), times[numbers])
        return found


def wilson_of_documents(hits: Sequence[float], owners: Owners) -> tuple[float, float]:
    """`wilson` of hits and misses of which several are of one document.

        n* = n / deff,   deff = (D/(D-1)) Σ_d (s_d - p c_d)² / (n p (1-p)),   between D and n

    s_d and c_d are the hits and items of a document; where all are alike, n* = D.

    Source: Korn and Graubard 1998 (effective sample size).
    """
    n, total = len(hits), float(sum(hits))
    _, number = np.unique([str(one) for one in owners], return_inverse=True)
    counts = np.bincount(number).astype(float)
    documents, p, effective = len(counts), total / n, float(len(counts))
    if documents > 1 and 0 < p < 1:
        off = np.bincount(number, weights=np.asarray(hits, float)) - p * counts
        deff = documents / (documents - 1) * float(off @ off) / (n * p * (1 - p))
        effective = min(float(n), max(effective, n / deff if deff else n))
    return wilson(p * effective, effective)


def _joined(owners: Mapping[str, Owners]) -> list[list[str]]:
    """The names of groups, those together that share a document, directly or through others."""
    found: list[tuple[list[str], set[Hashable]]] = []
    for name, own in owners.items():
        if not len(own):
            continue
        names, documents = [name], set(own)
        for other in [one for one in found if one[1] & documents]:
            found.remove(other)
            names, documents = other[0] + names, other[1] | documents
        found.append((names, documents))
    return [names for names, _ in found]
