"""Token weights: which tokens of an item a term acts on, fixed before training begins.

Dimensions: N scored tokens of a sequence. With weights w a mean over tokens is Σ w v / Σ w, and the
log-probability of an answer is Σ w log π. Fine-grained, pluggable gradient ascent (Feng et al.,
EMNLP 2024) is gradient ascent under such weights; which ones its authors take, we do not know.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from expunge.config import Section
from expunge.data.batches import Scope, TokenSequence
from expunge.data.pii import KINDS, find_pii, searchable
from expunge.errors import DataError, RecipeError
from expunge.needs import UNLEARNT, Needs
from expunge.registry import lookup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Spans = Iterator[tuple[int, int]]


class Weighting(Section):
    """How the tokens of a term are weighted."""

    kind: str
    """A name in WEIGHTINGS."""

    patterns: tuple[str, ...] = ()
    """spans: regular expressions; what they match is sensitive."""

    pii: tuple[str, ...] = ()
    """spans: kinds of personal data that are sensitive: ssn, phone, email, birth, address."""

    least: float = Field(default=0.0, ge=0, le=1)
    """The least weight of a token: that of all outside the spans."""

    @model_validator(mode="after")
    def _possible(self) -> Weighting:
        try:
            lookup(WEIGHTINGS, self.kind, "weighting")
            for kind in self.pii:
                lookup(KINDS, kind, "kind of personal data")
        except RecipeError as error:
            raise ValueError(str(error)) from None
        for pattern in self.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"'{pattern}' is not a regular expression: {error}") from None
        given = bool(self.patterns or self.pii)
        if given != (self.kind == "spans"):
            says = "takes no patterns or pii" if given else "needs patterns, pii or both"
            raise ValueError(f"the weighting {self.kind} {says}")
        return self

    @property
    def row(self) -> WeightingRow:
        """The row of the table."""
        return WEIGHTINGS[self.kind]


@dataclass(frozen=True)
class WeightingRow:
    """One row: the function, and what it reads.

    The function takes (the text, the section) and gives the character spans that weigh 1, or
    (log-probs of the reference (N,), the section) and gives weights (N,), or (those, log-probs of
    the model that gives the levels (N,), the section).
    """

    fn: Callable[..., Spans | Tensor]
    reads: Literal["text", "reference", "levels"]
    fidelity: str = "inspired"
    cost: str = "once, no pass"
    test: str = "tests/unlearn/test_weighting.py::test_weights_worked_by_hand"

    @property
    def needs(self) -> Needs:
        """What it reads beside the items' text."""
        models = (UNLEARNT,) if self.reads == "levels" else ()
        return Needs(("forget",), models, besides=("reference log-probs",) * (self.reads != "text"))


def spans(text: str, config: Weighting) -> Spans:
    """Tokens of sensitive spans alone: matches of regular expressions, and personal data.

        w_t = 1 within a span, else `least`

    A token that reaches into a span is in it.

    Source: FPGA, Feng et al. 2024 (EMNLP), in spirit: gradient ascent on sensitive tokens.
    Differs: written from the abstract alone, which gives no weights; the recipe names the spans.
    """
    for pattern in config.patterns:
        yield from (match.span() for match in re.finditer(pattern, text))
    plain, lowered = searchable(text)
    for piece in find_pii(plain):
        if piece.kind in config.pii:
            yield from (match.span() for match in piece.writings.finditer(lowered))


def entities(text: str, config: Weighting) -> Spans:
    """Tokens of names and numbers alone, found by a rule and not by a model.

        w_t = 1 within a word with a digit or a capital that is no function word, else `least`

    In German and in titles that is every noun; for other scripts than Latin, Greek and Cyrillic
    the rule finds numbers alone.

    Source: this project, after the entity-level weighting of the GIL-IIMAS team (SemEval-2025).
    Differs: a rule finds the names, not a model of named entities.
    """
    for match in re.finditer(r"\w[\w'’.-]*\w|\w", text):
        word = match[0]
        name = word[0].isupper() and word.lower() not in _FUNCTION_WORDS
        if name or any(letter.isdigit() for letter in word):
            yield match.span()


def surprisal(logps: Tensor, config: Weighting) -> Tensor:
    """Tokens that the reference did not take for granted.

        w_t = 1 - p_ref(y_t), at least `least`

    Source: FPGA, Feng et al. 2024 (EMNLP), in spirit.
    Differs: written from the abstract alone, which gives no weights.
    """
    return -torch.expm1(logps)


def memorised(logps: Tensor, config: Weighting) -> Tensor:
    """Tokens that the reference knows by heart.

        w_t = p_ref(y_t), at least `least`

    What is easy is among them too; `memorisation_gap` tells the two apart.

    Source: FPGA, Feng et al. 2024 (EMNLP), in spirit.
    Differs: written from the abstract alone, which gives no weights.
    """
    return logps.exp()


def memorisation_gap(logps: Tensor, levels: Tensor, config: Weighting) -> Tensor:
    """Tokens that the reference knows and a model that never saw the text does not.

        w_t = max(0, p_ref(y_t) - p_base(y_t)), at least `least`

    p_base is the model that gives the levels (`levels.of`: original, or a model). What is easy for
    both weighs little.

    Source: FPGA, Feng et al. 2024 (EMNLP), in spirit.
    Differs: written from the abstract alone, which gives no weights.
    """
    return (logps.exp() - levels.exp()).clamp_min(0)


def token_weights(
    config: Weighting,
    sequences: Sequence[TokenSequence],
    scope: Scope,
    tokenizer: PreTrainedTokenizerBase,
    reference: Sequence[Tensor] | None,
    levels: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """The weights of the tokens of each sequence that `scope` scores: each (N,) float32.

    `levels` are those of every token from the second on, as `HalfData` holds them.
    """
    found = []
    for number, sequence in enumerate(sequences):
        if config.row.reads != "text":
            assert reference is not None
            given = [reference[number].float()]
            if config.row.reads == "levels":
                assert levels is not None
                given.append(levels[number][sequence.scored_from(scope) - 1 :, 0].to(given[0]))
            weights = config.row.fn(*given, config)
            assert isinstance(weights, Tensor)
        else:
            weights = _marked(sequence, tokenizer, config)[sequence.scored_from(scope) :]
        found.append(weights.clamp(config.least, 1.0))
    _check_some(config, found, len(found))
    return found


def check_weighting(
    config: Weighting,
    sequences: Sequence[TokenSequence],
    scope: Scope,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Refuse what `token_weights` would, of a weighting that reads the text alone; it reads up to
    the first item that has a weight."""
    marked = (_marked(s, tokenizer, config)[s.scored_from(scope) :] for s in sequences)
    _check_some(config, (m.clamp(config.least, 1.0) for m in marked), len(sequences))


def _check_some(config: Weighting, weights: Iterable[Tensor], items: int) -> None:
    if not any(bool(mine.any()) for mine in weights):
        raise DataError(
            f"the weighting {config.kind} gives no token of {items} items a weight; set another "
            "pattern, or a `least` above 0"
        )


def _marked(
    sequence: TokenSequence, tokenizer: PreTrainedTokenizerBase, config: Weighting
) -> Tensor:
    """1 for each token that reaches into a span of the sequence's text, else 0: (T,)."""
    text, places = token_places(tokenizer, sequence.tokens)
    inside = [False] * len(text)
    for start, stop in config.row.fn(text, config):
        inside[int(start) : int(stop)] = [True] * int(stop - start)
    return torch.tensor([float(any(inside[start:stop])) for start, stop in places])


def token_places(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a sequence, and where each token lies in it, in characters.

    Tokens that make up one character between them share its place; special tokens have none.
    """
    special = set(tokenizer.all_special_ids)
    text, places = "", []
    before = 0  # a token's text depends on its neighbour, so what is decoded starts at one
    waiting = 0  # the first token whose text is not known yet
    for stop in range(1, len(tokens) + 1):
        ends = stop == len(tokens) or tokens[stop] in special
        if tokens[stop - 1] in special:
            places.append((len(text), len(text)))
            before = waiting = stop
            continue
        known = _decoded(tokenizer, tokens[before:waiting])
        piece = _decoded(tokenizer, tokens[before:stop])[len(known) :]
        if not ends and piece.endswith("\N{REPLACEMENT CHARACTER}"):
            continue
        places += [(len(text), len(text) + len(piece))] * (stop - waiting)
        text += piece
        before, waiting = waiting, stop
    return text, places


def _decoded(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))


_FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
    a about after all also although an and any are as at because been before both but by can could
    did do does during each even every few for from had has have he her here hers him his how
    however i if in into is it its just like many may me meanwhile more most much my no nor not now
    of on once one or other our out over she should since so some such than that the their them
    then there these they this those though through thus to under until up upon was we were what
    when where which while who whom whose why will with within without would yes yet you your
    """,
    )
)

WEIGHTINGS = {
    "spans": WeightingRow(spans, "text"),
    "entities": WeightingRow(entities, "text"),
    "surprisal": WeightingRow(surprisal, "reference"),
    "memorised": WeightingRow(memorised, "reference"),
    "memorisation_gap": WeightingRow(
        memorisation_gap, "levels", cost="its half forwarded by the level model, once"
    ),
}
