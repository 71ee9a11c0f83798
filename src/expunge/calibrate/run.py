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
from expunge.calibrate.outcome import CALIBRATION, rows
from expunge.calibrate.reading import Material, Reading, documents_of, screen
from expunge.calibrate.resident import Resident
from expunge.calibrate.search import Judge, Search
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
    """Members and non-members of both sides, for the cross-calibration."""

    folds: Callable[[str], int]
    """The fold of a document of `everything`, by its id."""

    count: int
    """How many folds."""


def calibrate(
    resident: Resident,
    given: Given,
    config: Calibrate,
    ends: Sequence[End],
    folder: Path,
    *,
    name: str,
    judge: Judge,
) -> dict[str, Any]:
    """Search, judge and write calibration.json, and the chosen adapter where one meets the floors.

    Ends that do not bracket the balance are a `CalibrationError`.
    """
    search = Search(resident, given.sample, given.calibration, config, ends)
    search.run(folder, name)
    start = time.monotonic()
    chosen = search.finals(judge)
    official = round(time.monotonic() - start, 2)
    nearest, lacks = search.nearest()
    shown = nearest if chosen is None else chosen
    tests = {
        number: _tested(resident, point.candidate, given.test, config)
        for number, point in enumerate(search.points)
        if point.role != "trial" or number == shown
    }
    point = search.points[shown]
    certain = _tested(resident, point.candidate, given.calibration, config)
    search.points[shown] = replace(point, reading=certain)
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
    branches: Mapping[str, Path], config: Calibrate
) -> tuple[list[End], dict[str, Path], dict[str, str]]:
    """The ends that branches offer, their adapter folders, and what stands for each, by label.

    `branches` are the folders of the branches' stages, by name.
    """
    ends: list[End] = []
    folders: dict[str, Path] = {}
    hashes: dict[str, str] = {}
    for name, folder in branches.items():
        end = End(branch=name)
        ends.append(end)
        folders[end.label], hashes[end.label] = folder / ADAPTER, folder.name
    for name, folder in branches.items():
        kept = snapshots(folder)
        for step in _spread(sorted(kept), config.snapshots):
            end = End(branch=name, step=step)
            ends.append(end)
            folders[end.label], hashes[end.label] = kept[step], f"{folder.name}@{step}"
    return ends, folders, hashes


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
