"""Adapters on the way: the weights of a branch after chosen steps, each a peft folder of its own.

They lie in the branch's folder as `snapshots/step-00040/`, and outlive its training.
"""

import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from pydantic import Field, model_validator

from expunge import parallel
from expunge.config import Section
from expunge.errors import TrainingError

SNAPSHOTS = "snapshots"


class Keep(Section):
    """After which steps an adapter is kept, beside the one that the branch ends with."""

    every: int = Field(default=0, ge=0)
    """Steps between two; 0 for none but those of `at` and `epochs`."""

    at: tuple[int, ...] = ()
    """Steps after which one is kept, besides, counted from 1."""

    epochs: bool = False
    """Whether one is kept at the end of each epoch and phase of the schedule, besides."""

    @model_validator(mode="after")
    def _some(self) -> "Keep":
        if not self.every and not self.at and not self.epochs:
            raise ValueError("keep needs every, at or epochs: the steps after which to keep one")
        if any(step < 1 for step in self.at):
            raise ValueError("at counts steps from 1; before the first there is the target")
        return self

    def check(self, steps: int, label: str) -> None:
        """Refuse what a branch of so many steps would never come to."""
        last = max(self.every, *self.at, 0)
        if last > steps:
            raise TrainingError(f"{label}: keep names step {last}, and the branch has {steps}")

    def due(self, step: int, ends: Collection[int]) -> bool:
        """Whether to keep the weights after this step; epochs and phases end after `ends`."""
        regular = self.every and step % self.every == 0
        return step > 0 and bool(regular or step in self.at or (self.epochs and step in ends))


class Keeper:
    """The snapshots of one branch: when one is due, and where it is written.

    Whoever trains writes a checkpoint before one, so none is of a later step than a checkpoint.
    """

    def __init__(
        self,
        config: Keep,
        write: Callable[[Path], None],
        ends: Collection[int],
        folder: Path,
        *,
        steps: int,
        label: str,
    ) -> None:
        """`write` puts the weights as they are now into a folder, whole or not at all. What a
        branch `label` of so many `steps` would never come to is refused."""
        config.check(steps, label)
        self.config, self.write, self.ends = config, write, ends
        self.folder = folder

    def start(self, step: int) -> None:
        """Training begins after this step: what is of a later one will be trained again."""
        if not parallel.is_main():
            return
        for later, path in snapshots(self.folder).items():
            if later > step:
                shutil.rmtree(path)

    def due(self, step: int) -> bool:
        """Whether to keep the weights after this step."""
        return self.config.due(step, self.ends)

    def take(self, step: int) -> None:
        """Write the weights after this step, unless they are there; of several ranks the first."""
        path = self.folder / SNAPSHOTS / f"step-{step:05d}"
        if parallel.is_main() and not path.exists():
            self.write(path)


def snapshots(folder: Path) -> dict[int, Path]:
    """The adapter folders that a branch's folder holds, by the step that they are of."""
    found = {}
    for path in folder.glob(f"{SNAPSHOTS}/step-*"):
        if named := re.fullmatch(r"step-(\d+)", path.name):
            found[int(named[1])] = path
    return dict(sorted(found.items()))
