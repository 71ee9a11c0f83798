"""Line up vocabularies: one tokenizer for the output, and each model's embeddings in its order.

Dimensions: V words of the output, R >= V rows of its embeddings, d width. A word that a model lacks
gets a row from where it is known: the one model that has it, else the base, else the mean of those
that have it. Rows behind the last word are lined up by number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from expunge import models
from expunge.config import Section, parse_section
from expunge.errors import MergeError
from expunge.merge.chat_templates import template_of
from expunge.merge.compat import MergeFile, Tokenizer
from expunge.merge.operands import KINDS, Part, Update, Whole, decode
from expunge.merge.plan import Plan
from expunge.merge.sources import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_HEADS = ("lm_head.weight", "embed_out.weight")
ABSENT = -1


class Token(Section):
    """One token of a merge file's tokenizer: where its row of the embeddings comes from."""

    source: str | dict[str, Any] | None = None
    """A model, {kind: zero}, or {kind: model_token, model: …} with token or token_id."""

    force: bool = False
    """Replace the row of every model that has the token."""


class Zero(Section):
    """A row of zeros."""

    kind: Literal["zero"]
    """`zero`."""


class ModelToken(Section):
    """The row of another token, or of the token itself where none is named."""

    kind: Literal["model_token"]
    """`model_token`."""

    model: str | dict[str, Any]
    """The model that has it."""

    token: str | None = None
    """The other token."""

    token_id: int | None = Field(default=None, ge=0)
    """Its number, instead."""

    @model_validator(mode="after")
    def _one(self) -> ModelToken:
        if self.token is not None and self.token_id is not None:
            raise ValueError("give either token or token_id")
        return self


@dataclass(frozen=True)
class Vocabulary:
    """The output's words, and where each model keeps them."""

    tokenizer: PreTrainedTokenizerBase
    source: Source
    """The model whose tokenizer it is, with words of others in a union."""

    words: int
    """V."""

    rows: int
    """R: as many as that model has, or V rounded up if asked for."""

    places: Mapping[Source, np.ndarray]
    """By model: (R,) its row for each row of the output, ABSENT where it has none."""

    forced: np.ndarray
    """(R,) bool: words whose row comes from elsewhere even where a model has it."""

    donors: Mapping[int, tuple[Source | None, int]]
    """By word: the model and row that it is taken from; row ABSENT is a row of zeros."""

    base: Source | None

    def lines_up(self, name: str) -> bool:
        """Whether the rows of a tensor stand for words."""
        return name.endswith((*_EMBEDDINGS, *_HEADS))

    def line_up(
        self, parts: dict[Source, Part], columns: int
    ) -> tuple[dict[Source, Part], tuple[int, ...]]:
        """Each model's embeddings in the output's order, and their common shape."""
        lent = self._lent(parts, columns)

        def lined_up(name: Source) -> Update:
            places = np.where(self.forced, ABSENT, self.places[name])

            @cache
            def padding() -> np.ndarray:
                """A row that no model has: the mean of this one's words."""
                known = self.places[name][: self.words]
                return _gathered(parts[name], known[known != ABSENT], columns).mean(0)

            def rows(first: int, last: int) -> np.ndarray:
                out = np.zeros((last - first, columns), np.float32)
                wanted = places[first:last]
                own = np.flatnonzero(wanted != ABSENT)
                out[own] = _gathered(parts[name], wanted[own], columns)
                for row in (first + np.flatnonzero(wanted == ABSENT)).tolist():
                    out[row - first] = lent[row] if row in lent else padding()
                return out

            return Update(rows, whole=True)

        return {name: lined_up(name) for name in parts}, (self.rows, columns)

    def _lent(self, parts: Mapping[Source, Part], columns: int) -> dict[int, np.ndarray]:
        """Rows of words that some model lacks, or that are taken from one on purpose; behind the
        last word, rows that some model lacks and some has."""
        absent = np.stack([self.places[name] == ABSENT for name in parts])
        lacking = np.any(absent, 0)
        lacking[self.words :] &= ~np.all(absent, 0)[self.words :]
        return {
            int(word): self._row(int(word), parts, columns)
            for word in np.flatnonzero(lacking | self.forced)
        }

    def _row(self, word: int, parts: Mapping[Source, Part], columns: int) -> np.ndarray:
        if word in self.donors:
            donor, row = self.donors[word]
            if donor is None or row == ABSENT:
                return np.zeros(columns, np.float32)
            if donor not in parts:
                raise MergeError("a token is taken from a model that has no such embeddings")
            return _gathered(parts[donor], np.array([row]), columns)[0]
        having = [name for name in parts if self.places[name][word] != ABSENT]
        if len(having) > 1 and self.base in having:
            having = [self.base]
        if not having:
            return np.zeros(columns, np.float32)
        found = [_gathered(parts[n], self.places[n][word : word + 1], columns)[0] for n in having]
        return np.stack(found).mean(0)


def vocabulary(plan: Plan) -> Vocabulary | None:
    """What the merge file asks of the vocabulary; None where the donor's tokenizer is copied."""
    file = plan.file
    wanted = file.tokenizer
    if file.tokenizer_source is not None:
        wanted = Tokenizer(source=file.tokenizer_source)
    if wanted is None:
        return None
    tokens = {
        token: parse_section(how, Token, origin=f"tokenizer.tokens.{token}")
        for token, how in wanted.tokens.items()
    }
    loaded = {source: _load(source) for source in plan.sources}
    tokenizer, chosen = _chosen(wanted.source, plan, loaded)
    for token in tokens:
        if token not in tokenizer.get_vocab():
            tokenizer.add_tokens([token])
    words = tokenizer.get_vocab()
    size = max(words.values()) + 1
    pad, held = wanted.pad_to_multiple_of, {name: _rows_of(name) for name in loaded}
    rows = -(-size // pad) * pad if pad else max(size, held.get(chosen) or 0)
    places = {}
    for name, own in loaded.items():
        own_words, found = own.get_vocab(), np.full(rows, ABSENT, np.int64)
        for word, number in words.items():
            found[number] = own_words.get(word, ABSENT)
        room = held[name]
        if room is not None and found.max() >= room:
            raise MergeError(
                f"the tokenizer of {name.name} makes token {found.max()}, but the model has "
                f"{room} rows of embeddings; they do not belong together"
            )
        spare = np.arange(max(size, *(n + 1 for n in own_words.values())), min(rows, room or 0))
        found[spare] = spare  # none of the words of either
        places[name] = found
    forced, donors = np.zeros(rows, bool), {}
    for token, how in tokens.items():
        forced[words[token]] = how.force
        donors[words[token]] = _donor(token, how.source, plan, loaded)
    return Vocabulary(tokenizer, chosen, size, rows, places, forced, donors, plan.base)


def chat_template(file: MergeFile, sources: list[Source]) -> str | None:
    """The template that the merge file asks for; None keeps the tokenizer's own."""
    if file.chat_template is None:
        return None
    if file.chat_template != "auto":
        return template_of(file.chat_template)
    found = [_load(source).chat_template for source in sources]
    counts = Counter(text.strip() for text in found if isinstance(text, str))
    return counts.most_common(1)[0][0] if counts else None


def write_tokenizer(
    tokenizer: PreTrainedTokenizerBase, template: str | None
) -> Callable[[Path], None]:
    """A function that puts the tokenizer into a folder."""

    def write(folder: Path) -> None:
        if template is not None:
            tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)

    return write


def _load(source: Source) -> PreTrainedTokenizerBase:
    return models.load_tokenizer(source.checkpoint.folder)


def _chosen(
    wanted: str, plan: Plan, loaded: Mapping[Source, PreTrainedTokenizerBase]
) -> tuple[PreTrainedTokenizerBase, Source]:
    """The tokenizer of the output, and the model that it is of."""
    if wanted == "union":
        tokenizer = _load(plan.donor)
        for other in loaded.values():
            words = tokenizer.get_vocab()
            new = [w for w, _ in sorted(other.get_vocab().items(), key=lambda p: p[1])]
            tokenizer.add_tokens([w for w in new if w not in words])
        return tokenizer, plan.donor
    if wanted == "base":
        if plan.base is None:
            raise MergeError("tokenizer source: base needs base_model")
        return _load(plan.base), plan.base
    source = plan.source(wanted)
    return _load(source), source


def _donor(
    token: str, given: Any, plan: Plan, loaded: Mapping[Source, PreTrainedTokenizerBase]
) -> tuple[Source | None, int]:
    """The model and row that a token is taken from."""
    where, word, row = f"tokenizer.tokens.{token}.source", token, None
    kind = given.get("kind") if isinstance(given, dict) else None
    if kind == "zero":
        parse_section(given, Zero, origin=where)
        return None, ABSENT
    if kind == "model_token":
        wanted = parse_section(given, ModelToken, origin=where)
        given, word, row = wanted.model, wanted.token or token, wanted.token_id
    elif kind is not None:
        raise MergeError(f"{where}: kind is zero or model_token, not {kind!r}")
    if given is None:
        raise MergeError(f"the token {token!r} needs a source")
    source = plan.source(given)
    if row is None:
        row = loaded[source].get_vocab().get(word) if source in loaded else None
    if row is None:
        raise MergeError(f"{source.name} has no token {word!r}")
    room = _rows_of(source)
    if room is not None and row >= room:
        raise MergeError(
            f"{where}: {source.name} has {room} rows of embeddings, so there is no token_id {row}"
        )
    return source, row


def _rows_of(source: Source) -> int | None:
    """How many words a model has room for; None where its embeddings have another name."""
    held = source.checkpoint
    rows = [held[n].shape[0] for n in held if n.endswith((*_EMBEDDINGS, *_HEADS)) and held[n].shape]
    return min(rows, default=None)


def _gathered(part: Part, rows: np.ndarray, columns: int) -> np.ndarray:
    """Some rows of a tensor, in float32: (len(rows), columns)."""
    if isinstance(part, Whole):
        kind = KINDS[part.dtype]
        size = 4 if part.dtype == "F32" else 2
        table = part.raw.reshape(-1, columns * size)
        return decode(np.ascontiguousarray(table[rows]).ravel(), kind).reshape(-1, columns)
    out = np.empty((len(rows), columns), np.float32)
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    for run in np.split(np.arange(len(rows)), breaks):
        if len(run):
            low, high = int(rows[run[0]]), int(rows[run[-1]]) + 1
            raw, kind = part.read(low * columns, high * columns, columns)
            out[run] = decode(raw, kind).reshape(-1, columns)
    return out
