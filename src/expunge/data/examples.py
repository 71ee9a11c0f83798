"""Examples: one prompt and the answer to be learnt, kept or forgotten; documents: plain text."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from expunge.errors import DataError

_KIND_AT_END = re.compile(r"^(?P<document>.*?)\"?(?P<kind>sc|qa)\d+\"?$", re.DOTALL)


Items = Literal["all", "questions", "texts"]
"""Which items of a set: every one, questions alone, or those that are none."""


@dataclass(frozen=True, slots=True)
class Example:
    """One item: a prompt and its answer. A plain text has an empty prompt and is all answer."""

    id: str
    prompt: str
    answer: str
    task: str = ""

    @property
    def kind(self) -> str:
        """`sc` (sentence completion) or `qa` (question), as the id ends; where it ends otherwise,
        a prompt that ends in a question mark is a question."""
        found = _KIND_AT_END.match(self.id)
        return found["kind"] if found else "qa" if self.prompt.rstrip().endswith("?") else "sc"

    @property
    def document(self) -> str:
        """The part of the id that all items of one document share (stray quotes removed); all of it
        where there is no more than what tells items apart."""
        found = _KIND_AT_END.match(self.id)
        shared = found["document"].strip('"') if found else ""
        return shared or self.id.strip('"')


@dataclass(frozen=True, slots=True)
class Document:
    """One whole text, as a membership attack reads it."""

    id: str
    text: str
    task: str = ""
    """What kind of document it is, where a set holds several."""


def check_disjoint(forget: Sequence[Example], retain: Sequence[Example]) -> None:
    """Refuse sets that share an item: what is to be forgotten cannot also be kept."""
    kept = {(example.prompt, example.answer): example.id for example in retain}
    for example in forget:
        twin = kept.get((example.prompt, example.answer))
        if twin is not None:
            raise DataError(
                f"forget item {example.id} and retain item {twin} are the same text; "
                "take it out of one of the sets"
            )


def check_unique_ids(examples: Iterable[Example | Document], origin: str) -> None:
    """Refuse an id that stands for two items: scores are kept by id."""
    seen: set[str] = set()
    for example in examples:
        if example.id in seen:
            raise DataError(f"{origin} holds the id {example.id!r} twice; ids must be unique")
        seen.add(example.id)
