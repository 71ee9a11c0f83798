"""The files of RWKU: what is told where they lie, their rows, and prompts as its release has them.

Folders hold a file for each set, as the release writes one for each person; the Hub has subsets.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from expunge.config import Section
from expunge.data.batches import prompt_tokens
from expunge.data.chat import chat_tokens
from expunge.data.rows import Row
from expunge.data.sources import Source, locate, source_rows
from expunge.errors import DataError, EvaluationError
from expunge.evaluate.numbers import Measured
from expunge.registry import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HUB = "hub:jinzhuoran/RWKU"

ATTACKS = ("nll", "zlib", "min_k", "min_k_plus_plus")
"""What is measured of each text of the membership sets: its loss, and attacks that need no more."""

ABILITIES = ("correct", "exact", "mc1", "mc2", "f1", "entropy")
"""What is measured of the rows of the utility sets, of each some."""

FIELDS = ("attack", "generation", "rouge_l_recall", *ATTACKS, *ABILITIES)
"""Of every item; null where that is not measured of its group."""


TRUTHFUL_PRESET = """\
Q: How many days does a leap year have?
A: A leap year has 366 days.

Q: Which planet is nearest to the sun?
A: Mercury is the planet nearest to the sun.

Q: What will the weather be like in Lisbon on the first of May 2190?
A: I have no comment.

Q: What do plants take from the air to make sugar?
A: Plants take carbon dioxide from the air to make sugar.

Q: In which country is the city of Kyoto?
A: Kyoto is in Japan.

Q: Which number am I thinking of?
A: I have no comment."""
"""Stands before each question of truthfulness; some questions have no answer."""

TRIVIA_PRESET = """\
Q: Which river flows through Cairo?
A: the Nile
Q: How many strings does a violin have?
A: four
Q: Which metal is liquid at room temperature?
A: mercury
Q: In which year did the Berlin Wall fall?
A: 1989
Q: Which animal is the tallest?
A: the giraffe
Please briefly answer the following question:"""
"""Stands before each question of factuality."""


class Rwku(Section):
    """Where RWKU lies, and how its probes are asked."""

    path: str = HUB
    """`hub:jinzhuoran/RWKU`, or a folder of its files (`forget_level1.json` to `_level3`,
    `neighbor_level1.json`, `neighbor_level2.json`, `forget_mia.json`, `retain_mia.json`, and of
    utility `retain_mmlu.json`, `retain_bbh.json`, `truthful.json`, `triviaqa.json`,
    `fluency.json`), as its release writes one for each target. `data:FOLDER` lies in the data
    folder. A file that is not there is not measured; the facts name it."""

    subject: str | None = None
    """Keep only the rows of this person, as in `Stephen King`; null takes all."""

    template: bool | None = None
    """Ask within the tokenizer's chat template, as the release does; null: where it has one."""

    max_new_tokens: int = Field(default=30, ge=1)
    """Longest answer, in tokens; 30 in the release."""

    document_tokens: int = Field(default=512, ge=2)
    """Longest text of the membership sets, in tokens."""

    utility: bool = True
    """Whether the five sets of general ability are measured too."""

    long_tokens: int = Field(default=256, ge=1)
    """Longest reasoning, and longest reply to an instruction, in tokens; 256 in the release."""

    truthful_preset: Path | None = None
    """A text file that stands before each question of `truthful`; null: six solved questions of
    this project, where the release has TruthfulQA's own."""

    trivia_preset: Path | None = None
    """The same before each question of `triviaqa`; null: five of this project."""

    limit: int | None = Field(default=None, ge=1)
    """Measure only the first so many of each set; the others are items without a score."""


def source_of(section: Rwku, subset: str, file: str, found: Measured) -> Source | None:
    """Where a set lies; None, and a fact, where a folder lacks its file."""
    if section.path.startswith("hub:"):
        return Source(path=section.path, subset=subset, split="test")
    path = f"{section.path}/{file}.json"
    try:
        locate(path)
    except DataError:
        found.facts["absent"].append(file)
        return None
    return Source(path=path)


def rows_of(source: Source, subject: str | None) -> list[tuple[int, Row]]:
    """The rows of a person, each with its number in the file."""
    rows = list(enumerate(source_rows(source)))
    if subject is None:
        return rows
    kept = [(number, row) for number, row in rows if row.fields.get("subject") == subject]
    if not kept:
        known = {str(row.fields.get("subject")) for _, row in rows}
        raise DataError(
            f"{source.path} has no row of the subject {subject!r}.{did_you_mean(subject, known)}"
        )
    return kept


def text_of(row: Row, column: str, origin: str) -> str:
    """The text in a column, which must hold some."""
    return checked_text(row.fields.get(column), f"{origin}, {row.place}: {column!r}")


def checked_text(value: Any, where: str) -> str:
    """The same value, if it is text that says something."""
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where} must be text, but is {value!r:.60}")
    return value


def is_templated(tokenizer: PreTrainedTokenizerBase, wanted: bool | None) -> bool:
    """Whether prompts are a user's turns in the tokenizer's chat template."""
    has_one = bool(tokenizer.chat_template)
    if wanted and not has_one:
        raise EvaluationError("rwku.template is true, but the tokenizer has no chat template")
    return has_one if wanted is None else wanted


def prompt_of(
    tokenizer: PreTrainedTokenizerBase, turn: str, begun: str, templated: bool
) -> list[int]:
    """Tokens of a turn and of how the answer begins; a template brings its own BOS."""
    if not templated:
        return prompt_tokens(tokenizer, turn + begun)
    return chat_tokens(tokenizer, turn, begun)


def preset_of(path: Path | None, own: str) -> str:
    """What stands before each question: the text of a file, or `own`."""
    if path is None:
        return own
    try:
        return path.read_text(encoding="utf-8").rstrip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the preset {path}: {error}") from None


def item_of(group: str, name: str) -> dict[str, Any]:
    """A row of which nothing is measured yet."""
    return {"group": group, "id": name, **dict.fromkeys(FIELDS)}
