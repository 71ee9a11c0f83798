"""The guards of a recipe as stages: what each is made of, and the folder it is written to."""

from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any

from expunge.edit.task import Weights
from expunge.guard.helpers import HelperSource
from expunge.guard.make import Making, check_guard, make_guard, making_of
from expunge.inputs import Inputs, said_of


class Guards(Inputs, ABC):
    """The part of a pipeline that makes guards."""

    def checked(self, base: Path) -> Path:
        """The model's folder; before anything is computed, a guard that cannot be made of the texts
        and the tokenizer is refused too."""
        base = super().checked(base)
        for name, guard in self.recipe.guards.items() if self.builds else ():
            with said_of(f"guard '{name}'"):
                check_guard(guard, self._making(Weights(base)))
        return base

    def guard(self, name: str, seed: int) -> Weights:
        """One guard, and the weights behind it."""
        config = self.recipe.guards[name]
        behind = self.weights(config.of, seed)
        helpers = {role: self.weights(model, seed) for role, model in config.helpers.items()}

        def build(work: Path) -> None:
            found = {
                role: self._helper(config.helpers[role], weights)
                for role, weights in helpers.items()
            }
            make_guard(config, self._making(behind, helpers=found), work / "guard")

        inputs = {"model": self.recipe.model.told()}
        for role, weights in {"of": behind, **helpers}.items():
            inputs |= {f"{role}.{k}": v for k, v in self._weights_keys(weights).items()}
        done = self.folder.stage(name, config, inputs | self._data_hashes, build)
        return replace(behind, guard=done / "guard")

    def _making(self, behind: Weights, **given: Any) -> Making:
        """What a guard of these weights is made of."""
        how = self.recipe.model
        given |= {"forget": self.sets.forget, "retain": self.sets.retain}
        given |= {"separator": how.separator, "max_length": how.max_length}
        return making_of(behind.base, behind.adapter, dtype=how.dtype, **given)

    @abstractmethod
    def weights(self, name: str, seed: int) -> Weights:
        """A model of the results by its name."""

    def _helper(self, name: str, weights: Weights) -> HelperSource:
        """Where a helper lies; a branch of blocks shares them with the target."""
        branch = self.recipe.branches.get(name)
        blocks = None if branch is None else branch.blocks
        trunk = self.weights("target", self.recipe.seeds[0]).base if blocks else None
        return HelperSource(weights.base, weights.adapter, blocks, trunk)

    def _weights_keys(self, weights: Weights) -> dict[str, str]:
        """What stands for the base, the adapter and the guard of a model."""
        adapter, guard = weights.adapter, weights.guard
        found = {"base": self._weights_key(weights.base)}
        found["adapter"] = self._weights_key(adapter) if adapter else ""
        return found | ({"guard": self._weights_key(guard)} if guard else {})

    @abstractmethod
    def _weights_key(self, folder: Path) -> str:
        """What stands for the content of a folder of weights."""
