"""The work of each stage, counted exactly: steps and tokens of training, tokens read and written.

The schedules are seeded, so what a run will forward is known before it starts.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from expunge.data.batches import TokenSequence, encode, encode_document, prompt_tokens
from expunge.data.examples import Example
from expunge.data.sources import locate
from expunge.evaluate.collapse import NEUTRAL, WINDOW
from expunge.evaluate.generate import EARLIEST_STOP
from expunge.evaluate.mmlu import HUB, Mmlu, Question, prompt, read_mmlu, sample
from expunge.pipeline import Pipeline
from expunge.plan.folder import Survey, Unmade
from expunge.recipe import Recipe
from expunge.unlearn.halves import Halves
from expunge.unlearn.masks import MASKS
from expunge.unlearn.objective import Objective
from expunge.unlearn.section import Branch
from expunge.unlearn.tune import Tune, tune_steps


@dataclass(frozen=True)
class Encoded:
    """The tokens of the recipe's sets."""

    forget: list[TokenSequence]
    retain: list[TokenSequence]
    neutral: list[TokenSequence]
    documents: list[TokenSequence]

    def halves(self, cache: Path) -> Halves:
        """Both halves, as a branch takes them."""
        return Halves(self.forget, self.retain, cache, "plan")


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
            if name not in recipe.unscored:
                try:
                    pipeline.evaluate(name, weights)
                except Unmade:
                    continue
    return folder


def encoded(pipeline: Pipeline, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """The sets of a recipe as training and evaluation see them."""
    recipe, sets = pipeline.recipe, pipeline.sets
    how = recipe.model.model_dump(include={"max_length", "prompt_tail", "separator"})

    def tokens(examples: Iterable[Example]) -> list[TokenSequence]:
        return [encode(example, tokenizer, **how) for example in examples]

    length = recipe.evaluate.document_tokens
    documents = [
        encode_document(document, tokenizer, max_length=length)
        for document in (*sets.members, *sets.nonmembers, *NEUTRAL)
    ]
    return Encoded(tokens(sets.forget), tokens(sets.retain), tokens(sets.neutral), documents)


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


def unlearning(config: Branch, data: Encoded, seed: int) -> Training:
    """The work of a branch."""
    objective = Objective(config.terms)
    phases, halves = data.halves(Path()).planned(config.schedule, seed=seed)
    lengths = {
        half: [len(text.tokens) for text in halves.of(half)] for half in ("forget", "retain")
    }
    steps = [step for phase in phases for step in phase.steps]
    tokens = sum(
        lengths[half][index]
        for step in steps
        for batch in step
        for half in ("forget", "retain")
        if objective.on(half)
        for index in (batch.forget if half == "forget" else batch.retain)
    )
    if config.mask is not None:
        read = {"forget": data.forget, "retain": data.retain}
        tokens += sum(len(t.tokens) for half in MASKS[config.mask.kind].passes for t in read[half])
    reference = sum(sum(lengths[half]) for half in ("forget", "retain") if objective.asks(half))
    return Training(len(steps), tokens, reference)


def reading(
    name: str, pipeline: Pipeline, data: Encoded, tokenizer: PreTrainedTokenizerBase
) -> Reading:
    """The work of scoring the model `name`.

    How much it writes is a guess from above: the original, and an unlearned model on the forget
    half, do not end their texts; what is remembered has the length of its answer.
    """
    recipe = pipeline.recipe
    limit = recipe.evaluate.max_new_tokens
    remembers = {"original": (), "target": ("forget", "retain")}.get(name, ("retain",))
    examples = {"forget": pipeline.sets.forget, "retain": pipeline.sets.retain}
    read = sum(len(text.tokens) for text in data.documents)
    written, prompts = [WINDOW] * len(NEUTRAL), [0]
    for half, sequences in (("forget", data.forget), ("retain", data.retain)):
        for example, sequence in zip(examples[half], sequences, strict=True):
            answer = len(sequence.tokens) - sequence.answer_start
            endless = min(limit, EARLIEST_STOP) if example.kind == "qa" else limit
            written.append(min(limit, answer) if half in remembers else endless)
            prompts.append(sequence.answer_start)
            read += len(sequence.tokens)
    mmlu = recipe.evaluate.mmlu
    if mmlu is not None:
        questions = read_mmlu(mmlu.path if mmlu.path == HUB else locate(mmlu.path))
        read += _asked(mmlu, questions, tokenizer)
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
