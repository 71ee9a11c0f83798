"""What the losses of a pack read: its scores, losses on its logits, states of its blocks, weights.

Dimensions: N scored tokens of a pack, d width. Each is formed for the tokens of the half whose
terms ask for it, and is 0 elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from expunge import sharding
from expunge.affine_heads import output_head
from expunge.data.batches import Scope, TokenSequence, pack
from expunge.errors import DataError
from expunge.heads import Anchor, joined
from expunge.packs import Pack, block_states, hidden_states
from expunge.scores import Scores, logps_and_kl, narrowed
from expunge.unlearn.levels import LEVELS, STANDARDIZED
from expunge.unlearn.objective import Half, Objective, Term, column
from expunge.unlearn.per_token import standardized, token_values
from expunge.unlearn.reference import Reference
from expunge.unlearn.weighting import token_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class HalfData:
    """The items of one half, and what the reference said of them."""

    sequences: Sequence[TokenSequence]
    reference: Reference | None = None
    weights: Mapping[int, Sequence[Tensor]] = field(default_factory=dict)
    """Of each term with a weighting, by its number: the weights of each item's tokens."""
    own: int | None = None
    """How many of them are the half's own; null means all. The rest are read when asked for, and
    count in no mean over the half."""
    levels: Sequence[Tensor] | None = None
    """Of each item the level log-probs of its tokens from the second on, and these standardised, as
    columns; see `levels`. Training may put others in their place."""


def weights_of(
    objective: Objective,
    half: Half,
    sequences: Sequence[TokenSequence],
    reference: Reference | None,
    tokenizer: PreTrainedTokenizerBase | None,
    levels: Sequence[Tensor] | None = None,
) -> dict[int, list[Tensor]]:
    """The weights that HalfData holds; a term that weighs tokens needs the tokenizer."""
    logps, found = None if reference is None else reference.logps, {}
    for number, term in objective.numbered(half):
        if not any(sequence.is_among(term.items) for sequence in sequences):
            raise DataError(
                f"{term.loss} reads {term.items} of {half} alone, and none of its {len(sequences)} "
                "items is one; leave out the term"
            )
        if term.weighting is not None:
            assert tokenizer is not None
            given = term.weighting, sequences, objective.scope(half), tokenizer, logps
            found[number] = token_weights(*given, levels)
    return found


def weights_in(
    data: HalfData, objective: Objective, number: int, term: Term, index: int
) -> Tensor | None:
    """What each token of an item weighs in a term; None where all weigh the same: (N,)."""
    if term.weighting is None and not term.skips and term.items == "all":
        return None
    sequence, scope = data.sequences[index], objective.scope(term.half)
    start = sequence.scored_from(scope)
    given = None if term.weighting is None else data.weights[number][index]
    weights = torch.ones(len(sequence.tokens) - start) if given is None else given.clone()
    weights[: sequence.scored_from(term.scope) - start + term.skips] = 0
    return weights if sequence.is_among(term.items) else weights.zero_()


def mean_norm(data: HalfData, objective: Objective, term: Term) -> float:
    """The mean length of the reference's states at the term's block, over all items."""
    assert data.reference is not None and term.layer is not None
    start = objective.scope(term.half)
    kept = [
        norms[sequence.scored_from(term.scope) - sequence.scored_from(start) :]
        for norms, sequence in zip(data.reference.norms[term.layer], data.sequences, strict=True)
    ]
    return float(torch.cat(kept).mean())


@dataclass(frozen=True)
class _Reading:
    """A pack, and which of its scored tokens belong to what."""

    batch: Pack
    halves: Mapping[Half, HalfData]
    objective: Objective
    chosen: Sequence[tuple[Half, int]]  # half and index of each sequence
    counts: Sequence[int]  # scored tokens of each sequence
    in_answer: Tensor  # (N,)

    @classmethod
    def of(
        cls,
        halves: Mapping[Half, HalfData],
        objective: Objective,
        chosen: Sequence[tuple[Half, int]],
        device: torch.device,
    ) -> _Reading:
        sequences = [halves[half].sequences[index] for half, index in chosen]
        scopes: list[Scope] = [objective.scope(half) for half, _ in chosen]
        both = zip(sequences, scopes, strict=True)
        counts = [len(sequence.tokens) - sequence.scored_from(scope) for sequence, scope in both]
        batch = pack(sequences, scopes, device)
        starts = torch.tensor([s.answer_start for s in sequences], device=device)
        in_answer = batch.positions[batch.scored] + 1 >= starts[batch.sequence]
        return cls(batch, halves, objective, chosen, counts, in_answer)

    @property
    def present(self) -> list[Half]:
        """The halves that the pack holds, each once."""
        return list(dict.fromkeys(half for half, _ in self.chosen))

    def tokens_of(self, halves: Sequence[Half]) -> Tensor:
        """Which tokens belong to some halves: (N,)."""
        owners = torch.tensor([half in halves for half, _ in self.chosen], dtype=torch.bool)
        return owners.to(self.batch.sequence.device)[self.batch.sequence]

    def spread(self, values: Tensor, inside: Tensor) -> Tensor:
        """Values of the tokens `inside` (N,) among all, 0 elsewhere: (N, ...)."""
        if bool(inside.all()):
            return values
        whole = values.new_zeros(len(inside), *values.shape[1:])
        whole[inside] = values
        return whole

    def kept(self, half: Half, items: Sequence[Tensor]) -> Tensor:
        """What is held of each item of a half, for the tokens of those in the pack."""
        device = self.batch.tokens.device
        return torch.cat([items[index] for own, index in self.chosen if own == half]).to(device)


def read(
    model: PreTrainedModel,
    halves: Mapping[Half, HalfData],
    objective: Objective,
    chosen: Sequence[tuple[Half, int]],
) -> tuple[Scores, Scores, Tensor]:
    """The scores of a pack of items now and by the reference (0 where there is none), and which
    of its scored tokens belong to answers: (N,)."""
    reading = _Reading.of(halves, objective, chosen, next(model.parameters()).device)
    final, states = _forward(model, reading)
    count, owners = len(chosen), reading.batch.sequence
    logps, kl, more = torch.zeros(len(owners), device=owners.device), None, {}
    if final is not None:
        final, head = narrowed(final), output_head(model)
        if states and sharding.is_sharded(model):
            states = _through(states, final, head)
        logps, kl = _scores(final, head, reading)
        more |= _losses(final, head, reading)
    more |= {column("states", n): found for n, found in states.items()}
    more |= _weights(reading) | _levels(reading)
    return (
        Scores(logps, owners, count, kl, None, more),
        Scores(_reference_logps(reading), owners, count, None, None, _reference_states(reading)),
        reading.in_answer,
    )


def _forward(model: PreTrainedModel, reading: _Reading) -> tuple[Tensor | None, dict[int, Tensor]]:
    """Final states where a term needs them, and those of the blocks that are read, in float32."""
    objective = reading.objective
    layers = sorted(set[int]().union(*(objective.layers(half) for half in reading.present)))
    if not layers:
        return hidden_states(model, reading.batch), {}
    # A pass that ends early would leave sharded weights gathered.
    unread, sharded = objective.deepest is not None, sharding.is_sharded(model)
    final, states = block_states(model, reading.batch, layers, stop=unread and not sharded)
    found = {layer: states.float() for layer, states in states.items()}
    if unread and final is not None:
        return None, _through(found, final)
    return final, found


def _through(states: dict[int, Tensor], *others: Tensor) -> dict[int, Tensor]:
    """The same states, whose backward pass goes through the others too: that of every rank has to
    reach the same sharded weights, whatever its items read."""
    nothing = sum(0.0 * other.sum(dtype=torch.float32) for other in others)
    return {layer: found + nothing for layer, found in states.items()}


def _scores(states: Tensor, head: Tensor, reading: _Reading) -> tuple[Tensor, Tensor | None]:
    """log p(target), and the KL to the reference, of the tokens whose terms read scores: (N,)."""
    inside = reading.tokens_of([h for h in reading.present if reading.objective.reads(h, "scores")])
    targets = reading.batch.targets
    if not inside.any():
        return torch.zeros(len(targets), device=targets.device), None
    anchors, anchored = [], []
    for (half, index), count in zip(reading.chosen, reading.counts, strict=True):
        reference = reading.halves[half].reference
        speaks = reference is not None and reference.anchors is not None
        anchored.append(torch.full((count,), speaks))
        if reference is not None and reference.anchors is not None:
            anchors.append(reference.anchors[index])
    speaks = torch.cat(anchored).to(states.device)
    anchor = joined(anchors, states.device)
    if bool(inside.all()):
        return logps_and_kl(states, head, targets, anchor, speaks)
    logps, kl = logps_and_kl(states[inside], head, targets[inside], anchor, speaks[inside])
    return reading.spread(logps, inside), None if kl is None else reading.spread(kl, inside)


def _losses(states: Tensor, head: Tensor, reading: _Reading) -> dict[str, Tensor]:
    """What terms read of the logits, and each loss on them, token by token: (N,)."""
    found = {}
    wanted: list[Half] = [h for h in reading.present if reading.objective.needs_standardized(h)]
    if wanted:
        inside = reading.tokens_of(wanted)
        values = token_values(states[inside], head, reading.batch.targets[inside], standardized)
        found[STANDARDIZED] = reading.spread(values, inside)
    for half in reading.present:
        for number, term in reading.objective.numbered(half):
            if term.row.reads != "logits":
                continue
            inside = reading.tokens_of([half])
            reference, kept = reading.halves[half].reference, None
            if term.row.needs_reference_states:
                assert reference is not None and reference.states is not None
                kept = reading.kept(half, reference.states)
            if term.scope == "answer":
                kept = None if kept is None else kept[reading.in_answer[inside]]
                inside = inside & reading.in_answer
            old = None if kept is None or reference is None else Anchor(kept, head=reference.head)
            fn = partial(term.row.fn, **term.options)
            losses = token_values(states[inside], head, reading.batch.targets[inside], fn, old)
            found[column("losses", number)] = reading.spread(losses, inside)
    return found


def _weights(reading: _Reading) -> dict[str, Tensor]:
    """Of each term that does not weigh all tokens alike, their weights: (N,)."""
    found = {}
    for half in reading.present:
        for number, term in reading.objective.numbered(half):
            made = {
                index: weights_in(reading.halves[half], reading.objective, number, term, index)
                for own, index in reading.chosen
                if own == half
            }
            given = {index: weights for index, weights in made.items() if weights is not None}
            if given:
                weights = torch.cat([given[i] for own, i in reading.chosen if own == half])
                weights = weights.to(reading.batch.tokens.device)
                found[column("weights", number)] = reading.spread(
                    weights, reading.tokens_of([half])
                )
    return found


def _levels(reading: _Reading) -> dict[str, Tensor]:
    """The level log-probs of the targets, and these standardised, where a term asks: (N, 2)."""
    inside = [half for half in reading.present if reading.objective.needs_level(half)]
    if not inside:
        return {}
    found = []
    for (half, index), count in zip(reading.chosen, reading.counts, strict=True):
        levels = reading.halves[half].levels if half in inside else None
        found.append(torch.zeros(count, 2) if levels is None else levels[index][-count:])
    return {LEVELS: torch.cat(found).to(reading.batch.tokens.device)}


def _reference_logps(reading: _Reading) -> Tensor:
    """What the reference said of the targets: (N,)."""
    logps = []
    for (half, index), count in zip(reading.chosen, reading.counts, strict=True):
        reference = reading.halves[half].reference
        logps.append(torch.zeros(count) if reference is None else reference.logps[index])
    return torch.cat(logps).to(reading.batch.tokens.device)


def _reference_states(reading: _Reading) -> dict[str, Tensor]:
    """The reference's states at the blocks that are compared with it, in float32: (N, d)."""
    found: dict[str, Tensor] = {}
    for half in reading.present:
        reference, inside = reading.halves[half].reference, reading.tokens_of([half])
        for layer, items in ({} if reference is None else reference.hidden).items():
            name = column("states", layer)
            mine = reading.spread(reading.kept(half, items).float(), inside)
            found[name] = found[name] + mine if name in found else mine
    return found
