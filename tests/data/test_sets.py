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


def test_a_non_member_that_is_a_member_is_refused(tmp_path):
    sets = read_sets(data(tmp_path))
    check_unseen(sets)  # control
    sets.forget.clear()
    sets.nonmembers.extend(sets.members)
    with pytest.raises(DataError, match="non-member f is the same text as member f"):
        check_unseen(sets)
