"""Stand-ins for non-members: given documents, with other facts in the same sentences.

A membership test wants documents of the members' distribution that no model has seen. Where there
are none, these stand in: every name, number, date, e-mail address and place that is found, and
peoples, occupations and spelt numbers, are replaced by invented ones of the same shape, and no word
else is touched.

How far they stand in: the form is the same, the facts are others, and what a model knows of the
frame of the sentences stays. A model that learnt the documents has learnt their frames too, which
makes stand-ins more likely to it than real non-members, and the AUC lower. Facts drawn from lists
may fit their sentence badly, which makes them less likely to any model, and the AUC higher. Which
weighs more depends on the documents, so such an AUC is biased and 0.5 is not its neutral value:
read it beside that of the model before tuning, or beside real non-members where there are some.
"""

import json
import random
import re
import string
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from faker.providers.address.en_US import Provider as Places

from expunge.data.examples import Document
from expunge.data.particulars import (
    COUNTRIES,
    MEN,
    SURNAMES,
    TABLES,
    WOMEN,
    Finder,
    Particular,
    runs,
    size,
)
from expunge.data.sources import named_source, read_examples
from expunge.errors import DataError
from expunge.runs import write_text

LEAST = 0.1
"""Least share of a document's words, digits and marks that must be replaced."""

T = TypeVar("T")
_ORDINAL = re.compile(r"\d{1,3}(?:st|nd|rd|th)")
_VOWELS = frozenset("AEIOUaeiou")
_TRIES = 200
_MARK = "-standin"
"""Between the id of a document and the number of a stand-in for it."""
_LONG = 5
"""From so many digits on a number belongs to one document alone."""


def write_stand_ins(file: str, out: Path, *, count: int, seed: int = 0) -> dict[str, int]:
    """Write `count` stand-ins for the documents of a file to `out`, as JSON lines: id, document.

    A forget set will do: the prompt and the answer of an item that is no question are one text.
    Returns how many documents there were, how many were left out for want of facts to replace, and
    how many stand-ins are written.
    """
    documents = [
        Document(item.id, f"{item.prompt} {item.answer}".strip(), item.task)
        for item in read_examples(named_source(file, out))
        if item.kind != "qa"
    ]
    if not documents:
        raise DataError(f"{file} holds questions alone; stand-ins are made of texts")
    made, left_out = stand_ins(documents, count=count, seed=seed)
    rows = [{"id": document.id, "document": document.text} for document in made]
    write_text(out, "".join(json.dumps(row) + "\n" for row in rows))
    return {"documents": len(documents), "left_out": len(left_out), "written": len(made)}


def stand_ins(
    documents: Sequence[Document], *, count: int, seed: int = 0, least: float = LEAST
) -> tuple[list[Document], list[Document]]:
    """`count` stand-ins, and the documents left out because less than `least` of them is facts.

    Documents take turns in an order drawn by `seed`; each turn has facts of its own. One whose
    facts leave no others is left out too, and fewer are made where only such are left. No stand-in
    holds anything that was replaced in its own document, nor any full name, e-mail address or long
    number of another, given or made.
    """
    if count < 1:
        raise DataError(f"--count must be at least 1 stand-in, not {count}")
    finder = Finder(document.text for document in documents)
    found = {document.id: finder.find(document.text) for document in documents}
    taken = {
        said for d in documents for said in runs(d.text, found[d.id]) if _of_one_document(said)
    }
    usable = [d for d in documents if _share(d.text, found[d.id]) >= least]
    random.Random(seed).shuffle(usable)
    made: list[Document] = []
    served: set[str] = set()
    failed: set[str] = set()
    turn = 0
    while len(made) < count and len(failed) < len(usable):
        document, again = usable[turn % len(usable)], turn // len(usable)
        turn += 1
        if document.id in failed:
            continue
        rng = random.Random(f"{seed}:{document.id}:{again}")
        text = _stand_in(document.text, found[document.id], taken, rng)
        if text is None:
            failed.add(document.id)
        else:
            served.add(document.id)
            made.append(Document(f"{document.id}{_MARK}{again}", text, document.task))
    if not made:
        raise DataError(
            f"none of the {len(documents)} documents says enough that can be replaced (names, "
            f"numbers, dates, addresses; at least {least:.0%} of it)"
        )
    fit = {document.id for document in usable} - (failed - served)
    return made, [document for document in documents if document.id not in fit]


def original_id(stand_in: str) -> str:
    """The id of the document that a stand-in was made of, by its own."""
    return stand_in.rpartition(_MARK)[0]


def _stand_in(
    text: str, found: list[Particular], taken: set[str], rng: random.Random
) -> str | None:
    """The text with other facts, whose full names and long numbers join `taken`; None if stuck."""
    own = {place.text for place in found}
    holds_own = re.compile("|".join(map(_whole, sorted(own, key=len, reverse=True))))
    for _ in range(_TRIES):
        facts = Facts(found, rng)
        new = [facts.other(place) for place in found]
        parts, end = [], 0
        for place, other in zip(found, new, strict=True):
            parts += [text[end : place.start], other]
            end = place.end
        made = "".join(parts) + text[end:]
        said = {s for s in runs(made, _moved(found, new)) if _of_one_document(s)}
        if not holds_own.search(made) and not any(value in made for value in taken):
            taken |= said
            return made
    return None


class Facts:
    """Other facts for one document: what is said twice is replaced alike."""

    def __init__(self, found: Sequence[Particular], rng: random.Random) -> None:
        """`found` are the particulars of the document."""
        self.rng = rng
        self.own = {place.text for place in found}
        self.names = {place.text.lower(): place.text for place in found if place.kind == "name"}
        self.last = {b.text for a, b in pairwise(found) if _side_by_side(a, b)}
        self.years = self._shift([int(y) for p in found for y in _years(p)])
        self.made: dict[tuple[str, str], str] = {}

    def other(self, place: Particular) -> str:
        """What stands for one particular, of the same shape."""
        key = place.kind, place.text
        if key not in self.made:
            self.made[key] = self._draw(place)
        return self.made[key]

    def _draw(self, place: Particular) -> str:
        kind, text = place.kind, place.text
        if kind in TABLES:
            free = [word for word in TABLES[kind] if word not in self.own]
            if kind in ("people", "job"):  # "an" before it stays right
                free = [word for word in free if (word[0] in _VOWELS) == (text[0] in _VOWELS)]
            return self._choose(free) or text
        if kind == "name":
            return self._name(text)
        if kind == "email":
            return self._email(text)
        if kind == "year":
            years = self.years if text[-1] != "s" else round(self.years, -1) or 10
            return re.sub(r"\d{4}", lambda year: str(int(year[0]) + years), text)
        if kind in ("day", "numbered month"):
            days = range(1, 13 if kind == "numbered month" else 29)
            free = [day for day in _like(text, days) if day not in self.own]
            return self._choose(free) or text
        if _ORDINAL.fullmatch(text):
            return (
                self._choose([n for n in _like(text, range(1, 1000)) if n not in self.own]) or text
            )
        return self._code(text)

    def _name(self, text: str) -> str:
        """A first name for a first name, of the same sex; a surname or a place for the others."""
        plain = text.title() if text.isupper() else text
        ending = next((e for e in Places.city_suffixes if plain.endswith(e)), "")
        pools = (SURNAMES,) if text in self.last else ()
        pools = (*pools, WOMEN, MEN, SURNAMES, COUNTRIES)
        pool = next((names for names in pools if plain in names), ())
        if not pool:
            ending = ending if len(plain) > len(ending) + 2 else ""
            pool = tuple(surname + ending for surname in SURNAMES)
        free = [name for name in pool if name not in self.own and name not in self.made.values()]
        near = [name for name in free if abs(len(name) - len(plain)) <= 1]
        drawn = self._choose(near if len(near) >= 10 else free) or plain
        return drawn.upper() if text.isupper() else drawn

    def _email(self, text: str) -> str:
        """An address whose words follow the names of the document; its last label stays."""
        start = text.rfind(".") + 1
        return re.sub(r"[^\W\d_]+|\d+", self._mail_word, text[:start]) + text[start:]

    def _mail_word(self, match: re.Match[str]) -> str:
        word = match[0]
        if word.isdigit():
            return self._code(word)
        name = self.names.get(word.lower())
        drawn = self.other(Particular(0, 0, "name", name or f"{word.title()}"))
        return drawn.lower() if word.islower() else drawn

    def _code(self, text: str) -> str:
        """Other digits and capitals; Social Security and telephone numbers that are not issued."""
        drawn = "".join(self._character(c, first=not i) for i, c in enumerate(text))
        if re.fullmatch(r"\d{3}-\d{2}-\d{4}", text):
            return "9" + drawn[1:]
        if re.fullmatch(r"\d{3}-\d{3}-\d{4}", text):
            return drawn[0] + "9" + drawn[2:]
        return drawn

    def _character(self, c: str, *, first: bool) -> str:
        if c.isdigit():
            return self.rng.choice("0123456789" if not first or c == "0" else "123456789")
        return self.rng.choice(string.ascii_uppercase) if c in string.ascii_uppercase else c

    def _shift(self, years: list[int]) -> int:
        """By how many years all are moved: so that the time between them stays."""
        known = set(years)
        shifts = [s for s in range(-60, 61) if known.isdisjoint(year + s for year in years)]
        past = [s for s in shifts if all(year + s <= max(2025, *years) for year in years)]
        return self._choose(past or shifts) or 0

    def _choose(self, words: Sequence[T]) -> T | None:
        """One of the words; None of nothing, so that what was said stays and is found out."""
        return self.rng.choice(words) if words else None


def _share(text: str, found: Sequence[Particular]) -> float:
    return sum(size(place.text) for place in found) / max(1, size(text))


def _of_one_document(said: str) -> bool:
    """Whether two documents would say this by no chance: full names, addresses, long numbers."""
    return " " in said or "@" in said or sum(c.isdigit() for c in said) >= _LONG


def _whole(value: str) -> str:
    """Matches a value that stands by itself, not within a longer word or number."""
    return rf"(?<![\w@])(?<!\d[.,:/-]){re.escape(value)}(?![\w@]|[.,:/-]\d)"


def _like(text: str, numbers: Iterable[int]) -> list[str]:
    """The numbers with as many digits as one in the text, with zeros or an ending where it has."""
    digits = text.rstrip("stndrh")
    width = len(digits) if digits[0] == "0" else 1
    written = [(f"{number:0{width}}", _ending(number)) for number in numbers]
    return [n + (e if digits != text else "") for n, e in written if len(n) == len(digits)]


def _ending(number: int) -> str:
    teen = number % 100 in (11, 12, 13)
    return "th" if teen else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")


def _side_by_side(before: Particular, after: Particular) -> bool:
    return before.kind == after.kind == "name" and after.start == before.end + 1


def _years(place: Particular) -> list[str]:
    return re.findall(r"\d{4}", place.text) if place.kind == "year" else []


def _moved(found: Sequence[Particular], new: Sequence[str]) -> list[Particular]:
    """The particulars where they stand once each is replaced."""
    moved, by = [], 0
    for place, other in zip(found, new, strict=True):
        start = place.start + by
        moved.append(Particular(start, start + len(other), place.kind, other))
        by += len(other) - len(place.text)
    return moved
