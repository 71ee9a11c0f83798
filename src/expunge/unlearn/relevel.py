"""Levels read anew on the way: what training does to unseen text, the forget items follow.

Dimensions: N scored tokens of a forget item.
"""

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from expunge import parallel, runs
from expunge.disk import safetensors_errors
from expunge.errors import TrainingError
from expunge.unlearn.tensor_files import opened

FILE = "levels.safetensors"


class Releveller:
    """The levels of one branch: when they are due, and the last of them, for a killed run.

    Whoever trains writes a checkpoint before they are read, so they are never of a later step than
    the checkpoint is.
    """

    def __init__(
        self,
        every: int,
        levels: list[Tensor],
        now: Callable[[], list[Tensor]],
        folder: Path,
        *,
        steps: int,
    ) -> None:
        """`levels`, each (N, 2), are what losses read, and are replaced in place by those of `now`,
        every so many of the `steps`, but for the last, after which nobody reads them."""
        self.every, self.levels, self.now, self.steps = every, levels, now, steps
        self.file = folder / FILE

    def start(self, step: int) -> None:
        """Training begins after this step: the levels that it had are there again."""
        last = step // self.every * self.every
        found, levels = self._kept()
        if found == last:
            self.levels[:] = levels or self.levels
        elif last < step and last:
            raise TrainingError(
                f"{self.file} is of step {found} where {last} is wanted; delete the checkpoint "
                "beside it to train from the start"
            )
        elif parallel.is_main():  # of a run that began anew, or of the time before this step's
            self.file.unlink(missing_ok=True)
        parallel.barrier()

    def due(self, step: int) -> bool:
        """Whether levels are read after this step."""
        return 0 < step < self.steps and step % self.every == 0

    def take(self, step: int) -> None:
        """Read the levels after this step, unless `start` found them."""
        if parallel.from_main(self._kept()[0]) == step:
            return
        self.levels[:] = self.now()
        if parallel.is_main():
            held = {str(item): level for item, level in enumerate(self.levels)}
            with runs.replacing(self.file) as temporary, safetensors_errors():
                save_file(held, temporary, {"step": str(step)})
        parallel.barrier()

    def _kept(self) -> tuple[int, list[Tensor]]:
        """The step that the file is of, and what it holds; 0 and nothing where there is none."""
        if not self.file.exists():
            return 0, []
        with opened(self.file, "delete the checkpoint beside it to train from the start") as stored:
            levels = [stored.get_tensor(str(item)) for item in range(len(self.levels))]
            return int(stored.metadata()["step"]), levels
