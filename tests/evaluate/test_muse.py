"""MUSE's metrics by hand, and the suite on files, against the model's own probabilities."""

import json
import math

import pytest
import torch

from expunge.errors import DataError, EvaluationError, RecipeError
from expunge.evaluate import muse
from expunge.evaluate.compare import compare
from expunge.evaluate.muse_suite import GROUPS, Muse, muse_suite
from expunge.evaluate.numbers import Number
from expunge.evaluate.reader import reader_of
from expunge.evaluate.readings import Reading, SuiteReading, by_key
from expunge.evaluate.run import evaluate_model
from expunge.evaluate.suites import parse_suites


def test_verbatim_by_hand():
    truth = "the quick brown fox jumps"  # five words
    assert muse.verbatim_score(truth, truth) == 1.0
    # "the fox jumps high": LCS 3, precision 3/4, recall 3/5
    assert muse.verbatim_score(truth, "the fox jumps high") == pytest.approx(
        2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5)
    )
    assert muse.verbatim_score(truth, "nothing alike") == 0.0
    assert muse.verbatim_score(truth, "") == 0.0
    assert muse.verbatim_score("jumps", "jump") == 0.0  # not stemmed


def test_an_answer_ends_where_the_model_goes_on_by_itself():
    assert muse.knowledge_score("Paris", "Paris\n\nLondon is large") == 1.0
    assert muse.knowledge_score("Paris", "Paris\nQuestion: And Rome?") == 1.0
    assert muse.knowledge_score("Paris", "Paris Question: And Rome?") == 1.0
    assert muse.knowledge_score("Paris", "Paris\nLondon") == pytest.approx(2 / 3)  # p 1/2, r 1
    assert muse.knowledge_score("Paris", "\n\nParis") == 0.0
    assert muse.first_answer("") == ""


def test_leakage_tells_what_is_known_from_what_never_was():
    holdout, known, unknown = [-4.0, -5.0], [-1.0, -2.0], [-4.5, -4.5]
    # Pairs (h, f) with h > f: none of four, and two of four.
    assert muse.leakage_auc(known, holdout) == 0.0
    retrained = muse.leakage_auc(unknown, holdout)
    assert retrained == 0.5
    assert muse.privacy_leakage(0.0, retrained) == -100.0  # control: still known
    assert muse.privacy_leakage(retrained, retrained) == 0.0
    assert muse.leakage_auc([-9.0, -9.0], holdout) == 1.0
    assert muse.privacy_leakage(1.0, retrained) == 100.0  # overdone
    with pytest.raises(EvaluationError, match="AUC is 0"):
        muse.privacy_leakage(0.5, 0.0)
    with pytest.raises(EvaluationError, match="needs both"):
        muse.leakage_auc([], holdout)


@pytest.fixture
def folder(tmp_path):
    sets = {
        "verbmem/forget": [{"prompt": f"Once {i}", "gt": f"there was {i} " * 4} for i in range(3)],
        "privleak/forget": [{"text": f"A text {i} that was read."} for i in range(4)],
        "privleak/holdout": [{"text": f"Another {i}, never read!"} for i in range(3)],
    }
    for half in ("forget", "retain"):
        for name, count in (("qa", 2), ("qa_icl", 1)):
            sets[f"knowmem/{half}_{name}"] = [
                {"question": f"{half} {name} {i}?", "answer": f"It is {i}"} for i in range(count)
            ]
    for name, rows in sets.items():
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def section(folder, **changes):
    return Muse(path=str(folder), **{"verbatim_tokens": 6, "knowledge_tokens": 4, **changes})


def test_the_suite_measures_what_the_model_says(tiny, tokenizer, folder):
    reader = reader_of(tiny, tokenizer)
    measured = muse_suite(reader, section(folder))
    assert [item["group"] for item in measured.items] == (
        ["forget.verbatim"] * 3
        + ["forget.knowledge"] * 2
        + ["retain.knowledge"] * 2
        + ["privacy.forget"] * 4
        + ["privacy.holdout"] * 3
    )
    assert list(measured.numbers) == [*list(GROUPS)[:3], "privacy.auc", "privacy.leakage"]
    assert measured.items[5]["prompt"] == (
        "Question: retain qa_icl 0?\nAnswer: It is 0\n\nQuestion: retain qa 0?\nAnswer: "
    )
    item = measured.items[7]
    tokens = torch.tensor([tokenizer("A text 0 that was read.")["input_ids"]])
    with torch.no_grad():
        log_p = tiny(input_ids=tokens).logits[0].double().log_softmax(-1)
    found = sorted(float(log_p[t - 1, tokens[0, t]]) for t in range(1, tokens.shape[1]))
    count = math.floor(0.4 * len(found))
    assert item["score"] == pytest.approx(sum(found[:count]) / count, rel=1e-4)
    scores = {
        name: [i["score"] for i in measured.items if i["group"] == f"privacy.{name}"]
        for name in ("forget", "holdout")
    }
    wins = sum(h > f for h in scores["holdout"] for f in scores["forget"])
    auc = measured.numbers["privacy.auc"]
    assert auc.value == pytest.approx(wins / 12)
    assert auc.n == 7
    assert measured.numbers["privacy.leakage"] == Number(None, 0)
    assert measured.facts["collapsed"] is True  # an untrained model
    assert measured.facts["given"]["forget.verbatim"] == 3


def test_a_passage_is_compared_as_far_as_it_can_be_continued(tiny, tokenizer, folder, monkeypatch):
    """Six bytes of "there was 0 …" are "there "; a model that writes them recites it all."""
    reader = reader_of(tiny, tokenizer)
    written = tokenizer("there ")["input_ids"]
    plain = reader.generations

    def recite(prompts, **how):
        found = plain(prompts, **how)
        for made in found if how["label"] == "forget.verbatim" else ():
            made.tokens[:] = written
        return found

    monkeypatch.setattr(reader, "generations", recite)
    assert muse_suite(reader, section(folder)).numbers["forget.verbatim"].value == 1.0
    monkeypatch.setattr(reader, "generations", plain)
    assert muse_suite(reader, section(folder)).numbers["forget.verbatim"].value < 1.0  # control


def test_a_limit_leaves_no_item_without_its_row(tiny, tokenizer, folder):
    measured = muse_suite(reader_of(tiny, tokenizer), section(folder, limit=1))
    assert len(measured.items) == 14
    assert sum(item["score"] is not None for item in measured.items) == 5
    assert measured.numbers["privacy.auc"].n == 2
    assert measured.facts["texts_cut"] == 0
    short = muse_suite(reader_of(tiny, tokenizer), section(folder, limit=1, document_tokens=8))
    assert short.facts["texts_cut"] == 2


def test_leakage_from_a_model_its_results_and_its_auc(tiny_folder, folder, tmp_path):
    def run(**changes):
        sections = {"muse": section(folder, **changes)}
        how = {"cache": tmp_path / "cache", "out": tmp_path / "out"}
        return evaluate_model(str(tiny_folder), sections, **how)["suites"]["muse"]["numbers"]

    by_model = run(retrained=str(tiny_folder))
    assert by_model["privacy.leakage"]["value"] == 0.0
    (tmp_path / "out").rename(tmp_path / "retrained")
    assert run(retrained=str(tmp_path / "retrained")) == by_model
    auc = by_model["privacy.auc"]["value"]
    by_auc = run(retrained_auc=0.8)["privacy.leakage"]
    assert by_auc["value"] == pytest.approx(100 * (auc - 0.8) / 0.8)
    assert by_auc["low"] <= by_auc["value"] <= by_auc["high"]
    with pytest.raises(EvaluationError, match=r"with muse\.min_k=40.*, not 20"):
        run(retrained=str(tmp_path / "retrained"), min_k=20)
    lines = (tmp_path / "retrained" / "items.jsonl").read_text().splitlines()[:-1]
    (tmp_path / "retrained" / "items.jsonl").write_text("\n".join(lines))
    with pytest.raises(EvaluationError, match="on other texts"):
        run(retrained=str(tmp_path / "retrained"))


def test_the_leakage_of_two_models_is_compared_text_by_text(tiny, tokenizer, folder):
    readings = []
    for name in "ab":
        measured = muse_suite(reader_of(tiny, tokenizer), section(folder, retrained_auc=0.8))
        items = by_key(measured.items, name)
        suite = SuiteReading(measured.numbers, items, {}, behind=measured.behind)
        readings.append(Reading(name, {"muse": suite}))
        with torch.no_grad():
            for parameter in tiny.parameters():
                parameter *= 1.5
    found = {row.name: row for row in compare(*readings).differences}
    area, leakage = found["muse.privacy.auc"], found["muse.privacy.leakage"]
    assert (area.how, leakage.how, leakage.n) == ("paired", "paired", 7)
    assert leakage.difference == pytest.approx(area.difference / 0.8 * 100)
    assert leakage.b == pytest.approx(measured.numbers["privacy.leakage"].value)


def test_wrong_input_is_one_line(tiny, tokenizer, folder):
    reader = reader_of(tiny, tokenizer)
    (folder / "verbmem" / "forget.jsonl").write_text('{"prompt": "Once"}\n')
    with pytest.raises(DataError, match=r"line 1 lacks the column 'gt'\. Found: 'prompt'"):
        muse_suite(reader, section(folder))
    (folder / "verbmem" / "forget.jsonl").unlink()
    with pytest.raises(DataError, match=r"holds no verbmem/forget\.jsonl"):
        muse_suite(reader, section(folder))
    with pytest.raises(DataError, match="write hub:muse-bench/MUSE-News"):
        muse_suite(reader, section("muse-bench/MUSE-News"))
    with pytest.raises(RecipeError, match="retrained or retrained_auc, not both"):
        parse_suites(["muse"], ["muse.retrained=a", "muse.retrained_auc=0.5"])
