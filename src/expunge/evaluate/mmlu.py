"""MMLU: 57 subjects of four-way questions, answered by the likeliest of four letters.

The questions of a subject share their few-shot examples, so these are read once; a pack then
holds many questions that continue that one cached prefix.
"""

import zlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from expunge.config import Section
from expunge.data.batches import TokenSequence, packs_by_length, prompt_tokens
from expunge.errors import DataError, EvaluationError
from expunge.evaluate.generate import end_pack
from expunge.evaluate.reader import Reader
from expunge.evaluate.tables import key_of, looked_up
from expunge.packs import hidden_states, output_head
from expunge.progress import progress

LETTERS = "ABCD"
HUB = "cais/mmlu"
CONTEXT = 2048
"""Longest prompt, in tokens, as in the original; few-shot examples are dropped to fit."""

PACK_TOKENS = 2048
"""Question tokens read in one forward pass."""


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


@dataclass(frozen=True, slots=True)
class Question:
    """One question; `answer` is 0 to 3."""

    subject: str
    split: str
    question: str
    choices: tuple[str, ...]
    answer: int


def read_mmlu(path: Path | str) -> list[Question]:
    """The dev and test questions in a parquet file, or from the Hub where `path` is `cais/mmlu`."""
    rows = _hub_rows() if str(path) == HUB else _parquet_rows(Path(path))
    questions = []
    for number, row in enumerate(rows):
        question = Question(
            row["subject"], row["split"], row["question"], tuple(row["choices"]), row["answer"]
        )
        if len(question.choices) != 4 or question.answer not in range(4):
            raise DataError(f"{path}: row {number} needs four choices and an answer from 0 to 3")
        questions.append(question)
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
    """The prompt of Hendrycks et al. 2021 (arXiv:2009.03300), up to and with `Answer:`."""
    subject = question.subject.replace("_", " ")
    header = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    solved = "".join(f"{_ask(e)} {LETTERS[e.answer]}\n\n" for e in examples)
    return header + solved + _ask(question)


def answer_mmlu(
    reader: Reader, questions: Sequence[Question], config: Mmlu
) -> dict[str, Any] | None:
    """Ask the test questions and count; None where there are none.

    `accuracy` is over all questions (micro), `macro` the mean of the subjects'.
    """
    asked = [q for q in sample(questions, config) if q.split == "test"]
    if not asked:
        return None
    logits, shots = letter_logits(reader, asked, _dev(questions), shots=config.shots)
    chosen = logits.argmax(-1).tolist()  # (Q,)
    hits: dict[str, list[bool]] = defaultdict(list)
    for question, choice in zip(asked, chosen, strict=True):
        hits[question.subject].append(choice == question.answer)
    counts = Counter(chosen)
    letters = {letter: counts[i] / len(asked) for i, letter in enumerate(LETTERS)}
    return {
        "accuracy": sum(map(sum, hits.values())) / len(asked),
        "macro": float(np.mean([np.mean(h) for h in hits.values()])),
        "n": len(asked),
        "per_subject": {s: {"n": len(h), "correct": sum(h)} for s, h in sorted(hits.items())},
        "shots": config.shots,
        "fewer_shots": sum(k < config.shots for k in shots),
        "sampled": config.per_subject is not None,
        "letters": letters,
    }


def letter_logits(
    reader: Reader,
    asked: Sequence[Question],
    examples: Mapping[str, Sequence[Question]],
    *,
    shots: int,
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
        tokens, kept = _fitting(reader.tokenizer, question, solved, limit)
        prompts.append(tokens)
        used.append(kept)
    groups = [(question.subject, kept) for question, kept in zip(asked, used, strict=True)]
    return option_logits(reader, prompts, groups, letter_tokens(reader.tokenizer)), used


def option_logits(
    reader: Reader,
    prompts: Sequence[list[int]],
    groups: Sequence[Hashable],
    options: Sequence[int],
    *,
    label: str = "MMLU",
) -> np.ndarray:
    """Logits of the tokens `options` after each prompt: (Q, options).

    The prompts of a group begin alike (few-shot examples), and what they share is read once.
    """
    keys = [key_of("options", tuple(prompt), tuple(options)) for prompt in prompts]

    def compute(missing: list[int]) -> Iterator[list[dict[str, Any]]]:
        reader.forwards += len(missing)
        together: dict[Hashable, list[int]] = defaultdict(list)
        for number in missing:
            together[groups[number]].append(number)
        head = output_head(reader.model)[list(options)]  # (options, d)
        with progress(label, len(missing), "questions") as bar:
            for numbers in together.values():
                found = _option_logits(reader.model, [prompts[i] for i in numbers], head)
                if not np.isfinite(found).all():
                    raise EvaluationError(
                        f"{label}: an option's logit is not finite; the model is broken"
                    )
                bar(len(numbers))
                yield [
                    {"key": keys[i], "logits": row}
                    for i, row in zip(numbers, found.tolist(), strict=True)
                ]

    rows = looked_up(reader.options, keys, compute)
    return np.array([row["logits"] for row in rows], np.float32)


@torch.inference_mode()
def _option_logits(
    model: PreTrainedModel, prompts: Sequence[list[int]], head: torch.Tensor
) -> np.ndarray:
    states = _last_states(model, prompts)
    return (states @ head.T.to(states.dtype)).float().cpu().numpy()


def letter_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token of each letter as it follows `Answer:`, its space included where they are one."""
    whole = [prompt_tokens(tokenizer, f"Answer: {letter}") for letter in LETTERS]
    last = [tokens[-1] for tokens in whole]
    if len({tuple(tokens[:-1]) for tokens in whole}) != 1 or len(set(last)) != 4:
        raise EvaluationError("this tokenizer does not write A, B, C and D as one token each")
    return last


def _last_states(model: PreTrainedModel, prompts: Sequence[list[int]]) -> torch.Tensor:
    """The hidden state at the end of each prompt (Q, d); what all begin with is read once.

    The common part is taken from the tokens, not the text, so no merge across its end can differ.
    """
    device = next(model.parameters()).device
    shared = min(len(p) for p in prompts) - 1
    while any(p[:shared] != prompts[0][:shared] for p in prompts):
        shared -= 1
    cache = DynamicCache()
    if shared:
        hidden_states(model, end_pack([prompts[0][:shared]], device), cache)
    order = [
        TokenSequence(str(i), tuple(p[shared:]), answer_start=0) for i, p in enumerate(prompts)
    ]
    states: dict[int, torch.Tensor] = {}
    for group in packs_by_length(order, max_tokens=PACK_TOKENS):
        tokens = [list(sequence.tokens) for sequence in group]
        found = hidden_states(model, end_pack(tokens, device, start=shared), cache)
        for layer in cache.layers:
            layer.crop(-sum(map(len, tokens)))  # pyright: ignore[reportAttributeAccessIssue]
        states.update({int(s.id): state for s, state in zip(group, found, strict=True)})
    return torch.stack([states[i] for i in range(len(prompts))])


def _fitting(
    tokenizer: PreTrainedTokenizerBase, question: Question, solved: Sequence[Question], limit: int
) -> tuple[list[int], int]:
    """The prompt with as many examples as fit (all but the letter's token), and how many."""
    tokens: list[int] = []
    for kept in range(len(solved), -1, -1):
        tokens = prompt_tokens(tokenizer, prompt(question, solved[:kept]) + " A")[:-1]
        if len(tokens) <= limit:
            return tokens, kept
    return tokens[-limit:], 0


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
