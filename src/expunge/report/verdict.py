"""The verdict in plain words: what was known before, what is forgotten, what is kept."""

import math
from typing import Literal

from expunge.report.certainty import WIDE
from expunge.report.results import Mia, ModelResults, Results, mean_term, models_compared

KNOWN = 0.5
"""A half counts as known before from this share on: what was not known cannot be forgotten."""

FORGOTTEN = 0.5
"""Forgotten: at most this share of what was known before is left."""

KEPT = 0.8
"""Kept: at least this share of what was known before is left."""

_WORDS = {"sc": "reproduces {} of the passages", "qa": "answers {} of the questions"}


def verdict(results: Results) -> list[str]:
    """Sentences for a reader who knows none of the measures; the first is the verdict itself."""
    names = models_compared(results)
    if names is None:
        return ["There is no verdict: it takes a model from before and one from after."]
    after_name = names[1]
    before, after = (results.models[name] for name in names)
    return [
        _headline(before, after, after_name) + _told_apart(after),
        *_comparisons(before, after, after_name),
        *_membership(after, after_name),
        *_collapses(results),
    ]


def _headline(before: ModelResults, after: ModelResults, name: str) -> str:
    if after.collapse.collapsed:
        return (
            f"Failed: the {name} model is destroyed as a language model; its scores mean nothing."
        )
    forget, retain = _shares_left(before, after, "forget"), _shares_left(before, after, "retain")
    if not forget or not retain:
        return (
            "There is no verdict: both halves must be measured before and after, and known before."
        )
    forgot, kept = max(forget) <= FORGOTTEN, min(retain) >= KEPT
    if after.collapse.collapsed is None:
        return f"{_claim(forgot, kept, name)} Whether it collapsed was not measured."
    return _claim(forgot, kept, name)


def _claim(forgot: bool, kept: bool, name: str) -> str:
    if forgot and kept:
        return f"The {name} model forgot what it should, and kept the rest."
    if forgot:
        return f"The {name} model forgot what it should, but lost some of what it should keep."
    if kept:
        return f"The {name} model kept what it should, but still knows some of what it should not."
    return f"Failed: the {name} model still knows what it should not, and lost what it should keep."


def _shares_left(before: ModelResults, after: ModelResults, half: str) -> list[float]:
    """For completion and knowledge, the share left of what was known; empty if unknown before."""
    shares = []
    for kind in _WORDS:
        was, now = (mean_term(model.semeval, half, kind) for model in (before, after))
        if was is None and now is None:
            continue
        if was is None or now is None or was < KNOWN:
            return []
        shares.append(now / was)
    return shares


def _comparisons(before: ModelResults, after: ModelResults, name: str) -> list[str]:
    sentences = []
    for half in ("forget", "retain"):
        parts = []
        for kind, words in _WORDS.items():
            was, now = (mean_term(model.semeval, half, kind) for model in (before, after))
            if was is not None and now is not None:
                parts.append(f"{words.format(_percent(now))} (before: {_percent(was)})")
        if parts:
            sentences.append(f"On the {half} half the {name} model {' and '.join(parts)}.")
    return sentences


def _told_apart(after: ModelResults) -> str:
    """What the headline says where membership shows, whatever the model says; else nothing."""
    mia = after.semeval.mia
    if mia is None or mia.auc is None or after.collapse.collapsed:
        return ""
    return {
        "above": " But one can still tell that it was trained on what it should forget.",
        "below": " But what it should forget was pushed so far below unseen text that this shows.",
    }.get(_attack(mia), "")


def _membership(model: ModelResults, name: str) -> list[str]:
    mia = model.semeval.mia
    if mia is None or mia.auc is None:
        return ["Whether an outsider could tell the forgotten documents was not measured."]
    interval = "" if mia.low is None else f", interval {mia.low:.2f} to {mia.high:.2f}"
    auc = f"AUC {mia.auc:.2f}{interval}; guessing is 0.50"
    seen = _documents(mia)
    meaning = {
        "above": "does better than guessing: one can still tell that it was trained on them",
        "below": "finds them by their high loss: they were pushed below what a stranger knows",
        "guessing": "does no better than guessing",
    }.get(_attack(mia))
    if meaning is None:
        return [
            f"{seen or 'The documents measured'} cannot tell whether the forgotten ones stand out "
            f"by the loss of the {name} model ({auc})."
        ]
    return [
        "Whoever tries to tell the forgotten documents from never-seen ones by the loss of the "
        f"{name} model {meaning} ({seen + ': ' if seen else ''}{auc})."
    ]


def _attack(mia: Mia) -> Literal["above", "below", "guessing", "open"]:
    """What the interval of the AUC says of 0.5; `open` where it is wide, or of too few documents.

    Where m members all come before n others, or all after, the interval is 0 wide; of two equal
    kinds 2 of the (m + n)! / m! n! orders are so, which below 40 orders is more than 5 %.
    """
    if mia.low is None or mia.high is None:
        return "open"
    if mia.n is not None:
        members = mia.n // 2 if mia.members is None else mia.members
        if math.comb(mia.n, members) < 40:
            return "open"
    if mia.low > 0.5:
        return "above"
    if mia.high < 0.5:
        return "below"
    return "guessing" if mia.high - mia.low <= WIDE else "open"


def _documents(mia: Mia) -> str:
    """How many documents there are of each kind, as far as the results say."""
    if mia.members is not None and mia.nonmembers is not None:
        return f"{mia.members} forgotten and {mia.nonmembers} never-seen documents"
    return "" if mia.n is None else f"{mia.n} documents"


def _collapses(results: Results) -> list[str]:
    """One sentence for each destroyed model, with the limits that it crossed."""
    return [
        f"The {name} model is destroyed as a language model"
        + (f" ({'; '.join(model.collapse.reasons)})." if model.collapse.reasons else ".")
        for name, model in results.ordered_models().items()
        if model.collapse.collapsed
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
