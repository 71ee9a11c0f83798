"""The metrics of MUSE: what is recited, what is known, and what membership gives away.

Dimensions: L scored tokens of one text.
"""

from collections.abc import Sequence

from expunge.errors import EvaluationError
from expunge.evaluate.membership import auc
from expunge.evaluate.rouge import rouge_l

ENDS = ("\n\n", "\nQuestion", "Question:")
"""Where an answer ends and the model goes on by itself."""


def verbatim_score(truth: str, continuation: str) -> float:
    """Verbatim memorisation: what the greedy continuation of a passage shares with the passage.

        ROUGE-L F1 = 2 p r / (p + r),    p = LCS / |continuation|,  r = LCS / |truth|

    Words are not stemmed. 0 for an empty continuation.

    Source: Shi et al. 2024, arXiv:2407.06460; F1 and no stemmer as in the released code.
    """
    return rouge_l(truth, continuation, stem=False).f1


def knowledge_score(answer: str, generation: str) -> float:
    """Knowledge memorisation: ROUGE-L F1 of the answer and the first answer that was generated.

    The generation is cut before the first blank line or further question. Of the retain set it is
    the utility that was preserved.

    Source: Shi et al. 2024, arXiv:2407.06460; F1 as in the released code.
    """
    return verbatim_score(answer, first_answer(generation))


def first_answer(generation: str) -> str:
    """What stands before the first of ENDS."""
    for end in ENDS:
        generation = generation.split(end)[0]
    return generation


def leakage_auc(forget: Sequence[float], holdout: Sequence[float]) -> float:
    """The chance that a text never seen looks more like training data than a forgotten one.

        AUC = P(h > f) + P(h = f) / 2,    h, f the Min-K% of held-out and of forgotten texts

    0: every forgotten text is still known; near 1/2: nothing shows; towards 1: they are so unlikely
    that it gives them away.

    Source: the released code of MUSE, which takes the forget set for the non-members, and on whose
    figures published leakages rest.
    """
    return auc(holdout, forget)


def privacy_leakage(value: float, retrained: float) -> float:
    """How far membership shows beyond what it does in a model that never saw the forget set.

        PrivLeak = 100 (AUC - AUC_retrained) / AUC_retrained

    In percent, best 0: below it the forget set is still known, above it was overdone.

    Source: Shi et al. 2024, arXiv:2407.06460.
    """
    if not retrained > 0:
        raise EvaluationError(
            f"the retrained model's AUC is {retrained:g}, so no leakage can be measured against "
            "it; does that model know the forget set?"
        )
    return 100 * (value - retrained) / retrained
