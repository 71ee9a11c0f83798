"""The verdict in plain words: what was known before, what is forgotten, what is kept."""

from expunge.report.results import ModelResults, Results, mean_term

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
        _headline(before, after, after_name),
        *_comparisons(before, after, after_name),
        *_membership(after, after_name),
        *_collapses(results),
    ]


def models_compared(results: Results) -> tuple[str, str] | None:
    """The models before and after that the verdict is about, if there are both."""
    before = next((name for name in ("target", "original") if name in results.models), None)
    after = _after(results)
    return None if before is None or after is None else (before, after)


def _after(results: Results) -> str | None:
    """The model that the verdict is about: the calibrated one, the merge, or the last measured."""
    measured = results.measured_models()
    for name in ("calibrated", "merged"):
        if name in measured:
            return name
    later = [name for name in measured if name not in ("original", "target")]
    return later[-1] if later else None


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


def _membership(model: ModelResults, name: str) -> list[str]:
    mia = model.semeval.mia
    if mia is None or mia.auc is None:
        return ["Whether an outsider could tell the forgotten documents was not measured."]
    low, high = (mia.auc if end is None else end for end in (mia.low, mia.high))
    if low <= 0.5 <= high:
        meaning = "does no better than guessing"
    elif mia.auc > 0.5:
        meaning = "does better than guessing: they are still remembered"
    else:
        meaning = "finds them by their high loss: they were pushed below what a stranger knows"
    interval = "" if mia.low is None else f", interval {low:.2f} to {high:.2f}"
    return [
        "Whoever tries to tell the forgotten documents from never-seen ones by the loss of the "
        f"{name} model {meaning} (AUC {mia.auc:.2f}{interval}; guessing is 0.50)."
    ]


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
