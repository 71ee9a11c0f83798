"""The table of metrics: what each reads, its function, and where it is defined."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from expunge.evaluate import choices, collapse, knowledge, membership, mmlu, rwku, semeval


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
    "accuracy": Metric(
        choices.accuracy,
        "arXiv:2009.03300",
        "letters chosen",
        "tests/evaluate/test_mmlu.py",
        cost="one forward pass",
    ),
    "macro_accuracy": Metric(
        choices.macro_accuracy,
        "arXiv:2009.03300",
        "accuracies by subject",
        "tests/evaluate/test_mmlu.py",
        cost="one forward pass",
    ),
    "top_letter": Metric(
        choices.top_letter,
        "this project",
        "letters chosen",
        "tests/evaluate/test_mmlu.py",
        "own",
        "one forward pass",
    ),
    "constant_answer": Metric(
        choices.constant_answer,
        "this project",
        "letters chosen",
        "tests/evaluate/test_mmlu.py",
        "own",
        "one forward pass",
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
        "one forward pass",
    ),
}
