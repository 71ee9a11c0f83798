"""results.json and docs/results.json: read back as written, null where nothing was measured."""

import json
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from expunge.errors import RunError
from expunge.report import board, results
from expunge.report.board import BoardRow, _worst, add_rows, read_rows, rows_of
from expunge.report.results import Results, read_results
from expunge.runs import write_json

DOCUMENT = Path(__file__).parents[2] / "docs" / "results-format.md"


def test_what_is_written_is_read_back(results, tmp_path):
    path = tmp_path / "results.json"
    write_json(path, results.model_dump(mode="json"))
    assert read_results(path) == results


def test_what_is_not_measured_is_null(results):
    bare = results.model_dump(mode="json")["models"]["original"]
    assert bare["semeval"]["mia"] is None and bare["semeval"]["final"] is None
    assert bare["collapse"] == {"collapsed": None, "reasons": []}
    assert set(bare["nll"].values()) == {None}
    assert "0" not in json.dumps(bare)


def test_a_newer_format_is_refused(results, tmp_path):
    path = tmp_path / "results.json"
    content = results.model_dump(mode="json")
    write_json(path, content)
    read_results(path)  # control: this format is read
    write_json(path, content | {"format": results.format + 1})
    with pytest.raises(RunError, match=r"format 2, written by a newer expunge; .* up to 1"):
        read_results(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "names no format"),
        ('{"format": 1, "recipe": "demo"}', "models: Field required"),
        ('{"format": 1, "recipe": "demo", "models": {"a": {"semevil": {}}}}', "semevil"),
        ('{"format": 1', "not valid JSON"),
    ],
)
def test_a_file_that_is_no_results_is_refused(text, says, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(RunError, match=says):
        read_results(path)
    with pytest.raises(RunError, match="there are no results at"):
        read_results(tmp_path / "gone.json")


@pytest.mark.parametrize("value", [1.5, -0.1, float("nan")])
def test_a_share_is_between_0_and_1(value):
    terms = {"forget/Task1/sc": value}
    with pytest.raises(ValidationError):
        Results.model_validate({"recipe": "r", "models": {"a": {"semeval": {"terms": terms}}}})


def test_the_worst_two_sided_auc_of_a_fold_is_the_one_furthest_from_a_half():
    attacks = {"loss": {"two_sided": 0.2, "ks": 0.3}, "zlib": {"two_sided": 0.6, "ks": 0.1}}
    assert _worst(attacks) == {"two_sided": 0.2, "ks": 0.3}
    assert _worst({}) == {}


def test_rows_tell_the_story_in_order_and_by_hand(results):
    found = {row["system"]: row for row in rows_of(results, board="smollm2")}
    assert list(found) == ["original", "target", "strong", "merged", "linear"]
    merged = found["merged"]
    assert merged["board"] == "smollm2" and rows_of(results)[0]["board"] == "demo"
    assert (merged["mia_auc"], merged["mia_score"], merged["final"]) == (0.5, 1.0, 0.81)
    assert (merged["forget_sc"], merged["retain_qa"]) == (pytest.approx(0.05), pytest.approx(0.95))
    assert (merged["seed"], merged["commit"], merged["recipe"]) == (42, "abc1234567", "demo")
    assert found["strong"]["collapsed"] is True
    assert found["original"]["forget_sc"] is None and found["original"]["final"] is None


def test_a_row_takes_the_place_of_the_same_system_board_and_seed(results, tmp_path):
    path = tmp_path / "results.json"
    assert read_rows(path) == []
    first = rows_of(results)
    add_rows(path, first)
    assert read_rows(path) == first
    add_rows(path, [first[3] | {"final": 0.5}, first[3] | {"seed": 7}])
    merged = [(r["seed"], r["final"]) for r in read_rows(path) if r["system"] == "merged"]
    assert merged == [(7, 0.81), (42, 0.5)]
    assert len(read_rows(path)) == len(first) + 1


def test_a_row_that_is_none_is_refused(tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(RunError, match="a new row: board: Field required"):
        add_rows(path, [{"system": "merged", "recipe": "demo"}])
    assert not path.exists()
    path.write_text('{"rows": 3}')
    with pytest.raises(RunError, match=r'must hold {"rows": \[...\]}'):
        read_rows(path)


def test_the_document_names_every_field():
    text = DOCUMENT.read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)`", text))
    kinds = [kind for kind in vars(results).values() if _is_section(kind)] + [BoardRow]
    fields = {name for kind in kinds for name in kind.model_fields}
    assert len(kinds) >= 8 and fields - named == set()
    assert "semevil" not in named  # control: not just any word is found


def test_the_example_in_the_document_can_be_read():
    (example,) = re.findall(r"```json\n(.*?)```", DOCUMENT.read_text("utf-8"), re.DOTALL)
    assert Results.model_validate_json(example).models["merged"].semeval.final == 0.7


def _is_section(kind) -> bool:
    return isinstance(kind, type) and issubclass(kind, board.Section) and kind is not board.Section
