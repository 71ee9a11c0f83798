"""What a candidate is screened by: tasks that are balanced apart, and those that are not."""

import numpy as np
import pytest

from expunge.calibrate.reading import Material, Reading, documents_of, material
from expunge.data.batches import TokenSequence
from expunge.data.examples import Document
from expunge.data.sets import Sets
from expunge.evaluate.balance import balance
from expunge.evaluate.tables import TokenScores


class Said:
    """A reader to which each text is as likely as its id says."""

    def scores(self, sequences, label=""):
        return [self._of(float(sequence.id)) for sequence in sequences]

    def _of(self, logp: float) -> TokenScores:
        one = np.array([logp], np.float32)
        return TokenScores(one, one.astype(np.int32), one > 0, one, one)


def texts(*logps: float) -> list[tuple[str, TokenSequence]]:
    return [("text", TokenSequence(str(logp), (1, 2), 1)) for logp in logps]


def read(tasks) -> Reading:
    """Members of A above all of A, those of B below all of B; together in the middle."""
    given = Material([], texts(-1, -2, -8, -9), texts(-4, -5, -3, -6), [], tasks)
    return Reading({}, balance(documents_of(Said(), given, ["loss"])), 0.0)  # pyright: ignore


def test_tasks_that_err_on_opposite_sides_are_seen_where_each_is_balanced_apart():
    together = read(None)
    assert {a: n["auc"] for a, n in together.membership.items()} == {"loss": 0.5}
    assert together.mia == 1
    apart = read((["A", "A", "B", "B"], ["A", "A", "B", "B"]))
    assert {a: n["auc"] for a, n in apart.membership.items()} == {
        "loss": 0.5,
        "loss of A": 1.0,
        "loss of B": 0.0,
    }
    assert apart.mia == 0
    assert apart.auc == 0.5  # midway: no dial that all tasks share does better


@pytest.mark.parametrize(("by_task", "kept"), [(False, 3), (True, 5)])
def test_a_limit_of_documents_is_each_task_s(tokenizer, by_task, kept):
    members = [Document(str(n), f"text {n}", "A" if n < 7 else "B") for n in range(9)]
    sets = Sets([], [], members, members[::-1], [])
    how = {"max_length": 64, "separator": " "}
    given = material(sets, tokenizer, how=how, document_tokens=64, documents=3, by_task=by_task)
    assert len(given.members) == len(given.nonmembers) == kept
    if by_task:
        assert given.tasks == (["A", "A", "A", "B", "B"],) * 2
        again = {text for text, _ in given.members}
        assert again == {text for text, _ in given.nonmembers}
    else:
        assert given.tasks is None
