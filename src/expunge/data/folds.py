"""Folds: which documents may be used to choose a model, and which only to judge it.

The unit is the document: whatever is made of one (its items, its text) lies on one side.
"""

import hashlib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pydantic import Field

from expunge.config import Section
from expunge.data.examples import Document, Example
from expunge.data.sets import Sets
from expunge.data.sources import locate
from expunge.errors import DataError

Members = Mapping[str, Mapping[str, str]]
"""By group, the text of each document by its id."""


class Folds(Section):
    """How documents are split into those that choose and those that judge."""

    test: float = Field(default=0.5, gt=0, lt=1)
    """Share of each group's documents that only judge."""

    test_ids: str | None = None
    """A file of the document ids that only judge, one a line, in place of a drawn share."""

    cross: int = Field(default=5, ge=2)
    """Folds of the cross-calibration."""

    seed: int = 0
    """Draws the folds."""

    least: int = Field(default=8, ge=2)
    """Fewest members, and fewest non-members, that a side may have."""

    interval: float | None = Field(default=None, gt=0, lt=1)
    """Widest 95 % interval of a balanced AUC that a side may have, from end to end; null takes what
    there is."""


def assigned(groups: Members, shares: Sequence[float], *, seed: int) -> dict[str, int]:
    """The fold of every document id: each group is dealt out by `shares`, at random but for good.

    A document that is in several groups is dealt once. Two ids with one text are one document. The
    fold that lacks most of a group is given its next document.
    """
    one, given = _documents(groups), dict[str, int]()
    for documents in groups.values():
        counts = [0] * len(shares)
        for id in sorted(documents, key=lambda id: _draw(id, seed)):
            fold = given.get(one[id])
            if fold is None:
                wanted = [share * len(documents) for share in shares]
                lacks = [have - want for have, want in zip(counts, wanted, strict=True)]
                fold = lacks.index(min(lacks))
            given[one[id]] = fold
            counts[fold] += 1
    return {id: given[document] for id, document in one.items()}


def groups_of(sets: Sets) -> dict[str, dict[str, str]]:
    """The documents of a run's sets by group: items by half and task, members, non-members."""
    found: dict[str, dict[str, str]] = {}
    for half in ("forget", "retain"):
        examples: list[Example] = getattr(sets, half)
        for example in examples:
            told = found.setdefault(f"{half}/{example.task}", {})
            said = f"{example.prompt}\n{example.answer}"
            told[example.document] = f"{told.get(example.document, '')}\n{said}"
    for side in ("members", "nonmembers"):
        documents: list[Document] = getattr(sets, side)
        found[side] = {document.id: document.text for document in documents}
    return found


def dealt(sets: Sets, shares: Sequence[float], *, seed: int) -> dict[str, int]:
    """The fold of every document of a run's sets; members of a task are dealt out apart from the
    rest of it, so that both are spread."""
    groups = groups_of(sets)
    members, strata = groups.pop("members"), {}
    for name, documents in groups.items():
        for inside in (True, False):
            some = {id: text for id, text in documents.items() if (id in members) == inside}
            strata[f"{name} {'members' if inside else ''}"] = some
    return assigned({**strata, "members": members}, shares, seed=seed)


def test_documents(sets: Sets, config: Folds) -> frozenset[str]:
    """The ids of the documents that only judge; what cannot be split so is a `DataError`."""
    groups = groups_of(sets)
    given = given_ids(config)
    if given is None:
        found = dealt(sets, (1 - config.test, config.test), seed=config.seed)
        chosen = frozenset(id for id, fold in found.items() if fold == 1)
    else:
        chosen = _named(given, groups)
    _check_sizes(groups, chosen, config)
    return chosen


def part(sets: Sets, ids: Iterable[str], *, inside: bool) -> Sets:
    """The sets with only the documents that are, or are not, among `ids`."""
    chosen = frozenset(ids)

    def examples(given: list[Example]) -> list[Example]:
        return [example for example in given if (example.document in chosen) == inside]

    def documents(given: list[Document]) -> list[Document]:
        return [document for document in given if (document.id in chosen) == inside]

    return Sets(
        examples(sets.forget),
        examples(sets.retain),
        documents(sets.members),
        documents(sets.nonmembers),
        sets.neutral,
    )


def interval_width(members: int, nonmembers: int) -> float:
    """How wide the 95 % interval of an AUC is where it is 1/2, from end to end.

        2 · 1.96 · √((M + N + 1) / (12 M N))

    Source: Mann and Whitney 1947, the variance of U where both sides are alike.
    """
    return 2 * 1.96 * ((members + nonmembers + 1) / (12 * members * nonmembers)) ** 0.5


def given_ids(config: Folds) -> Path | None:
    """The file of the ids that only judge, if one is named; one that is not there is a
    `DataError`."""
    if config.test_ids is None:
        return None
    path = locate(config.test_ids)
    if not path.is_file():
        raise DataError(f"folds.test_ids: there is no file {path}")
    return path


def _named(path: Path, groups: Members) -> frozenset[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text; give one document id a line") from None
    chosen = frozenset(line.strip() for line in lines if line.strip())
    one = _documents(groups)
    unknown = sorted(chosen - one.keys())
    if unknown:
        raise DataError(f"{path} names '{unknown[0]}', which is the id of no document")
    left = {document: id for id, document in one.items() if id not in chosen}
    for id in sorted(chosen):
        if one[id] in left:
            raise DataError(
                f"{path} names '{id}' but not '{left[one[id]]}', which is the same text: the folds "
                "share a document; name both or neither"
            )
    return chosen


def _documents(groups: Members) -> dict[str, str]:
    """The first of the ids of each id's document: those that share a text in any group are one."""
    above: dict[str, str] = {}
    first: dict[str, str] = {}

    def top(id: str) -> str:
        while above.setdefault(id, id) != id:
            id = above[id]
        return id

    for documents in groups.values():
        for id, text in documents.items():
            mine, twin = top(id), top(first.setdefault(_plain(text) or id, id))
            above[max(mine, twin)] = min(mine, twin)
    return {id: top(id) for id in above}


def _check_sizes(groups: Members, chosen: frozenset[str], config: Folds) -> None:
    for side, inside in (("calibration", False), ("test", True)):
        counts = {
            group: sum((id in chosen) == inside for id in documents)
            for group, documents in groups.items()
            if documents  # data may name no members
        }
        for group, count in counts.items():
            least = config.least if group in ("members", "nonmembers") else 1
            if count < least:
                raise DataError(
                    f"the {side} fold has {count} documents of {group}, and needs {least}; give "
                    "more documents, or change folds.test"
                )
        if config.interval is None or "members" not in counts:
            continue
        width = interval_width(counts["members"], counts["nonmembers"])
        if width > config.interval:
            raise DataError(
                f"the {side} fold's {counts['members']} members and {counts['nonmembers']} "
                f"non-members leave an AUC an interval of {width:.2f}, and folds.interval asks for "
                f"{config.interval}; {_enough(config.interval)} of each would do"
            )


def _enough(width: float) -> int:
    """Documents a side, of each kind, for an interval so wide."""
    count = max(2, int(2 / 12 * (2 * 1.96 / width) ** 2))  # (2 n + 1) / n² is more than 2 / n
    while interval_width(count, count) > width:
        count += 1
    return count


def _draw(id: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}:{id}".encode()).hexdigest()


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
