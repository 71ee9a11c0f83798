"""One run by hand: a target that knows all, a collapsed strong branch, a merge that is good."""

import pytest

from expunge.report.results import TERMS, Results


def model(forget, retain, *, auc=None, final=None, collapsed=None, **collapse):
    mia = auc and {"auc": auc, "score": 1 - 2 * abs(auc - 0.5), "low": auc - 0.1, "high": auc + 0.1}
    return {
        "semeval": {
            "terms": {term: forget if term.startswith("forget") else retain for term in TERMS},
            "mia": mia,
            "final": final,
        },
        "collapse": {"collapsed": collapsed, **collapse},
    }


@pytest.fixture
def results() -> Results:
    return Results.model_validate(
        {
            "recipe": "demo",
            "seed": 42,
            "commit": "abc1234567",
            "created": "2026-01-01T00:00:00Z",
            "models": {
                "linear": model(0.4, 0.5, final=0.244, collapsed=False),
                "merged": model(0.05, 0.95, auc=0.5, final=0.81, collapsed=False, repetition=0.125),
                "strong": model(
                    0.0,
                    0.1,
                    auc=0.1,
                    final=0.4321,
                    collapsed=True,
                    repetition=0.875,
                    reasons=["retain: looping"],
                ),
                "target": model(1.0, 0.99, auc=0.89, collapsed=False),
                "original": {},
            },
            "stages": [{"stage": "tune", "key": "00ff", "wall_seconds": 61.5}],
        }
    )


@pytest.fixture
def items():
    def row(generation, score=None, number=0, half="forget"):
        return {
            "id": f"{number}sc1",
            "half": half,
            "task": "Task1",
            "kind": "sc",
            "prompt": "Once upon a time",
            "truth": "there was a queen",
            "generation": generation,
            "score": score,
        }

    return {
        "merged": [row("<script>alert('x')</script><img src=//evil.example>", 0.25)],
        "target": [row("there was a queen", 1.0)],
    }
