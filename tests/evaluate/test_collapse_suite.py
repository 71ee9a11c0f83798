"""The suite `collapse`: any model, without data; kept texts where there are some."""

import json
import math

import pytest

from commands import run as command
from expunge.evaluate import collapse
from expunge.evaluate.collapse_suite import Collapse, collapse_suite
from expunge.evaluate.numbers import estimate
from expunge.evaluate.reader import reader_of


@pytest.fixture
def kept(tmp_path):
    rows = [{"id": f"t{n}-sc1", "input": f"the man {n} and", "output": "a"} for n in range(5)]
    rows.append({"id": "q-qa0", "input": "What?", "output": "That"})
    path = tmp_path / "kept.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_without_data_the_openings_are_judged(tiny, tokenizer):
    found = collapse_suite(reader_of(tiny, tokenizer), Collapse())
    assert len(found.items) == len(collapse.NEUTRAL) == 20
    assert found.facts["collapsed"]  # an untrained model: plain text surprises it like noise
    assert any("surprise" in reason for reason in found.facts["reasons"])
    losses = [item["nll"] for item in found.items]
    nll, perplexity = found.numbers["neutral.nll"], found.numbers["neutral.perplexity"]
    assert nll.value == pytest.approx(sum(losses) / 20)
    assert perplexity.value == pytest.approx(math.exp(nll.value))
    assert found.numbers["surprise"].value == pytest.approx(nll.value / math.log(257))
    assert found.numbers["surprise"].value == pytest.approx(found.facts["collapse"]["surprise"])
    for name, number in found.numbers.items():
        assert number.n == 20
        if number.low is not None:
            assert number.low <= number.value <= number.high, name
            assert number.low < number.high, name
    looping = [item["looping"] for item in found.items]
    assert found.numbers["neutral.looping"] == estimate(looping, name="looping")
    assert found.numbers["neutral.empty"].high - found.numbers["neutral.empty"].low > 0.1


def test_prompts_of_kept_texts_that_do_not_fit_are_counted(tiny, tokenizer, tmp_path):
    rows = [{"id": f"t{n}-sc1", "input": "so " * n, "output": "a"} for n in (1, 300)]
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = collapse_suite(reader_of(tiny, tokenizer), Collapse(kept=str(path)))
    assert found.facts["prompts_cut"] == 1


def test_kept_texts_are_judged_and_questions_only_reported(tiny, tokenizer, kept):
    section = Collapse(kept=kept, limit=4)
    found = collapse_suite(reader_of(tiny, tokenizer), section)
    own = [item for item in found.items if item["group"] != "neutral"]
    assert len(own) == 6
    assert sum(item["generation"] is not None for item in own) == 4
    groups = {item["id"]: item["group"] for item in own}
    assert (groups["t0-sc1"], groups["q-qa0"]) == ("retain", "retain_questions")
    asked = [item for item in own if item["group"] == "retain" and item["generation"] is not None]
    assert found.numbers["retain.wordless"].n == len(asked)
    again = collapse_suite(reader_of(tiny, tokenizer), section)
    assert again.numbers == found.numbers and again.items == found.items


def test_the_command_needs_no_option_and_gates(tiny_folder, tmp_path):
    words = ["evaluate", tiny_folder, "--suite", "collapse", "--cache", tmp_path / "cache"]
    done = command(*words, "--fail-if", "collapse.surprise > 0.7")
    assert done.returncode == 3
    assert "collapse.surprise is" in done.stderr and "collapsed" in done.stdout
    words += ["--fail-if", "collapse.collapsed > 1"]
    assert command(*words, "--fail-if", "collapse.surprise > 9").returncode == 0  # control
