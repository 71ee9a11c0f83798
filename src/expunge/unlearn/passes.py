"""One pass of a step: forward its micro-batches in packs, form their losses, run backward.

Dimensions: N scored tokens of a pack.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from expunge import parallel, sharding
from expunge.data.batches import TokenSequence, pack
from expunge.errors import TrainingError
from expunge.scores import LEAST_WEIGHT, Scores, score
from expunge.unlearn.companions import Chosen
from expunge.unlearn.objective import Half, Objective, Term
from expunge.unlearn.readings import HalfData, mean_norm, read, weights_in
from expunge.unlearn.reference import my_packs
from expunge.unlearn.schedule import MeanOver
from expunge.unlearn.sets import SETS, units

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class _Part:
    """What one rank reads of one micro-batch."""

    items: Chosen
    whole: Chosen  # the micro-batch; empty where the items count for nothing


@dataclass
class Passes:
    """The data of all sets, ready to give gradients for chosen items of one or of several."""

    model: PreTrainedModel
    halves: Mapping[Half, HalfData]
    objective: Objective
    max_tokens: int
    mean_over: MeanOver = "micro_batch"
    """Of what means are taken: of each micro-batch, then of these, or of all items of the step."""
    forwarding: list[tuple[Half, int, int]] = field(default_factory=list)
    """The items of the pack that is being forwarded: half, index, tokens."""

    def backward(
        self, batches: Sequence[Chosen], scale: Mapping[str, float] | None = None
    ) -> dict[str, float]:
        """Add the gradient of the mean loss over the micro-batches, that of a side by its `scale`;
        where `mean_over` is `step`, of the loss over the items of all of them.

        Packs are filled with whole micro-batches up to `max_tokens`; a larger one is forwarded item
        by item where its loss can be formed from parts (a pair stays a pair). So the result does
        not depend on that limit. Returns the total of each side and each term, averaged. Of several
        ranks each adds the gradient of its share of the items; the record is that of all.
        """
        read = [self.objective.read(batch) for batch in batches]
        record = {name: 0.0 for half in self._halves(read) for name in self._names(half)}
        broken: list[str] = []
        for group in self._my_groups(read) if record else []:
            current, reference, in_answer = self._score(group)
            total = current.token_logps.new_zeros(())
            start = 0
            for part in group:
                for half, items in part.items.items():
                    stop = start + len(items)
                    inside = (current.sequence >= start) & (current.sequence < stop)
                    has_reference = self.halves[half].reference is not None
                    loss, values = self.objective.loss(
                        half,
                        current.span(start, stop),
                        reference.span(start, stop) if has_reference else None,
                        in_answer[inside],
                        lambda term, part=part: self._share(part, term, read),
                        self._norms,
                    )
                    broken += self._broken(loss, current, half, items, start)
                    side = SETS[half].side
                    factor = 1.0 if scale is None else scale.get(side, 1.0)
                    total = total + factor * loss / len(batches)
                    values[side] = float(loss.detach())
                    for name, value in values.items():
                        record[name] += value / len(batches)
                    start = stop
            if torch.is_grad_enabled():
                total.backward()
        record = parallel.total(record)
        if not all(map(math.isfinite, record.values())):
            said = [line for lines in parallel.gather(broken) for line in lines]
            raise TrainingError(said[0] if said else "the loss is not finite")
        return record

    def recalling(self) -> Passes:
        """The same items under the loss -NLL of the forget half, dealt out among packs and ranks
        as they are here."""
        objective = Objective((Term(half="forget", loss="gradient_ascent"),))
        objective.divisible = self.objective.divisible
        return replace(self, objective=objective)

    @torch.no_grad()
    def losses(self, sample: int | None = None) -> dict[str, float]:
        """Mean NLL a token of the answers of each half that has items, averaged over them, or over
        about `sample` of them that lie evenly among all."""
        found = {}
        device = next(self.model.parameters()).device
        for half, data in self.halves.items():
            chosen, mine = evenly(data.sequences[: data.own], sample), {}
            if half not in ("forget", "retain") or not chosen:
                continue
            for group in my_packs(chosen, self.max_tokens):
                nll = score(self.model, pack(group, "answer", device)).nll.tolist()
                mine |= zip((sequence.id for sequence in group), nll, strict=True)
            all_ranks = {id: nll for part in parallel.gather(mine) for id, nll in part.items()}
            found[f"nll.{half}"] = math.fsum(all_ranks.values()) / len(chosen)
        sharding.release(self.model)
        return found

    def _halves(self, batches: Sequence[Chosen]) -> list[Half]:
        return [half for half in self.halves if any(half in batch for batch in batches)]

    def _names(self, half: Half) -> list[str]:
        """What is logged of one set."""
        named = (self.objective.name(number) for number, _ in self.objective.numbered(half))
        return [SETS[half].side, *named]

    def _my_groups(self, batches: Sequence[Chosen]) -> list[list[_Part]]:
        """This rank's packs. Every rank has as many, for it takes part in gathering weights; one
        that has none left reads an item that counts for nothing."""
        everyone = [self._groups(parts) for parts in self._dealt(batches)]
        mine = everyone[parallel.rank()]
        missing = max(map(len, everyone)) - len(mine)
        if not missing:
            return mine
        items: list[Chosen] = [
            {half: one} for batch in batches for half in batch for one in units(half, batch[half])
        ]
        return mine + missing * [[_Part(min(items, key=self._tokens), {})]]

    def _dealt(self, batches: Sequence[Chosen]) -> list[list[_Part]]:
        """For each rank its part of each micro-batch: some of the items of a set, or all or none
        of them where the loss cannot be formed from parts."""
        if parallel.world() == 1:
            return [[_Part(batch, batch) for batch in batches]]
        pieces = [
            (number, piece) for number, batch in enumerate(batches) for piece in self._pieces(batch)
        ]
        dealt = []
        sizes = [self._tokens(piece) for _, piece in pieces]
        for hand in parallel.deal(sizes, parallel.world()):
            held: dict[int, dict[Half, tuple[int, ...]]] = {}
            for number, piece in (pieces[place] for place in hand):
                mine = held.setdefault(number, {})
                for half, items in piece.items():
                    mine[half] = mine.get(half, ()) + items
            dealt.append([_Part(items, batches[number]) for number, items in held.items()])
        return dealt

    def _pieces(self, batch: Chosen) -> list[Chosen]:
        """What of a micro-batch may be forwarded apart: each item of a set, or the set."""
        found: list[Chosen] = []
        for half, items in batch.items():
            split = self.objective.divisible(half)
            found.extend({half: piece} for piece in (units(half, items) if split else [items]))
        return found

    def _groups(self, parts: Sequence[_Part]) -> list[list[_Part]]:
        """The parts by the pack that they are forwarded in; those that exceed one in pieces."""
        small = [
            _Part(piece, part.whole)
            for part in parts
            if part.items
            for piece in self._fitting(part.items)
        ]
        sizes = [self._tokens(part.items) for part in small]
        return [[small[place] for place in group] for group in filled(sizes, self.max_tokens)]

    def _fitting(self, items: Chosen) -> list[Chosen]:
        return [items] if self._tokens(items) <= self.max_tokens else self._pieces(items)

    def _tokens(self, chosen: Chosen) -> int:
        return sum(
            len(self.halves[half].sequences[index].tokens)
            for half, items in chosen.items()
            for index in items
        )

    def _score(self, group: Sequence[_Part]) -> tuple[Scores, Scores, Tensor]:
        """The readings of a pack; see `readings.read`."""
        chosen: list[tuple[Half, int]] = []
        for part in group:
            for half, items in part.items.items():
                chosen.extend((half, index) for index in items)
        self.forwarding[:] = [
            (half, index, len(self.halves[half].sequences[index].tokens)) for half, index in chosen
        ]
        return read(self.model, self.halves, self.objective, chosen)

    def _share(self, part: _Part, term: Term, batches: Sequence[Chosen]) -> float:
        """The part's share of what `term` takes the mean of over its micro-batch, times what that
        weighs among the `batches` of the step."""
        share = self._share_of_batch(part, term)
        if not share or self.mean_over == "micro_batch":
            return share
        counts = [self._counted(batch[term.half], term) for batch in batches if term.half in batch]
        own = self._counted(part.whole[term.half], term)
        return share * own * len(batches) / max(sum(counts), LEAST_WEIGHT)

    def _share_of_batch(self, part: _Part, term: Term) -> float:
        items, whole = part.items[term.half], part.whole.get(term.half, ())
        if not whole:
            return 0.0
        if items == whole or term.row.mean_over == "micro-batch":
            return 1.0
        return self._counted(items, term) / max(self._counted(whole, term), LEAST_WEIGHT)

    def _counted(self, items: Sequence[int], term: Term) -> float:
        """What a term means over: so many items, or their tokens, or the sum of their weights."""
        if term.row.mean_over == "sequences":
            return len(items)
        data, number = self.halves[term.half], self.objective.number(term)
        total = 0.0
        for index in items:
            weights = weights_in(data, self.objective, number, term, index)
            sequence = data.sequences[index]
            count = len(sequence.tokens) - sequence.scored_from(term.scope)
            total += count if weights is None else float(weights.sum())
        return total

    @cached_property
    def _norms(self) -> dict[int, float]:
        """The mean length of the reference's states, by the number of the term that reads it."""
        return {
            number: mean_norm(data, self.objective, term)
            for half, data in self.halves.items()
            for number, term in self.objective.numbered(half)
            if term.row.needs_reference_hidden == "norms"
        }

    def _broken(
        self, loss: Tensor, current: Scores, half: Half, items: tuple[int, ...], start: int
    ) -> list[str]:
        """What to say of a loss that is not finite."""
        if math.isfinite(float(loss.detach())):
            return []
        values = current.logps.detach()[start : start + len(items)].tolist()
        ids = [self.halves[half].sequences[index].id for index in items]
        broken = [id for id, value in zip(ids, values, strict=True) if not math.isfinite(value)]
        return [f"the {half} loss became {float(loss.detach())} at item {', '.join(broken or ids)}"]


def evenly(items: Sequence[TokenSequence], sample: int | None) -> Sequence[TokenSequence]:
    """All items, or about `sample` of them that lie evenly among all."""
    return items[:: max(1, len(items) // (sample or len(items) or 1))]


def filled(sizes: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Numbers of parts of the given tokens, by the pack that each is forwarded in."""
    groups: list[list[int]] = []
    room = 0
    for number, size in enumerate(sizes):
        if not groups or size > room:
            groups.append([])
            room = max_tokens
        groups[-1].append(number)
        room -= size
    return groups
