"""The sets of a run: what is forgotten, what is kept, and what the membership attack compares."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import model_validator

from expunge.config import Section
from expunge.data.examples import Document, Example, check_disjoint
from expunge.data.sources import Source, read_documents, read_examples, source_hash
from expunge.data.synthetic import Synthetic
from expunge.errors import DataError


class Data(Section):
    """What is forgotten, what is kept, and what the membership attack compares."""

    synthetic: Synthetic | None = None
    """Write synthetic sets instead of reading any."""

    forget: Source | None = None
    """Items to forget."""

    retain: Source | None = None
    """Items to keep; null where nothing of the recipe reads them, and what it keeps of them is not
    measured."""

    members: Source | None = None
    """Whole documents of the forget set; those that `forget.documents` leaves out are left out too.
    A recipe refuses any other that has no item in it."""

    nonmembers: Source | None = None
    """Documents of the same distribution that no model has seen."""

    neutral: Source | None = None
    """Texts of neither set, to keep the target a language model while it memorises."""

    @model_validator(mode="after")
    def _one_origin(self) -> "Data":
        if self.synthetic is None and self.forget is None:
            raise ValueError("give forget, with retain where something reads it, or synthetic")
        if self.synthetic is not None and any(v for k, v in self if k != "synthetic"):
            raise ValueError("synthetic writes every set itself; give no other source beside it")
        if (self.members is None) != (self.nonmembers is None):
            raise ValueError("members and nonmembers go together")
        return self

    def holds(self, name: str) -> bool:
        """Whether there is a set of this name, read or written."""
        return self.synthetic is not None or getattr(self, name) is not None

    def check_retain(self, readers: Sequence[str]) -> None:
        """Refuse, with a ValueError, what reads retain items where there are none."""
        if readers and not self.holds("retain"):
            raise ValueError(
                f"data names no retain set, which is read by {', '.join(readers)}; give "
                "data.retain items to keep (expunge data synthesize DIR writes such sets)"
            )

    def hashes(self) -> dict[str, str]:
        """A content hash for each set that is read from somewhere."""
        sources = {name: value for name, value in self if isinstance(value, Source)}
        return {name: source_hash(source) for name, source in sources.items()}


@dataclass(frozen=True)
class Sets:
    """Everything the recipe's data section names."""

    forget: list[Example]
    retain: list[Example]
    members: list[Document]
    nonmembers: list[Document]
    neutral: list[Example]


def read_sets(data: Data, *, strays: bool = True) -> Sets:
    """Read every set that `data` names, and refuse sets that overlap.

    Members without an item in forget are left out; without `strays` they are refused, unless
    forget is a sample.
    """
    assert data.forget is not None
    forget = read_examples(data.forget)
    retain = read_examples(data.retain) if data.retain else []
    check_disjoint(forget, retain)
    known = {example.document: example.task for example in forget}
    sampled = strays or data.forget.documents is not None
    members = read_documents(data.members, known, sampled=sampled) if data.members else []
    members = [replace(member, task=member.task or known[member.id]) for member in members]
    nonmembers = read_documents(data.nonmembers) if data.nonmembers else []
    neutral = read_examples(data.neutral) if data.neutral else []
    sets = Sets(forget, retain, members, nonmembers, neutral)
    check_unseen(sets)
    return sets


def written_sets(folder: Path) -> Data:
    """The sets that `synthesize` wrote into a folder."""
    names = ("forget", "retain", "members", "nonmembers", "neutral")
    return Data.model_validate({name: {"path": str(folder / f"{name}.jsonl")} for name in names})


def check_unseen(sets: Sets) -> None:
    """Refuse a non-member whose text stands in another set, letter case and white space aside: what
    a model is trained on, or takes its levels from, cannot judge it."""
    said = {
        "member": [(document.id, document.text) for document in sets.members],
        "forget item": _texts(sets.forget),
        "retain item": _texts(sets.retain),
        "neutral text": _texts(sets.neutral),
    }
    seen = {_plain(text): f"{kind} {id}" for kind, texts in said.items() for id, text in texts}
    for document in sets.nonmembers:
        twin = seen.get(_plain(document.text))
        if twin is not None:
            raise DataError(
                f"non-member {document.id} is the same text as {twin}; non-members judge, so take "
                "it out of one of the sets"
            )


def _texts(examples: list[Example]) -> list[tuple[str, str]]:
    return [(example.id, f"{example.prompt}{example.answer}") for example in examples]


def _plain(text: str) -> str:
    """Without letter case, forms of one letter and white space, which items are joined with or
    without."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())
