"""Courses of training as tables: every metric of each branch over steps and epochs.

A step counts optimiser steps; step 0 is the target, before the first.
"""

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from expunge.evaluate.numbers import flat_numbers
from expunge.evaluate.semeval import HALVES

Row = dict[str, Any]


@dataclass(frozen=True)
class Course:
    """What is known of the training of one branch."""

    branch: str
    ends: Sequence[int]
    """The steps after which an epoch ends."""

    log: Sequence[Mapping[str, Any]] = ()
    """A record for each step, as training wrote it."""

    watched: Sequence[Mapping[str, Any]] = ()
    """Evaluations during training: `step` and `numbers`."""

    measured: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    """What was measured of kept adapters, by step."""

    final: Mapping[str, Any] | None = None
    """What was measured of the weights that the branch consists of."""


def epoch_of(step: int, ends: Sequence[int]) -> float:
    """How many epochs a step is into training; within one, by the share of its steps.

    Epochs may be of unequal length. Steps beyond the last end count as at it.
    """
    whole = bisect_right(ends, step)
    if whole == len(ends):
        return float(whole)
    start = ends[whole - 1] if whole else 0
    return whole + (step - start) / (ends[whole] - start)


def trajectory_tables(courses: Sequence[Course]) -> dict[str, list[Row]]:
    """Every table of the analysis `trajectories`, by name."""
    return {
        "training": [row for one in courses for row in _training(one)],
        "watched": [row for one in courses for row in _watched(one)],
        "snapshots": [row for one in courses for row in _snapshots(one)],
        "epochs": [row for one in courses for row in epochs(one)],
        "objectives": [row for one in courses for row in objectives(one)],
    }


def epochs(course: Course) -> list[Row]:
    """Regurgitation and knowledge of each half and task over epochs: the paper's first figure.

    `regurgitation` and `knowledge` are the official scores of completions and questions, where
    something was generated; `completion_hits` and `question_exact` need no generation (see
    likelihoods). The task `all` is the mean of the tasks.

    Source: the figure is that of arXiv:2503.21088.
    """
    rows = []
    for where, found in _points(course):
        for half in HALVES:
            tasks = {task: _task(found, half, task) for task in _tasks(found, half)}
            known = {t: one for t, one in tasks.items() if any(v is not None for v in one.values())}
            if not known:
                continue
            names = next(iter(known.values()))
            whole = {name: _mean([one[name] for one in known.values()]) for name in names}
            rows += [
                {**where, "half": half, "task": task, **one}
                for task, one in {"all": whole, **known}.items()
            ]
    return rows


def objectives(course: Course) -> list[Row]:
    """Forget loss, retain loss and KL to the target over epochs: the paper's second figure.

    Source: the figure is that of arXiv:2503.21088, which sets NPO alone against the full objective.
    """
    return [
        {
            **where,
            "forget_nll": found.get("nll.forget"),
            "retain_nll": found.get("nll.retain"),
            "kl": found.get("kl"),
        }
        for where, found in _points(course)
        if "nll.forget" in found or "nll.retain" in found
    ]


def _points(course: Course) -> list[tuple[Row, dict[str, float]]]:
    """Where and what of every measurement, in the order of training."""
    found = [("snapshot", step, flat_numbers(one)) for step, one in course.measured.items()]
    if course.final is not None:
        found.append(("final", len(course.log), flat_numbers(course.final)))
    found += [("watch", one["step"], dict(one["numbers"])) for one in course.watched]
    order = ("snapshot", "watch", "final")
    found.sort(key=lambda one: (one[1], order.index(one[0])))
    return [
        (
            {
                "branch": course.branch,
                "step": step,
                "epoch": epoch_of(step, course.ends),
                "source": source,
            },
            numbers,
        )
        for source, step, numbers in found
    ]


def _tasks(found: Mapping[str, float], half: str) -> list[str]:
    """The tasks that something was measured of, by name."""
    terms = (re.search(rf"(?:^|\.)terms\.{half}/(.+)/(?:sc|qa)", name) for name in found)
    return sorted({term[1] for term in terms if term is not None})


def _task(found: Mapping[str, float], half: str, task: str) -> dict[str, float | None]:
    term = f"{half}/{task}"
    return {
        "regurgitation": found.get(f"semeval.terms.{term}/sc"),
        "knowledge": found.get(f"semeval.terms.{term}/qa"),
        "completion_hits": found.get(f"terms.{term}/sc.hits"),
        "question_exact": found.get(f"terms.{term}/qa.exact"),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _training(course: Course) -> list[Row]:
    return [
        {
            "branch": course.branch,
            "step": record["step"],
            "epoch": epoch_of(record["step"], course.ends),
            **{name: value for name, value in record.items() if name != "step"},
        }
        for record in course.log
    ]


def _watched(course: Course) -> list[Row]:
    points = _points(Course(course.branch, course.ends, watched=course.watched))
    return [{**where, **numbers} for where, numbers in points]


def _snapshots(course: Course) -> list[Row]:
    given = course.log, (), course.measured, course.final
    points = _points(Course(course.branch, course.ends, *given))
    return [{**where, **numbers} for where, numbers in points]
