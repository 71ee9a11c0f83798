"""Leaks: the documents whose items a model still gives away, the worst first."""

import json

import pytest

import expunge
from commands import run as command
from expunge.errors import EvaluationError
from expunge.evaluate.leaks import leaks
from expunge.evaluate.readings import Reading, SuiteReading, by_key
from expunge.report.compared import print_leaks

ITEMS = [
    {"group": "forget.Task1.sc", "id": "asc0", "prompt": "p", "truth": "t", "score": 0.4, "nll": 9},
    {"group": "forget.Task1.qa", "id": "aqa0", "generation": "t", "score": 0.4, "nll": 1},
    {"group": "forget.Task1.sc", "id": '"b"sc0', "score": 0.9, "nll": 5},
    {"group": "forget.Task1.qa", "id": '"b"qa0', "score": 0.0, "nll": 5},
    {"group": "forget.Task1.qa", "id": "cqa0", "score": None, "nll": 3},
    {"group": "forgetful", "id": "dqa0", "score": 1.0, "nll": 0},
    {"group": "retain.Task1.qa", "id": "eqa0", "score": 1.0, "nll": 0},
]


def reading(items=ITEMS, **more):
    suites = {"s": SuiteReading({}, by_key(items, "m"), {})}
    return Reading("m", suites | {n: SuiteReading({}, by_key(i, n), {}) for n, i in more.items()})


def test_the_worst_item_ranks_its_document_and_the_unmeasured_are_counted():
    found = leaks(reading())
    assert [one["document"] for one in found["documents"]] == ["b", "a"]
    assert [one["worst"] for one in found["documents"]] == [0.9, 0.4]
    assert [one["mean"] for one in found["documents"]] == [0.45, 0.4]
    assert [item["id"] for item in found["documents"][0]["items"]] == ['"b"sc0', '"b"qa0']
    first = found["documents"][1]["items"][0]
    assert first == {
        "score": 0.4,
        "group": "forget.Task1.sc",
        "id": "asc0",
        "prompt": "p",
        "truth": "t",
        "generation": None,
    }
    assert (found["metric"], found["of"], found["items"], found["not_measured"]) == (
        "score",
        2,
        5,
        1,
    )
    assert len(leaks(reading(), top=1)["documents"]) == 1


def test_of_a_loss_the_low_ones_leak():
    found = leaks(reading(), metric="nll")
    assert [one["document"] for one in found["documents"]] == ["a", "c", "b"]
    assert found["worst_is"] == "low"
    found = leaks(reading(), low=True)
    assert [one["document"] for one in found["documents"]] == ["b", "a"]
    assert [one["worst"] for one in found["documents"]] == [0.0, 0.4]


def test_other_groups_are_asked_for_by_name():
    assert leaks(reading(), group="retain")["documents"][0]["document"] == "e"
    assert leaks(reading(), group="forget.Task1.sc")["items"] == 2


def test_rows_of_two_sets_that_share_a_number_are_no_document():
    rows = [
        {"group": group, "id": name, "score": score}
        for group, name, score in (
            ("forget.verbatim", "0", 0.9),
            ("forget.knowledge", "0", 0.5),
            ("forget.verbatim", "7sc0", 0.4),
            ("forget.knowledge", "7qa0", 0.2),  # control: items of one document
        )
    ]
    found = leaks(reading(rows))["documents"]
    assert [(one["document"], one["worst"], len(one["items"])) for one in found] == [
        ("forget.verbatim 0", 0.9, 1),
        ("forget.knowledge 0", 0.5, 1),
        ("7", 0.4, 2),
    ]


def test_what_is_ambiguous_or_not_there_is_said():
    plain = [{"group": "forget", "id": "x", "jaccard": 1.0, "cosine": 1.0}]
    with pytest.raises(EvaluationError, match="say which: --metric jaccard or cosine"):
        leaks(reading(plain))
    with pytest.raises(EvaluationError, match=r"no metric 'jacard'. Did you mean 'jaccard'\?"):
        leaks(reading(plain), metric="jacard")
    with pytest.raises(EvaluationError, match="say which: --suite s or t"):
        leaks(reading(t=plain))
    assert leaks(reading(t=plain), suite="t", metric="cosine")["suite"] == "t"
    with pytest.raises(EvaluationError, match=r"was not measured by 'u'. It has: s"):
        leaks(reading(), suite="u")
    with pytest.raises(EvaluationError, match=r"no items of 'forgot'. Its groups: forget\.Task1"):
        leaks(reading(), group="forgot")
    other = [{"group": "members", "id": "x", "nll": 1.0}]
    with pytest.raises(EvaluationError, match=r"no items of 'forget'. Its groups: members;"):
        leaks(reading(t=other), suite="t")
    with pytest.raises(EvaluationError, match="none of these items was measured"):
        leaks(reading([{"group": "forget", "id": "x", "score": None}]))


def test_personal_data_that_a_model_gives_away_is_listed_with_what_it_says(tmp_path, capsys):
    said = [{"of": "forget", "kind": "ssn", "value": "900578002"}]
    rows = [
        {"suite": "m", "group": "forget", "id": "aqa0", "pii_leaks": 0, "leaks": []},
        {"suite": "m", "group": "forget", "id": "bqa0", "pii_leaks": 1, "leaks": said},
    ]
    (tmp_path / "results.json").write_text(
        json.dumps({"suites": {"m": {"numbers": {}, "facts": {}}}})
    )
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = expunge.leaks(tmp_path, metric="pii_leaks")
    assert [one["document"] for one in found["documents"]] == ["b", "a"]
    assert found["documents"][0]["items"][0]["leaks"] == said
    print_leaks(found)
    assert "says ssn: 900578002" in capsys.readouterr().out


def test_the_command_prints_both_ways(tmp_path):
    facts = {"numbers": {}, "facts": {}}
    (tmp_path / "results.json").write_text(json.dumps({"suites": {"s": facts}}))
    rows = [json.dumps({"suite": "s", **item}) + "\n" for item in ITEMS]
    (tmp_path / "items.jsonl").write_text("".join(rows))
    done = command("leaks", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.index("b: worst 0.9") < done.stdout.index("a: worst 0.4")
    assert "1 of 5 items were not measured" in done.stdout
    done = command("leaks", tmp_path, "--json", "--top", "1")
    assert [one["document"] for one in json.loads(done.stdout)["documents"]] == ["b"]
