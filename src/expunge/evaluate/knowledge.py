"""General knowledge that no set to be forgotten holds: plain questions, asked in two forms.

It tells a model that lost one subject from one that lost everything. Dimensions: Q questions,
K wordings of one answer.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from expunge.config import Section
from expunge.data.batches import TokenSequence, prompt_tokens
from expunge.data.rows import Row, read_rows
from expunge.data.sources import locate
from expunge.errors import DataError
from expunge.evaluate.numbers import Behind, Measured, estimate
from expunge.evaluate.prompts import fit_prompts
from expunge.evaluate.reader import Reader

OWN = Path(__file__).with_suffix(".jsonl")
"""Sixty questions: geography, science, arithmetic, everyday life, culture."""

PROMPT = """\
Question: Which animal barks?
Answer: a dog

Question: What is 1 + 2?
Answer: 3

Question: {question}
Answer:"""
"""Two solved examples, so that a base model too answers briefly."""

LEAD = "The animal that barks is the dog.\n1 + 2 = 3\nA year has four seasons.\n"
"""Stands before each sentence to complete. Without it SmolLM2 (135 M) completes 2 + 2 = with 3
and one of twelve sums rightly."""


class Knowledge(Section):
    """Which questions of general knowledge are asked."""

    path: str | None = None
    """A file of your own questions with the columns of the built-in ones: id, group, question,
    answers (accepted wordings), cloze (a sentence without its end), options (its possible ends,
    the right one first). Null asks the sixty that come with the program."""

    max_new_tokens: int = Field(default=16, ge=1)
    """Longest answer, in tokens; only its first line counts."""

    limit: int | None = Field(default=None, ge=1)
    """Ask only the first so many; the others are items without a score."""


@dataclass(frozen=True, slots=True)
class Item:
    """One fact, as a question and as a sentence to complete."""

    id: str
    group: str
    question: str
    answers: tuple[str, ...]
    cloze: str
    options: tuple[str, ...]
    """Ends of the sentence; the first is right."""


def contains_answer(answers: Sequence[str], generation: str) -> bool:
    """Whether the first line holds an accepted answer as whole words.

        contains = ∃ k: words(answer_k) is a run within words(line)

    Case, accents and punctuation do not matter; `18` is not in `180`. An empty line holds none. A
    line that lists every candidate, or denies the answer, would count: the length is limited.

    Source: this project.
    """
    line = _words(generation.strip().partition("\n")[0])
    return any(
        wanted and line[i : i + len(wanted)] == wanted
        for wanted in map(_words, answers)
        for i in range(len(line) - len(wanted) + 1)
    )


def likeliest_first(logps: Sequence[float]) -> bool:
    """Whether the right end of the sentence, given first, is likelier than every other.

        right = log p(e_1 | sentence) > max_{k>1} log p(e_k | sentence),   sums over e_k's tokens

    A tie is not right, so a model that tells nothing apart scores 0, and chance is 1/K. Ends are
    of similar length, so nothing is divided by it.

    Source: this project; the rule of multiple choice in lm-evaluation-harness.
    """
    right, *others = logps
    return right > max(others)


def read_items(path: Path) -> list[Item]:
    """The questions of a file, checked; an id stands for one question."""
    items = [_item(row, str(path)) for row in read_rows(path)]
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise DataError(f"{path} holds the id {item.id!r} twice; ids must be unique")
        seen.add(item.id)
    return items


def knowledge_suite(reader: Reader, section: Knowledge) -> Measured:
    """`generated`: the share of questions answered; `cloze`: the share of sentences completed.

    Each is also given by group. `cloze` is the one to read for a small base model, whose chance
    is 0.25 with four ends; `generated` has no chance level to speak of.
    """
    items = read_items(OWN if section.path is None else locate(section.path))
    asked = items[: section.limit]
    raw = [prompt_tokens(reader.tokenizer, PROMPT.format(question=i.question)) for i in asked]
    prompts, cut = fit_prompts(raw, reader.context, section.max_new_tokens)
    made = reader.generations(prompts, max_new_tokens=section.max_new_tokens, label="knowledge")
    texts = [reader.text(generation.tokens).strip() for generation in made]
    generated = [contains_answer(i.answers, text) for i, text in zip(asked, texts, strict=True)]
    logps = _option_logps(reader, asked)
    cloze = [likeliest_first(values) for values in logps]
    found = Measured(facts={"prompts_cut": cut})
    for name, hits in (("generated", generated), ("cloze", cloze)):
        groups: dict[str, list[bool]] = defaultdict(list)
        for item, hit in zip(asked, hits, strict=True):
            groups[item.group].append(hit)
        found.numbers[name] = estimate(hits, name=name)
        found.behind[name] = Behind(name)
        for group, values in groups.items():
            found.numbers[f"{name}.{group}"] = estimate(values, name=f"{name}.{group}")
            found.behind[f"{name}.{group}"] = Behind(name, (group,))
    for i, item in enumerate(items):
        done = i < len(asked)
        found.items.append(
            {
                "group": item.group,
                "id": item.id,
                "generation": texts[i].partition("\n")[0] if done else None,
                "generated": generated[i] if done else None,
                "chosen": item.options[logps[i].index(max(logps[i]))] if done else None,
                "cloze": cloze[i] if done else None,
            }
        )
    return found


def _option_logps(reader: Reader, items: Sequence[Item]) -> list[list[float]]:
    """log p of each end after its sentence, by item."""
    sequences = [sequence for item in items for sequence in _sequences(reader, item)]
    scores = iter(reader.scores(sequences, label="knowledge, cloze"))
    return [[float(next(scores).logp.sum(dtype=float)) for _ in item.options] for item in items]


def _sequences(reader: Reader, item: Item) -> list[TokenSequence]:
    """The sentence with each end, all scored from the first token that any end changes."""
    sentence = LEAD + item.cloze
    before = prompt_tokens(reader.tokenizer, sentence)
    texts = [prompt_tokens(reader.tokenizer, f"{sentence} {end}") for end in item.options]
    if max(map(len, texts)) > reader.context:
        raise DataError(f"question {item.id!r} is longer than the model's context")
    start = min(_shared(before, tokens) for tokens in texts)
    return [
        TokenSequence(f"{item.id}/{end}", tuple(tokens), answer_start=start)
        for end, tokens in zip(item.options, texts, strict=True)
    ]


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _words(text: str) -> list[str]:
    plain = unicodedata.normalize("NFKD", text.casefold())
    return re.findall(r"\w+", "".join(c for c in plain if not unicodedata.combining(c)))


def _item(row: Row, origin: str) -> Item:
    where = f"{origin}, {row.place}"
    texts = {}
    for column in ("id", "group", "question", "cloze"):
        value = row.fields.get(column)
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{where}: {column!r} must be text, but is {value!r:.60}")
        texts[column] = value
    lists = {}
    for column, fewest in (("answers", 1), ("options", 2)):
        value = row.fields.get(column)
        if not isinstance(value, list) or not all(isinstance(v, str) and v.strip() for v in value):
            raise DataError(f"{where}: {column!r} must be a list of texts, but is {value!r:.60}")
        if len(set(value)) < max(fewest, len(value)):
            raise DataError(f"{where}: {column!r} needs {fewest} or more, none of them twice")
        lists[column] = tuple(value)
    return Item(**texts, **lists)
