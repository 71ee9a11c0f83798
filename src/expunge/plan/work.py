"""The work of each stage, counted exactly: steps and tokens of training, tokens read and written.

The schedules are seeded, so what a run will forward is known before it starts.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from expunge.data.batches import TokenSequence, encode, encode_document, prompt_tokens
from expunge.data.examples import Example
from expunge.data.sets import Sets
from expunge.data.sources import locate
from expunge.evaluate.collapse import NEUTRAL, WINDOW
from expunge.evaluate.generate import EARLIEST_STOP
from expunge.evaluate.mmlu import HUB, Mmlu, Question, prompt, read_mmlu, sample
from expunge.evaluate.semeval import term_of
from expunge.evaluate.suite import drawn
from expunge.pipeline import Pipeline
from expunge.plan.folder import Survey, Unmade
from expunge.recipe import Recipe
from expunge.unlearn.companions import CompanionSet
from expunge.unlearn.halves import Halves
from expunge.unlearn.levels import Levels, set_apart
from expunge.unlearn.masks import MASKS
from expunge.unlearn.objective import Objective
from expunge.unlearn.passes import evenly
from expunge.unlearn.schedule import Phase
from expunge.unlearn.section import Branch
from expunge.unlearn.sets import Half
from expunge.unlearn.tune import Tune, tune_steps
from expunge.unlearn.watch import Watch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REQUEST_TOKENS = 40
"""Tokens by which asking for an alternate is longer than the prompt, about."""


@dataclass(frozen=True)
class Encoded:
    """The tokens of the recipe's sets."""

    forget: list[TokenSequence]
    retain: list[TokenSequence]
    neutral: list[TokenSequence]
    documents: list[TokenSequence]
    companions: dict[str, dict[Half, CompanionSet]] = field(default_factory=dict)
    """The other sets that a branch reads, by its name. Alternates are not written yet: the true
    answer stands in for each."""
    longer: dict[str, Encoded] = field(default_factory=dict)
    """The same of a branch, by its name, that cuts texts in its own way."""

    def by(self, branch: str) -> Encoded:
        """The tokens as a branch reads them."""
        return self.longer.get(branch, self)

    def halves(self, branch: str, cache: Path) -> Halves:
        """The sets of a branch, as it takes them; levels, which are not found yet, are all 0."""
        companions, read = self.companions.get(branch, {}), self.by(branch)
        levels = [torch.zeros(len(sequence.tokens) - 1, 2) for sequence in read.forget]
        return Halves(read.forget, read.retain, cache, "plan", companions, levels)


@dataclass(frozen=True)
class Training:
    """What a training stage forwards and runs backward."""

    steps: int
    tokens: int
    reference_tokens: int


@dataclass(frozen=True)
class Reading:
    """What an evaluation reads and writes."""

    read: int
    """Tokens scored, and tokens of prompts."""
    written: tuple[int, ...]
    """New tokens of each prompt, at most, longest first."""
    longest: int
    """Tokens of the longest prompt."""


def survey(recipe: Recipe, out: Path | None, scratch: Path, mark: dict[str, str]) -> Survey:
    """Every stage of a recipe in the order of a run, and which of them `out` holds."""
    folder = Survey(out, scratch, recipe=recipe, mark=mark)
    pipeline = Pipeline(recipe, scratch, folder)
    for seed in recipe.seeds:
        folder.seed = seed
        for name, weights in pipeline.models(seed):
            for ask in () if name in recipe.unscored else (pipeline.evaluate, pipeline.relearned):
                with suppress(Unmade):
                    ask(name, weights)
    return folder


def encoded(pipeline: Pipeline, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """The sets of a recipe as training and evaluation see them."""
    recipe, sets = pipeline.recipe, pipeline.sets

    def read(how: Mapping[str, Any]) -> Encoded:
        halves = (sets.forget, sets.retain, sets.neutral)
        forget, retain, neutral = ([encode(e, tokenizer, **how) for e in half] for half in halves)
        return Encoded(forget, retain, neutral, documents)

    length = recipe.evaluate.document_tokens
    documents = [
        encode_document(document, tokenizer, max_length=length)
        for document in (*sets.members, *sets.nonmembers, *NEUTRAL)
    ]
    longer = {
        name: read(branch.reading(recipe.model))
        for name, branch in recipe.branches.items()
        if branch.max_length is not None
    }
    made = replace(read(recipe.model.reading), longer=longer)
    companions = {
        name: pipeline.companions(
            branch, made.by(name).forget, tokenizer, _unwritten(sets.forget, branch)
        )
        for name, branch in recipe.branches.items()
    }
    return replace(made, companions=companions)


def _unwritten(forget: Sequence[Example], branch: Branch) -> list[list[str]]:
    return [branch.companions.alternate.count * [example.answer] for example in forget]


def tuning(config: Tune, data: Encoded) -> Training:
    """The work of tuning, if it does not stop early."""
    items = [len(text.tokens) for text in (*data.forget, *data.retain)]
    neutral = [len(text.tokens) for text in data.neutral]
    steps = tune_steps(config, len(items), len(neutral))
    tokens = sum(
        sum(items[i] for i in step.items) + sum(neutral[i] for i in step.neutral) for step in steps
    )
    held = config.neutral_loss == "kl" and config.neutral_per_item > 0
    return Training(len(steps), tokens, sum(neutral) if held else 0)


def unlearning(config: Branch, halves: Halves, seed: int) -> Training:
    """The work of a branch."""
    objective = Objective(config.terms)
    phases, planned = halves.planned(config.schedule, seed=seed)
    tokens = step_tokens(config, planned, phases)
    passes = () if config.mask is None else MASKS[config.mask.kind].passes
    scored = sum(len(text.tokens) for half in passes for text in halves.of(half))
    reference = sum(
        len(sequence.tokens)
        for half in objective.halves
        if objective.asks(half)
        for sequence in planned.of(half)
    )
    return Training(len(tokens), sum(tokens) + scored, reference)


def step_tokens(config: Branch, halves: Halves, phases: Sequence[Phase]) -> list[int]:
    """Tokens that each step of a branch forwards, companions among them."""
    objective = Objective(config.terms)
    return [
        sum(
            len(halves.of(half)[index].tokens)
            for batch in step
            for half, items in objective.read(batch).items()
            for index in items
        )
        for step in halves.steps(phases)
    ]


def writing(config: Branch, data: Encoded) -> Reading:
    """The work of writing alternates, if the model never ends one and none is asked for again."""
    how = config.companions.alternate
    prompts = [sequence.answer_start + REQUEST_TOKENS for sequence in data.forget]
    written = (how.max_new_tokens,) * (how.count * len(prompts))
    return Reading(how.count * sum(prompts), written, max(prompts))


def levelling(recipe: Recipe, data: Encoded) -> int:
    """Tokens read to find levels, at most."""
    return max(
        _level_tokens(branch.levels, data.by(name))
        for name, branch in recipe.branches.items()
        if branch.levels is not None
    )


def relevelling(config: Branch, data: Encoded, steps: int) -> int:
    """Tokens read while a branch trains, to find its levels anew."""
    if config.levels is None or not config.levels.every:
        return 0
    return (steps - 1) // config.levels.every * _level_tokens(config.levels, data)


def watching(watch: Watch, data: Encoded) -> int:
    """Tokens whose losses an evaluation during training reads."""
    return sum(
        len(text.tokens)
        for half in (data.forget, data.retain)
        for text in evenly(half, watch.sample)
    )


def _level_tokens(levels: Levels, data: Encoded) -> int:
    if levels.of_tokens:
        return sum(len(text.tokens) for text in data.forget)
    places = set_apart(len(data.neutral), levels.apart)
    return sum(len(data.neutral[place].tokens) for place in places)


def reading(
    name: str,
    pipeline: Pipeline,
    data: Encoded,
    tokenizer: PreTrainedTokenizerBase,
    side: Sets | None = None,
) -> Reading:
    """The work of scoring the model `name`, on all items or those of one side of the documents.

    How much it writes is a guess from above: the original, and an unlearned model on the forget
    half, do not end their texts; what is remembered has the length of its answer.
    """
    recipe = pipeline.recipe
    config, limit = recipe.evaluate, recipe.evaluate.max_new_tokens
    remembers = {"original": (), "target": ("forget", "retain")}.get(name, ("retain",))
    encodings = {"forget": data.forget, "retain": data.retain}
    inside = {half: {e.id for e in getattr(side or pipeline.sets, half)} for half in encodings}
    items = [
        (half, example, sequence)
        for half, sequences in encodings.items()
        for example, sequence in zip(getattr(pipeline.sets, half), sequences, strict=True)
        if example.id in inside[half]
    ]
    read = sum(len(text.tokens) for text in data.documents)
    read += sum(len(sequence.tokens) for _, _, sequence in items)
    written, prompts = [WINDOW] * len(NEUTRAL), [0]
    for number in drawn([term_of(half, example) for half, example, _ in items], config):
        half, example, sequence = items[number]
        answer = len(sequence.tokens) - sequence.answer_start
        endless = min(limit, EARLIEST_STOP) if example.kind == "qa" else limit
        written.append(min(limit, answer) if half in remembers else endless)
        prompts.append(sequence.answer_start)
    if config.mmlu is not None:
        path = config.mmlu.path
        questions = read_mmlu(path if path == HUB else locate(path))
        read += _asked(config.mmlu, questions, tokenizer)
    return Reading(read + sum(prompts), tuple(sorted(written, reverse=True)), max(prompts))


def _asked(config: Mmlu, questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of the MMLU prompts."""
    dev = sorted((q for q in questions if q.split == "dev"), key=lambda q: q.subject)
    solved = {s: list(rows) for s, rows in itertools.groupby(dev, key=lambda q: q.subject)}
    return sum(
        len(prompt_tokens(tokenizer, prompt(q, solved.get(q.subject, [])[: config.shots])))
        for q in sample(questions, config)
        if q.split == "test"
    )
