"""One half of a step: forward its micro-batches in packs, form their losses, run backward."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from expunge.data.batches import TokenSequence, pack
from expunge.errors import TrainingError
from expunge.packs import Pack
from expunge.scores import Scores, score
from expunge.unlearn.objective import Half, Objective
from expunge.unlearn.reference import Reference


@dataclass
class HalfPass:
    """The data and reference of one half, ready to give gradients for chosen items."""

    model: PreTrainedModel
    half: Half
    sequences: Sequence[TokenSequence]
    objective: Objective
    reference: Reference | None
    max_tokens: int

    def backward(
        self, batches: Sequence[tuple[int, ...]], parts_of: Sequence[float] | None = None
    ) -> dict[str, float]:
        """Add the gradient of the mean loss over the micro-batches `batches` of item indices.

        Packs are filled with whole micro-batches up to `max_tokens`, so the result does not
        depend on that limit. A micro-batch weighs one part in `parts_of`, by default one in their
        number. Returns the total and each term, averaged.
        """
        record: dict[str, float] = {}
        shares = iter(parts_of or [len(batches)] * len(batches))
        if not self.objective.on(self.half):
            return record
        for group in self._groups(batches):
            chosen = [index for batch in group for index in batch]
            current, reference, in_answer = self._score(chosen)
            total = current.token_logps.new_zeros(())
            start = 0
            for batch in group:
                stop = start + len(batch)
                loss, parts = self._micro_loss(current, reference, in_answer, start, stop)
                self._check(loss, current, batch, start)
                share = next(shares)
                total = total + loss / share
                parts[self.half] = float(loss.detach())
                for name, value in parts.items():
                    record[name] = record.get(name, 0.0) + value / share
                start = stop
            total.backward()
        return record

    def _groups(self, batches: Sequence[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
        sizes = [sum(len(self.sequences[index].tokens) for index in batch) for batch in batches]
        return [[batches[i] for i in group] for group in filled(sizes, self.max_tokens)]

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
        stop: int,
    ) -> tuple[Tensor, dict[str, float]]:
        inside = (current.sequence >= start) & (current.sequence < stop)
        return self.objective.loss(
            self.half,
            current.span(start, stop),
            None if reference is None else reference.span(start, stop),
            in_answer[inside],
        )

    def _check(self, loss: Tensor, current: Scores, batch: tuple[int, ...], start: int) -> None:
        if math.isfinite(float(loss.detach())):
            return
        values = current.logps.detach()[start : start + len(batch)].tolist()
        ids = [self.sequences[index].id for index in batch]
        broken = [id for id, value in zip(ids, values, strict=True) if not math.isfinite(value)]
        raise TrainingError(
            f"the {self.half} loss became {float(loss.detach())} at item {', '.join(broken or ids)}"
        )


def filled(sizes: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of micro-batches of the given tokens, by the pack that each is forwarded in."""
    groups: list[list[int]] = []
    room = 0
    for number, size in enumerate(sizes):
        if not groups or size > room:
            groups.append([])
            room = max_tokens
        groups[-1].append(number)
        room -= size
    return groups


def _in_answer(batch: Pack, sequences: Sequence[TokenSequence]) -> Tensor:
    """Which scored tokens belong to answers: (N,)."""
    starts = torch.tensor([s.answer_start for s in sequences], device=batch.tokens.device)
    return batch.positions[batch.scored] + 1 >= starts[batch.sequence]
