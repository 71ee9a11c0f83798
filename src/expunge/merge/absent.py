"""The base of adapters that are merged by themselves: of it only names and shapes are known.

What a merge of adapters adds to its base does not hang on the base's weights, but for DoRA and
methods that say so (families.Piece.looks), which are refused.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from expunge.adapter_files import CONFIG, WEIGHTS
from expunge.errors import MergeError
from expunge.merge.checkpoint import INDEX, SINGLE, Checkpoint, Stored
from expunge.merge.updates import Adapter

ABSENT = "their base"
"""What stands for its name in a merge."""


class Absent(Checkpoint):
    """A base of zeros, with the tensors that at least one of its adapters changes."""

    def __init__(self) -> None:
        self.tensors: dict[str, Stored] = {}
        self.folder = Path(ABSENT)  # which holds nothing
        self._stated = ""

    @property
    def name(self) -> str:
        """The base that the first adapter names."""
        return self._stated

    @property
    def files(self) -> list[Path]:
        """None."""
        return []

    @cached_property
    def config(self) -> dict[str, Any]:
        """Nothing is known of it."""
        return {}

    def take(self, adapter: Adapter) -> None:
        """Learn the shapes that an adapter changes; refuse those that an earlier one denies."""
        self._stated = self._stated or str(adapter.config.get("base_model_name_or_path") or "")
        for name, shape in adapter.shapes.items():
            known = self.tensors.setdefault(
                name, Stored(name, "F32", shape, adapter.folder / WEIGHTS, 0)
            )
            if known.shape != shape:
                raise MergeError(
                    f"{name} is {shape} in {adapter.folder} but {known.shape} in "
                    f"{known.file.parent}; adapters must be of the same base"
                )

    def raw(self, name: str) -> np.ndarray:
        """Zeros, of which no page is touched until it is read."""
        zeros = np.zeros(self.tensors[name].nbytes, np.uint8)
        zeros.flags.writeable = False
        return zeros


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and no model."""
    held = [(folder / name).is_file() for name in (CONFIG, SINGLE, INDEX)]
    return held == [True, False, False]
