"""A whole calibration: search on one side of the documents, judge on the other, say how sure."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from expunge import runs
from expunge.calibrate.candidate import Candidate, End
from expunge.calibrate.cross import Line, around, cross_calibrated
from expunge.calibrate.outcome import CALIBRATION, front, rows
from expunge.calibrate.reading import Material, Reading, documents_of, screen
from expunge.calibrate.resident import Resident
from expunge.calibrate.search import Judge, Point, Search
from expunge.calibrate.section import Calibrate
from expunge.unlearn.snapshots import snapshots

RESAMPLES = 1000
ADAPTER = "adapter"


@dataclass(frozen=True)
class Given:
    """The documents of a calibration."""

    sample: Material
    """What the search reads: a sample of `calibration` where that is much."""

    calibration: Material
    """What chooses: all documents on its side, and the items of the sample."""

    test: Material
    """What only judges."""

    everything: Material
    """Members and non-members of both sides, for the cross-calibration; stand-ins of both where
    these choose."""

    folds: Callable[[str], int]
    """The fold of a document of `everything`, by its id."""

    count: int
    """How many folds."""


@dataclass(frozen=True)
class Ends:
    """The ends of a calibration."""

    searched: list[End]
    """Branches first, in order, then their snapshots."""

    paper: list[End]
    """What the paper's merge is made of, which stands in every table."""

    folders: dict[str, Path]
    """The adapter folder of each, by label."""

    stages: dict[str, str] | None = None
    """The stages of the paper's branches; none where the first two stand in for them."""

    @property
    def hashes(self) -> dict[str, str]:
        """What stands for the content of each folder, by label."""
        return {label: runs.hash_folder(folder) for label, folder in self.folders.items()}


def calibrate(
    resident: Resident,
    given: Given,
    config: Calibrate,
    ends: Ends,
    folder: Path,
    *,
    name: str,
    judge: Judge,
) -> dict[str, Any]:
    """Search, judge and write calibration.json, and the chosen adapter where one meets the floors.

    Ends that do not bracket the balance are a `CalibrationError`.
    """
    search = Search(
        resident, given.sample, given.calibration, config, ends.searched, paper=ends.paper
    )
    search.run(folder, name)
    start = time.monotonic()
    chosen = search.finals(judge)
    official = round(time.monotonic() - start, 2)
    nearest, lacks = search.nearest()
    shown = nearest if chosen is None else chosen
    point = search.points[shown]
    certain = _tested(resident, point.candidate, given.calibration, config)
    balanced = search.near(certain, given.calibration)
    search.points[shown] = replace(point, reading=certain, balanced=balanced)
    tests = {}
    for number in _judged(search.points, shown):
        point = search.points[number]
        tests[number] = _tested(resident, point.candidate, given.test, config)
        sampled = point.reading.documents == _count(given.sample)
        side = given.sample if sampled else given.calibration
        reading = _tested(resident, point.candidate, side, config)
        search.points[number] = replace(point, reading=reading)
    line = _line(resident, search.points[shown].candidate, given.everything, config)
    cross = cross_calibrated(
        line,
        [given.folds(sequence.id) for _, sequence in given.everything.members],
        [given.folds(sequence.id) for _, sequence in given.everything.nonmembers],
        folds=given.count,
    )
    found = {
        "name": name,
        "settings": config.model_dump(mode="json"),
        "paper": ends.stages,
        "chosen": chosen,
        "nearest": None if chosen is not None else {"point": nearest, "lacks": lacks},
        "documents": {
            side: {"members": len(part.members), "nonmembers": len(part.nonmembers)}
            for side, part in (("calibration", given.calibration), ("test", given.test))
        },
        "points": rows(search.points, tests),
        "line": line.curve(),
        "cross": cross,
        "screening": {**search.screening, "official_seconds": official},
    }
    if chosen is not None:
        resident.write(search.points[chosen].candidate, folder / ADAPTER)
    runs.write_json(folder / CALIBRATION, found)
    return found


def ends_of(
    branches: Mapping[str, Path], config: Calibrate, paper: Mapping[str, Path] | None = None
) -> Ends:
    """The ends that branches offer, and those of the paper's merge beside them.

    `branches` are the folders of the branches' stages, by name, `paper` those of two more that the
    recipe merges as the paper does; without them these are the first two.
    """
    searched = [End(branch=name) for name in branches]
    folders = {end.label: branches[end.branch] / ADAPTER for end in searched}
    for name, folder in branches.items():
        kept = snapshots(folder)
        for step in _spread(sorted(kept), config.snapshots):
            end = End(branch=name, step=step)
            searched.append(end)
            folders[end.label] = kept[step]
    pair = [End(branch=name) for name in paper or [*branches][:2]]
    folders |= {name: folder / ADAPTER for name, folder in (paper or {}).items()}
    stages = {name: folder.name for name, folder in paper.items()} if paper else None
    return Ends(searched, pair, folders, stages)


def _judged(points: Sequence[Point], shown: int) -> list[int]:
    """The points that the other documents judge: those that are no trials, the one shown, the
    finalists that were generated from, and the front."""
    chosen = {shown, *front([point.reading for point in points])}
    chosen |= {n for n, p in enumerate(points) if p.role != "trial" or p.official is not None}
    return sorted(chosen)


def _count(given: Material) -> int:
    return len(given.members) + len(given.nonmembers)


def _tested(
    resident: Resident, candidate: Candidate, given: Material, config: Calibrate
) -> Reading:
    """What a candidate shows on one side, with intervals."""
    with resident.reader(candidate) as reader:
        return screen(reader, given, config.attacks, resamples=RESAMPLES)


def _line(resident: Resident, candidate: Candidate, given: Material, config: Calibrate) -> Line:
    """What the attacks say of all documents about the chosen point of its line."""
    points, found = around(candidate.t), []
    for t in points:
        with resident.reader(candidate.at(t)) as reader:
            found.append(documents_of(reader, given, config.attacks))
    scores = {
        attack: (
            np.array([one[attack][0] for one in found]),
            np.array([one[attack][1] for one in found]),
        )
        for attack in config.attacks
    }
    return Line(points, scores, given.tasks)


def _spread(steps: Sequence[int], most: int) -> list[int]:
    """At most so many, evenly spread."""
    if len(steps) <= most:
        return list(steps)
    return [steps[i * len(steps) // most] for i in range(most)]
