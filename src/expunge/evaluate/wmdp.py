"""WMDP: four-way questions on hazardous knowledge in biology, cyber security and chemistry.

A model from which that knowledge was removed answers by chance (0.25); MMLU is its control.
"""

from typing import Any

from pydantic import Field

from expunge.config import Section
from expunge.data.rows import Row
from expunge.data.sources import Source, source_rows
from expunge.errors import DataError
from expunge.evaluate.choices import measure_choices
from expunge.evaluate.mmlu import Question, letter_logits
from expunge.evaluate.numbers import Measured
from expunge.evaluate.reader import Reader

HUB = "hub:cais/wmdp"
SUBJECTS = {"bio": "biology", "cyber": "cybersecurity", "chem": "chemistry"}
"""Each set, and what its prompt says the questions are about."""


def _hub(name: str) -> Source:
    return Source(path=HUB, subset=f"wmdp-{name}", split="test")


class Wmdp(Section):
    """Which sets of WMDP are asked, and how many questions of each.

    A set is a file with the columns question, choices (four) and answer (0 to 3), as `cais/wmdp`
    has them; null leaves it out.
    """

    bio: Source | None = _hub("bio")
    """1,273 questions on biosecurity."""

    cyber: Source | None = _hub("cyber")
    """1,987 questions on cyber security."""

    chem: Source | None = _hub("chem")
    """408 questions on chemical security."""

    limit: int | None = Field(default=None, ge=1)
    """Ask only the first so many of each set; the others are items without an answer."""


def read_wmdp(name: str, source: Source) -> list[Question]:
    """The questions of one set, in file order; a row of another form is refused by its place."""
    rows = source_rows(source)
    return [_question(name, row, source.path) for row in rows]


def wmdp_suite(reader: Reader, section: Wmdp) -> Measured:
    """The accuracy of each set (`bio`, `cyber`, `chem`) and over all, without examples.

    The prompt is that of MMLU with the set's subject: "The following are multiple choice
    questions (with answers) about biology."; the answer is the likeliest of the four letters.
    Asked as lm-evaluation-harness does, through which the release was measured.

    Source: Li et al. 2024, arXiv:2403.03218.
    """
    names = [name for name in SUBJECTS if getattr(section, name) is not None]
    if not names:
        raise DataError("wmdp: every set is left out, so there is nothing to ask")
    sets = {name: read_wmdp(name, getattr(section, name)) for name in names}
    asked = [question for name in names for question in sets[name][: section.limit]]
    logits, _ = letter_logits(reader, asked, {}, shots=0, style="harness")
    left = iter(logits.argmax(-1).tolist())
    groups, answers, chosen = [], [], []
    for name, questions in sets.items():
        for number, question in enumerate(questions):
            taken = section.limit is None or number < section.limit
            groups.append(name)
            answers.append(question.answer)
            chosen.append(next(left) if taken else None)
    hashes = [question.hash for questions in sets.values() for question in questions]
    return measure_choices(groups, answers, chosen, hashes, prefix="")


def _question(name: str, row: Row, origin: str) -> Question:
    fields: dict[str, Any] = row.fields
    where = f"{origin}, {row.place}"
    for column in ("question", "choices", "answer"):
        if column not in fields:
            raise DataError(f"{where} lacks the column '{column}'; found: {', '.join(fields)}")
    text, choices, answer = fields["question"], fields["choices"], fields["answer"]
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: 'question' is empty")
    if not isinstance(choices, list | tuple) or len(choices) != 4:
        raise DataError(f"{where}: 'choices' must be a list of four")
    if isinstance(answer, bool) or not isinstance(answer, int) or answer not in range(4):
        raise DataError(f"{where}: 'answer' must be 0, 1, 2 or 3, but is {answer!r}")
    return Question(SUBJECTS[name], "test", text, tuple(map(str, choices)), answer)
