"""A run folder that is only looked at: what is finished of it, and nothing is built."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from expunge import runs
from expunge.edit.task import Weights
from expunge.errors import CalibrationError, UnfinishedError
from expunge.evaluate.suite import EvaluationData
from expunge.finished import Finished
from expunge.pipeline import Pipeline
from expunge.recipe import kept_recipe
from expunge.unlearn.checkpoints import LOG
from expunge.unlearn.snapshots import snapshots

Found = TypeVar("Found")


class Looked(Pipeline):
    """The stages of a run folder, each found or an `UnfinishedError`."""

    def __init__(self, folder: Path | str) -> None:
        """Look at the run in `folder`; a folder that holds no run is a `RunError`."""
        root = Path(folder)
        recipe = kept_recipe(root)
        store = runs.store_of(root)
        super().__init__(recipe, root, Finished(root))
        self.builder = runs.Run(root, owner=recipe.name, store=store)
        """Where analyses are kept, as stages of the same store."""

    def nothing(self, reason: str) -> UnfinishedError:
        """The error that there is nothing to analyse yet."""
        return UnfinishedError(
            f"{self.folder.root} has nothing to analyse yet: {reason}; expunge run goes on with it",
            self.folder.root,
        )

    def done(self, seed: int) -> dict[str, Weights]:
        """Every finished model, in the order they are made."""
        found = {n: found_or_none(lambda n=n: self.weights(n, seed)) for n in self.recipe.models}
        return {name: weights for name, weights in found.items() if weights is not None}

    def evaluated_models(
        self, models: Mapping[str, Weights]
    ) -> dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]:
        """Scores and items of those models that have been evaluated."""
        found = {n: found_or_none(lambda n=n, w=w: self.evaluate(n, w)) for n, w in models.items()}
        return {name: scores for name, scores in found.items() if scores is not None}

    def branch_folder(self, name: str, seed: int) -> Path | None:
        """What a branch's training has written so far, finished or not."""
        try:
            weights = self.branch(name, seed)
        except UnfinishedError as error:
            place = error.folder.with_name(error.folder.name + ".partial")
            is_own = place.name.startswith(f"{name}-")
            return place if is_own and place.is_dir() else None
        return weights.folder.parent

    def steps(self, name: str, seed: int) -> list[dict[str, Any]]:
        """What a branch's training has logged so far, a record a step."""
        folder = self.branch_folder(name, seed)
        return [] if folder is None else json_lines(folder / LOG)

    def snapshots(self, name: str, seed: int) -> dict[int, Path]:
        """The adapters that a branch has kept so far, by step; the last is the finished one's.

        Where a watch chose among the weights it is not known which step the finished one is of.
        """
        branch, folder = self.recipe.branches[name], self.branch_folder(name, seed)
        if folder is None or branch.training == "full" or branch.blocks is not None:
            return {}
        found, last = snapshots(folder), len(self.steps(name, seed))
        whole = (folder / "adapter").is_dir() and last
        chosen = branch.watch is not None and (branch.watch.metric or branch.watch.until)
        return found | ({last: folder / "adapter"} if whole and not chosen else {})

    @property
    def evaluated(self) -> EvaluationData:
        """What models are evaluated on."""
        return self._evaluated

    @property
    def reading(self) -> dict[str, Any]:
        """How items are cut and joined."""
        return self._reading

    @property
    def target_key(self) -> str:
        """What stands for the target, the data and how they are read."""
        return self._target_key

    @property
    def data_keys(self) -> dict[str, str]:
        """What stands for the data, and how they are read, among the inputs of a stage."""
        return {"reading": self.recipe.model.told(), **self._data_hashes}

    def keys(self, models: Mapping[str, Weights]) -> dict[str, str]:
        """What stands for models among the inputs of a stage."""
        return {
            f"{name}.{part}": key
            for name, weights in models.items()
            for part, key in self._weights_keys(weights).items()
        }


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file with one a line; none where there is no file.

    A line that a killed process cut off is left out.
    """
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines() if text.endswith("\n") else text.splitlines()[:-1]
    return [json.loads(line) for line in lines]


def found_or_none(find: Callable[[], Found]) -> Found | None:
    """What is found; None where it is not finished."""
    try:
        return find()
    except (UnfinishedError, CalibrationError):  # one that chose nothing made no model
        return None
