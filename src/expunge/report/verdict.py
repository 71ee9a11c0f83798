"""The verdict in plain words: what was known before, what is forgotten, what is kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from expunge.report.certainty import WIDE, half_number
from expunge.report.hidden import hidden, lost_unseen, percent, relearned
from expunge.report.results import HALVES, Mia, ModelResults, Results
from expunge.report.story import mean_term, models_compared

KNOWN = 0.5
"""A half counts as known before from this share on: what was not known cannot be forgotten."""

FORGOTTEN = 0.3
"""Forgotten: at most this share of what was known before is left. Not 0, for even a model that
never saw a passage repeats about a fifth of its words in order (0.18 to 0.20 in docs/results.md:
`the`, `of`, and a few more)."""

KEPT = 0.8
"""Kept: at least this share of what was known before is left."""

HALF = 0.5
"""Where more than a half of what should be forgotten is left it is still known; where less than a
half of what should be kept is left it is lost. In between it is partly so."""

GATE = 0.75
"""Share of the MMLU accuracy from before that the contest asks for: an accuracy of 0.371 at 7B."""

THRESHOLDS = (
    f"Forgotten: at most {FORGOTTEN:.0%} of what was known before is left; still known: more than "
    f"{HALF:.0%}. Kept: at least {KEPT:.0%} is left; lost: less than {HALF:.0%}. Partly: between."
).replace("%", " %")

Grade = Literal["done", "partly", "not"]
"""How far a half came to what it should: forgotten or kept, partly so, still known or lost."""

Attack = Literal["above", "below", "guessing", "open"]
"""What membership inference says: members stand out by a low loss or a high one, or do not."""

Sureness = Literal["sure", "probably", "open"]
"""Whether the whole interval has this grade, or touches the next, or goes from end to end."""

_WORDS = {"sc": "reproduces {} of the passages", "qa": "answers {} of the questions"}

_GRADES: tuple[Grade, ...] = ("done", "partly", "not")
_FORGET = {
    "done": "forgot what it should",
    "partly": "forgot only part of what it should",
    "not": "still knows what it should forget",
}
_RETAIN = {
    "done": "kept the rest",
    "partly": "kept only part of the rest",
    "not": "lost the rest",
}
_SHOWS = {
    "above": "one can still tell that it was trained on what it should forget.",
    "below": "what it should forget was pushed so far below unseen text that this shows.",
}


@dataclass(frozen=True)
class Judged:
    """One half: its grade, how sure it is, and the items asked."""

    grade: Grade
    sureness: Sureness
    n: int


def verdict(results: Results) -> list[str]:
    """Sentences for a reader who knows none of the measures; the first is the verdict itself."""
    names = models_compared(results)
    if names is None:
        return ["There is no verdict: it takes a model from before and one from after."]
    after_name = names[1]
    before, after = (results.models[name] for name in names)
    if before.collapse.collapsed:
        return [
            f"Nothing can be judged: the {names[0]} model was no working language model before "
            "anything was removed."
        ]
    halves = [_judged(before, after, half) for half in HALVES]
    kept_known = halves[1] is not None or not _measured(before, after, "retain")
    graded = halves[0] is not None and kept_known
    return [
        _headline(after, halves, after_name, graded),
        *_comparisons(before, after, after_name),
        *([THRESHOLDS] if graded and not after.collapse.collapsed else []),
        *_membership(after, after_name),
        *lost_unseen(before, after, after_name),
        *relearned(after, after_name),
        *_gated(results, names[0]),
        *_collapses(results, after_name),
    ]


def _headline(after: ModelResults, halves: Sequence[Judged | None], name: str, graded: bool) -> str:
    if after.collapse.collapsed:
        return (
            f"Failed: the {name} model is destroyed as a language model; its scores mean nothing."
        )
    (forget, retain), attack = halves, _attack(after.semeval.mia)
    if forget is None or not graded:
        return (
            "There is no verdict: both halves must be measured before and after, and known before."
        )
    claim = (
        _claim(forget, retain, name, attack) + _shown(forget, attack) + hidden(after, forget.grade)
    )
    if after.collapse.collapsed is None:
        return f"{claim} Whether it collapsed was not measured."
    return claim


def _measured(before: ModelResults, after: ModelResults, half: str) -> bool:
    """Whether any of a half was; without a retain set nothing of it is."""
    values = [mean_term(one.semeval, half, kind) for one in (before, after) for kind in _WORDS]
    return any(value is not None for value in values)


def _judged(before: ModelResults, after: ModelResults, half: str) -> Judged | None:
    """The worse of completion and knowledge; None where either was not known or not measured.

        share left = after / before,    low and high likewise

    Before is taken as it is: both were asked the same items, and an easy choice of items is easy
    for both. Without intervals the value alone decides.
    """
    found = []
    for kind in _WORDS:
        was, now = (half_number(model.semeval, half, kind) for model in (before, after))
        if was.value is None and now.value is None:
            continue
        if was.value is None or now.value is None or was.value < KNOWN:
            return None
        low, high = (now.value if end is None else end for end in (now.low, now.high))
        ends = [_grade(half, share / was.value) for share in (low, now.value, high)]
        found.append((ends, now.n))
    if not found:
        return None
    worst = [max((ends[i] for ends, _ in found), key=_GRADES.index) for i in range(3)]
    sureness: Sureness = "sure"
    if len(set(worst)) > 1:
        sureness = "open" if {"done", "not"} <= set(worst) else "probably"
    return Judged(worst[1], sureness, sum(n for _, n in found))


def _grade(half: str, left: float) -> Grade:
    if half == "forget":
        return "done" if left <= FORGOTTEN else "partly" if left <= HALF else "not"
    return "done" if left >= KEPT else "partly" if left >= HALF else "not"


def _claim(forget: Judged, retain: Judged | None, name: str, attack: Attack) -> str:
    """What became of the two halves, as far as the items tell."""
    forgot = _FORGET[forget.grade]
    if attack == "above" and forget.grade == "done":
        forgot = "no longer says what it should forget"
    if retain is None:
        begin = "Failed: the" if forget.grade == "not" else "The"
        claim = f"{begin} {name} model {_hedged(forgot, forget)}"
        if forget.sureness == "open":
            claim = f"{forget.n} items are too few to say whether the {name} model forgot them"
        return f"{claim}; whether it kept the rest was not measured."
    if forget.sureness == retain.sureness == "open":
        return (
            f"Too few items to say whether the {name} model forgot what it should "
            f"({forget.n} items) or kept the rest ({retain.n} items)."
        )
    kept = _RETAIN[retain.grade]
    if forget.sureness == "open":
        claim = (
            f"The {name} model {_hedged(kept, retain)}; {forget.n} items are too few to say "
            "whether it forgot what it should."
        )
    elif retain.sureness == "open":
        claim = (
            f"The {name} model {_hedged(forgot, forget)}; {retain.n} items are too few to "
            "say whether it kept the rest."
        )
    else:
        joined = "and" if (forget.grade == "done") == (retain.grade == "done") else "but"
        begin = "Failed: the" if forget.grade == retain.grade == "not" else "The"
        claim = f"{begin} {name} model {_hedged(forgot, forget)}, {joined} {_hedged(kept, retain)}."
    return claim


def _shown(forget: Judged, attack: Attack) -> str:
    """What the headline adds where membership shows, whatever the model says; else nothing."""
    shows = _SHOWS.get(attack)
    if shows is None:
        return ""
    return f" But {shows}" if forget.grade == "done" else f" {shows[0].upper()}{shows[1:]}"


def _hedged(words: str, judged: Judged) -> str:
    return words if judged.sureness == "sure" else f"probably {words}"


def _comparisons(before: ModelResults, after: ModelResults, name: str) -> list[str]:
    sentences = []
    for half in ("forget", "retain"):
        parts = []
        for kind, words in _WORDS.items():
            was, now = (mean_term(model.semeval, half, kind) for model in (before, after))
            if was is not None and now is not None:
                parts.append(f"{words.format(percent(now))} (before: {percent(was)})")
        if parts:
            sentences.append(f"On the {half} half the {name} model {' and '.join(parts)}.")
    return sentences


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


def _attack(mia: Mia | None) -> Attack:
    """What the interval of the AUC says of 0.5; `open` where it holds it and is wide."""
    if mia is None or mia.low is None or mia.high is None:
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


def _gated(results: Results, before: str) -> list[str]:
    """One sentence that names all models that the contest would refuse for their MMLU."""
    asked = {name: m.semeval.mmlu for name, m in results.measured_models().items()}
    known = {name: m.accuracy for name, m in asked.items() if m and m.accuracy is not None}
    least = GATE * known.get(before, 0.0)
    under = [name for name, accuracy in known.items() if accuracy < least - 1e-9 and name != before]
    if not under:
        return []
    shares = ", ".join(f"{name} {percent(known[name] / known[before])}" for name in under)
    return [
        f"Of the {before} model's MMLU accuracy less than {percent(GATE)} is left, which the "
        f"contest asks for: {shares}."
    ]


def _collapses(results: Results, told: str) -> list[str]:
    """One sentence that names all destroyed models; none where the headline has told of the only.

    Which limits they crossed stands among the measures.
    """
    names = [name for name, m in results.ordered_models().items() if m.collapse.collapsed]
    if not names or names == [told]:
        return []
    if len(names) == 1:
        return [f"The {names[0]} model is destroyed as a language model; its scores mean nothing."]
    listed = f"{', '.join(names[:-1])} and {names[-1]}"
    return [f"The {listed} models are destroyed as language models; their scores mean nothing."]
