"""Run folders that a plan needs: one that is only looked at, and one that keeps a budget."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge import runs
from expunge.config import Section
from expunge.recipe import Recipe
from expunge.unlearn.checkpoints import SHORTENED

Deadline = Callable[[str, int | None], float | None]
"""(stage, seed) → when its training must end, on `time.monotonic`."""


def mark_of(budget: float | None) -> dict[str, str]:
    """The input that a budget (in seconds) adds to the key of a shortened stage."""
    return {} if budget is None else {"budget": f"{budget:g} s"}


class BudgetRun(runs.Run):
    """A run folder whose training stages have deadlines.

    A stage that a deadline cut short is not the stage of the recipe, so it must not be found in
    its place. While it is built its key holds the budget as one more input. If it then was not cut
    (there is no `shortened.json`), it is the recipe's own stage and takes that name. Else it keeps
    the key with the budget: the same command finds it again, a run without a budget or with
    another one does not, and what is made of it (branches, merges, scores) has other keys too,
    for those hold its name. Whole stages that are there already are used as they are.
    """

    def __init__(
        self, root: Path | str, *, owner: str, trained: Collection[str], budget: float
    ) -> None:
        """`trained` are the names of the stages that may be cut, `budget` is in seconds."""
        super().__init__(root, owner=owner)
        self.trained, self.mark = trained, mark_of(budget)
        self.deadlines: Deadline = lambda name, seed: None

    def deadline(self, name: str, seed: int | None = None) -> float | None:
        """When the training of a stage must end."""
        return self.deadlines(name, seed)

    def stage(
        self,
        name: str,
        section: Section,
        inputs: Mapping[str, str],
        build: Callable[[Path], Any],
        *,
        together: bool = False,
    ) -> Path:
        """The finished folder of a stage, whole or shortened."""
        whole = self.store / "stages" / f"{name}-{runs.stage_key(name, section, inputs)}"
        if name not in self.trained or whole.exists():
            return super().stage(name, section, inputs, build, together=together)
        marked = {**inputs, **self.mark}
        done = super().stage(name, section, marked, build, together=together)
        if (done / SHORTENED).exists():
            return done
        said = runs.read_json(done / runs.PROVENANCE)
        said |= {"key": whole.name.rpartition("-")[2], "inputs": dict(inputs)}
        runs.write_json(done / runs.PROVENANCE, said)
        done.rename(whole)
        runs.sync(whole.parent)
        self._asked = self._asked - {done.name} | {whole.name}
        return whole


@dataclass(frozen=True)
class Seen:
    """A stage of a recipe and where it lies, or would."""

    name: str
    seed: int | None
    folder: Path
    finished: bool

    @property
    def label(self) -> tuple[str, int | None]:
        """What names it in a plan."""
        return self.name, self.seed


class Unmade(BaseException):
    """What a stage would have written was asked for."""


class Survey(runs.Run):
    """A run folder that is only read: what its stages are called and which are finished.

    Data are written, into `scratch`; nothing else is built.
    """

    def __init__(
        self, root: Path | None, scratch: Path, *, recipe: Recipe, mark: dict[str, str]
    ) -> None:
        """`mark` is that of the budget whose shortened stages count as finished."""
        self.root = self.store = root or scratch / "run"
        self.recipe, self.mark, self.scratch = recipe, mark, scratch
        self.seen: list[Seen] = []
        self.seed: int | None = None

    def stage(
        self,
        name: str,
        section: Section,
        inputs: Mapping[str, str],
        build: Callable[[Path], Any],
        *,
        together: bool = False,
    ) -> Path:
        """Where a stage lies or would lie."""
        keys = [runs.stage_key(name, section, i) for i in (inputs, {**inputs, **self.mark})]
        places = [self.store / "stages" / f"{name}-{key}" for key in keys]
        found = next((place for place in places if place.exists()), None)
        if name == "data":
            return found or runs.Run(self.scratch, owner=self.recipe.name).stage(
                name, section, inputs, build
            )
        seed = None if name in ("target", "alternates", "levels") else self.seed
        seen = Seen(name, seed, found or places[0], found is not None)
        if seen.folder not in [other.folder for other in self.seen]:
            self.seen.append(seen)
        if name.startswith(("evaluate-", "relearn-")) and found is None:
            raise Unmade
        return seen.folder
