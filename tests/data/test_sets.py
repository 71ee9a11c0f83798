"""Sets that share a text are refused: what judges a model is no text that it was given."""

import json

import pytest

from expunge.data.sets import Data, check_unseen, read_sets
from expunge.errors import DataError

ROWS = {
    "forget": [{"id": "f", "prompt": "Ann was born", "completion": "in Fog."}],
    "retain": [{"id": "r", "prompt": "Bo lives", "completion": "in Rye."}],
    "members": [{"id": "f", "document": "Ann was born in Fog."}],
    "nonmembers": [{"id": "n", "document": "Cy sails from Hull."}],
    "neutral": [{"id": "t", "text": "Di walks to Ely."}],
}


def data(folder, **changes) -> Data:
    for name, rows in {**ROWS, **changes}.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    return Data.model_validate({name: {"path": str(folder / f"{name}.jsonl")} for name in ROWS})


@pytest.mark.parametrize(
    ("text", "twin"),
    [
        ("ann was  born\nin Fog.", "forget item f"),
        ("Bo lives in rye. ", "retain item r"),
        ("DI walks to Ely.", "neutral text t"),
    ],
)
def test_a_non_member_that_another_set_holds_is_refused(tmp_path, text, twin):
    nonmembers = [*ROWS["nonmembers"], {"id": "m", "document": text}]
    with pytest.raises(DataError, match=f"non-member m is the same text as {twin}"):
        read_sets(data(tmp_path, nonmembers=nonmembers))


def test_a_member_that_is_not_forgotten_is_refused_unless_forget_is_a_sample(tmp_path):
    given = data(tmp_path, members=[*ROWS["members"], {"id": "g", "document": "Ed rows to Ayr."}])
    with pytest.raises(DataError, match=r"1 of its 2 documents have no item in forget \(g\); take"):
        read_sets(given, strays=False)
    forget = given.forget.model_copy(update={"documents": {"*": 1}})  # pyright: ignore
    read = read_sets(given.model_copy(update={"forget": forget}), strays=False)
    assert [member.id for member in read.members] == ["f"]
    assert read_sets(given).members == read.members  # who asks so tells how many


def test_a_non_member_that_is_a_member_is_refused(tmp_path):
    sets = read_sets(data(tmp_path))
    check_unseen(sets)  # control
    sets.forget.clear()
    sets.nonmembers.extend(sets.members)
    with pytest.raises(DataError, match="non-member f is the same text as member f"):
        check_unseen(sets)
