"""The tokens of every set of a branch, and what the steps of a schedule mean over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from expunge.data.batches import TokenSequence
from expunge.unlearn.companions import Chosen, CompanionSet, with_companions
from expunge.unlearn.schedule import Phase, Schedule, phases, row_of
from expunge.unlearn.sets import Half

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Halves:
    """The tokens of all sets, and where their reference scores are cached."""

    forget: Sequence[TokenSequence]
    retain: Sequence[TokenSequence]
    cache: Path
    """Folder of the reference files."""
    cache_key: str
    """Stands for the target model and the data."""
    companions: Mapping[Half, CompanionSet] = field(default_factory=dict)
    """The sets beside the halves that a term reads."""
    levels: list[Tensor] | None = None
    """Of each forget item the level log-probs of its tokens from the second on, where a term reads
    levels."""
    relevel: Callable[[PreTrainedModel], list[Tensor]] | None = None
    """Reads them anew in the model as it is, where they are not read once alone."""

    @property
    def names(self) -> tuple[Half, ...]:
        """The sets that are there."""
        return ("forget", "retain", *self.companions)

    def of(self, half: Half) -> Sequence[TokenSequence]:
        """The sequences of one set."""
        if half in ("forget", "retain"):
            return self.forget if half == "forget" else self.retain
        return self.companions[half].sequences

    def planned(self, config: Schedule, *, seed: int) -> tuple[list[Phase], Halves]:
        """The phases of a run, and the items that their indices mean."""
        ids = [sequence.id for sequence in self.forget]
        made = phases(config, ids, len(self.retain), seed=seed)
        if not row_of(config).keeps:
            return made, self
        kept = [replace(s, id=f"{s.id} (kept)") for s in self.forget]
        both = [*self.retain, *kept]
        return made, replace(self, retain=both, cache_key=f"{self.cache_key}-{config.kind}")

    def steps(self, made: Sequence[Phase]) -> list[list[Chosen]]:
        """The micro-batches of every step, with the companions of their items."""
        return with_companions([step for phase in made for step in phase.steps], self.companions)
