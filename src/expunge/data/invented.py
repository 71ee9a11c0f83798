"""Invented documents: words drawn for them, sentences worded, and prompts cut off them."""

import datetime
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from faker import Faker

from expunge.data import wording
from expunge.data.wording import Fact

Saying = tuple[Fact, dict[str, str]]
"""A fact and the words for its slots."""


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


class Words:
    """Draws names and words for one task's documents, one after the other."""

    def __init__(self, seed: str, names: set[str]) -> None:
        """`names`, and whatever else may occur once only, are in use already; new ones join."""
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

    def fresh(self, draw: Callable[[], str]) -> str:
        """What `draw` gives, drawn again until no other document holds it."""
        while (drawn := draw()) in self.names:
            pass
        self.names.add(drawn)
        return drawn

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


def document(
    words: Words,
    prompt_share: float,
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
    cut = max(named, min(round(prompt_share * len(pieces)), len(pieces) - 1))
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
