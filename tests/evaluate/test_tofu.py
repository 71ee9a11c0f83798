"""TOFU's metrics by hand, and the suite on files, against the model's own probabilities."""

import json
import math

import pytest
import torch

from expunge.errors import DataError, EvaluationError, ModelError, RecipeError
from expunge.evaluate import tofu
from expunge.evaluate.compare import compare
from expunge.evaluate.numbers import Number
from expunge.evaluate.reader import reader_of
from expunge.evaluate.readings import read_place
from expunge.evaluate.run import _write, evaluate_model, read_run
from expunge.evaluate.suites import parse_suites
from expunge.evaluate.tofu_suite import Tofu, question_tokens, tofu_suite


def test_probabilities_by_hand():
    assert tofu.answer_probability(math.log(4)) == pytest.approx(1 / 4)
    assert tofu.answer_probability(0.0) == 1.0
    # 1/2 against 1/4 and 1/4
    others = [math.log(4), math.log(4)]
    assert tofu.option_probability(math.log(2), others) == pytest.approx(1 / 2)
    assert tofu.option_probability(5000.0, [5000.0]) == pytest.approx(1 / 2)  # no 0/0
    assert tofu.option_probability(5000.0, [1.0]) < 1e-300
    with pytest.raises(EvaluationError, match="no perturbed answer"):
        tofu.option_probability(1.0, [])


def test_the_truth_ratio_is_a_geometric_mean_over_the_right_answer():
    """Wrong answers at 1/2 and 1/8: geometric mean 1/4 (arithmetic 5/16); the right one at 1/2."""
    ratio = tofu.truth_ratio(math.log(2), [math.log(2), math.log(8)])
    assert ratio == pytest.approx((1 / 4) / (1 / 2))
    assert tofu.truth_ratio(math.log(2), [math.log(8), math.log(2)]) == pytest.approx(ratio)
    assert tofu.kept_truth(ratio) == pytest.approx(1 / 2)
    assert tofu.forget_truth(ratio) == pytest.approx(1 / 2)
    assert tofu.forget_truth(1 / ratio) == pytest.approx(1 / 2)
    assert tofu.kept_truth(1 / ratio) == 0.0
    for extreme in (tofu.truth_ratio(1e6, [0.0]), tofu.truth_ratio(0.0, [1e6])):
        assert 0 < extreme < math.inf
        assert 0 <= tofu.forget_truth(extreme) < 1e-300
    with pytest.raises(EvaluationError, match="no perturbed answer"):
        tofu.truth_ratio(1.0, [])


def test_rouge_is_the_share_of_the_answer_in_order():
    answer = "Ada was born in London."  # five words
    assert tofu.answer_rouge(answer, "She says: Ada was born in London, long ago") == 1.0
    assert tofu.answer_rouge(answer, "born in Paris") == pytest.approx(2 / 5)
    assert tofu.answer_rouge(answer, "London in born") == pytest.approx(1 / 5)
    assert tofu.answer_rouge(answer, "") == 0.0
    assert tofu.answer_rouge("日本", "日") == 0.5


def test_utility_is_the_harmonic_mean_of_nine():
    means = dict.fromkeys(tofu.UTILITY, 0.5)
    assert len(means) == 9
    assert tofu.model_utility(means) == pytest.approx(0.5)
    one_low = {**means, "world.rouge": 0.1}
    assert tofu.model_utility(one_low) == pytest.approx(9 / (8 / 0.5 + 1 / 0.1))
    assert tofu.model_utility({**means, "world.rouge": 0.0}) == 0.0
    assert tofu.model_utility({**means, "forget.rouge": 0.0}) == pytest.approx(0.5)  # no part of it
    del means["retain.rouge"]
    assert tofu.model_utility(means) is None


def test_forget_quality_tells_who_forgot_from_who_remembers():
    retained = [0.6 + i / 100 for i in range(40)]
    forgot = [0.6 + i / 100 + 0.002 for i in range(40)]
    remembers = [0.1 + i / 100 for i in range(40)]
    assert tofu.forget_quality(forgot, retained) > 0.9
    assert tofu.forget_quality(remembers, retained) < 1e-6  # control


def rows(group, count):
    paraphrase = group in ("forget10", "retain")
    return [
        {
            "question": f"Who wrote {group} {i}?",
            "answer": f"Writer {i}",
            **({"paraphrased_answer": f"It was {i}"} if paraphrase else {}),
            "perturbed_answer": [f"Nobody {i}", f"Somebody {i}"][: 2 - i % 2],
        }
        for i in range(count)
    ]


@pytest.fixture
def folder(tmp_path):
    for group, count in {"forget10": 4, "retain": 3, "real_authors": 3, "world_facts": 2}.items():
        lines = [json.dumps(row) + "\n" for row in rows(group, count)]
        (tmp_path / f"{group}_perturbed.jsonl").write_text("".join(lines))
    return tmp_path


def section(folder, **changes):
    return Tofu(path=str(folder), **{"max_new_tokens": 4, **changes})


@torch.no_grad()
def loss(model, tokenizer, prompt, answer):
    start = tokenizer(prompt)["input_ids"]
    tokens = [*start, *tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
    log_p = model(input_ids=torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    found = [-float(log_p[t - 1, tokens[t]]) for t in range(len(start), len(tokens))]
    return sum(found) / len(found)


def test_the_suite_measures_what_the_model_says(tiny, tokenizer, folder):
    measured = tofu_suite(reader_of(tiny, tokenizer), section(folder))
    assert [item["group"] for item in measured.items] == (
        ["forget"] * 4 + ["retain"] * 3 + ["authors"] * 3 + ["world"] * 2
    )
    assert list(measured.numbers) == [
        *(f"{group}.{metric}" for group in tofu.GROUPS for metric in tofu.METRICS),
        "model_utility",
        "forget_quality",
    ]
    forget, author = measured.items[0], measured.items[7]
    ask = "Question: Who wrote forget10 0?\nAnswer:"
    losses = {
        answer: loss(tiny, tokenizer, ask, f" {answer}")
        for answer in ("Writer 0", "It was 0", "Nobody 0", "Somebody 0")
    }
    assert forget["probability"] == pytest.approx(math.exp(-losses["Writer 0"]), rel=1e-4)
    wrong = (losses["Nobody 0"] + losses["Somebody 0"]) / 2
    assert forget["truth_ratio"] == pytest.approx(math.exp(losses["It was 0"] - wrong), rel=1e-4)
    ask = "Question: Who wrote real_authors 0?\nAnswer:"
    right, *others = (
        math.exp(-loss(tiny, tokenizer, ask, f" {answer}"))
        for answer in ("Writer 0", "Nobody 0", "Somebody 0")
    )
    assert author["probability"] == pytest.approx(right / (right + sum(others)), rel=1e-4)
    # Without a paraphrase the answer itself is compared.
    assert author["truth_ratio"] == pytest.approx(
        math.sqrt(others[0] * others[1]) / right, rel=1e-4
    )
    number = measured.numbers["forget.truth_ratio"]
    ratios = [item["truth_ratio"] for item in measured.items[:4]]
    assert number.value == pytest.approx(sum(min(r, 1 / r) for r in ratios) / 4)
    assert number.n == 4
    assert measured.numbers["model_utility"].n == 8
    assert measured.numbers["forget_quality"] == Number(None, 0)
    assert measured.facts["collapsed"] is True  # an untrained model
    assert measured.facts["given"] == {"forget": 4, "retain": 3, "authors": 3, "world": 2}


def test_a_limit_leaves_no_item_without_its_row(tiny, tokenizer, folder):
    reader = reader_of(tiny, tokenizer)
    measured = tofu_suite(reader, section(folder, limit=2))
    assert len(measured.items) == 12
    asked = [item for item in measured.items if item["probability"] is not None]
    assert len(asked) == 8
    assert all(item["rouge"] is not None for item in asked)
    assert measured.numbers["forget.probability"].n == 2
    again = tofu_suite(reader, section(folder, limit=2))
    assert again.items == measured.items
    other = tofu_suite(reader, section(folder, limit=2, seed=1))
    assert other.items != measured.items


def test_forget_quality_from_a_model_and_from_its_results(tiny_folder, folder, tmp_path):
    def run(**changes):
        sections = {"tofu": section(folder, **changes)}
        how = {"cache": tmp_path / "cache", "out": tmp_path / "out"}
        return evaluate_model(str(tiny_folder), sections, **how)["suites"]["tofu"]["numbers"]

    by_model = run(retain=str(tiny_folder))
    assert by_model["forget_quality"]["value"] == 1.0
    assert by_model["forget_quality"]["n"] == 4
    saved = tmp_path / "retain"
    (tmp_path / "out").rename(saved)
    assert run(retain=str(saved)) == by_model
    results, items = read_run(saved)
    for item in items:  # of a model whose ratios all lie elsewhere
        item["truth_ratio"] = 50.0 + len(item["id"])
    (saved / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    # Of the 70 orders of 4 + 4 only the two wholly separate ones reach D = 1.
    assert run(retain=str(saved))["forget_quality"]["value"] == pytest.approx(2 / 70)
    with pytest.raises(EvaluationError, match=r"with tofu\.template=plain, not raw"):
        run(retain=str(saved), template="raw")
    (saved / "items.jsonl").write_text(json.dumps(items[0]) + "\n")
    with pytest.raises(EvaluationError, match="other forget items"):
        run(retain=str(saved))
    results["suites"] = {}
    (saved / "results.json").write_text(json.dumps(results))
    with pytest.raises(EvaluationError, match="no results of the suite tofu"):
        run(retain=str(saved))


def test_a_retain_model_that_is_not_there_is_refused_before_anything_is_read(
    tiny, tokenizer, folder
):
    reader = reader_of(tiny, tokenizer)
    with pytest.raises(ModelError, match="there is no model at /nowhere"):
        tofu_suite(reader, section(folder, retain="/nowhere"))
    assert reader.forwards == 0


def test_templates(tokenizer):
    def text(template):
        return tokenizer.decode(question_tokens(tokenizer, "Who?", template))

    assert text("plain") == "Question: Who?\nAnswer:"
    assert text("raw") == "Who?"
    with pytest.raises(EvaluationError, match="no chat template"):
        text("chat")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    try:
        assert text("chat") == "<user>Who?<assistant>"
    finally:
        tokenizer.chat_template = None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.pop("perturbed_answer"), "line 2 lacks the column 'perturbed_answer'"),
        (lambda row: row.update(perturbed_answer=[]), "must be a list that holds a text"),
        (lambda row: row.update(perturbed_answer=["a", 1]), "must be text, but is int"),
        (lambda row: row.update(answer=" "), "line 2: 'answer' is empty"),
        (lambda row: row.pop("paraphrased_answer"), "lacks the column 'paraphrased_answer'"),
        (lambda row: row.update(id="0"), "the id '0' is there twice"),
        (lambda row: row.update(question="long " * 200), "more than the model's context of 512"),
    ],
)
def test_wrong_files_are_one_line(tiny, tokenizer, folder, change, message):
    broken = rows("forget10", 3)
    change(broken[1])
    lines = "".join(json.dumps(row) + "\n" for row in broken)
    (folder / "forget10_perturbed.jsonl").write_text(lines)
    with pytest.raises((DataError, EvaluationError), match=message) as error:
        tofu_suite(reader_of(tiny, tokenizer), section(folder))
    assert "\n" not in str(error.value)


def test_wrong_places_are_one_line(tiny, tokenizer, folder):
    reader = reader_of(tiny, tokenizer)
    with pytest.raises(DataError, match=r"holds no forget05_perturbed\.jsonl"):
        tofu_suite(reader, section(folder, forget="forget05"))
    with pytest.raises(DataError, match=r"write hub:locuslab/TOFU"):
        tofu_suite(reader, section("locuslab/TOFU"))
    (folder / "retain_perturbed.json").write_text("{}")
    with pytest.raises(DataError, match="which is meant"):
        tofu_suite(reader, section(folder))
    with pytest.raises(RecipeError, match="forget01"):
        parse_suites(["tofu"], ["tofu.forget=forget99"])


def test_two_models_are_compared_item_by_item_under_each_name_once(
    tiny, tokenizer, folder, tmp_path, monkeypatch
):
    # An untrained model repeats no word and prefers no answer, so its utility would be 0.
    monkeypatch.setattr(tofu, "answer_rouge", lambda answer, text: 0.25 + len(text) % 4 / 8)
    monkeypatch.setattr(tofu, "kept_truth", lambda ratio: 1 / (1 + ratio))
    readings = []
    for name in "ab":
        measured = tofu_suite(reader_of(tiny, tokenizer), section(folder))
        measured.facts["collapsed"] = False
        _write(tmp_path / name, {"suites": {"tofu": measured.as_json()}}, {"tofu": measured})
        readings += read_place(str(tmp_path / name))
        with torch.no_grad():
            for parameter in tiny.parameters():
                parameter *= 1.5
    found = compare(*readings).differences
    assert [row.name for row in found] == [f"tofu.{name}" for name in measured.numbers]
    of = {row.name.removeprefix("tofu."): row for row in found}
    numbers = [reading.suites["tofu"].numbers for reading in readings]
    for name in [*(f"{group}.truth_ratio" for group in tofu.GROUPS), "model_utility"]:
        row, (a, b) = of[name], (one[name].value for one in numbers)
        assert (row.how, row.a, row.b) == ("paired", pytest.approx(a), pytest.approx(b))
        assert row.low <= row.difference <= row.high
    assert of["model_utility"].difference != 0 < of["model_utility"].a
    ratios = [row["truth_ratio"] for row in measured.items[:4]]
    assert of["forget.truth_ratio"].b != pytest.approx(sum(ratios) / 4)  # control: it is not R
