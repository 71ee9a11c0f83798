"""MMLU: 57 subjects of four-way questions, answered by the likeliest of four letters."""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from expunge.config import Section
from expunge.data.batches import prompt_tokens
from expunge.errors import DataError
from expunge.evaluate.choices import accuracy, macro_accuracy
from expunge.evaluate.options import LETTERS, letter_tokens, option_logits
from expunge.evaluate.reader import Reader
from expunge.evaluate.tables import text_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HUB = "cais/mmlu"
CONTEXT = 2048
"""Longest prompt, in tokens, as in the original; few-shot examples are dropped to fit."""

Style = Literal["original", "harness"]


class Mmlu(Section):
    """Which questions of MMLU are asked, and how."""

    path: str = HUB
    """A parquet file (subject, split, question, choices, answer), or `cais/mmlu` on the Hub."""

    shots: int = Field(default=5, ge=0, le=5)
    """Solved examples before each question, from the subject's dev split."""

    per_subject: int | None = Field(default=None, ge=1)
    """Ask a seeded sample of this many questions a subject; null asks all."""

    seed: int = 0
    """Draws the sample."""

    style: Style = "original"
    """`original`: as Hendrycks et al. ask, but for one blank before the subject, where their code
    writes two; examples that do not fit into 2048 tokens are dropped.
    `harness`: as lm-evaluation-harness 0.4 asks; a question's outer white space is taken off, and
    a prompt longer than the model's context loses its beginning. The original is the default
    because the published tables of unlearning used it."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question; `answer` is 0 to 3."""

    subject: str
    split: str
    question: str
    choices: tuple[str, ...]
    answer: int

    @property
    def hash(self) -> str:
        """What stands for the question, its choices and its answer in a row of items."""
        return text_hash("\n".join([self.question, *self.choices, str(self.answer)]))


def read_mmlu(path: Path | str) -> list[Question]:
    """The dev and test questions in a parquet file, or from the Hub where `path` is `cais/mmlu`."""
    rows = _hub_rows() if str(path) == HUB else _parquet_rows(Path(path))
    questions = []
    for number, row in enumerate(rows):
        subject, split, text = row["subject"], row["split"], row["question"]
        choices, answer = row["choices"], row["answer"]
        if not all(isinstance(one, str) and one.strip() for one in (subject, split, text)):
            raise DataError(f"{path}: row {number} needs a subject, a split and a question")
        if not isinstance(choices, list) or len(choices) != 4:
            raise DataError(f"{path}: row {number} needs four choices and an answer from 0 to 3")
        if isinstance(answer, bool) or not isinstance(answer, int) or answer not in range(4):
            raise DataError(f"{path}: row {number} needs an answer from 0 to 3, not {answer!r}")
        questions.append(Question(subject, split, text, tuple(map(str, choices)), answer))
    return questions


def sample(questions: Sequence[Question], config: Mmlu) -> list[Question]:
    """The dev questions and the chosen test questions, in their order."""
    if config.per_subject is None:
        return list(questions)
    by_subject: dict[str, list[int]] = defaultdict(list)
    for number, question in enumerate(questions):
        if question.split == "test":
            by_subject[question.subject].append(number)
    chosen: set[int] = set()
    for subject, numbers in by_subject.items():
        # Seeded by name, so that one subject's sample does not depend on the others.
        rng = np.random.default_rng([config.seed, zlib.crc32(subject.encode())])
        chosen.update(rng.permutation(numbers)[: config.per_subject].tolist())
    return [q for i, q in enumerate(questions) if q.split != "test" or i in chosen]


def prompt(question: Question, examples: Sequence[Question]) -> str:
    """The prompt of Hendrycks et al. 2021 (arXiv:2009.03300), up to and with `Answer:`.

    Differs: one blank before the subject, where their code writes two.
    """
    subject = question.subject.replace("_", " ")
    header = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    solved = "".join(f"{_ask(e)} {LETTERS[e.answer]}\n\n" for e in examples)
    return header + solved + _ask(question)


def choose(
    reader: Reader, questions: Sequence[Question], config: Mmlu
) -> tuple[list[Question], list[int], list[int]]:
    """The test questions asked, the letter chosen for each, and how many examples each had."""
    asked = [q for q in sample(questions, config) if q.split == "test"]
    if not asked:
        return [], [], []
    dev = _dev(questions)
    logits, shots = letter_logits(reader, asked, dev, shots=config.shots, style=config.style)
    return asked, logits.argmax(-1).tolist(), shots


def answer_mmlu(
    reader: Reader, questions: Sequence[Question], config: Mmlu
) -> dict[str, Any] | None:
    """Ask the test questions and count; None where there are none.

    `accuracy` is over all questions (micro), `macro` the mean of the subjects'.
    """
    asked, chosen, shots = choose(reader, questions, config)
    if not asked:
        return None
    hits: dict[str, list[bool]] = defaultdict(list)
    for question, choice in zip(asked, chosen, strict=True):
        hits[question.subject].append(choice == question.answer)
    counts = Counter(chosen)
    letters = {letter: counts[i] / len(asked) for i, letter in enumerate(LETTERS)}
    return {
        "accuracy": accuracy([q.answer for q in asked], chosen),
        "macro": macro_accuracy({s: sum(h) / len(h) for s, h in hits.items()}),
        "n": len(asked),
        "per_subject": {s: {"n": len(h), "correct": sum(h)} for s, h in sorted(hits.items())},
        "shots": config.shots,
        "fewer_shots": sum(k < config.shots for k in shots),
        "sampled": config.per_subject is not None,
        "letters": letters,
    }


def places_of(questions: Sequence[Question]) -> dict[int, str]:
    """SUBJECT/number of each test question among its subject's, by the question's identity."""
    counts: Counter[str] = Counter()
    places = {}
    for question in questions:
        if question.split == "test":
            places[id(question)] = f"{question.subject}/{counts[question.subject]}"
            counts[question.subject] += 1
    return places


def letter_logits(
    reader: Reader,
    asked: Sequence[Question],
    examples: Mapping[str, Sequence[Question]],
    *,
    shots: int,
    style: Style = "original",
) -> tuple[np.ndarray, list[int]]:
    """Logits of the four letters after each question (Q, 4), and how many examples each had."""
    limit = min(CONTEXT, reader.context)
    prompts, used = [], []
    for question in asked:
        solved = examples.get(question.subject, ())[:shots]
        if len(solved) < shots:
            raise DataError(
                f"MMLU subject {question.subject} has {len(solved)} dev questions, not {shots}"
            )
        if style == "harness":
            tokens, kept = _harness_tokens(reader, question, solved), shots
        else:
            tokens, kept = _fitting(reader.tokenizer, question, solved, limit)
        prompts.append(tokens)
        used.append(kept)
    groups = [(question.subject, kept) for question, kept in zip(asked, used, strict=True)]
    return option_logits(reader, prompts, groups, letter_tokens(reader.tokenizer)), used


def _fitting(
    tokenizer: PreTrainedTokenizerBase, question: Question, solved: Sequence[Question], limit: int
) -> tuple[list[int], int]:
    """The prompt with as many examples as fit (all but the letter's token), and how many."""
    tokens: list[int] = []
    for kept in range(len(solved), -1, -1):
        tokens = _before_letter(tokenizer, prompt(question, solved[:kept]))
        if len(tokens) <= limit:
            return tokens, kept
    return tokens[-limit:], 0


def _harness_tokens(reader: Reader, question: Question, solved: Sequence[Question]) -> list[int]:
    """The last tokens of the prompt that the model's context holds."""
    bare, *examples = (replace(q, question=q.question.strip()) for q in (question, *solved))
    return _before_letter(reader.tokenizer, prompt(bare, examples))[-reader.context :]


def _before_letter(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """A prompt's tokens with all but the last of ` A`, which is where the letters part."""
    return prompt_tokens(tokenizer, text + " A")[:-1]


def _dev(questions: Sequence[Question]) -> dict[str, list[Question]]:
    found: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        if question.split == "dev":
            found[question.subject].append(question)
    return found


def _ask(question: Question) -> str:
    options = zip(LETTERS, question.choices, strict=True)
    return "\n".join([question.question, *(f"{a}. {c}" for a, c in options), "Answer:"])


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = ["subject", "split", "question", "choices", "answer"]
    try:
        return pq.read_table(path, columns=columns).to_pylist()
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"cannot read MMLU from {path}: {reason}") from None


def _hub_rows() -> list[dict[str, Any]]:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise DataError(f"{HUB} is read through datasets: pip install expunge[hub]") from None
    rows = []
    for split in ("dev", "test"):
        try:
            table = datasets.load_dataset(HUB, "all", split=split)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"cannot fetch {HUB} from the Hub: {reason}") from None
        rows += [{**row, "split": split} for row in table]  # pyright: ignore
    return rows
