"""The table of metrics: what each reads, its function, and where it is defined."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from expunge.evaluate import collapse, membership, mmlu, muse, semeval, tofu


@dataclass(frozen=True)
class Metric:
    """One row."""

    fn: Callable[..., Any]
    source: str
    needs: str
    test: str
    fidelity: str = "exact"
    cost: str = "generation"


_LUME = "LUME, SemEval-2025 Task 4, arXiv:2504.02883"
_TOFU = "TOFU, arXiv:2401.06121"
_TOFU_TEST = "tests/evaluate/test_tofu.py"
_MUSE = "MUSE, arXiv:2407.06460"
_MUSE_TEST = "tests/evaluate/test_muse.py"

METRICS = {
    "regurgitation": Metric(
        semeval.completion_score, _LUME, "generations", "tests/evaluate/test_semeval.py"
    ),
    "knowledge": Metric(
        semeval.knowledge_score, _LUME, "generations", "tests/evaluate/test_semeval.py"
    ),
    "task_aggregate": Metric(
        semeval.task_aggregate, _LUME, "the twelve terms", "tests/evaluate/test_semeval.py"
    ),
    "mia": Metric(
        membership.mia,
        _LUME,
        "members, non-members",
        "tests/evaluate/test_membership.py",
        cost="one forward pass",
    ),
    "mmlu": Metric(
        mmlu.answer_mmlu,
        "arXiv:2009.03300",
        "questions",
        "tests/evaluate/test_mmlu.py",
        cost="one forward pass",
    ),
    "collapse": Metric(
        collapse.judge, "this project", "generations", "tests/evaluate/test_collapse.py", "own"
    ),
    "tofu_probability": Metric(
        tofu.answer_probability, _TOFU, "token scores", _TOFU_TEST, cost="one forward pass"
    ),
    "tofu_option_probability": Metric(
        tofu.option_probability,
        _TOFU,
        "token scores of right and wrong answers",
        _TOFU_TEST,
        "as released",
        cost="one forward pass",
    ),
    "tofu_truth_ratio": Metric(
        tofu.truth_ratio,
        _TOFU,
        "token scores of right and wrong answers",
        _TOFU_TEST,
        "as released",
        cost="one forward pass",
    ),
    "tofu_forget_truth": Metric(
        tofu.forget_truth, _TOFU, "truth ratios", _TOFU_TEST, cost="one forward pass"
    ),
    "tofu_kept_truth": Metric(
        tofu.kept_truth, _TOFU, "truth ratios", _TOFU_TEST, cost="one forward pass"
    ),
    "tofu_rouge": Metric(tofu.answer_rouge, _TOFU, "generations", _TOFU_TEST),
    "tofu_model_utility": Metric(tofu.model_utility, _TOFU, "the nine terms", _TOFU_TEST),
    "tofu_forget_quality": Metric(
        tofu.forget_quality,
        _TOFU,
        "truth ratios of two models",
        _TOFU_TEST,
        cost="one forward pass of each model",
    ),
    "muse_verbatim": Metric(muse.verbatim_score, _MUSE, "generations", _MUSE_TEST),
    "muse_knowledge": Metric(muse.knowledge_score, _MUSE, "generations", _MUSE_TEST),
    "muse_min_k": Metric(
        muse.min_k, "arXiv:2310.16789", "token scores", _MUSE_TEST, cost="one forward pass"
    ),
    "muse_auc": Metric(
        muse.leakage_auc,
        _MUSE,
        "forgotten and held-out texts",
        _MUSE_TEST,
        cost="one forward pass",
    ),
    "muse_leakage": Metric(
        muse.privacy_leakage,
        _MUSE,
        "the AUC of two models",
        _MUSE_TEST,
        cost="one forward pass of each model",
    ),
}
