"""The table of metrics: what each reads, its function, and where it is defined."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from expunge.evaluate import collapse, compare, concepts, membership, mmlu, semeval


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
    "trace_jaccard": Metric(
        concepts.jaccard,
        _TRACES,
        "the model before",
        "tests/evaluate/test_traces.py",
        "exact",
        "weights alone",
    ),
    "trace_cosine": Metric(
        concepts.cosine,
        _TRACES,
        "the model before",
        "tests/evaluate/test_traces.py",
        "exact",
        "weights alone",
    ),
    "trace_distance": Metric(
        concepts.distance,
        _TRACES,
        "the model before",
        "tests/evaluate/test_traces.py",
        "adapted",
        "weights alone",
    ),
    "trace_score": Metric(
        concepts.concept_scores,
        _TRACES,
        "the model before, a concept's tokens",
        "tests/evaluate/test_traces.py",
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
