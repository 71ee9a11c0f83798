"""The two halves of the data, as tokens, and what the steps of a schedule mean over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from expunge.data.batches import TokenSequence
from expunge.unlearn.objective import Half
from expunge.unlearn.schedule import Phase, Schedule, phases, row_of


@dataclass(frozen=True)
class Halves:
    """The tokens of both halves, and where their reference scores are cached."""

    forget: Sequence[TokenSequence]
    retain: Sequence[TokenSequence]
    cache: Path
    """Folder of the reference files."""
    cache_key: str
    """Stands for the target model and the data."""

    def of(self, half: Half) -> Sequence[TokenSequence]:
        """The sequences of one half."""
        return self.forget if half == "forget" else self.retain

    def planned(self, config: Schedule, *, seed: int) -> tuple[list[Phase], Halves]:
        """The phases of a run, and the items that their indices mean."""
        ids = [sequence.id for sequence in self.forget]
        made = phases(config, ids, len(self.retain), seed=seed)
        if not row_of(config).keeps:
            return made, self
        kept = [replace(s, id=f"{s.id} (kept)") for s in self.forget]
        both = [*self.retain, *kept]
        return made, replace(self, retain=both, cache_key=f"{self.cache_key}-{config.kind}")
