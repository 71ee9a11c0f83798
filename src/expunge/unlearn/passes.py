"""One pass of a step: forward its micro-batches in packs, form their losses, run backward.

Dimensions: N scored tokens of a pack.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from expunge import parallel
from expunge.data.batches import Scope, TokenSequence, pack, packs_by_length
from expunge.errors import TrainingError
from expunge.heads import Anchor
from expunge.packs import Pack
from expunge.scores import Scores, score
from expunge.unlearn.objective import Half, Objective, Term
from expunge.unlearn.reference import Reference
from expunge.unlearn.sets import SETS, units

Chosen = Mapping[Half, tuple[int, ...]]
"""A micro-batch: the indices of its items, by set; where they are pairs, of both of each."""


@dataclass(frozen=True)
class HalfData:
    """The items of one set, and what the reference said of them."""

    sequences: Sequence[TokenSequence]
    reference: Reference | None = None


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

    def backward(self, batches: Sequence[Chosen]) -> dict[str, float]:
        """Add the gradient of the mean loss over the micro-batches.

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
                        lambda term, part=part: self._share(part, term),
                    )
                    broken += self._broken(loss, current, half, items, start)
                    total = total + loss / len(batches)
                    side = SETS[half].side
                    values[side] = float(loss.detach())
                    for name, value in values.items():
                        record[name] += value / len(batches)
                    start = stop
            total.backward()
        record = parallel.total(record)
        if not all(map(math.isfinite, record.values())):
            said = [line for lines in parallel.gather(broken) for line in lines]
            raise TrainingError(said[0] if said else "the loss is not finite")
        return record

    @torch.no_grad()
    def losses(self) -> dict[str, float]:
        """Mean NLL a token of the answers of both halves, averaged over the items of each."""
        found = {}
        device = next(self.model.parameters()).device
        for half, data in self.halves.items():
            if half not in ("forget", "retain"):
                continue
            total = 0.0
            for group in packs_by_length(data.sequences, max_tokens=self.max_tokens):
                total += float(score(self.model, pack(group, "answer", device)).nll.sum())
            found[f"nll.{half}"] = total / len(data.sequences)
        return found

    def _halves(self, batches: Sequence[Chosen]) -> list[Half]:
        return [half for half in self.halves if any(half in batch for batch in batches)]

    def _names(self, half: Half) -> list[str]:
        """What is logged of one set."""
        return [SETS[half].side, *(f"{half}.{term.loss}" for term in self.objective.on(half))]

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
        """The scores of a pack now and by the reference (0 where there is none), and which of
        its scored tokens belong to answers: (N,)."""
        chosen: list[tuple[Half, int]] = []
        for part in group:
            for half, items in part.items.items():
                chosen.extend((half, index) for index in items)
        sequences = [self.halves[half].sequences[index] for half, index in chosen]
        scopes: list[Scope] = [self.objective.scope(half) for half, _ in chosen]
        device = next(self.model.parameters()).device
        batch = pack(sequences, scopes, device)
        counts = [
            len(sequence.tokens) - sequence.scored_from(scope)
            for sequence, scope in zip(sequences, scopes, strict=True)
        ]
        logps, anchors, anchored = [], [], []
        for (half, index), count in zip(chosen, counts, strict=True):
            reference = self.halves[half].reference
            logps.append(torch.zeros(count) if reference is None else reference.logps[index])
            has_anchor = reference is not None and reference.anchors is not None
            anchored.append(torch.full((count,), has_anchor))
            if reference is not None and reference.anchors is not None:
                anchors.append(reference.anchors[index])
        current = score(
            self.model,
            batch,
            anchor=_joined(anchors, device),
            anchored=torch.cat(anchored).to(device),
        )
        then = Scores(torch.cat(logps).to(device), batch.sequence, len(chosen))
        return current, then, _in_answer(batch, sequences)

    def _share(self, part: _Part, term: Term) -> float:
        """The part's share of what `term` takes the mean of over its micro-batch."""
        items, whole = part.items[term.half], part.whole.get(term.half, ())
        if not whole:
            return 0.0
        if items == whole or term.row.mean_over == "micro-batch":
            return 1.0
        if term.row.mean_over == "sequences":
            return len(items) / len(whole)
        return self._scored(items, term) / self._scored(whole, term)

    def _scored(self, items: Sequence[int], term: Term) -> int:
        chosen = [self.halves[term.half].sequences[index] for index in items]
        return sum(len(sequence.tokens) - sequence.scored_from(term.scope) for sequence in chosen)

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


def _joined(anchors: Sequence[Anchor], device: torch.device) -> Anchor | None:
    if not anchors:
        return None
    entropies = [anchor.entropies for anchor in anchors if anchor.entropies is not None]
    return Anchor(
        torch.cat([anchor.rows for anchor in anchors]).to(device),
        torch.cat(entropies).to(device) if entropies else None,
        anchors[0].head,
    )


def _in_answer(batch: Pack, sequences: Sequence[TokenSequence]) -> Tensor:
    """Which scored tokens belong to answers: (N,)."""
    starts = torch.tensor([s.answer_start for s in sequences], device=batch.tokens.device)
    return batch.positions[batch.scored] + 1 >= starts[batch.sequence]
