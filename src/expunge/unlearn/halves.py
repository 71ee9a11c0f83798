"""The tokens of every set of a branch, and the micro-batches of its schedule."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from expunge.data.batches import TokenSequence
from expunge.unlearn.companions import Chosen, CompanionSet, with_companions
from expunge.unlearn.schedule import Pairing, paired_steps
from expunge.unlearn.sets import Half


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

    @property
    def names(self) -> tuple[Half, ...]:
        """The sets that are there."""
        return ("forget", "retain", *self.companions)

    def of(self, half: Half) -> Sequence[TokenSequence]:
        """The sequences of one set."""
        if half in ("forget", "retain"):
            return self.forget if half == "forget" else self.retain
        return self.companions[half].sequences

    def steps(self, schedule: Pairing, *, seed: int) -> list[list[Chosen]]:
        """The micro-batches of every step, with the companions of their items."""
        steps = paired_steps(schedule, len(self.forget), len(self.retain), seed=seed)
        return with_companions(steps, self.companions)
