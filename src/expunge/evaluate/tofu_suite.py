"""The suite `tofu`: fictitious authors forgotten, as `expunge evaluate MODEL` measures it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from expunge.config import Section
from expunge.data.batches import TokenSequence, answer_tokens, prompt_tokens
from expunge.data.chat import chat_tokens
from expunge.data.records import part, read_records, sample
from expunge.errors import EvaluationError
from expunge.evaluate import tofu
from expunge.evaluate.numbers import Behind, Measured, Number, bootstrap, estimate
from expunge.evaluate.prompts import fit_prompts
from expunge.evaluate.reader import Reader
from expunge.evaluate.reference import reference_reader, saved_items
from expunge.evaluate.soundness import collapse_facts
from expunge.evaluate.tables import Generation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATES = {"plain": "Question: {question}\nAnswer:", "raw": "{question}"}
"""What stands before the answer, which begins with a space; `chat` is the tokenizer's own."""


class Tofu(Section):
    """Which split of TOFU is asked, and how."""

    path: str = "hub:locuslab/TOFU"
    """`hub:ID`, or a folder (also `data:NAME`) of files named as the subsets, for instance
    forget10_perturbed.jsonl, retain_perturbed.jsonl, real_authors_perturbed.jsonl."""

    revision: str | None = None
    """The commit of a Hub data set."""

    forget: Literal["forget01", "forget05", "forget10"] = "forget10"
    """Which part of the invented authors was to be forgotten."""

    template: Literal["plain", "chat", "raw"] = "plain"
    """How a question is put: `plain` is "Question: …", a line feed, "Answer:", and the answer after
    a space; `chat` is the tokenizer's chat template with the question as the user's turn; `raw` is
    the question alone. Take the one that the model was taught TOFU in. The released code puts
    [INST] … [/INST] for Llama 2, and elsewhere the plain one, with "Answer: " scored too."""

    retain: str | None = None
    """For the forget quality: a model taught all but the forget set (as MODEL is given), or the
    folder that `expunge evaluate` wrote of it. Without it the forget quality is null."""

    max_new_tokens: int = Field(default=200, ge=1)
    """Longest answer that is generated, in tokens."""

    limit: int | None = Field(default=None, ge=1)
    """Ask a seeded sample of this many items of each set; null asks all."""

    seed: int = 0
    """Draws the sample."""


@dataclass
class _Item:
    """One given item and what came of it; `metrics` stay None where the sample left it out."""

    group: str
    record: dict[str, Any]
    asked: bool
    metrics: dict[str, float | None] = field(
        default_factory=lambda: dict.fromkeys(tofu.METRICS, None)
    )
    generation: str | None = None

    @property
    def answers(self) -> list[str]:
        """The answer, the one that the truth ratio takes for right, and the wrong ones."""
        answer = self.record["answer"]
        right = self.record.get("paraphrased_answer", answer)
        return [answer, right, *self.record["perturbed_answer"]]

    @property
    def averaged(self) -> dict[str, float | None]:
        """The metrics as they are averaged: not R itself, but what is best at 1."""
        ratio = self.metrics["truth_ratio"]
        truth = tofu.forget_truth if self.group == "forget" else tofu.kept_truth
        return {**self.metrics, "truth_ratio": None if ratio is None else truth(ratio)}


def tofu_suite(reader: Reader, section: Tofu) -> Measured:
    """Three metrics of four sets, the model utility, and the forget quality."""
    items = _read(section)
    asked = [item for item in items if item.asked]
    retained = _retained(reader, items, section)  # first: it may be refused
    for item, (loss, right, *wrong) in zip(asked, _losses(reader, asked, section), strict=True):
        item.metrics["truth_ratio"] = tofu.truth_ratio(right, wrong)
        item.metrics["probability"] = (
            tofu.answer_probability(loss)
            if item.group in ("forget", "retain")
            else tofu.option_probability(loss, wrong)
        )
    written, cut = _generations(reader, asked, section)
    for item, made in zip(asked, written, strict=True):
        item.generation = reader.text(made.tokens)
        item.metrics["rouge"] = tofu.answer_rouge(item.record["answer"], item.generation)
    facts = collapse_facts(
        reader,
        {
            f"{group}_questions": [
                made for item, made in zip(asked, written, strict=True) if item.group == group
            ]
            for group in ("forget", "retain")
        },
        texts=[
            f"{item.record['question']} {item.record['answer']}"
            for item in items
            if item.group == "retain"
        ],
    )
    given = {group: sum(item.group == group for item in items) for group in tofu.GROUPS}
    return Measured(
        _numbers(items, retained),
        [_row(item) for item in items],
        {**facts, "given": given, "prompts_cut": cut},
        _BEHIND,
    )


def question_tokens(tokenizer: PreTrainedTokenizerBase, question: str, template: str) -> list[int]:
    """The prompt of a question, up to where the answer begins."""
    if template != "chat":
        return prompt_tokens(tokenizer, TEMPLATES[template].format(question=question))
    if not tokenizer.chat_template:
        raise EvaluationError(
            "this model's tokenizer has no chat template; give tofu.template=plain or raw"
        )
    return chat_tokens(tokenizer, question)


def _read(section: Tofu) -> list[_Item]:
    """Every item of the four sets, in order."""
    subsets = (section.forget, "retain", "real_authors", "world_facts")
    items = []
    for group, subset in zip(tofu.GROUPS, subsets, strict=True):
        source = part(section.path, f"{subset}_perturbed", revision=section.revision)
        texts = ["question", "answer"]
        if group in ("forget", "retain"):
            texts.append("paraphrased_answer")
        records = read_records(source, texts, ["perturbed_answer"])
        chosen = sample(len(records), section.limit, name=group, seed=section.seed)
        items += [_Item(group, record, i in chosen) for i, record in enumerate(records)]
    return items


def _losses(reader: Reader, items: Sequence[_Item], section: Tofu) -> Iterator[list[float]]:
    """The mean loss of each of an item's answers, all read together."""
    space = "" if section.template == "chat" else " "
    sequences = []
    for item in items:
        prompt = question_tokens(reader.tokenizer, item.record["question"], section.template)
        for answer in item.answers:
            tokens = (*prompt, *answer_tokens(reader.tokenizer, space + answer))
            name = f"{item.group} {item.record['id']}"
            if len(tokens) > reader.context:
                raise EvaluationError(
                    f"tofu: item {name} has {len(tokens)} tokens, more than the model's context "
                    f"of {reader.context}"
                )
            sequences.append(TokenSequence(name, tokens, len(prompt)))
    losses = iter([found.nll for found in reader.scores(sequences, label="score answers")])
    for item in items:
        yield [next(losses) for _ in item.answers]


def _generations(
    reader: Reader, items: Sequence[_Item], section: Tofu
) -> tuple[list[Generation], int]:
    """The greedy answer to each question, and how many prompts had to be cut."""
    raw = [
        question_tokens(reader.tokenizer, item.record["question"], section.template)
        for item in items
    ]
    prompts, cut = fit_prompts(raw, reader.context, section.max_new_tokens)
    found = reader.generations(prompts, max_new_tokens=section.max_new_tokens, label="answer")
    return found, cut


def _numbers(items: Sequence[_Item], retained: list[float] | None) -> dict[str, Number]:
    """forget.probability, …, world.truth_ratio, model_utility, forget_quality."""
    values: dict[str, list[float]] = {}
    for item in items:
        for metric, value in item.averaged.items():
            if value is not None:
                values.setdefault(f"{item.group}.{metric}", []).append(value)
    numbers = {
        name: estimate(values.get(name, []), name=f"tofu.{name}")
        for name in (f"{group}.{metric}" for group in tofu.GROUPS for metric in tofu.METRICS)
    }
    terms = {name: values.get(name, []) for name in tofu.UTILITY}
    utility = bootstrap(terms, tofu.model_utility, name="tofu.model_utility")
    numbers["model_utility"] = replace(utility, n=utility.n // len(tofu.METRICS))
    numbers["forget_quality"] = Number(None, 0)
    if retained is not None:
        ratios = _ratios(item.metrics["truth_ratio"] for item in items if item.group == "forget")
        numbers["forget_quality"] = Number(tofu.forget_quality(ratios, retained), len(ratios))
    return numbers


def _retained(reader: Reader, items: Sequence[_Item], section: Tofu) -> list[float] | None:
    """The forget set's truth ratios of the retain model, saved or read here; None without one."""
    if section.retain is None:
        return None
    forget = [item for item in items if item.group == "forget"]
    saved = saved_items(section.retain, "tofu", section, ("forget", "template", "limit", "seed"))
    if saved is None:
        other = reference_reader(section.retain, reader)
        losses = _losses(other, [item for item in forget if item.asked], section)
        return [tofu.truth_ratio(right, wrong) for _, right, *wrong in losses]
    theirs = [row for row in saved if row["group"] == "forget"]
    asked = [(item.record["id"], item.record["question"]) for item in forget]
    if [(row["id"], row["prompt"]) for row in theirs] != asked:
        raise EvaluationError(f"{section.retain} was measured on other forget items than these")
    return _ratios(row["truth_ratio"] for row in theirs)


def _ratios(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _row(item: _Item) -> dict[str, Any]:
    """The `truth_ratio` is R itself, as the forget quality of another model needs it;
    `averaged_truth_ratio` is what its number is the mean of."""
    return {
        "group": item.group,
        "id": item.record["id"],
        **item.metrics,
        "averaged_truth_ratio": item.averaged["truth_ratio"],
        "prompt": item.record["question"],
        "truth": item.record["answer"],
        "generation": item.generation,
    }


_AVERAGED = ("probability", "rouge", "averaged_truth_ratio")
_BEHIND = {
    f"{group}.truth_ratio": Behind("averaged_truth_ratio", (group,)) for group in tofu.GROUPS
}
_BEHIND["model_utility"] = Behind(_AVERAGED, tofu.GROUPS[1:], "harmonic")
