"""Budgets: a run that ends in time, with what each training stage may take of it."""

import re
import time
from collections.abc import Sequence
from pathlib import Path

from expunge import parallel
from expunge.errors import RecipeError
from expunge.pipeline import Pipeline
from expunge.plan.folder import BudgetRun
from expunge.plan.predict import Plan, Prediction, plan, write_plan
from expunge.progress import say
from expunge.recipe import Recipe, keep_recipe
from expunge.runner import run_pipelines

SAFETY = 1.25
"""What is kept for loading, merging, scoring and writing, as a multiple of its prediction."""

REPORT = 1.5
"""Seconds that are kept for the report of a seed, which is no stage."""


def parse_budget(text: str) -> float:
    """Seconds of `90s`, `30m`, `1h`, `1h30m` or a plain number of seconds."""
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text.strip().lower())
    parts = found.groups() if found else ()
    try:
        seconds = float(text) if not any(parts) else _seconds(parts)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise RecipeError(
            f"--budget {text!r} is no time; write 90s, 30m, 1h, 1h30m or a number of seconds"
        )
    return seconds


def _seconds(parts: Sequence[str | None]) -> float:
    return float(sum(int(n or 0) * unit for n, unit in zip(parts, (3600, 60, 1), strict=True)))


class Budget:
    """Shares what is left of the time among the training stages that are left.

    What cannot be shortened (loading, references, merging, scoring, writing) is kept back, with
    some to spare; the rest goes to training in proportion to its predicted time. Each share is
    dealt when its stage begins, so what one stage takes too long for, the later ones lose.
    """

    def __init__(self, ends: float, stages: list[Prediction]) -> None:
        """`ends` is a time of `time.monotonic`; `stages` stand in the order of the run."""
        self.ends, self.stages = ends, stages
        self.labels = [stage.label for stage in stages]

    def deadline(self, name: str, seed: int | None = None) -> float:
        """When the training of a stage that begins now must end."""
        here = self.labels.index((name, None if name == "target" else seed))
        rest = self.stages[here:]
        kept = SAFETY * sum(stage.fixed for stage in rest)
        share = self.stages[here].training / sum(stage.training for stage in rest)
        now = time.monotonic()
        # Its own references are scored after this moment, and kept back with the rest.
        own = self.stages[here].fixed / 2
        return now + own + max(0.0, self.ends - now - kept) * share


def run_in_time(recipe: Recipe, out: Path, seconds: float, start: float) -> dict[int, Path]:
    """Every stage of `recipe` within `seconds` of `start`; the folder of each seed's report.

    Refuses before anything is trained what cannot be done in the time.
    """
    parallel.refuse_several("a run within a budget")
    trained = ["target", *recipe.branches]
    folder = BudgetRun(out, owner=recipe.name, trained=trained, budget=seconds)
    made = plan(recipe, out, budget=seconds)
    spent = time.monotonic() - start
    check_budget(made, seconds, spent)
    write_plan(made, out)
    keep_recipe(recipe, out)
    ends = start + seconds - REPORT * len(recipe.seeds)
    folder.deadlines = Budget(ends, made.stages).deadline
    folders = run_pipelines([Pipeline(recipe, out, folder)])[recipe.name]
    took = time.monotonic() - start
    said = "in time" if took <= seconds else "too late"
    say(f"took {took:.0f} s of a budget of {seconds:.0f} s: {said}")
    return folders


def least_seconds(made: Plan) -> float:
    """With one step of each training, and what is kept for the rest."""
    fixed = sum(stage.fixed for stage in made.stages)
    return SAFETY * fixed + (made.least - fixed)


def check_budget(made: Plan, seconds: float, spent: float = 0.0) -> None:
    """Refuse a budget in which not even one step of each training fits."""
    least = spent + least_seconds(made)
    if least > seconds:
        count = sum(stage.steps > 0 for stage in made.stages)
        whole = spent + made.seconds
        raise RecipeError(
            f"a budget of {seconds:.0f} s is too little: one step of each of {count} trainings "
            f"and all that cannot be shortened take {least:.0f} s, the whole run {whole:.0f} s, "
            f"{spent:.0f} s of planning among them"
        )
