"""A run folder that is only read: what is finished of it is found, and nothing is built."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from expunge import runs
from expunge.config import Section
from expunge.errors import UnfinishedError


class Finished(runs.Run):
    """A run folder whose stages are found or an `UnfinishedError`, never built.

    A stage that a budget cut short stands for the whole one where that is not there.
    """

    def __init__(self, root: Path) -> None:
        """Look at `root`, which holds a run; nothing is written to it."""
        self.root, self.store, self.wait = root, runs.store_of(root) or root, False
        self._asked = set()

    def stage(
        self,
        name: str,
        section: Section,
        inputs: Mapping[str, str],
        build: Callable[[Path], Any],
        *,
        together: bool = False,
    ) -> Path:
        """The finished folder of a stage."""
        done = self.store / "stages" / f"{name}-{runs.stage_key(name, section, inputs)}"
        found = done if done.exists() else self._cut_short(name, section, inputs)
        if found is None:
            raise UnfinishedError(
                f"'{name}' of {self.root} is not finished; expunge run RECIPE --out {self.root} "
                "goes on",
                done,
            )
        self._asked.add(found.name)
        return found

    def _cut_short(self, name: str, section: Section, inputs: Mapping[str, str]) -> Path | None:
        """The last finished stage that differs from the one asked for in its budget alone."""
        found = {}
        for note in self.store.glob(f"stages/{name}-*/{runs.PROVENANCE}"):
            said = runs.read_json(note)
            given = {key: value for key, value in said["inputs"].items() if key != "budget"}
            whole = note.parent.suffix != ".partial" and said["stage"] == name
            if not whole or "budget" not in said["inputs"] or given != dict(inputs):
                continue
            if said["key"] == runs.stage_key(name, section, said["inputs"]):
                found[said["finished"]] = note.parent
        return found[max(found)] if found else None
