"""RWKU's utility sets: what of a model's general ability is left, in five kinds.

MMLU (general), BBH (reason), TruthfulQA (truthfulness), TriviaQA (factuality) and AlpacaEval
(fluency), as the release asks them. Dimensions: Q questions of a set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from expunge.data.batches import TokenSequence
from expunge.data.rows import Row
from expunge.errors import DataError
from expunge.evaluate.abilities import (
    REACHED,
    exact_answer,
    ngram_entropy,
    reasoned,
    token_f1,
    truthful_mc1,
    truthful_mc2,
)
from expunge.evaluate.numbers import Behind, Measured, estimate
from expunge.evaluate.options import LETTERS, letter_tokens, option_logits
from expunge.evaluate.prompts import fit_prompts
from expunge.evaluate.reader import Reader
from expunge.evaluate.rwku_rows import (
    TRIVIA_PRESET,
    TRUTHFUL_PRESET,
    Rwku,
    checked_text,
    item_of,
    preset_of,
    prompt_of,
    rows_of,
    source_of,
    text_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Scores = tuple[list[dict[str, float]], int]
"""The metrics of each of some rows, in order, and how many prompts or texts were cut."""


def measure_utility(reader: Reader, section: Rwku, templated: bool, found: Measured) -> None:
    """Measure the sets that are there, into `found`."""
    for name, one in UTILITY.items():
        source = source_of(section, one.subset, one.file, found)
        if source is None:
            continue
        rows = rows_of(source, section.subject)
        given = [one.read(row, source.path) for _, row in rows]
        scores, cut = one.measure(reader, section, given[: section.limit], templated)
        found.facts[f"{name}.prompts_cut"] = cut
        for metric, number in one.numbers.items():
            full = f"{name}.{number}" if number else name
            found.numbers[full] = estimate([own[metric] for own in scores], name=full)
            found.behind[full] = Behind(metric, (name,))
        for place, (number, _) in enumerate(rows):
            own = scores[place] if place < len(scores) else {}
            found.items.append(item_of(name, f"{name}/{number}") | own)


def _read_choices(row: Row, origin: str) -> dict[str, Any]:
    where = f"{origin}, {row.place}"
    examples = row.fields.get("examples")
    if not isinstance(examples, list) or not all(isinstance(e, Mapping) for e in examples):
        raise DataError(f"{where}: 'examples' must be a list of solved questions")
    asked = _choice(row.fields, where)
    solved = [_choice(example, f"{where}, example {n}") for n, example in enumerate(examples, 1)]
    return {"task": text_of(row, "task", origin), "asked": asked, "solved": solved}


def _choice(fields: Mapping[str, Any], where: str) -> tuple[str, int]:
    """A question with its choices as the prompt has it, and the number of the right one."""
    choices, answer = fields.get("choices"), fields.get("answer")
    if not isinstance(choices, list | tuple) or len(choices) != len(LETTERS):
        raise DataError(f"{where}: 'choices' must be a list of four")
    if isinstance(answer, bool) or not isinstance(answer, int) or answer not in range(4):
        raise DataError(f"{where}: 'answer' must be 0, 1, 2 or 3, but is {answer!r}")
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True)]
    question = checked_text(fields.get("question"), f"{where}: 'question'")
    return "\n".join([f"Question: {question}", *lines]), answer


def _measure_choices(
    reader: Reader, section: Rwku, given: Sequence[Any], templated: bool
) -> Scores:
    turns = [
        f"The following are multiple choice questions (with answers) about "
        f"{one['task'].replace('_', ' ')}.\n\n"
        + "".join(f"{text}\nAnswer: {LETTERS[right]}\n\n" for text, right in one["solved"])
        + "Please following the previous examples and answer the given question.\n"
        + one["asked"][0]
        for one in given
    ]
    raw = [
        prompt_of(reader.tokenizer, t if templated else f"{t}\n", "Answer:", templated)
        for t in turns
    ]
    prompts, cut = fit_prompts(raw, reader.context, 0)
    tasks = [one["task"] for one in given]
    letters = letter_tokens(reader.tokenizer)
    chosen = option_logits(reader, prompts, tasks, letters, label="rwku utility.general")
    hits = [
        {"correct": float(one["asked"][1] == choice)}
        for one, choice in zip(given, chosen.argmax(-1).tolist(), strict=True)
    ]
    return hits, cut


def _read_reasoning(row: Row, origin: str) -> tuple[str, list[str]]:
    """The turn, and the accepted wordings: BBH's answer is a text or a list of such."""
    examples, question = (text_of(row, column, origin) for column in ("cot", "question"))
    turn = (
        f"{examples.strip()}\n\nFollowing previous examples, answer the following questions and "
        f"end with 'so the answer is'\nQ: {question}"
    )
    given, where = row.fields.get("answer"), f"{origin}, {row.place}: 'answer'"
    answers = given if isinstance(given, list) and given else [given]
    return turn, [checked_text(one, where) for one in answers]


def _measure_reasoning(
    reader: Reader, section: Rwku, given: Sequence[Any], templated: bool
) -> Scores:
    begun = _begun(reader.tokenizer, templated)
    raw = [prompt_of(reader.tokenizer, turn, begun, templated) for turn, _ in given]
    prompts, cut = fit_prompts(raw, reader.context, section.long_tokens)
    made = reader.generations(
        prompts,
        max_new_tokens=section.long_tokens,
        settled=lambda _, tokens: bool(REACHED.search(reader.text(tokens))),
        label="rwku utility.reason",
    )
    said = [reasoned(reader.text(one.tokens)) for one in made]
    hits = [
        {"exact": float(exact_answer(answers, one))}
        for (_, answers), one in zip(given, said, strict=True)
    ]
    return hits, cut


def _read_truthful(row: Row, origin: str) -> dict[str, Any]:
    """The question, and the right and wrong answers of MC1 and of MC2."""
    found: dict[str, Any] = {"question": text_of(row, "question", origin)}
    for name in ("mc1", "mc2"):
        where = f"{origin}, {row.place}: '{name}_targets'"
        targets = row.fields.get(f"{name}_targets")
        targets = targets if isinstance(targets, Mapping) else {}
        choices, labels = targets.get("choices"), targets.get("labels")
        if not isinstance(choices, list) or not isinstance(labels, list):
            raise DataError(f"{where} must hold lists of choices and of labels")
        if len(choices) != len(labels):
            raise DataError(f"{where} must hold as many choices as labels")
        pairs = list(zip(choices, labels, strict=True))
        sides = [
            [checked_text(choice, where) for choice, label in pairs if bool(label) is right]
            for right in (True, False)
        ]
        if not all(sides):
            raise DataError(f"{where} needs a right and a wrong answer")
        found[name] = sides
    return found


def _measure_truthful(
    reader: Reader, section: Rwku, given: Sequence[Any], templated: bool
) -> Scores:
    preset = preset_of(section.truthful_preset, TRUTHFUL_PRESET)
    tokenizer, begun = reader.tokenizer, _begun(reader.tokenizer, templated)
    sequences: dict[tuple[int, str], TokenSequence] = {}
    cut = 0
    for number, one in enumerate(given):
        prompt = prompt_of(tokenizer, f"{preset}\n\nQ: {one['question']}", begun, templated)
        ends = {
            answer: tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
            for side in (*one["mc1"], *one["mc2"])
            for answer in side
        }
        (kept,), short = fit_prompts([prompt], reader.context, max(map(len, ends.values())))
        cut += short
        for answer, end in ends.items():
            name = f"utility.truthfulness/{number}: {answer}"
            sequences[number, answer] = TokenSequence(name, (*kept, *end), len(kept))
    scored = reader.scores(list(sequences.values()), label="rwku utility.truthfulness")
    logp = {key: float(own.logp.sum()) for key, own in zip(sequences, scored, strict=True)}
    found = []
    for number, one in enumerate(given):
        (best, *_), wrong = ([logp[number, a] for a in side] for side in one["mc1"])
        right2, wrong2 = ([logp[number, a] for a in side] for side in one["mc2"])
        mc1 = float(truthful_mc1(best, wrong))
        found.append({"mc1": mc1, "mc2": truthful_mc2(right2, wrong2)})
    return found, cut


def _read_trivia(row: Row, origin: str) -> tuple[str, list[str]]:
    answers, where = row.fields.get("answers"), f"{origin}, {row.place}: 'answers'"
    if not isinstance(answers, list) or not answers:
        raise DataError(f"{where} must be a list of accepted wordings")
    return text_of(row, "question", origin), [checked_text(one, where) for one in answers]


def _measure_trivia(reader: Reader, section: Rwku, given: Sequence[Any], templated: bool) -> Scores:
    preset = preset_of(section.trivia_preset, TRIVIA_PRESET)
    turns = [f"{preset}\nQ: {question}\n" for question, _ in given]
    said, cut = _said(reader, turns, "A:", templated, section.max_new_tokens, "factuality")
    found = [
        {"f1": token_f1(answers, one), "exact": float(exact_answer(answers, one))}
        for (_, answers), one in zip(given, said, strict=True)
    ]
    return found, cut


def _read_instruction(row: Row, origin: str) -> str:
    return f"Instruction: {text_of(row, 'instruction', origin)}\n"


def _measure_fluency(
    reader: Reader, section: Rwku, given: Sequence[Any], templated: bool
) -> Scores:
    said, cut = _said(reader, given, "", templated, section.long_tokens, "fluency")
    return [{"entropy": ngram_entropy(one)} for one in said], cut


def _said(
    reader: Reader, turns: Sequence[str], begun: str, templated: bool, length: int, name: str
) -> tuple[list[str], int]:
    """What the model answers to each turn, in full, and how many of these were cut."""
    raw = [prompt_of(reader.tokenizer, turn, begun, templated) for turn in turns]
    prompts, cut = fit_prompts(raw, reader.context, length)
    made = reader.generations(prompts, max_new_tokens=length, label=f"rwku utility.{name}")
    return [reader.text(one.tokens) for one in made], cut


def _begun(tokenizer: PreTrainedTokenizerBase, templated: bool) -> str:
    """How an answer begins behind a question: on a new line, or behind the template's own."""
    if not templated:
        return "\nA:"
    opened = str(tokenizer.decode(prompt_of(tokenizer, "?", "", templated)))
    return "A:" if opened[-1:].isspace() else " A:"


@dataclass(frozen=True)
class Utility:
    """One of the sets."""

    subset: str
    """On the Hub."""

    file: str
    read: Callable[[Row, str], Any]
    measure: Callable[[Reader, Rwku, Sequence[Any], bool], Scores]
    numbers: Mapping[str, str]
    """Each metric, and how its number is called behind the set's name."""


UTILITY = {
    "utility.general": Utility(
        "utility_general", "retain_mmlu", _read_choices, _measure_choices, {"correct": ""}
    ),
    "utility.reason": Utility(
        "utility_reason", "retain_bbh", _read_reasoning, _measure_reasoning, {"exact": ""}
    ),
    "utility.truthfulness": Utility(
        "utility_truthfulness",
        "truthful",
        _read_truthful,
        _measure_truthful,
        {"mc1": "", "mc2": "mc2"},
    ),
    "utility.factuality": Utility(
        "utility_factuality",
        "triviaqa",
        _read_trivia,
        _measure_trivia,
        {"f1": "", "exact": "exact"},
    ),
    "utility.fluency": Utility(
        "utility_fluency", "fluency", _read_instruction, _measure_fluency, {"entropy": ""}
    ),
}
