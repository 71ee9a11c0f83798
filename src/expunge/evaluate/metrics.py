"""The table of metrics: what each reads, its function, and where it is defined."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from expunge.evaluate import collapse, membership, mmlu, semeval


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
}
