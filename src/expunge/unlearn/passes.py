"""One half of a step: forward its micro-batches in packs, form their losses, run backward."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from expunge import parallel
from expunge.data.batches import TokenSequence, pack
from expunge.errors import TrainingError
from expunge.packs import Pack
from expunge.scores import Scores, score
from expunge.unlearn.objective import Half, Objective, Term
from expunge.unlearn.reference import Reference


@dataclass(frozen=True)
class _Part:
    """What one rank reads of one micro-batch."""

    items: tuple[int, ...]
    whole: tuple[int, ...]  # the micro-batch; empty where the items count for nothing


@dataclass
class HalfPass:
    """The data and reference of one half, ready to give gradients for chosen items."""

    model: PreTrainedModel
    half: Half
    sequences: Sequence[TokenSequence]
    objective: Objective
    reference: Reference | None
    max_tokens: int

    def backward(self, batches: Sequence[tuple[int, ...]]) -> dict[str, float]:
        """Add the gradient of the mean loss over the micro-batches `batches` of item indices.

        Packs are filled with whole micro-batches up to `max_tokens`, so the result does not
        depend on that limit. Returns the total and each term, averaged. Of several ranks each adds
        the gradient of its share of the items; the record is that of all.
        """
        record: dict[str, float] = {}
        if not self.objective.on(self.half):
            return record
        broken: list[str] = []
        for group in self._my_groups(batches):
            chosen = [index for part in group for index in part.items]
            current, reference, in_answer = self._score(chosen)
            total = current.token_logps.new_zeros(())
            start = 0
            for part in group:
                stop = start + len(part.items)
                loss, parts = self._micro_loss(current, reference, in_answer, start, part)
                broken += self._broken(loss, current, part, start)
                total = total + loss / len(batches)
                parts[self.half] = float(loss.detach())
                for name, value in parts.items():
                    record[name] = record.get(name, 0.0) + value / len(batches)
                start = stop
            total.backward()
        record = parallel.total(record)
        if not all(map(math.isfinite, record.values())):
            said = [line for lines in parallel.gather(broken) for line in lines]
            raise TrainingError(said[0] if said else f"the {self.half} loss is not finite")
        return record

    def _my_groups(self, batches: Sequence[tuple[int, ...]]) -> list[list[_Part]]:
        """This rank's packs. Every rank has as many, for it takes part in gathering weights; one
        that has none left reads an item that counts for nothing."""
        everyone = [self._groups(parts) for parts in self._dealt(batches)]
        mine = everyone[parallel.rank()]
        idle = min((i for b in batches for i in b), key=lambda i: len(self.sequences[i].tokens))
        missing = max(map(len, everyone)) - len(mine)
        return mine + missing * [[_Part((idle,), ())]]

    def _dealt(self, batches: Sequence[tuple[int, ...]]) -> list[list[_Part]]:
        """For each rank its part of each micro-batch: some of the items, or all or none of them
        where the loss cannot be formed from parts."""
        if parallel.world() == 1:
            return [[_Part(batch, batch) for batch in batches]]
        split = self.objective.divisible(self.half)
        units = [
            (number, items)
            for number, batch in enumerate(batches)
            for items in ([(index,) for index in batch] if split else [batch])
        ]
        dealt = []
        for hand in parallel.deal([self._tokens(unit) for _, unit in units], parallel.world()):
            held: dict[int, tuple[int, ...]] = {}
            for number, items in (units[place] for place in hand):
                held[number] = held.get(number, ()) + items
            dealt.append([_Part(items, batches[number]) for number, items in held.items()])
        return dealt

    def _groups(self, parts: Sequence[_Part]) -> list[list[_Part]]:
        groups: list[list[_Part]] = []
        room = 0
        for part in parts:
            size = self._tokens(part.items)
            if not groups or size > room:
                groups.append([])
                room = self.max_tokens
            groups[-1].append(part)
            room -= size
        return groups

    def _tokens(self, items: Sequence[int]) -> int:
        return sum(len(self.sequences[index].tokens) for index in items)

    def _score(self, chosen: list[int]) -> tuple[Scores, Scores | None, Tensor]:
        scope = self.objective.scope(self.half)
        sequences = [self.sequences[index] for index in chosen]
        batch = pack(sequences, scope, next(self.model.parameters()).device)
        states = logps = None
        if self.reference is not None:
            device = batch.tokens.device
            logps = torch.cat([self.reference.logps[index] for index in chosen]).to(device)
            if self.reference.states is not None:
                states = torch.cat([self.reference.states[index] for index in chosen]).to(device)
        head = None if self.reference is None else self.reference.head
        current = score(self.model, batch, reference_states=states, reference_head=head)
        reference = None if logps is None else Scores(logps, batch.sequence, len(chosen))
        return current, reference, _in_answer(batch, sequences)

    def _micro_loss(
        self,
        current: Scores,
        reference: Scores | None,
        in_answer: Tensor,
        start: int,
        part: _Part,
    ) -> tuple[Tensor, dict[str, float]]:
        stop = start + len(part.items)
        inside = (current.sequence >= start) & (current.sequence < stop)
        return self.objective.loss(
            self.half,
            current.span(start, stop),
            None if reference is None else reference.span(start, stop),
            in_answer[inside],
            lambda term: self._share(part, term),
        )

    def _share(self, part: _Part, term: Term) -> float:
        """The part's share of what `term` takes the mean of over its micro-batch."""
        if part.items == part.whole or term.row.mean_over == "micro-batch":
            return float(bool(part.whole))
        if term.row.mean_over == "sequences":
            return len(part.items) / len(part.whole) if part.whole else 0.0
        scored = [self._scored(part.items, term), self._scored(part.whole, term)]
        return scored[0] / scored[1] if part.whole else 0.0

    def _scored(self, items: Sequence[int], term: Term) -> int:
        chosen = [self.sequences[index] for index in items]
        return sum(len(sequence.tokens) - sequence.scored_from(term.scope) for sequence in chosen)

    def _broken(self, loss: Tensor, current: Scores, part: _Part, start: int) -> list[str]:
        """What to say of a loss that is not finite."""
        if math.isfinite(float(loss.detach())):
            return []
        values = current.logps.detach()[start : start + len(part.items)].tolist()
        ids = [self.sequences[index].id for index in part.items]
        broken = [id for id, value in zip(ids, values, strict=True) if not math.isfinite(value)]
        return [
            f"the {self.half} loss became {float(loss.detach())} at item {', '.join(broken or ids)}"
        ]


def _in_answer(batch: Pack, sequences: Sequence[TokenSequence]) -> Tensor:
    """Which scored tokens belong to answers: (N,)."""
    starts = torch.tensor([s.answer_start for s in sequences], device=batch.tokens.device)
    return batch.positions[batch.scored] + 1 >= starts[batch.sequence]
