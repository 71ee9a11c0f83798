"""Synthetic data: LUME-shaped forget and retain sets of invented documents, small enough for CPUs.

Task1: short creative stories; Task2: biographies with personal data; Task3: encyclopaedic lives.
No name, number or address belongs to anybody but by chance: Social Security numbers begin with 9
(never issued), phone area codes have a 9 in the middle (not assigned) and e-mail domains end in
`.example` (reserved).
"""

import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from expunge.config import Section
from expunge.data import wording
from expunge.data.invented import Invented, Words, document
from expunge.data.neutral import neutral_texts
from expunge.data.notices import notice
from expunge.errors import DataError
from expunge.runs import make_folder, write_text


class Synthetic(Section):
    """How much to invent; the same section always gives the same files."""

    seed: int = Field(default=0, ge=0)
    """Seed of every draw."""

    documents: int = Field(default=20, ge=1, le=1000)
    """Documents of each of the three tasks, in each of the halves forget and retain."""

    members: int | None = Field(default=None, ge=1, le=5000)
    """Short documents of one form to be forgotten beside those of the tasks, an item each; then
    they alone are the members. Without it all forget documents are."""

    kept: int = Field(default=0, ge=0, le=5000)
    """With `members`: documents of their form in the retain half, in all."""

    nonmembers: int = Field(default=20, ge=1, le=5000)
    """Documents that no set holds, from the generator of the members: of each task, or, with
    `members`, of their form in all."""

    unseen: int = Field(default=0, ge=0, le=5000)
    """With `members`: documents of their form that become the neutral texts, which no model learns:
    what holds unseen text of that form where it is."""

    sentences: int = Field(default=3, ge=2, le=8)
    """Sentences of a Task1 or Task3 document; a Task2 document always has its five facts."""

    prompt_share: float = Field(default=0.4, gt=0, lt=1)
    """Share of a document's words that its completion prompt shows, at least up to the name."""

    @model_validator(mode="after")
    def _are_of_the_form_of_members(self) -> Self:
        for name in ("kept", "unseen"):
            if getattr(self, name) and self.members is None:
                raise ValueError(f"{name} counts documents of the form of members; give members")
        return self


def synthesize(config: Synthetic, folder: Path, *, replace: bool = True) -> dict[str, int]:
    """Write the five files into `folder`; return the number of rows of each.

    `forget.jsonl`, `retain.jsonl`: id, input, output, task, split, with LUME's ids (Task1's hold
    quotes). `members.jsonl` (the whole text of every forget document, all tasks alike, or of the
    short ones alone) and `nonmembers.jsonl`: id, document; both have the same share of each task.
    `neutral.jsonl`: id, text. Without `replace`, a file of such a name with other content is a
    `DataError`.
    """
    forget, retain, nonmembers, unseen = invent(config)
    told = [document.text for document in unseen] or neutral_texts()
    members = forget if config.members is None else forget[-config.members :]
    files = {
        "forget.jsonl": [row for document in forget for row in _items(document, "forget")],
        "retain.jsonl": [row for document in retain for row in _items(document, "retain")],
        "members.jsonl": [_whole(document) for document in members],
        "nonmembers.jsonl": [_whole(document) for document in nonmembers],
        "neutral.jsonl": [
            {"id": f"neutral{number}", "text": text} for number, text in enumerate(told)
        ],
    }
    make_folder(folder)
    texts = {
        folder / name: "".join(json.dumps(row) + "\n" for row in rows)
        for name, rows in files.items()
    }
    for path, text in texts.items():
        if not replace and path.exists() and path.read_bytes() != text.encode():
            raise DataError(f"{path} is there with other content; choose another folder")
    for path, text in texts.items():
        write_text(path, text)
    return {name: len(rows) for name, rows in files.items()}


def invent(config: Synthetic) -> tuple[list[Invented], ...]:
    """Forget, retain, non-member and unseen documents, the tasks taking turns; every name occurs
    once.

    With `members`, the short documents come last in each half. Which of them are members is drawn
    after they are all there, so that no order of drawing tells the sides apart.
    """
    names: set[str] = set()
    short = config.members is not None
    count = 2 * config.documents + (0 if short else config.nonmembers)
    drawn = []
    for task, draw in TASKS.items():
        words = Words(f"{config.seed}:{task}", names)
        drawn.append([draw(words, config) for _ in range(count)])
    documents = [document for turn in zip(*drawn, strict=True) for document in turn]
    half = len(TASKS) * config.documents
    forget, retain, others = documents[:half], documents[half : 2 * half], documents[2 * half :]
    if config.members is None:
        return forget, retain, others, []
    words, kept = Words(f"{config.seed}:notice", names), config.members + config.kept
    apart = kept + config.nonmembers
    notices = [notice(words, config.prompt_share) for _ in range(apart + config.unseen)]
    words.rng.shuffle(notices)
    return (
        forget + notices[: config.members],
        retain + notices[config.members : kept],
        notices[kept:apart],
        notices[apart:],
    )


def story(words: Words, config: Synthetic) -> Invented:
    """A Task1 document: deeds of a hero and of others; one question."""
    first, last = words.name()
    said = []
    for number in range(config.sentences):
        who = words.rng.choice((first, words.fake.first_name())) if number else f"{first} {last}"
        said.append((words.rng.choice(wording.STORY), words.slots(first, last, who)))
    id = f'"{uuid.UUID(int=words.rng.getrandbits(128), version=4)}"'
    return document(words, config.prompt_share, id, "Task1", said, [words.rng.choice(said)])


def person(words: Words, config: Synthetic) -> Invented:
    """A Task2 document: five personal facts in any order; five questions in LUME's order."""
    first, last = words.name()
    slots = words.slots(first, last, "") | words.personal(first, last)
    facts = words.rng.sample(wording.PERSONAL, len(wording.PERSONAL))
    names = [f"{first} {last}", *words.rng.choices((first, last), k=len(facts) - 1)]
    said = [(fact, slots | {"who": who}) for fact, who in zip(facts, names, strict=True)]
    asked = [(fact, slots) for fact in wording.PERSONAL]
    id = str(uuid.UUID(int=words.rng.getrandbits(128), version=4))
    return document(words, config.prompt_share, id, "Task2", said, asked)


def life(words: Words, config: Synthetic) -> Invented:
    """A Task3 document: the life of somebody notable; one question."""
    first, last = words.name()
    facts = [wording.OPENING, *words.rng.sample(wording.CAREER, config.sentences - 1)]
    names = [f"{first} {last}", *words.rng.choices((first, last), k=len(facts) - 1)]
    birth = words.rng.randint(1800, 1940)
    years = [birth, *(birth + words.rng.randint(20, 60) for _ in facts[1:])]
    said = [
        (fact, words.slots(first, last, who, year))
        for fact, who, year in zip(facts, names, years, strict=True)
    ]
    id = str(words.rng.randrange(10**7, 10**12))
    return document(words, config.prompt_share, id, "Task3", said, [words.rng.choice(said)])


def _items(document: Invented, split: str) -> list[dict[str, str]]:
    """The rows of one document as LUME has them: the completion, then the questions."""
    texts = {"sc1": (document.prompt, document.completion)}
    texts |= {f"qa{number}": texts for number, texts in enumerate(document.questions)}
    return [
        {
            "id": document.id + kind,
            "input": prompt,
            "output": answer,
            "task": document.task,
            "split": split,
        }
        for kind, (prompt, answer) in texts.items()
    ]


def _whole(document: Invented) -> dict[str, str]:
    return {"id": document.id.strip('"'), "document": document.text}


TASKS: dict[str, Callable[[Words, Synthetic], Invented]] = {
    "Task1": story,
    "Task2": person,
    "Task3": life,
}
