"""A plan on the terminal."""

import json

from expunge.plan.budget import least_seconds
from expunge.plan.predict import Plan
from expunge.report.terminal import console, print_rows


def print_plan(made: Plan, as_json: bool, *, kept: bool) -> None:
    """Print the stages, the total, what the machine has and the picked settings.

    Of a plan that is not `kept` in a run folder it says that its error will not be stated.
    """
    out = console()
    if as_json:
        out.print_json(json.dumps(made.as_json()))
        return
    rows = [
        {
            "stage": one.stage,
            "seed": one.seed,
            "seconds": f"{one.seconds:.1f}",
            "GB": f"{one.memory_bytes / 1e9:.1f}",
            "from": one.how,
        }
        for one in made.stages
    ]
    total = {"stage": "total", "seed": None, "seconds": f"{made.seconds:.1f}"}
    most = max((one.memory_bytes for one in made.stages), default=0)
    rows.append({**total, "GB": f"{most / 1e9:.1f}", "from": ""})
    print_rows(rows, as_json=False)
    for line in (*_machine(made), *(one.sentence for one in made.settings), *_budget(made)):
        out.print(line, markup=False)
    if not kept:
        out.print("how wrong this was is stated only with --out DIR, after the run into it")


def _machine(made: Plan) -> list[str]:
    has = made.machine
    device = has["accelerator"] or f"{has['cpus']} cores"
    said = (
        f"this machine: {device}, {has['room_bytes'] / 1e9:.1f} GB of memory free, "
        f"{has['disk_free_bytes'] / 1e9:.0f} GB of disk"
    )
    if has["others"] < 0.5:
        return [said]
    busy = f"others use {has['others']:.1f} of its cores: the times hold while they do"
    return [said, busy]


def _budget(made: Plan) -> list[str]:
    if made.budget is None:
        return []
    least = least_seconds(made)
    if made.budget < least:
        verdict = f"too little: the least is {least:.0f} s"
    elif made.budget < made.seconds:
        verdict = "in time with fewer steps"
    else:
        verdict = "enough for every step"
    return [f"a budget of {made.budget:.0f} s is {verdict}"]
