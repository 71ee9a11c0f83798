"""Where branches, merges and edits went: angles, norms, spectra, conflicts, and what storage keeps.

Dimensions: M models, S snapshots of one branch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from expunge.adapter_files import block_of
from expunge.analyse.angles import angles, norms, phases
from expunge.analyse.deltas import (
    AdapterDeltas,
    Deltas,
    LowRank,
    ModelDeltas,
    gram,
    layers_of,
    module_of,
)
from expunge.analyse.signs import conflict_rows
from expunge.analyse.spectra import overlap, spectrum
from expunge.analyse.storage import storage
from expunge.config import Section
from expunge.edit.task import Weights
from expunge.merge.branches import read_branches
from expunge.merge.checkpoint import Checkpoint
from expunge.merge.families import Elect
from expunge.merge.section import Merge
from expunge.progress import progress

Tables = dict[str, list[dict[str, Any]]]


class LookAtWeights(Section):
    """How closely weights are looked at."""

    directions: int = Field(default=8, ge=1)
    """First singular directions whose spaces are compared."""


@dataclass(frozen=True)
class Changed:
    """The models of a run as changes of its target."""

    target: Path
    branches: Mapping[str, Weights]
    made: Mapping[str, Weights]
    """Merges and edits."""

    sources: Mapping[str, Sequence[str]]
    """What each merge and edit was made from."""

    merges: Mapping[str, Merge] = field(default_factory=dict)
    """Sections of those among `made` that are merges."""

    snapshots: Mapping[str, Mapping[int, Path]] = field(default_factory=dict)
    """By branch, adapter folders by step."""

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Whose angles are taken: branches, a branch and what is made, an edit and its source."""
        branches = list(self.branches)
        found = [(a, b) for i, a in enumerate(branches) for b in branches[i + 1 :]]
        found += [(branch, name) for name in self.made for branch in branches]
        more = [(s, name) for name in self.made for s in self.sources[name] if s in self.made]
        return found + more


def weights_tables(run: Changed, config: LookAtWeights) -> Tables:
    """Every table of the analysis `weights`, by name."""
    models = {n: _deltas(w, run.target) for n, w in {**run.branches, **run.made}.items()}
    names = list(models)
    grams, spectra, overlaps, stored = {}, [], [], []
    base = Checkpoint(run.target)
    layers = layers_of(models.values())
    with progress("weights", len(layers), "layers") as bar:
        for layer in layers:
            here = {name: deltas.get(layer) for name, deltas in models.items()}
            grams[layer] = gram(list(here.values()))
            where = {"layer": layer, "block": block_of(layer), "module": module_of(layer)}
            low = {name: delta for name, delta in here.items() if isinstance(delta, LowRank)}
            for name, delta in low.items():
                spectra.append({"model": name, **where, **spectrum(delta)})
                kept = storage(delta, layer, base)
                stored += [] if kept is None else [{"model": name, **where, **kept}]
            overlaps += [
                {"one": a, "two": b, **where, **overlap(low[a], low[b], config.directions)}
                for a, b in run.pairs
                if a in low and b in low
            ]
            bar()
    found = {
        "norms": norms(grams, names),
        "angles": angles(grams, names, run.pairs),
        "spectra": spectra,
        "overlap": overlaps,
        "signs": _signs(run),
        "storage": stored,
    }
    return found | _phases(run)


def _deltas(weights: Weights, target: Path) -> Deltas:
    if weights.adapter is not None and weights.base == target:
        return AdapterDeltas(weights.adapter)
    return ModelDeltas(weights.base, target)


def _signs(run: Changed) -> list[dict[str, Any]]:
    """Sign conflicts of each merge that elects signs, or could."""
    rows = []
    for name, config in run.merges.items():
        sources = run.sources[name]
        folders = [w.adapter for w in map(run.branches.get, sources) if w is not None and w.adapter]
        if len(folders) != len(sources) or not isinstance(config.row.how, Elect):
            continue
        branches = read_branches(folders)
        found = conflict_rows(branches, sources, config, branches[0].factors)
        rows += [{"merge": name, **row} for row in found]
    return rows


def _phases(run: Changed) -> Tables:
    """Norms and angles of what each phase of each branch added."""
    sizes, turns = [], []
    for name, kept in run.snapshots.items():
        steps = sorted(kept)
        if not steps:
            continue
        adapters = [AdapterDeltas(kept[step]) for step in steps]
        grams = {layer: gram([one.get(layer) for one in adapters]) for layer in layers_of(adapters)}
        own_sizes, own_turns = phases(grams, steps)
        sizes += [{"branch": name, **row} for row in own_sizes]
        turns += [{"branch": name, **row} for row in own_turns]
    return {"phases": sizes, "phase_angles": turns}


def summary(tables: Tables) -> dict[str, Any]:
    """The numbers of the whole of each model: norm, angles, median effective rank and overlap."""
    ranks: dict[str, list[float]] = {}
    for row in tables["spectra"]:
        ranks.setdefault(row["model"], []).append(row["effective_rank"])
    overlaps: dict[tuple[str, str], list[float]] = {}
    for row in tables["overlap"]:
        if row["columns"] is not None:
            both = (row["columns"] + row["rows"]) / 2
            overlaps.setdefault((row["one"], row["two"]), []).append(both)
    return {
        "norm": {r["model"]: r["norm"] for r in tables["norms"] if r["scope"] == "all"},
        "degrees": [
            {"one": r["one"], "two": r["two"], "degrees": r["degrees"]}
            for r in tables["angles"]
            if r["scope"] == "all"
        ],
        "effective_rank": {name: float(np.median(found)) for name, found in ranks.items()},
        "overlap": [
            {"one": a, "two": b, "median": float(np.median(found))}
            for (a, b), found in overlaps.items()
        ],
    }
