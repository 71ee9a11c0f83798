"""Particulars: the names, numbers, dates and addresses that a text says, and where they stand.

Found by form and by lists of words, without a model, so not all of them and a few words too many.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from faker.providers.address.en_US import Provider as Places
from faker.providers.lorem.en_US import Provider as English
from faker.providers.person.en_US import Provider as People

from expunge.data import wording
from expunge.data.pii import DATES, EMAIL

WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
PEOPLES = (
    *wording.NATIONALITIES,
    *("American", "Australian", "Austrian", "British", "Chinese", "English", "European"),
    *("French", "German", "Indian", "Iranian", "Israeli", "Russian", "Spanish", "Ukrainian"),
)
NUMBER_WORDS = ("two", "three", *wording.NUMBERS)
WOMEN, MEN = tuple(People.first_names_female), tuple(People.first_names_male)
SURNAMES = tuple(People.last_names)
COUNTRIES = tuple(name for name in Places.countries if name.isalpha())
TABLES = {
    "month": wording.MONTHS,
    "weekday": WEEKDAYS,
    "people": PEOPLES,
    "count": NUMBER_WORDS,
    "job": wording.JOBS,
}
"""Words of which one stands for another, by kind."""

_KNOWN = {word: kind for kind, words in TABLES.items() for word in words}
_NAMES = frozenset((*WOMEN, *MEN, *SURNAMES))
_KEPT = frozenset(
    word.lower() for word in (*Places.street_suffixes, *Places.city_prefixes, *wording.SCHOOLS)
) | {"northern", "southern", "eastern", "western", "saint", "church", "house", "day"}
_ENGLISH = frozenset((*English.word_list, "an", "is", "was", "were", "are", "am", "ssn"))
_TOWN = re.compile(r"\w{3}\w*(?:town|ville|berg|burgh|borough|bury|stad|furt|chester|haven|shire)")

_CODE = re.compile(r"(?<![\w])(?:[A-Z]{1,5}-)?\w*\d\w*(?:[-.,/:]\w*\d\w*)*")
_WORD = re.compile(r"[^\W\d_]+(?:['’](?!s\b)[^\W\d_]+)*")
_YEARS = re.compile(r"(?:1\d|20)\d\d(?:[-/](?:1\d|20)\d\d)?s?")
_STARTS = re.compile(r"(?:^|[.!?:][\"”’)]?\s+|\n\s*)$")


@dataclass(frozen=True, slots=True, order=True)
class Particular:
    """One thing that a text says: where it stands, of what kind it is, and its words."""

    start: int
    end: int
    kind: str
    text: str


class Finder:
    """Finds the particulars of documents, told by all of them which words are ordinary."""

    def __init__(self, texts: Iterable[str]) -> None:
        """A word that any text writes in lower case, or that is common English, is ordinary.

        One that is written with a capital within a sentence, and is not ordinary, is a name.
        """
        plain = [EMAIL.sub(" ", text) for text in texts]
        small = {word for text in plain for word in _WORD.findall(text) if word.islower()}
        self.ordinary = _ENGLISH | _KEPT | small
        self.names = {
            match[0]
            for text in plain
            for match in _WORD.finditer(text)
            if not _starts(text, match.start()) and self._is_name(match[0])
        }

    def find(self, text: str) -> list[Particular]:
        """Every particular of a text, in order, none over another."""
        found: list[Particular] = []
        free = [True] * len(text)
        for place in (*_written(EMAIL, "email", text), *_dates(text), *_codes(text)):
            if all(free[place.start : place.end]):
                found.append(place)
                free[place.start : place.end] = [False] * (place.end - place.start)
        words = [m for m in _WORD.finditer(text) if all(free[m.start() : m.end()])]
        names = self._names_of(text, words)
        for match in words:
            word = match[0]
            kind = "name" if word in names else _KNOWN.get(word, "")
            if kind and (word not in ("March", "May") or not _starts(text, match.start())):
                found.append(Particular(match.start(), match.end(), kind, word))
        return sorted(found)

    def _names_of(self, text: str, words: Sequence[re.Match[str]]) -> set[str]:
        """The words that stand for a name anywhere in the text: there they do everywhere."""
        names = set()
        for number, match in enumerate(words):
            word = match[0]
            following = words[min(number + 1, len(words) - 1)]
            joined = text[match.end() : following.start()] == " "
            if not _starts(text, match.start()):
                named = self._is_name(word)
            elif joined and word.lower() not in _KEPT and self._is_name(following[0]):
                named = word in _NAMES or word.lower() not in self.ordinary
            elif word.lower() not in self.ordinary:
                named = word in self.names or _title(word) in _NAMES or _TOWN.fullmatch(word)
            else:
                named = False
            before = words[number - 1] if number else match
            follows = before[0] in names and text[before.end() : match.start()] == " "
            if named and (word not in _KNOWN or (follows and word in _NAMES)):
                names.add(word)
        return names

    def _is_name(self, word: str) -> bool:
        """Whether a word with a capital, within a sentence, is a name or a part of one."""
        if len(word) < 2 or not word[0].isupper() or word.lower() in _KEPT:
            return False
        if _title(word) in _NAMES:
            return True
        return not word.isupper() and word.lower() not in self.ordinary


def runs(text: str, found: Sequence[Particular]) -> list[str]:
    """What particulars say together: names side by side as one, everything else by itself."""
    said: list[Particular] = []
    for place in found:
        last = said[-1] if said else None
        names = last is not None and last.kind == place.kind == "name"
        if last is not None and names and text[last.end : place.start] == " ":
            joined = text[last.start : place.end]
            said[-1] = Particular(last.start, place.end, "name", joined)
        else:
            said.append(place)
    return [place.text for place in said]


def size(text: str) -> int:
    """Words, digits and marks of a text: much as many as its tokens."""
    return len(re.findall(r"\d|[^\W\d]+|[^\w\s]", text))


def _title(word: str) -> str:
    return word.title() if word.isupper() else word


def _starts(text: str, place: int) -> bool:
    return _STARTS.search(text, max(0, place - 8), place) is not None or place == 0


def _written(pattern: re.Pattern[str], kind: str, text: str) -> Iterator[Particular]:
    for match in pattern.finditer(text):
        yield Particular(match.start(), match.end(), kind, match[0])


def _dates(text: str) -> Iterator[Particular]:
    """Day, month and year of each date, each by itself."""
    for pattern in DATES:
        for match in pattern.finditer(text):
            for part in ("day", "month", "year"):
                kind = "numbered month" if part == "month" and match[part].isdigit() else part
                start, end = match.span(part)
                if part == "day" and text[end : end + 2] in ("st", "nd", "rd", "th"):
                    end += 2
                if kind != "month" or match[part] in wording.MONTHS:
                    yield Particular(start, end, kind, text[start:end])


def _codes(text: str) -> Iterator[Particular]:
    for place in _written(_CODE, "code", text):
        years = _YEARS.fullmatch(place.text) is not None
        yield Particular(place.start, place.end, "year" if years else "code", place.text)
