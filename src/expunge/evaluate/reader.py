"""A reader: one model that is asked for scores, generations and option logits, and remembers.

Suites ask a `Reader`; what its tables hold already is not computed again, and the model itself is
loaded only when something is missing.

Dimensions: L scored tokens of one text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge import lora, models, runs
from expunge.affine_heads import head_weight
from expunge.data.batches import TokenSequence
from expunge.errors import EvaluationError
from expunge.evaluate.asked import Asked
from expunge.evaluate.beginnings import Beginnings
from expunge.evaluate.generate import MAX_BATCH, Settled, generate
from expunge.evaluate.guarding import Guarding
from expunge.evaluate.prompts import check_sequences, context_length, sizes_of
from expunge.evaluate.scoring import score_texts
from expunge.evaluate.tables import (
    Generation,
    Table,
    TokenScores,
    key_of,
    looked_up,
    sequence_key,
    token_scores,
)
from expunge.evaluate.vllm_backend import Writer, vllm_writer
from expunge.guard.guard import Guard, open_guard
from expunge.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACK_TOKENS = 4096
"""Tokens scored in one forward pass."""

KEPT_TOKENS, KEPT_PROMPTS = 1 << 16, 512
"""Tokens scored, and prompts continued, between two writes of a table."""

BACKENDS = ("torch", "vllm")
"""What continues prompts; texts are always scored by torch."""

Load = Callable[[], "PreTrainedModel"]


class Reader:
    """One model and what it has said.

    context: tokens that its positions reach; vocabulary_size: rows of its output head. `forwards`
    counts the texts that the model had to read, from no table.
    """

    def __init__(
        self,
        load: Load,
        tokenizer: PreTrainedTokenizerBase,
        *,
        context: int,
        vocabulary_size: int,
        key: str = "",
        folder: Path | None = None,
        max_batch: int = MAX_BATCH,
        dtype: models.Dtype = "float32",
        writer: Writer | None = None,
        guard: Guard | None = None,
    ) -> None:
        """`writer` generates in place of the model, kept apart; all is asked through `guard`."""
        self.guard = Guarding(guard)
        self._writer = writer
        self.load, self.tokenizer, self.max_batch = load, tokenizer, max_batch
        self.dtype: models.Dtype = dtype
        self.context = context - self.guard.room
        self.vocabulary_size = vocabulary_size
        self.key, self.folder = key, folder
        inside = folder / key if folder is not None else None
        self._scores = Table("scores", key, inside)
        self._generations = Table("generations", key, inside)
        self.options = Table("options", key, inside)
        self.gradients = Table("gradients", key, inside)
        self._beginnings = Beginnings()
        self.forwards = 0

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model, loaded when it is first needed."""
        return self.load()

    @cached_property
    def speaker(self) -> PreTrainedModel:
        """The model as its guard lets it speak: itself, or a stand-in with other logits."""
        return self.guard.speaker(self.model)

    def scores(
        self, sequences: Sequence[TokenSequence], *, label: str = "score"
    ) -> list[TokenScores]:
        """What the model says of each text's answer, in the order given, none left out."""
        check_sequences(sequences, self.context)
        keys = [sequence_key(sequence) for sequence in sequences]
        sizes = [len(sequence.tokens) for sequence in sequences]

        def compute(missing: list[int]) -> Iterator[list[dict[str, Any]]]:
            yield from self._score([sequences[i] for i in missing], label)

        found = [token_scores(row) for row in looked_up(self._scores, keys, compute, sizes)]
        if not self.guard:  # which may choose other tokens than it scores
            self._beginnings.scored(sequences, found)
        return found

    def keep_scores(self, rows: Sequence[dict[str, Any]]) -> None:
        """Keep rows of the table of scores that were found on the way to something else."""
        if self.guard:
            return  # they are the unguarded model's
        missing = set(self._scores.missing([row["key"] for row in rows]))
        self._scores.add([row for row in rows if row["key"] in missing])

    def generations(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        settled: Settled | None = None,
        label: str = "generate",
    ) -> list[Generation]:
        """The greedy continuation of each prompt.

        `settled` may stop a row that no longer matters (see generate). What is known of a text is
        kept by its prompt: of a longer one the beginning is taken, a shorter one is written on.
        """
        by = () if self._writer is None else ("vllm",)
        if self.guard:  # which judges whole answers, so that none is the beginning of another
            by = (max_new_tokens, *by)
        keys = [key_of("generations", tuple(prompt), *by) for prompt in prompts]
        asked = Asked(keys, max_new_tokens, settled)

        def compute(missing: list[int]) -> Iterator[list[dict[str, Any]]]:
            refused = self.guard.refused([prompts[i] for i in missing])
            said = [i for i, no in zip(missing, refused, strict=True) if no]
            yield [{"key": keys[i], **self.guard.refusal(max_new_tokens)} for i in said]
            missing = [i for i, no in zip(missing, refused, strict=True) if not no]
            missing.sort(key=lambda i: -len(prompts[i]))
            for low in range(0, len(missing), KEPT_PROMPTS):
                part = missing[low : low + KEPT_PROMPTS]
                made = self._generate(
                    [prompts[i] for i in part],
                    [self._known(keys[i], prompts[i]) for i in part],
                    max_new_tokens,
                    lambda place, tokens, part=part: asked.stops(part[place], tokens),
                    label,
                )
                yield [{"key": keys[i], **row} for i, row in zip(part, made, strict=True)]

        sizes = [len(prompt) + max_new_tokens for prompt in prompts]
        rows = looked_up(self._generations, keys, compute, sizes, asked.serves)
        return [asked.taken(row) for row in rows]

    def text(self, tokens: Sequence[int]) -> str:
        """The text of generated tokens, special ones dropped; nothing is the empty string."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True)) if tokens else ""

    def _known(self, key: str, prompt: Sequence[int]) -> Sequence[int]:
        """Tokens that are known to follow a prompt."""
        if self.guard or self._writer is not None:
            return ()
        row = self._generations.rows.get(key)
        return max(row["tokens"] if row else (), self._beginnings.after(prompt), key=len)

    def _generate(
        self,
        prompts: list[Sequence[int]],
        known: list[Sequence[int]],
        max_new_tokens: int,
        settled: Settled,
        label: str,
    ) -> list[dict[str, Any]]:
        """Rows for some prompts, of which so much is `known`."""
        stopped: set[int] = set()

        def ask(place: int, tokens: list[int]) -> bool:
            done = not self.guard.filters_answers and settled(place, tokens)
            if done:
                stopped.add(place)
            return done

        if self._writer is not None:
            found = self._writer(self.guard.wrapped(prompts), max_new_tokens)
        else:
            found = generate(
                self.speaker,
                self.tokenizer,
                self.guard.wrapped(prompts),
                max_new_tokens=max_new_tokens,
                max_batch=self.max_batch,
                settled=ask,
                known=known,
                label=label,
            )
        ended = [p not in stopped and len(t) < max_new_tokens for p, t in enumerate(found)]
        for tokens, before, end in zip(found, known, ended, strict=True):
            self.forwards += len(tokens) + end > len(before)  # else all of it was known
        if self.guard:  # none of whose answers is written on
            ended = [place not in stopped for place in range(len(found))]
        done = self.guard.filtered(prompts, found, max_new_tokens)
        return [{"tokens": t, "complete": end} for t, end in zip(done, ended, strict=True)]

    def _score(
        self, sequences: Sequence[TokenSequence], label: str
    ) -> Iterator[list[dict[str, Any]]]:
        model, rows, held = self.speaker, [], 0
        given = self.guard.scored(sequences, self.context)
        keys = {id(g): sequence_key(s) for g, s in zip(given, sequences, strict=True)}
        self.forwards += len(sequences)
        with progress(label, len(sequences), "texts") as bar:
            for scored in score_texts(model, given, max_tokens=PACK_TOKENS):
                rows += [{"key": keys[id(sequence)], **row} for sequence, row in scored]
                held += sum(len(sequence.tokens) for sequence, _ in scored)
                bar(len(scored))
                if held >= KEPT_TOKENS:
                    yield rows
                    rows, held = [], 0
        yield rows


def reader_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_batch: int = MAX_BATCH,
    guard: Guard | None = None,
) -> Reader:
    """A reader of a model in memory, which keeps nothing on disk."""
    return Reader(
        lambda: model,
        tokenizer,
        context=context_length(model),
        vocabulary_size=len(head_weight(model)),
        max_batch=max_batch,
        guard=guard,
    )


def open_reader(
    base: Path,
    adapter: Path | None,
    *,
    dtype: models.Dtype,
    folder: Path | None,
    max_batch: int = MAX_BATCH,
    backend: str = "torch",
    guard: Path | None = None,
) -> Reader:
    """A reader of a model on disk, with its tables in `folder` under the hash of its weights.

    `guard` is a guard's folder; what is said through it has tables of its own.
    """
    if backend not in BACKENDS:
        raise EvaluationError(f"backend {backend!r} is none of {', '.join(BACKENDS)}")
    hashes = [runs.hash_folder(place) for place in (base, adapter) if place is not None]
    key = key_of("model", *hashes, dtype)

    def load() -> PreTrainedModel:
        model = models.load_model(base, dtype=dtype)
        models.load_tokenizer(base, model)  # refused here if they do not belong together
        if adapter is not None:
            lora.load_adapter(model, adapter)
        return model

    context, vocabulary_size = sizes_of(base / "config.json")
    tokenizer, writer = models.load_tokenizer(base), None
    guarding = None if guard is None else open_guard(guard, tokenizer)
    if guarding is not None:
        key = key_of("guarded", key, guarding.key)
    if backend == "vllm":
        if guarding is not None and guarding.changes_logits:
            raise EvaluationError("a guard that changes logits or embeddings is run by torch")
        writer = vllm_writer(base, adapter, tokenizer, dtype=dtype, context=context)
    return Reader(
        load,
        tokenizer,
        context=context,
        vocabulary_size=vocabulary_size,
        key=key,
        folder=folder,
        max_batch=max_batch,
        dtype=dtype,
        writer=writer,
        guard=guarding,
    )
