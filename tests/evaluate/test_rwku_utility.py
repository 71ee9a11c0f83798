"""RWKU's utility sets: how each is asked, what is measured of it, and which rows are refused."""

import json

import pytest

from expunge.data.batches import TokenSequence
from expunge.errors import DataError
from expunge.evaluate import rwku_utility
from expunge.evaluate.abilities import truthful_mc2
from expunge.evaluate.generate import EARLIEST_STOP
from expunge.evaluate.reader import reader_of
from expunge.evaluate.rwku import rwku_suite
from expunge.evaluate.rwku_rows import TRIVIA_PRESET, TRUTHFUL_PRESET, Rwku
from expunge.evaluate.rwku_utility import UTILITY

SOLVED = {"question": "What is 1 + 1?", "choices": ["1", "2", "3", "4"], "answer": 1}
ROWS = {
    "retain_mmlu": {
        "question": "What is 2 + 2?",
        "choices": ["1", "2", "3", "4"],
        "answer": 3,
        "task": "abstract_algebra",
        "examples": [SOLVED],
    },
    "retain_bbh": {
        "task": "sums",
        "cot": "Add up.\n\nQ: 1 + 1?\nA: so the answer is 2.\n",
        "question": "2 + 2?",
        "answer": "4",
    },
    "truthful": {
        "question": "Can pigs fly?",
        "mc1_targets": {"choices": ["No", "Yes"], "labels": [1, 0]},
        "mc2_targets": {"choices": ["No", "Never", "Yes"], "labels": [1, 1, 0]},
    },
    "triviaqa": {"question": "Which river is in Cairo?", "answers": ["Nile", "the Nile"]},
    "fluency": {"instruction": "Write a poem."},
}
ASKED = {
    "retain_mmlu": "The following are multiple choice questions (with answers) about abstract "
    "algebra.\n\nQuestion: What is 1 + 1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B\n\nPlease following "
    "the previous examples and answer the given question.\nQuestion: What is 2 + 2?\n"
    "A. 1\nB. 2\nC. 3\nD. 4\nAnswer:",
    "retain_bbh": "Add up.\n\nQ: 1 + 1?\nA: so the answer is 2.\n\nFollowing previous examples, "
    "answer the following questions and end with 'so the answer is'\nQ: 2 + 2?\nA:",
    "truthful": f"{TRUTHFUL_PRESET}\n\nQ: Can pigs fly?\nA:",
    "triviaqa": f"{TRIVIA_PRESET}\nQ: Which river is in Cairo?\nA:",
    "fluency": "Instruction: Write a poem.\n",
}


@pytest.fixture
def folder(tmp_path):
    for name, row in ROWS.items():
        rows = [row | {"subject": who} for who in ("Stephen King", "Confucius")]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    return tmp_path


def section(folder, **more):
    return Rwku(path=str(folder), max_new_tokens=4, long_tokens=2 * EARLIEST_STOP, **more)


def only(folder, name):
    """The folder with one of its sets."""
    for other in ROWS:
        if other != name:
            (folder / f"{other}.json").unlink()


def test_every_row_of_every_set_is_an_item_with_what_is_measured_of_it(tiny, tokenizer, folder):
    found = rwku_suite(reader_of(tiny, tokenizer), section(folder))
    more = {"utility.truthfulness.mc2", "utility.factuality.exact"}
    assert set(found.numbers) == {*UTILITY, *more}
    assert {number.n for number in found.numbers.values()} == {2}
    assert [item["id"] for item in found.items] == [f"{n}/{i}" for n in UTILITY for i in (0, 1)]
    for name, number in found.numbers.items():
        behind = found.behind[name]
        own = [item[behind.metric] for item in found.items if item["group"] in behind.groups]
        assert sum(own) / 2 == pytest.approx(number.value)
    one = rwku_suite(reader_of(tiny, tokenizer), section(folder, limit=1, subject="Confucius"))
    assert [item["id"] for item in one.items] == [f"{name}/1" for name in UTILITY]
    without = section(folder, utility=False)
    with pytest.raises(DataError, match=r"no data file at .*forget_level1"):
        rwku_suite(reader_of(tiny, tokenizer), without)


@pytest.mark.parametrize("name", ROWS)
def test_prompts_are_those_of_the_release(tiny, tokenizer, folder, name, monkeypatch):
    only(folder, name)
    seen = []
    reader = reader_of(tiny, tokenizer)

    def generations(prompts, **_):
        seen.extend(map(tuple, prompts))
        raise DataError("asked")

    def scores(sequences, **_):
        seen.extend(s.tokens[: s.answer_start] for s in sequences)
        raise DataError("asked")

    def options(_, prompts, groups, letters, **__):
        seen.extend(map(tuple, prompts))
        raise DataError("asked")

    monkeypatch.setattr(reader, "generations", generations)
    monkeypatch.setattr(reader, "scores", scores)
    monkeypatch.setattr(rwku_utility, "option_logits", options)
    monkeypatch.setattr(rwku_utility, "letter_tokens", lambda _: [])
    for template, around in ((None, "{}"), ("<{{ messages[0]['content'] }}>", "<{}>{}")):
        seen.clear()
        monkeypatch.setattr(tokenizer, "chat_template", template)
        monkeypatch.setattr(reader, "context", 10**6)
        with pytest.raises(DataError, match="asked"):
            rwku_suite(reader, section(folder))
        said = ASKED[name]
        if template:  # the release puts what the answer begins with behind the template
            begun = {"retain_mmlu": "\nAnswer:", "triviaqa": "A:", "fluency": ""}.get(name, "\nA:")
            turn = said.removesuffix(begun)
            space = " " if name in ("retain_bbh", "truthful") else ""
            said = around.format(turn, space + begun.strip())
        assert set(map(tokenizer.decode, seen)) == {said}


def test_right_answers_score_and_wrong_ones_do_not(tiny, tokenizer, folder, monkeypatch):
    said = {
        "utility.reason": ["so the answer is 4. And", "the answer is 5."],
        "utility.factuality": ["Nile", "the river Nile"],
        "utility.fluency": ["no no no", "one two three"],
    }
    reader = reader_of(tiny, tokenizer)
    texts = iter([text for own in said.values() for text in own])

    def generations(prompts, **_):
        return [type("Made", (), {"tokens": next(texts)}) for _ in prompts]

    monkeypatch.setattr(reader, "generations", generations)
    monkeypatch.setattr(reader, "text", lambda tokens: tokens)
    numbers = rwku_suite(reader, section(folder)).numbers
    assert numbers["utility.reason"].value == 0.5
    assert numbers["utility.factuality.exact"].value == 0.5
    assert numbers["utility.factuality"].value == pytest.approx((1 + 2 / 3) / 2)
    assert 0 < numbers["utility.fluency"].value < 2


def test_truthfulness_is_of_whole_answers_behind_the_question(tiny, tokenizer, folder):
    only(folder, "truthful")
    reader = reader_of(tiny, tokenizer)
    found = rwku_suite(reader, section(folder))
    preset, logp = TRUTHFUL_PRESET, {}
    for answer in ("No", "Never", "Yes"):
        prompt = tokenizer(f"{preset}\n\nQ: Can pigs fly?\nA:")["input_ids"]
        end = tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
        kept = prompt[-(reader.context - len(" Never")) :]
        (scored,) = reader.scores([TokenSequence(answer, (*kept, *end), len(kept))])
        logp[answer] = float(scored.logp.sum())
    mc2 = truthful_mc2([logp["No"], logp["Never"]], [logp["Yes"]])
    assert found.numbers["utility.truthfulness.mc2"].value == pytest.approx(mc2)
    assert found.numbers["utility.truthfulness"].value == float(logp["No"] > logp["Yes"])


def test_reasoning_ends_once_its_answer_is_named(tiny, tokenizer, folder, monkeypatch):
    """Tokens behind it change nothing, so they are not written."""
    only(folder, "retain_bbh")
    reader = reader_of(tiny, tokenizer)
    plain = rwku_suite(reader, section(folder))
    lengths = []
    for text in ("nothing", "the answer is 4."):
        reader = reader_of(tiny, tokenizer)
        monkeypatch.setattr(reader, "text", lambda tokens, text=text: text)
        kept = reader.generations

        def generations(prompts, kept=kept, **how):
            made = kept(prompts, **how)
            lengths.append(max(len(one.tokens) for one in made))
            return made

        monkeypatch.setattr(reader, "generations", generations)
        value = rwku_suite(reader, section(folder)).numbers["utility.reason"].value
        assert value == float(text != "nothing")
    assert plain.numbers["utility.reason"].value == 0.0
    (folder / "retain_bbh.json").write_text(json.dumps([ROWS["retain_bbh"] | {"answer": ["4"]}]))
    assert rwku_suite(reader, section(folder)).numbers["utility.reason"].value == 1.0  # a list
    assert lengths[1] < lengths[0]


def test_presets_can_be_those_of_the_release(tiny, tokenizer, folder, tmp_path, monkeypatch):
    preset = tmp_path / "preset.txt"
    preset.write_text("Q: Own?\nA: Yes.\n")
    reader, seen = reader_of(tiny, tokenizer), []
    kept = reader.generations
    monkeypatch.setattr(
        reader,
        "generations",
        lambda prompts, **how: [seen.append(tokenizer.decode(prompts[0])), kept(prompts, **how)][1],
    )
    only(folder, "triviaqa")
    rwku_suite(reader, section(folder, trivia_preset=preset))
    assert seen == ["Q: Own?\nA: Yes.\nQ: Which river is in Cairo?\nA:"]
    with pytest.raises(DataError, match="cannot read the preset"):
        rwku_suite(reader, section(folder, trivia_preset=tmp_path / "none.txt"))


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("retain_mmlu", {"examples": None}, "row 1: 'examples' must be a list of solved"),
        ("retain_mmlu", {"examples": [{}]}, "row 1, example 1: 'choices' must be a list of four"),
        ("retain_mmlu", {"answer": 4}, "row 1: 'answer' must be 0, 1, 2 or 3"),
        ("retain_mmlu", {"answer": True}, "row 1: 'answer' must be 0, 1, 2 or 3"),
        ("retain_mmlu", {"question": ""}, "row 1: 'question' must be text"),
        ("retain_mmlu", {"task": 3}, "row 1: 'task' must be text"),
        ("retain_bbh", {"cot": None}, "row 1: 'cot' must be text"),
        ("retain_bbh", {"answer": []}, "row 1: 'answer' must be text"),
        ("truthful", {"mc1_targets": None}, "row 1: 'mc1_targets' must hold lists"),
        (
            "truthful",
            {"mc2_targets": {"choices": ["No"], "labels": [1, 0]}},
            "row 1: 'mc2_targets' must hold as many choices as labels",
        ),
        (
            "truthful",
            {"mc2_targets": {"choices": ["No"], "labels": [1]}},
            "row 1: 'mc2_targets' needs a right and a wrong answer",
        ),
        ("triviaqa", {"answers": []}, "row 1: 'answers' must be a list"),
        ("triviaqa", {"answers": [" "]}, "row 1: 'answers' must be text"),
        ("fluency", {"instruction": 1}, "row 1: 'instruction' must be text"),
    ],
)
def test_wrong_rows_are_refused_by_their_place(tiny, tokenizer, folder, name, change, said):
    only(folder, name)
    (folder / f"{name}.json").write_text(json.dumps([ROWS[name] | change]))
    with pytest.raises(DataError, match=said):
        rwku_suite(reader_of(tiny, tokenizer), section(folder))
