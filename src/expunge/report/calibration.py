"""A calibration as tables: calibration and test side by side, the front, how sure it is."""

from collections.abc import Collection, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from expunge.evaluate.balance import furthest

TASK, RETAIN = "task (screened)", "retain (screened)"
COLUMNS = ("documents", TASK, "AUC", "two-sided", "KS", RETAIN, "neutral")
"""What is said of each side: the documents that attacks read, the screened task aggregate, the AUC
midway, with the least and the greatest end of the attacks' intervals, the worst two-sided AUC and
KS distance over the attacks, the least screened retain term, the NLL of neutral texts."""


def calibration_rows(found: Mapping[str, Any], *, every: bool = False) -> list[dict[str, Any]]:
    """A row for each point that was judged on the test fold (with `every`, for all): the numbers of
    the calibration fold, and behind a slash those of the test fold; `official` is the generated
    task aggregate of a finalist, on the calibration fold."""
    shown = found["chosen"] if found["chosen"] is not None else found["nearest"]["point"]
    made = []
    for point in found["points"]:
        if point["test"] is None and not every and not point["front"]:
            continue
        sides = [_numbers(point["calibration"]), _numbers(point["test"])]
        row = {"point": point["point"], "merge": _named(point, found, shown)}
        for name in COLUMNS:
            both = [side[name] for side in sides]
            row[name] = both[0] if point["test"] is None else " / ".join(both)
        row["official"] = _short(point["official"] and point["official"]["aggregate"])
        row["front"] = "★" if point["front"] else ""
        row["lacks"] = ", ".join(point["short"]) or (point["refused"] or "")
        made.append(row)
    return made


def calibration_sentences(found: Mapping[str, Any]) -> list[str]:
    """What came of it, in words, with the intervals of both folds."""
    said = []
    if found["chosen"] is None:
        near = found["nearest"]
        said.append(
            f"No candidate meets the floors; the nearest, point {near['point']}, lacks "
            f"{near['lacks']}."
        )
    shown = found["chosen"] if found["chosen"] is not None else found["nearest"]["point"]
    test, side = (found["points"][shown][side] for side in ("test", "calibration"))
    if not found["points"][shown]["balanced"]:
        crosses = found["points"][shown].get("bracketed", False)
        why = (
            "its line crosses 1/2 between places that were tried (more steps may come nearer)"
            if crosses
            else "its line does not cross 1/2 as far as was tried"
        )
        said.append(
            f"Point {shown} is not balanced: {why}, and the AUC nearest to it, on the calibration "
            f"fold, is {side['auc']:.2f}."
        )
    for attack, numbers in test["membership"].items():
        before = side["membership"].get(attack, {})
        for fold, there in (("calibration", before), ("test", numbers)):
            if "auc_low" in there:
                said.append(_sure(attack, fold, there))
    if all(point["role"] != "baseline" for point in found["points"]):
        said.append(
            "The paper's merge (TIES 0.8, weights 1 and 1) is no row: it takes two branches of one "
            "rank."
        )
    if found["settings"].get("standins"):
        said.append(
            "Stand-ins made of the members chose: the calibration column, the line and the "
            "cross-calibration are against these, the test column against the given non-members."
        )
    cross = found["cross"]
    if cross["auc_mean"] is not None:
        said.append(
            f"Cross-calibrated over {len(cross['folds'])} folds: held-out AUC "
            f"{cross['auc_mean']:.2f}{_scatter(cross['auc_deviation'])}, {_worst(cross)}, "
            f"t{_scatter(cross['t_deviation'], 3)}{_beyond(cross)}."
        )
    spent = found["screening"]
    if spent["candidates"]:
        each = spent["seconds"] / spent["candidates"]
        said.append(
            f"{spent['candidates']} candidates were screened in {spent['seconds']:.0f} s "
            f"({each:.1f} s each{_by_documents(spent)}; what was known cost nothing), and the "
            "finalists balanced on all documents and generated from in "
            f"{spent['official_seconds']:.0f} s."
        )
    return said


def _by_documents(spent: Mapping[str, Any]) -> str:
    """How many candidates were read with items too; a calibration of old does not say."""
    if "whole" not in spent:
        return ""
    return f", {spent['whole']} of them with items and the others by documents alone"


def _worst(cross: Mapping[str, Any]) -> str:
    """What the worst attack says of the held-out documents, over the folds, otherwise."""
    folds = [fold["membership"].values() for fold in cross["folds"]]
    said = (
        ("two-sided", [furthest(one["two_sided"] for one in attacks) for attacks in folds]),
        ("KS", [max(one["ks"] for one in attacks) for attacks in folds]),
    )
    spreads = [stdev(each) if len(each) > 1 else None for _, each in said]
    return ", ".join(
        f"{name} {fmean(each):.2f}{_scatter(spread)}"
        for (name, each), spread in zip(said, spreads, strict=True)
    )


def _scatter(deviation: float | None, digits: int = 2) -> str:
    """The standard deviation over the folds; of one fold there is none."""
    return " of one fold" if deviation is None else f" ± {deviation:.{digits}f}"


def _beyond(cross: Mapping[str, Any]) -> str:
    """How many folds balance nowhere on the part of the line that was read."""
    count = cross.get("beyond", 0)
    return f" or more: {count} balance beyond the places that were read" if count else ""


def _sure(attack: str, fold: str, numbers: Mapping[str, float]) -> str:
    """The numbers of an attack on one fold, with their intervals."""
    both = [
        f"{numbers[name]:.2f} [{numbers[f'{name}_low']:.2f}, {numbers[f'{name}_high']:.2f}]"
        for name in ("auc", "two_sided")
    ]
    return (
        f"{attack} on the {fold} fold: AUC {both[0]}, two-sided {both[1]}, KS {numbers['ks']:.2f} "
        f"(p {numbers['ks_p']:.2g})."
    )


def front_table(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The Pareto front as data: a row for each of its points."""
    return [
        {"point": point["point"], "label": point["label"], "role": point["role"]}
        | {name: point["calibration"][name] for name in ("forgetting", "retention", "balance")}
        for point in found["points"]
        if point["front"]
    ]


def _named(point: Mapping[str, Any], found: Mapping[str, Any], shown: int) -> str:
    if point["point"] == shown:
        return f"{'chosen' if found['chosen'] is not None else 'nearest'}: {point['label']}"
    candidate = point["candidate"]
    if point["role"] == "end":
        return _end(candidate["over"])
    if point["role"] == "baseline":
        weights = ", ".join(f"{weight:g}" for weight in candidate["weights"])
        pair = f"{_end(candidate['over'])} and {_end(candidate['under'])}"
        stray = " (not the paper's branches)" if found.get("paper", {}) is None else ""
        return f"TIES {candidate['density']:g}, weights {weights}: {pair}{stray}"
    return "target" if point["role"] == "target" else point["label"]


def _end(end: Mapping[str, Any]) -> str:
    return end["branch"] + ("" if end["step"] is None else f"@{end['step']}")


def _numbers(side: Mapping[str, Any] | None) -> dict[str, str]:
    if side is None:
        return dict.fromkeys(COLUMNS, "–")
    kept: Sequence[float] = [
        v for t, v in side["terms"].items() if t.startswith("retain/") and v is not None
    ]
    return {
        "documents": _short(side.get("documents")),
        TASK: _short(side["aggregate"]),
        "AUC": _short(side["auc"]) + _interval(side["membership"].values()),
        "two-sided": _short(side["two_sided"]),
        "KS": _short(side["ks"]),
        RETAIN: _short(min(kept) if kept else None),
        "neutral": _short(side["neutral_nll"]),
    }


def _interval(attacks: Collection[Mapping[str, float]]) -> str:
    """From the least end of the attacks' intervals to the greatest, where they were taken."""
    if not all("auc_low" in attack for attack in attacks):
        return ""
    low, high = min(a["auc_low"] for a in attacks), max(a["auc_high"] for a in attacks)
    return f" [{low:.2f}, {high:.2f}]"


def _short(value: float | None) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.2f}"
