"""The metrics of TOFU: how likely and how truthful answers are, on four sets of questions.

Sets: forget and retain (invented authors), authors (real ones) and world (facts). Losses are mean
negative log-likelihoods a token, in nats, end of text included.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from expunge.errors import EvaluationError
from expunge.evaluate import semeval
from expunge.evaluate.numbers import harmonic_mean
from expunge.evaluate.two_sample import ks_test

GROUPS = ("forget", "retain", "authors", "world")
METRICS = ("probability", "rouge", "truth_ratio")
UTILITY = tuple(f"{group}.{metric}" for group in GROUPS[1:] for metric in METRICS)
"""The nine terms of the model utility."""

_LARGEST_LOG = 700.0
"""Ratios beyond e^±700 are held there, so that no float overflows."""


def answer_probability(loss: float) -> float:
    """The probability of the answer, as a geometric mean over its tokens.

        P(a|q)^(1/|a|) = exp(-loss)

    Source: Maini et al. 2024, arXiv:2401.06121.
    """
    return math.exp(-loss)


def option_probability(loss: float, others: Sequence[float]) -> float:
    """The probability of the answer among its alternatives, for real authors and world facts.

        p / (p + Σ p'),    p = exp(-loss) of the answer, p' of each wrong one

    Never 0/0, however unlikely all of them are.

    Source: Maini et al. 2024, arXiv:2401.06121, and the released code.
    Differs: from the paper, which compares P(a|q) of whole answers; as the code does, p is the
    mean a token, so that long answers are not put behind.
    """
    _refuse_none(others)
    logs = -np.array([loss, *others])
    return float(1 / np.exp(np.minimum(logs - logs[0], _LARGEST_LOG)).sum())


def truth_ratio(loss: float, perturbed: Sequence[float]) -> float:
    """How much likelier wrong answers are than the right one, both worded anew.

        R = exp(mean of log p̂) / p̃ = exp(loss - mean of the perturbed losses)

    `loss` is that of the paraphrased answer; real authors and world facts have none, and the answer
    itself stands for it. Near 0 the model knows; near 1 it cannot tell.

    Source: Maini et al. 2024, arXiv:2401.06121, and the released code.
    Differs: from the paper, whose numerator is the arithmetic mean of the p̂; the code's is the
    geometric one, on which published numbers rest.
    """
    _refuse_none(perturbed)
    log_ratio = loss - float(np.mean(perturbed))
    return math.exp(max(-_LARGEST_LOG, min(_LARGEST_LOG, log_ratio)))


def forget_truth(ratio: float) -> float:
    """The truth ratio as it is averaged over the forget set: min(R, 1/R), best 1.

    Source: the released code of arXiv:2401.06121.
    """
    return min(ratio, 1 / ratio)


def kept_truth(ratio: float) -> float:
    """The truth ratio as it is averaged over the other sets: max(0, 1 - R), best 1.

    Source: Maini et al. 2024, arXiv:2401.06121.
    """
    return max(0.0, 1 - ratio)


def answer_rouge(answer: str, generation: str) -> float:
    """The share of the answer's words that the greedy answer repeats in order.

        ROUGE-L recall = LCS(answer, generation) / |answer|,   words stemmed

    Source: Maini et al. 2024, arXiv:2401.06121.
    Differs: the released code ends a generation at 200 tokens, question included; here all are new.
    """
    return semeval.completion_score(answer, generation)


def model_utility(means: Mapping[str, float]) -> float | None:
    """The harmonic mean of the nine terms: three metrics of retain, authors and world.

        9 / Σ 1/v

    0 where a term is 0; None where one was not measured.

    Source: Maini et al. 2024, arXiv:2401.06121.
    """
    if any(term not in means for term in UTILITY):
        return None
    return harmonic_mean([means[term] for term in UTILITY])


def forget_quality(ratios: Sequence[float], retained: Sequence[float]) -> float:
    """Whether the forget set's truth ratios could be those of a model that never saw it.

        p of the two-sample Kolmogorov-Smirnov test of R and R_retain

    At the usual level they cannot be told apart above 0.05. More items give smaller p-values:
    compare those of the same items alone.

    Source: Maini et al. 2024, arXiv:2401.06121.
    Differs: the released code takes the first 300 items of each set, here all are taken.
    """
    return ks_test(ratios, retained)[1]


def _refuse_none(perturbed: Sequence[float]) -> None:
    if not len(perturbed):
        raise EvaluationError("an item has no perturbed answer, so nothing can be compared")
