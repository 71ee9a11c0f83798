"""Four-way questions: how many are right, and whether the model always says the same letter.

Dimensions: Q questions.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from expunge.errors import EvaluationError
from expunge.evaluate.numbers import Behind, Measured, Number, bootstrap, estimate
from expunge.evaluate.options import LETTERS

CONSTANT_SHARE = 0.95
"""From this share of one letter on, the answers hardly depend on the questions."""

FEWEST_QUESTIONS = 20
"""With fewer, one letter throughout may be chance."""


def accuracy(answers: Sequence[int], chosen: Sequence[int]) -> float | None:
    """The share of questions answered rightly (micro); None of nothing.

        accuracy = (1/Q) Σ_q [chosen_q = answer_q]

    Always answering one letter scores that letter's share of the answers: 0.229 for A on all
    test questions of MMLU. Read it beside `top_letter`.

    Source: Hendrycks et al. 2021, arXiv:2009.03300.
    """
    pairs = list(zip(answers, chosen, strict=True))
    return sum(a == c for a, c in pairs) / len(pairs) if pairs else None


def macro_accuracy(subjects: Mapping[str, float]) -> float | None:
    """The mean of the subjects' accuracies, each subject counting alike; None of nothing.

        macro = (1/S) Σ_s accuracy_s

    Over all questions of MMLU it differs from the micro accuracy by up to a point or so, since
    subjects have 100 to 1,534 questions. State which of the two is meant.
    """
    return sum(subjects.values()) / len(subjects) if subjects else None


def top_letter(chosen: Sequence[int]) -> float | None:
    """The share of the letter chosen most often; None of nothing.

        top_letter = max_k #{q: chosen_q = k} / Q

    0.25 is even, 1 a model that does not read the question.
    """
    return max(Counter(chosen).values()) / len(chosen) if chosen else None


def constant_answer(chosen: Sequence[int]) -> bool | None:
    """Whether one letter makes up 95 % of the answers; None with fewer than 20 questions.

        constant = top_letter >= 0.95

    It says that the accuracy measures nothing, not why: SmolLM2 (135 M), undamaged and asked
    without examples, gives one letter to 98 % of a sample of 57.

    Source: this project.
    """
    share = top_letter(chosen)
    if share is None or len(chosen) < FEWEST_QUESTIONS:
        return None
    return share >= CONSTANT_SHARE


def measure_choices(
    groups: Sequence[str],
    answers: Sequence[int],
    chosen: Sequence[int | None],
    hashes: Sequence[str],
    *,
    prefix: str = "subject.",
) -> Measured:
    """The numbers and items of Q questions; what was not asked (None) is an item all the same.

    `hashes` stand for the questions in the items.

    Numbers: accuracy, macro, `{prefix}<group>`, top_letter, constant_answer (1 or 0). The facts
    hold each letter's share of the answers given, and what giving it always would have scored.
    """
    hits: dict[str, list[bool]] = defaultdict(list)
    items: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    for group, answer, choice, text in zip(groups, answers, chosen, hashes, strict=True):
        correct = None if choice is None else choice == answer
        if correct is not None:
            hits[group].append(correct)
        items.append(
            {
                "group": group,
                "id": f"{group}/{counts[group]}",
                "text": text,
                "answer": LETTERS[answer],
                "chosen": None if choice is None else LETTERS[choice],
                "correct": correct,
            }
        )
        counts[group] += 1
    asked = [(a, c) for a, c in zip(answers, chosen, strict=True) if c is not None]
    if not asked:
        raise EvaluationError("there is no question to ask")
    given, said = [a for a, _ in asked], [c for _, c in asked]
    numbers = {
        "accuracy": estimate([float(a == c) for a, c in asked], name="accuracy"),
        "macro": macro_number(hits),
        **{
            f"{prefix}{group}": estimate(values, name=f"{prefix}{group}")
            for group, values in sorted(hits.items())
        },
        "top_letter": Number(top_letter(said), len(said)),
        "constant_answer": _as_number(constant_answer(said), len(said)),
    }
    behind = {f"{prefix}{group}": Behind("correct", (group,)) for group in hits}
    behind |= {"accuracy": Behind("correct"), "macro": Behind("correct", how="means")}
    facts = {"letters": _shares(said), "always": _shares(given)}
    return Measured(numbers, items, facts, behind)


def macro_number(hits: Mapping[str, Sequence[bool]]) -> Number:
    """The mean accuracy of groups, each resampled by itself.

    Without an interval where a group of one item would show no spread.
    """
    found = bootstrap(hits, macro_accuracy, name="macro")
    return found if min(map(len, hits.values())) > 1 else Number(found.value, found.n)


def _as_number(claim: bool | None, n: int) -> Number:
    return Number(None if claim is None else float(claim), n)


def _shares(letters: Sequence[int]) -> dict[str, float]:
    return {letter: letters.count(i) / len(letters) for i, letter in enumerate(LETTERS)}
