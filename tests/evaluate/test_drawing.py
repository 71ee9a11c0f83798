"""Items of one document are drawn together, and tell less than as many of different ones."""

import numpy as np
import pytest

from expunge.evaluate.drawing import Draws, document_of, wilson_of_documents
from expunge.evaluate.numbers import Behind, wilson
from expunge.evaluate.paired import Pairs


def test_items_of_one_document_stay_together_in_all_groups():
    owners = {"sc": ["a", "b", "c"], "qa": ["a", "a", "b", "b", "c", "c"], "other": [1, 2]}
    draws, rng = Draws(owners), np.random.default_rng(0)
    assert draws.most == 3
    seen = set()
    for _ in range(50):
        found = draws.again(rng)
        passages = np.bincount(found["sc"], minlength=3)
        assert passages.sum() == 3 and len(found["other"]) == 2
        assert np.bincount(found["qa"], minlength=6).tolist() == np.repeat(passages, 2).tolist()
        seen.add(tuple(passages))
    assert len(seen) > 5  # control: not always the same


def test_groups_that_share_a_document_through_a_third_are_one_part():
    owners = {"a": [1], "b": [2], "c": [1, 2], "d": [3], "none": []}
    draws, rng = Draws(owners), np.random.default_rng(0)
    found = [draws.again(rng) for _ in range(50)]
    sizes = {tuple(len(one[name]) for name in "abcd") for one in found}
    assert sizes == {(2, 0, 2, 1), (0, 2, 2, 1), (1, 1, 2, 1)}
    assert Draws({"none": []}).most == 0


def test_wilson_of_documents_by_hand():
    """Two persons of four questions, all right and all wrong: D = 2, so deff = 2 · 8 / 2 = 8, and
    n* = 8 / 8 is held at two documents."""
    hits, owners = [1.0] * 4 + [0.0] * 4, ["a"] * 4 + ["b"] * 4
    assert wilson_of_documents(hits, owners) == wilson(1, 2)
    assert wilson_of_documents(hits, list(range(8))) == wilson(4, 8)  # each its own
    spread = [1.0, 1.0, 0.0, 0.0] * 2  # each person half right: no more is told than by eight
    assert wilson_of_documents(spread, owners) == wilson(4, 8)
    # Three of four, two of four, one of four: Σ(s - 2)² = 2, deff = (3/2) · 2 / (12 / 4) = 1.
    mixed = [1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    thirds = [name for name in "abc" for _ in range(4)]
    assert wilson_of_documents(mixed, thirds) == pytest.approx(wilson(6, 12))
    assert wilson_of_documents([0.0] * 8, owners) == wilson(0, 2)  # all alike: as if one each
    assert wilson_of_documents([1.0], ["a"]) == wilson(1, 1)


def test_an_interval_of_persons_holds_the_truth_nineteen_times_in_twenty():
    """Twenty persons of five questions each; a person knows all or nothing."""
    rng, owners = np.random.default_rng(0), np.repeat(np.arange(20), 5).tolist()
    held = {"documents": 0, "items": 0}
    for _ in range(300):
        hits = np.repeat(rng.integers(2, size=20), 5).astype(float).tolist()
        for name, found in (
            ("documents", wilson_of_documents(hits, owners)),
            ("items", wilson(sum(hits), 100)),
        ):
            held[name] += found[0] <= 0.5 <= found[1]
    assert held["documents"] / 300 > 0.92
    assert held["items"] / 300 < 0.75  # control: as if all questions were of different persons


def test_a_document_is_told_by_its_row_or_its_id():
    assert document_of({"id": "12ab-qa3"}) == "12ab-"
    assert document_of({"id": "12ab-qa3", "document": "d"}) == "d"
    assert document_of({"id": "7", "group": "forget"}) == "forget 7"
    assert document_of({"id": "7", "group": "forget"}) != document_of(
        {"id": "7", "group": "retain"}
    )


def test_evidence_counts_documents_that_differ():
    values = {"g": np.array([[0.0, 1.0], [0.0, 1.0], [0.5, 0.5], [1.0, 0.0]])}
    pairs = Pairs(values, {"g": ["a", "a", "b", "c"]})
    assert pairs.evidence(Behind("score", ("g",))) == 2
    sides = {"m": np.array([[0.0, 1.0]] * 5), "n": np.array([[0.0, 1.0]] * 2)}
    owners = {"m": list("abcde"), "n": list("fg")}
    assert Pairs(sides, owners).evidence(Behind("nll", ("m", "n"), "auc")) == 2
