"""Synthetic data: LUME-shaped forget and retain sets of invented documents, small enough for CPUs.

Task1: short creative stories; Task2: biographies with personal data; Task3: encyclopaedic lives.
No name, number or address belongs to anybody but by chance: Social Security numbers begin with 9
(never issued), phone area codes have a 9 in the middle (not assigned) and e-mail domains end in
`.example` (reserved).
"""

import datetime
import json
import random
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from faker import Faker
from pydantic import Field

from expunge.config import Section
from expunge.data import wording
from expunge.data.neutral import neutral_texts
from expunge.data.wording import Fact
from expunge.runs import write_text

Saying = tuple[Fact, dict[str, str]]
"""A fact and the words for its slots."""


class Synthetic(Section):
    """How much to invent; the same section always gives the same files."""

    seed: int = Field(default=0, ge=0)
    """Seed of every draw."""

    documents: int = Field(default=20, ge=1, le=1000)
    """Documents of each of the three tasks, in each of the halves forget and retain."""

    nonmembers: int = Field(default=20, ge=1, le=1000)
    """Documents of each task that no set holds: later draws of the same generator."""

    sentences: int = Field(default=3, ge=2, le=8)
    """Sentences of a Task1 or Task3 document; a Task2 document always has its five facts."""

    prompt_share: float = Field(default=0.4, gt=0, lt=1)
    """Share of a document's words that its completion prompt shows, at least up to the name."""


@dataclass(frozen=True, slots=True)
class Invented:
    """One invented document: its completion item, and its questions with their answers."""

    id: str
    name: str
    task: str
    prompt: str
    completion: str
    questions: tuple[tuple[str, str], ...]

    @property
    def text(self) -> str:
        """The whole text, as LUME joins it for its membership sets."""
        return f"{self.prompt} {self.completion}"


def synthesize(config: Synthetic, folder: Path) -> dict[str, int]:
    """Write the five files into `folder`; return the number of rows of each.

    `forget.jsonl`, `retain.jsonl`: id, input, output, task, split, with LUME's ids (Task1's hold
    quotes). `members.jsonl` (the whole text of every forget document, all tasks alike) and
    `nonmembers.jsonl`: id, document; both have the same share of each task. `neutral.jsonl`: id,
    text.
    """
    forget, retain, nonmembers = invent(config)
    files = {
        "forget.jsonl": [row for document in forget for row in _items(document, "forget")],
        "retain.jsonl": [row for document in retain for row in _items(document, "retain")],
        "members.jsonl": [_whole(document) for document in forget],
        "nonmembers.jsonl": [_whole(document) for document in nonmembers],
        "neutral.jsonl": [
            {"id": f"neutral{number}", "text": text} for number, text in enumerate(neutral_texts())
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        write_text(folder / name, "".join(json.dumps(row) + "\n" for row in rows))
    return {name: len(rows) for name, rows in files.items()}


def invent(config: Synthetic) -> tuple[list[Invented], list[Invented], list[Invented]]:
    """Forget, retain and non-member documents, the tasks taking turns; every name occurs once."""
    names: set[str] = set()
    count = 2 * config.documents + config.nonmembers
    drawn = []
    for task, draw in TASKS.items():
        words = Words(f"{config.seed}:{task}", names)
        drawn.append([draw(words, config) for _ in range(count)])
    documents = [document for turn in zip(*drawn, strict=True) for document in turn]
    half = len(TASKS) * config.documents
    return documents[:half], documents[half : 2 * half], documents[2 * half :]


class Words:
    """Draws names and words for one task's documents, one after the other."""

    def __init__(self, seed: str, names: set[str]) -> None:
        """`names` are those in use already; new ones are added."""
        self.names = names
        self.rng = random.Random(seed)
        # Unweighted: else the commonest names of the language would come again and again.
        self.fake = Faker("en_US", use_weighting=False)
        self.fake.seed_instance(self.rng.getrandbits(64))

    def name(self) -> tuple[str, str]:
        """A first and a last name that stand together in no other document."""
        while True:
            first, last = self.fake.first_name(), self.fake.last_name()
            if f"{first} {last}" not in self.names:
                self.names.add(f"{first} {last}")
                return first, last

    def slots(self, first: str, last: str, who: str, year: int = 0) -> dict[str, str]:
        """Fresh words for every slot of a sentence about a person, who is called `who` there."""
        choose = self.rng.choice
        base, past = choose(wording.VERBS)
        adjective, noun = choose(wording.ADJECTIVES), choose(wording.NOUNS)
        return {
            "name": f"{first} {last}",
            "who": who,
            "base": base,
            "past": past,
            "adjective": adjective,
            "noun": noun,
            "title": f"{adjective} {noun}".title(),
            "number": choose(wording.NUMBERS),
            "adverb": choose(wording.ADVERBS),
            "near": choose(wording.PLACES),
            "nationality": choose(wording.NATIONALITIES),
            "job": choose(wording.JOBS),
            "field": choose(wording.FIELDS),
            "school": choose(wording.SCHOOLS),
            "year": str(year),
            "city": self.fake.city(),
            "street": self.fake.street_name(),
            "person": " ".join(self.name()),
        }

    def personal(self, first: str, last: str) -> dict[str, str]:
        """Birth date, numbers and addresses of one person."""
        below = self.rng.randrange
        birth = datetime.date(1950, 1, 1) + datetime.timedelta(days=below(55 * 365))
        ssn = f"9{below(100):02}-{below(1, 100):02}-{below(1, 10_000):04}"
        phone = f"{below(2, 10)}9{below(10)}-{below(200, 1000)}-{below(10_000):04}"
        return {
            "date": f"{wording.MONTHS[birth.month - 1]} {birth.day}, {birth.year}",
            "iso_date": birth.isoformat(),
            "ssn": ssn,
            "ssn_digits": ssn.replace("-", ""),
            "phone": phone,
            "phone_digits": phone.replace("-", ""),
            "email": f"{first}_{last}@{self.rng.choice(wording.NOUNS)}.example".lower(),
            "house": str(below(1, 1000)),
        }


def story(words: Words, config: Synthetic) -> Invented:
    """A Task1 document: deeds of a hero and of others; one question."""
    first, last = words.name()
    said = []
    for number in range(config.sentences):
        who = words.rng.choice((first, words.fake.first_name())) if number else f"{first} {last}"
        said.append((words.rng.choice(wording.STORY), words.slots(first, last, who)))
    id = f'"{uuid.UUID(int=words.rng.getrandbits(128), version=4)}"'
    return _document(words, config, id, "Task1", said, [words.rng.choice(said)])


def person(words: Words, config: Synthetic) -> Invented:
    """A Task2 document: five personal facts in any order; five questions in LUME's order."""
    first, last = words.name()
    slots = words.slots(first, last, "") | words.personal(first, last)
    facts = words.rng.sample(wording.PERSONAL, len(wording.PERSONAL))
    names = [f"{first} {last}", *words.rng.choices((first, last), k=len(facts) - 1)]
    said = [(fact, slots | {"who": who}) for fact, who in zip(facts, names, strict=True)]
    asked = [(fact, slots) for fact in wording.PERSONAL]
    id = str(uuid.UUID(int=words.rng.getrandbits(128), version=4))
    return _document(words, config, id, "Task2", said, asked)


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
    return _document(words, config, id, "Task3", said, [words.rng.choice(said)])


def _document(
    words: Words,
    config: Synthetic,
    id: str,
    task: str,
    said: Sequence[Saying],
    asked: Sequence[Saying],
) -> Invented:
    """Word what is said, cut it in prompt and completion, and word the questions asked."""
    sentences = [words.rng.choice(fact.forms).format(**slots) for fact, slots in said]
    text = " ".join(sentence[0].upper() + sentence[1:] + "." for sentence in sentences)
    name = said[0][1]["name"]
    named = len(text[: text.index(name) + len(name)].split())
    pieces = text.split()
    cut = max(named, min(round(config.prompt_share * len(pieces)), len(pieces) - 1))
    questions = [(words.rng.choice(fact.questions), slots) for fact, slots in asked]
    return Invented(
        id=id,
        name=name,
        task=task,
        prompt=" ".join(pieces[:cut]),
        completion=" ".join(pieces[cut:]),
        questions=tuple(
            (question.format(**slots), answer.format(**slots))
            for (question, answer), slots in questions
        ),
    )


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
