"""The table of metrics: what each reads, its function, and where it is defined."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from expunge.data import pii
from expunge.evaluate import (
    attacks,
    balance,
    choices,
    collapse,
    compare,
    concepts,
    knowledge,
    membership,
    memorisation,
    mmlu,
    muse,
    rwku,
    semeval,
    tofu,
    two_sample,
)


@dataclass(frozen=True)
class Metric:
    """One row."""

    fn: Callable[..., Any]
    source: str
    needs: str
    test: str
    fidelity: str = "exact"
    cost: str = "generation"


_TRACES = "ConceptVectors, arXiv:2406.11614"
_LUME = "LUME, SemEval-2025 Task 4, arXiv:2504.02883"
_TOFU = "TOFU, arXiv:2401.06121"
_TOFU_TEST = "tests/evaluate/test_tofu.py"
_MUSE = "MUSE, arXiv:2407.06460"
_MUSE_TEST = "tests/evaluate/test_muse.py"

_MEMBERSHIP = "tests/evaluate/test_membership.py"
_MEMORISATION = "tests/evaluate/test_memorisation.py"
_FORWARD = "one forward pass"
_COLLAPSE = "tests/evaluate/test_collapse.py"
_BALANCE = "tests/evaluate/test_balance.py"
_MMLU = "tests/evaluate/test_mmlu.py"
_TRACED = "tests/evaluate/test_traces.py"
_SIDES = "members, non-members"

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
        membership.mia, _LUME, _SIDES, "tests/evaluate/test_membership.py", cost=_FORWARD
    ),
    "mmlu": Metric(mmlu.answer_mmlu, "arXiv:2009.03300", "questions", _MMLU, cost=_FORWARD),
    "collapse": Metric(collapse.judge, "this project", "generations", _COLLAPSE, "own"),
    "collapse_measures": Metric(collapse.measures, "this project", "generations", _COLLAPSE, "own"),
    "looping": Metric(collapse.is_looping, "this project", "generations", _COLLAPSE, "own"),
    "nonword": Metric(collapse.is_nonword, "this project", "generations", _COLLAPSE, "own"),
    "distinct_n": Metric(collapse.distinct, "arXiv:1510.03055", "generations", _COLLAPSE),
    "entropy": Metric(collapse.entropy, "Shannon 1948", "generations", _COLLAPSE),
    "two_sided_auc": Metric(
        balance.two_sided_auc, "this project", _SIDES, _BALANCE, "own", _FORWARD
    ),
    "separation_gap": Metric(
        balance.separation_gap, "Green and Swets 1966", _SIDES, _BALANCE, cost=_FORWARD
    ),
    "ks": Metric(
        two_sample.ks_test,
        "Kolmogorov 1933; Smirnov 1939",
        _SIDES,
        "tests/evaluate/test_two_sample.py",
        cost=_FORWARD,
    ),
    "auc": Metric(membership.auc, "Mann and Whitney 1947", _SIDES, _MEMBERSHIP, cost=_FORWARD),
    "tpr": Metric(membership.tpr, "arXiv:2112.03570", _SIDES, _MEMBERSHIP, cost=_FORWARD),
    "loss": Metric(attacks.loss, "arXiv:1709.01604", "documents", _MEMBERSHIP, cost=_FORWARD),
    "zlib": Metric(attacks.zlib_ratio, "arXiv:2012.07805", "documents", _MEMBERSHIP, cost=_FORWARD),
    "zlib_total": Metric(
        attacks.zlib_total, "arXiv:2012.07805", "documents", _MEMBERSHIP, "adapted", _FORWARD
    ),
    "min_k": Metric(attacks.min_k, "arXiv:2310.16789", "documents", _MEMBERSHIP, cost=_FORWARD),
    "min_k_plus_plus": Metric(
        attacks.min_k_plus_plus,
        "arXiv:2404.02936",
        "documents",
        _MEMBERSHIP,
        fidelity="adapted",
        cost=_FORWARD,
    ),
    "reference": Metric(
        attacks.reference_gap,
        "arXiv:2203.03929",
        "documents, a reference model",
        _MEMBERSHIP,
        cost="one forward pass of two models",
    ),
    "recall": Metric(
        attacks.recall,
        "arXiv:2406.15968",
        "documents, non-members",
        _MEMBERSHIP,
        fidelity="adapted",
        cost="two forward passes",
    ),
    "gradient_norm": Metric(
        attacks.gradient_norm,
        "arXiv:2402.17012",
        "documents",
        _MEMBERSHIP,
        cost="one backward pass a document",
    ),
    "exact_memorisation": Metric(
        memorisation.exact_memorisation, "arXiv:2205.10770", "answers", _MEMORISATION, cost=_FORWARD
    ),
    "extraction_strength": Metric(
        memorisation.extraction_strength,
        "arXiv:2012.07805",
        "answers",
        _MEMORISATION,
        cost=_FORWARD,
    ),
    "verbatim_length": Metric(
        memorisation.verbatim_length,
        "arXiv:2202.07646",
        "answers",
        _MEMORISATION,
        "adapted",
        _FORWARD,
    ),
    "copied_length": Metric(
        memorisation.copied_length, "this project", "generations", _MEMORISATION, "own"
    ),
    "pii_leak": Metric(pii.pii_leak, "this project", "generations", _MEMORISATION, "own"),
    "tofu_probability": Metric(
        tofu.answer_probability, _TOFU, "token scores", _TOFU_TEST, cost=_FORWARD
    ),
    "tofu_option_probability": Metric(
        tofu.option_probability,
        _TOFU,
        "token scores of right and wrong answers",
        _TOFU_TEST,
        "as-released quirk",
        cost=_FORWARD,
    ),
    "tofu_truth_ratio": Metric(
        tofu.truth_ratio,
        _TOFU,
        "token scores of right and wrong answers",
        _TOFU_TEST,
        "as-released quirk",
        cost=_FORWARD,
    ),
    "tofu_forget_truth": Metric(
        tofu.forget_truth, _TOFU, "truth ratios", _TOFU_TEST, cost=_FORWARD
    ),
    "tofu_kept_truth": Metric(tofu.kept_truth, _TOFU, "truth ratios", _TOFU_TEST, cost=_FORWARD),
    "tofu_rouge": Metric(tofu.answer_rouge, _TOFU, "generations", _TOFU_TEST, "adapted"),
    "tofu_model_utility": Metric(tofu.model_utility, _TOFU, "the nine terms", _TOFU_TEST),
    "tofu_forget_quality": Metric(
        tofu.forget_quality,
        _TOFU,
        "truth ratios of two models",
        _TOFU_TEST,
        "adapted",
        cost="one forward pass of each model",
    ),
    "muse_verbatim": Metric(muse.verbatim_score, _MUSE, "generations", _MUSE_TEST),
    "muse_knowledge": Metric(muse.knowledge_score, _MUSE, "generations", _MUSE_TEST),
    "muse_auc": Metric(
        muse.leakage_auc, _MUSE, "forgotten and held-out texts", _MUSE_TEST, cost=_FORWARD
    ),
    "muse_leakage": Metric(
        muse.privacy_leakage,
        _MUSE,
        "the AUC of two models",
        _MUSE_TEST,
        cost="one forward pass of each model",
    ),
    "accuracy": Metric(
        choices.accuracy, "arXiv:2009.03300", "letters chosen", _MMLU, cost=_FORWARD
    ),
    "macro_accuracy": Metric(
        choices.macro_accuracy, "arXiv:2009.03300", "accuracies by subject", _MMLU, cost=_FORWARD
    ),
    "top_letter": Metric(
        choices.top_letter, "this project", "letters chosen", _MMLU, "own", _FORWARD
    ),
    "constant_answer": Metric(
        choices.constant_answer, "this project", "letters chosen", _MMLU, "own", _FORWARD
    ),
    "rwku": Metric(
        rwku.answer_score,
        "RWKU, arXiv:2406.10890",
        "generations",
        "tests/evaluate/test_rwku.py",
        "adapted",
    ),
    "contains_answer": Metric(
        knowledge.contains_answer,
        "this project",
        "generations",
        "tests/evaluate/test_knowledge.py",
        "own",
    ),
    "likeliest_first": Metric(
        knowledge.likeliest_first,
        "this project",
        "token scores",
        "tests/evaluate/test_knowledge.py",
        "own",
        _FORWARD,
    ),
    "trace_jaccard": Metric(
        concepts.jaccard, _TRACES, "the model before", _TRACED, "exact", "weights alone"
    ),
    "trace_cosine": Metric(
        concepts.cosine, _TRACES, "the model before", _TRACED, "exact", "weights alone"
    ),
    "trace_distance": Metric(
        concepts.distance, _TRACES, "the model before", _TRACED, "adapted", "weights alone"
    ),
    "trace_score": Metric(
        concepts.concept_scores,
        _TRACES,
        "the model before, a concept's tokens",
        _TRACED,
        "adapted",
        "weights alone",
    ),
    "paired_difference": Metric(
        compare.paired_difference,
        "Koehn 2004",
        "items of two models",
        "tests/evaluate/test_compare.py",
        "exact",
        "none",
    ),
    "unpaired_difference": Metric(
        compare.unpaired_difference,
        "Newcombe 1998; Zou and Donner 2008",
        "intervals of two models",
        "tests/evaluate/test_compare.py",
        "exact",
        "none",
    ),
}
