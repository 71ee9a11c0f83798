"""One pass of a step: forward its micro-batches in packs, form their losses, run backward.

Dimensions: N scored tokens of a pack.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from expunge.data.batches import Scope, TokenSequence, pack, packs_by_length
from expunge.errors import TrainingError
from expunge.heads import Anchor
from expunge.packs import Pack
from expunge.scores import Scores, score
from expunge.unlearn.objective import Half, Objective
from expunge.unlearn.reference import Reference

Chosen = Mapping[Half, tuple[int, ...]]
"""A micro-batch: the indices of its items, by half."""


@dataclass(frozen=True)
class HalfData:
    """The items of one half, and what the reference said of them."""

    sequences: Sequence[TokenSequence]
    reference: Reference | None = None


@dataclass
class Passes:
    """The data of both halves, ready to give gradients for chosen items of one or of both."""

    model: PreTrainedModel
    halves: Mapping[Half, HalfData]
    objective: Objective
    max_tokens: int

    def backward(self, batches: Sequence[Chosen]) -> dict[str, float]:
        """Add the gradient of the mean loss over the micro-batches.

        Packs are filled with whole micro-batches up to `max_tokens`, so the result does not
        depend on that limit. Returns the total of each half and each term, averaged.
        """
        record: dict[str, float] = {}
        for group in self._groups([self._read(batch) for batch in batches]):
            current, reference, in_answer = self._score(group)
            total = current.token_logps.new_zeros(())
            start = 0
            for batch in group:
                for half, items in batch.items():
                    stop = start + len(items)
                    inside = (current.sequence >= start) & (current.sequence < stop)
                    has_reference = self.halves[half].reference is not None
                    loss, parts = self.objective.loss(
                        half,
                        current.span(start, stop),
                        reference.span(start, stop) if has_reference else None,
                        in_answer[inside],
                    )
                    self._check(loss, current, half, items, start)
                    total = total + loss / len(batches)
                    parts[half] = float(loss.detach())
                    for name, value in parts.items():
                        record[name] = record.get(name, 0.0) + value / len(batches)
                    start = stop
            total.backward()
        return record

    @torch.no_grad()
    def losses(self) -> dict[str, float]:
        """Mean NLL a token of the answers of each half, averaged over its items."""
        found = {}
        device = next(self.model.parameters()).device
        for half, data in self.halves.items():
            total = 0.0
            for group in packs_by_length(data.sequences, max_tokens=self.max_tokens):
                total += float(score(self.model, pack(group, "answer", device)).nll.sum())
            found[f"nll.{half}"] = total / len(data.sequences)
        return found

    def _read(self, batch: Chosen) -> Chosen:
        """The halves of a micro-batch that a term reads."""
        return {half: items for half, items in batch.items() if items and self.objective.on(half)}

    def _groups(self, batches: Sequence[Chosen]) -> list[list[Chosen]]:
        groups: list[list[Chosen]] = []
        room = 0
        for batch in batches:
            if not batch:
                continue
            size = sum(
                len(self.halves[half].sequences[index].tokens)
                for half, items in batch.items()
                for index in items
            )
            if not groups or size > room:
                groups.append([])
                room = self.max_tokens
            groups[-1].append(batch)
            room -= size
        return groups

    def _score(self, group: Sequence[Chosen]) -> tuple[Scores, Scores, Tensor]:
        """The scores of a pack now and by the reference (0 where there is none), and which of
        its scored tokens belong to answers: (N,)."""
        chosen: list[tuple[Half, int]] = []
        for batch in group:
            for half, items in batch.items():
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

    def _check(
        self, loss: Tensor, current: Scores, half: Half, items: tuple[int, ...], start: int
    ) -> None:
        if math.isfinite(float(loss.detach())):
            return
        values = current.logps.detach()[start : start + len(items)].tolist()
        ids = [self.halves[half].sequences[index].id for index in items]
        broken = [id for id, value in zip(ids, values, strict=True) if not math.isfinite(value)]
        raise TrainingError(
            f"the {half} loss became {float(loss.detach())} at item {', '.join(broken or ids)}"
        )


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
