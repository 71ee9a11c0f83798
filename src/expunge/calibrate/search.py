"""The search: which line between two ends is tried is Optuna's, where on it is solved for."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from expunge.calibrate.candidate import TARGET, Candidate, End, alone, plain
from expunge.calibrate.floors import Refusal, refusal, said, shortfalls
from expunge.calibrate.objectives import OBJECTIVES
from expunge.calibrate.reading import Material, Reading, documents_of, officially, screen
from expunge.calibrate.resident import Resident
from expunge.calibrate.section import Calibrate
from expunge.calibrate.solve import Solved, solve_balance
from expunge.calibrate.study import Study, open_study
from expunge.errors import CalibrationError
from expunge.evaluate.balance import balance
from expunge.evaluate.reader import Reader
from expunge.evaluate.tables import key_of, sequence_key
from expunge.progress import progress

BASELINE_DENSITY = 0.8
"""Of the paper's TIES, which stands in every table."""

Judge = Callable[[Reader], Mapping[str, Any]]
"""The official evaluation of a model on the calibration fold."""


@dataclass(frozen=True)
class Point:
    """One candidate that was screened whole."""

    candidate: Candidate
    role: str
    """`target`, `end`, `baseline` or `trial`."""

    reading: Reading
    """On the calibration fold."""

    short: Mapping[str, float]
    """What it lacks to the floors; nothing where it meets them."""

    balanced: bool = True
    """Whether its AUC is as near 1/2 as is asked."""

    bracketed: bool = True
    """Whether both sides of 1/2 were seen on its line."""

    official: Reading | None = None
    """Generated and scored on the calibration fold, of a finalist."""

    refused: Refusal | None = None
    """Why a finalist that met the floors when screened did not when generated."""

    @property
    def lack(self) -> tuple[bool, bool, float]:
        """How far it is from what is asked, the least first: a collapsed one is last, and one that
        met the floors and was not judged stands after those of which it is known."""
        if self.refused is not None:
            return self.refused.collapsed, False, sum(self.refused.short.values())
        return False, not self.short, sum(self.short.values())


class Search:
    """One search over the lines between some ends, on the calibration fold."""

    def __init__(
        self,
        resident: Resident,
        given: Material,
        whole: Material,
        config: Calibrate,
        ends: Sequence[End],
        *,
        paper: Sequence[End] = (),
    ) -> None:
        """`ends` are the branches first, in order, then their snapshots, and the two of `paper` are
        merged as a baseline; `whole` has all documents, of which `given` may be a sample."""
        self.resident, self.given, self.whole, self.config = resident, given, whole, config
        self.ends, self.paper = [*ends, End(branch=TARGET)], paper
        self.value = OBJECTIVES[config.objective].fn
        target = self._screened(alone(End(branch=TARGET)), "target", None)
        self.points = [target]
        self.screening: Mapping[str, Any] = {}
        """Candidates that were screened for this search, by other processes too, once it ran."""

    @property
    def target(self) -> Reading:
        """What the target shows."""
        return self.points[0].reading

    def run(self, folder: Path, name: str) -> list[Point]:
        """Every candidate that was screened whole: the target, the ends, the paper's merge, and one
        for each trial. Ends that do not bracket the balance are a `CalibrationError`."""
        url = self.config.storage or f"sqlite:///{(folder / 'study.db').absolute()}"
        study = open_study(url, f"{name}-{self._key()}", self.config)
        with progress("calibrate", self.config.trials + len(self.ends), "candidates") as bar:
            for end in self.ends[:-1]:
                self.points.append(self._screened(alone(end), "end", self.target))
                bar()
            if len(self.paper) > 1:
                paper = plain("ties", self.paper[0], self.paper[1], BASELINE_DENSITY)
                if self.resident.can_merge(paper):
                    self.points.append(self._screened(paper, "baseline", self.target))
            over, under = self._sides()
            for candidate, bracketed in self._trials(study, over, under, bar):
                point = self._screened(candidate, "trial", self.target)
                self.points.append(replace(point, bracketed=bracketed))
        return self.points

    def _key(self) -> str:
        """Stands for what is searched: searches of one storage share trials if it is the same."""
        shown = self.config.model_dump_json(exclude={"trials", "storage", "finalists"})
        given = self.given
        sides = [
            [(name, sequence_key(sequence)) for name, sequence in side]
            for side in (given.items, given.members, given.nonmembers)
        ]
        neutral = [sequence_key(sequence) for sequence in given.neutral]
        ends = sorted((e.label, self.resident.hashes[e.label]) for e in self.ends[:-1])
        made = self.resident.key, self.resident.dtype, ends
        return key_of(made, shown, sides, neutral, given.tasks)

    def finals(self, judge: Judge) -> int | None:
        """The number of the best trial, once the best few were balanced on all documents, where
        the search read a sample, generated from and scored.

        One that is not balanced comes after all that are, whatever is maximised, and one whose line
        was not bracketed after those. Where the few fail, or none of them is balanced by all
        documents, as many again are judged twice over; None where all fail.
        """
        config = self.config
        able = [n for n, p in enumerate(self.points) if p.role == "trial" and not p.short]
        able.sort(key=lambda n: self._worth(self.points[n], self.points[n].reading), reverse=True)
        if not able:
            return None
        before = self._official(alone(End(branch=TARGET)), self.target, judge)
        best: tuple[tuple[bool, bool, float], int] | None = None
        for place, number in enumerate(able[: config.judged]):
            settled = best is not None and (best[0][0] or self.whole == self.given)
            if settled and place >= config.finalists:
                break
            point = self.points[number] = self._settled(self.points[number])
            if point.short:
                continue
            official = self._official(point.candidate, point.reading, judge)
            refused = refusal(official, before, self.config)
            self.points[number] = replace(point, official=official[0], refused=refused)
            value = self._worth(point, official[0])
            if refused is None and (best is None or value > best[0]):
                best = (value, number)
        return None if best is None else best[1]

    def nearest(self) -> tuple[int, str]:
        """The trial that lacks least to the floors, and what it lacks."""
        trials = [n for n, p in enumerate(self.points) if p.role == "trial"]
        number = min(trials, key=lambda n: self.points[n].lack)
        point = self.points[number]
        if point.refused is not None:
            return number, point.refused.why
        lacks = said(point.reading, self.target, self.config.floors)
        return number, lacks or "what its official scores, which were not taken, may show"

    def near(self, reading: Reading, given: Material) -> bool:
        """Whether the AUC on some documents is within the tolerance, or within half a member: where
        one passes all non-members at a place of the line, none may lie nearer."""
        members = Counter(given.tasks[0]).values() if given.tasks else [len(given.members)]
        most = max([self.config.tolerance, *(0.5 / max(count, 1) for count in members)])
        return abs(reading.auc - 0.5) <= most + 1e-9

    def _worth(self, point: Point, reading: Reading) -> tuple[bool, bool, float]:
        """What is chosen by, the greatest first."""
        return point.balanced, point.bracketed, self.value(reading)

    def _settled(self, point: Point) -> Point:
        """A trial whose line is balanced by all documents, beginning where a sample had it."""
        if self.whole == self.given:
            return point
        solved = self._solved(point.candidate, self.whole, start=point.candidate.t)
        candidate = point.candidate.at(solved.t)
        found = self._screened(candidate, point.role, self.target, self.whole)
        return replace(found, bracketed=solved.bracketed)

    def _solved(self, line: Candidate, given: Material, start: float | None = None) -> Solved:
        return solve_balance(
            lambda t: self._membership(line.at(t), given),
            ends=(self._gap(line.over), self._gap(line.under)),
            tolerance=self.config.tolerance,
            steps=self.config.steps,
            start=start,
        )

    def _screened(
        self,
        candidate: Candidate,
        role: str,
        target: Reading | None,
        given: Material | None = None,
    ) -> Point:
        with self.resident.reader(candidate, whole=True) as reader:
            reading = screen(reader, given or self.given, self.config.attacks)
        lacks = {} if target is None else shortfalls(reading, target, self.config.floors)
        balanced = self.near(reading, given or self.given)
        return Point(candidate, role, reading, lacks, balanced)

    def _official(
        self, candidate: Candidate, reading: Reading, judge: Judge
    ) -> tuple[Reading, Mapping[str, Any]]:
        with self.resident.reader(candidate) as reader:
            entry = judge(reader)
        return officially(reading, entry), entry

    def _sides(self) -> tuple[list[End], list[End]]:
        """Ends at or below the balance, alone or as far as the scale goes, and ends above it."""
        over, under, tried = [], [End(branch=TARGET)], []
        most, balanced = self.config.scale[1], 0.5 + self.config.tolerance
        for point in self.points:
            if point.role != "end":
                continue
            end, auc = point.candidate.over, point.reading.auc
            if auc > balanced and most > 1:
                far = self._membership(alone(end, most), self.given)
                tried.append(
                    f"{_said(end.label, point.reading)}, {_said(f'at scale {most:g}', far)}"
                )
                (over if far.auc <= balanced else under).append(end)
            else:
                tried.append(_said(end.label, point.reading))
                (over if auc <= balanced else under).append(end)
        if self.target.auc <= 0.5:
            raise CalibrationError(
                f"the target's own membership AUC is {self.target.auc:.2f} on the calibration "
                "fold: it does not know the members, so there is nothing to balance"
            )
        if not over:
            raise CalibrationError(
                "the branches do not bracket the balance: on the calibration fold every membership "
                f"AUC is above 1/2 ({'; '.join(tried)}). A branch that forgets whole documents "
                "further would help: a term with scope: document and a higher target or margin, "
                "more steps, a branch `after` it that has these, or a greater calibrate.scale"
            )
        return over, under

    def _trials(
        self, study: Study, over: list[End], under: list[End], bar: Callable[[], None]
    ) -> list[tuple[Candidate, bool]]:
        """The balanced candidate of each trial, and whether its line was bracketed."""
        config = self.config
        while len(study.found()) < config.trials:
            trial, line = study.ask(over, under)
            solved = self._solved(line, self.given)
            point = self._screened(line.at(solved.t), "trial", self.target)
            off = abs(solved.auc - 0.5) - config.tolerance
            study.tell(
                trial,
                point.candidate,
                self.value(point.reading),
                bracketed=solved.bracketed,
                lacks={"floors": sum(point.short.values()), "balance": off},
                spent=self.resident.spent,
            )
            bar()
        self.screening = study.spent(self.resident.spent)
        return study.found()

    def _gap(self, end: End) -> float | None:
        known = {p.candidate.over.label: p for p in self.points if p.role in ("end", "target")}
        return known[end.label].reading.gap

    def _membership(self, candidate: Candidate, given: Material) -> Reading:
        """Only what the attacks say of a candidate."""
        with self.resident.reader(candidate) as reader:
            scored = documents_of(reader, given, self.config.attacks)
        return Reading({}, balance(scored), 0.0)


def _said(who: str, reading: Reading) -> str:
    """How well members are told apart: 'deep 0.62 (two-sided 0.70, KS 0.31)'."""
    return f"{who} {reading.auc:.2f} (two-sided {reading.two_sided:.2f}, KS {reading.ks:.2f})"
