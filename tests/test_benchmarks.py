"""The benchmark of training: its cases, and what it takes to meet their goals."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def train(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import train

    return train


def test_a_case_that_is_none_is_refused_before_anything_runs(train, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--cases", "npo", "olno"])
    with pytest.raises(SystemExit, match="2"):
        train.main()
    assert "invalid choice: 'olno'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "cuda", "cases"),
    [
        ([], False, ["npo", "released", "full"]),
        ([], True, ["npo", "released", "full", "olmo"]),
        (["--cases", "olmo"], False, ["olmo"]),
    ],
)
def test_the_contest_in_an_hour_is_a_case_where_there_is_a_device(
    train, monkeypatch, words, cuda, cases
):
    done = []
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    monkeypatch.setattr(train.torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(train, "_case", lambda name, options: name)
    monkeypatch.setattr(train, "write_case", done.append)
    monkeypatch.setattr(subprocess, "call", lambda words: done.append(Path(words[1]).stem[6:]))
    train.main()
    assert done == cases


def test_npo_has_a_goal_of_memory_too(train):
    assert train.is_met("npo", 2.5, 0.5)
    assert not train.is_met("npo", 2.4, 0.5)
    assert not train.is_met("npo", 2.5, 0.51)
    assert train.is_met("released", 8.0, 0.9)


def test_what_is_recorded_as_met_is(train):
    recorded = json.loads(train.RESULTS.read_text())["cases"]
    assert {case["case"] for case in recorded} >= train.GOALS.keys()
    for case in recorded:
        if case["case"] in train.GOALS:
            assert case["met"] == train.is_met(case["case"], case["ratio"], case["memory_ratio"])
            assert case["memory_goal"] == train.MEMORY_GOALS.get(case["case"])
