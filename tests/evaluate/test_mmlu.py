"""MMLU: prompts, sampling, and the shared prefix."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from expunge.errors import DataError
from expunge.evaluate import choices, options
from expunge.evaluate.mmlu import (
    Mmlu,
    Question,
    answer_mmlu,
    letter_logits,
    prompt,
    read_mmlu,
    sample,
)
from expunge.evaluate.mmlu_suite import mmlu_suite
from expunge.evaluate.reader import reader_of


def question(number, subject="world_facts", split="test"):
    return Question(subject, split, f"What is {number}?", ("w", "x", "y", f"{number}"), number % 4)


DEV = [question(n, s, "dev") for s in ("world_facts", "maths") for n in range(5)]
TEST = [question(n, s) for s in ("world_facts", "maths") for n in range(10, 17)]


def test_the_prompt_is_the_original_one():
    assert prompt(question(2), [question(1)]) == (
        "The following are multiple choice questions (with answers) about world facts.\n\n"
        "What is 1?\nA. w\nB. x\nC. y\nD. 1\nAnswer: B\n\n"
        "What is 2?\nA. w\nB. x\nC. y\nD. 2\nAnswer:"
    )


@torch.no_grad()
def test_a_shared_prefix_gives_the_logits_of_the_full_prompt(tiny, tokenizer, monkeypatch):
    monkeypatch.setattr(options, "PACK_TOKENS", 120)  # several packs a subject
    examples = {"world_facts": DEV[:5], "maths": DEV[5:]}
    found, shots = letter_logits(reader_of(tiny, tokenizer), TEST, examples, shots=5)
    letters = [tokenizer(letter)["input_ids"][0] for letter in "ABCD"]
    full = []
    for asked, kept in zip(TEST, shots, strict=True):
        text = prompt(asked, examples[asked.subject][:kept]) + " "  # a byte tokenizer: space apart
        tokens = torch.tensor([tokenizer(text)["input_ids"]])
        full.append(tiny(input_ids=tokens).logits[0, -1, letters])
    torch.testing.assert_close(torch.from_numpy(found), torch.stack(full), atol=1e-5, rtol=1e-4)
    assert set(shots) < set(range(6))  # control: 512 tokens hold fewer than five examples


def test_counts_are_of_all_questions_and_constant_answers_show(tiny, tokenizer):
    found = answer_mmlu(reader_of(tiny, tokenizer), DEV + TEST, Mmlu(shots=2))
    assert found is not None
    correct = sum(subject["correct"] for subject in found["per_subject"].values())
    assert found["n"] == 14
    assert found["accuracy"] == correct / 14
    assert sum(found["letters"].values()) == pytest.approx(1)
    assert found["fewer_shots"] == 0
    assert not found["sampled"]


def test_a_sample_is_seeded_counted_and_said(tiny, tokenizer):
    config = Mmlu(shots=0, per_subject=3)
    found = answer_mmlu(reader_of(tiny, tokenizer), DEV + TEST, config)
    assert found is not None
    assert [s["n"] for s in found["per_subject"].values()] == [3, 3]
    assert found["sampled"]
    assert sample(TEST, config) == sample(TEST, config)
    assert sample(TEST, config) != sample(TEST, Mmlu(per_subject=3, seed=1))


def test_no_questions_are_no_score(tiny, tokenizer):
    assert answer_mmlu(reader_of(tiny, tokenizer), [], Mmlu()) is None


def test_too_few_examples_are_refused(tiny, tokenizer):
    with pytest.raises(DataError, match="maths has 0 dev questions, not 5"):
        answer_mmlu(reader_of(tiny, tokenizer), [question(1, "maths")], Mmlu())


def test_a_parquet_file_is_read_and_a_missing_or_wrong_one_refused(tmp_path):
    rows = [{"subject": "s", "split": "dev", "question": "q", "choices": list("wxyz"), "answer": 3}]
    path = tmp_path / "mmlu.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert read_mmlu(path) == [Question("s", "dev", "q", ("w", "x", "y", "z"), 3)]
    with pytest.raises(DataError, match="cannot read MMLU from"):
        read_mmlu(tmp_path / "none.parquet")
    pq.write_table(pa.Table.from_pylist([{**rows[0], "answer": 4}]), path)
    with pytest.raises(DataError, match="row 0 needs an answer from 0 to 3, not 4"):
        read_mmlu(path)


def test_accuracies_by_hand():
    answers, chosen = [0, 1, 2, 3, 0], [0, 0, 2, 1, 0]
    assert choices.accuracy(answers, chosen) == 3 / 5
    assert choices.accuracy([], []) is None
    assert choices.macro_accuracy({"a": 1.0, "b": 0.25}) == 0.625
    assert choices.macro_accuracy({}) is None
    assert choices.top_letter(chosen) == 3 / 5
    assert choices.top_letter([]) is None


def test_one_letter_throughout_is_called_constant():
    assert choices.constant_answer([1] * 20) is True
    assert choices.constant_answer([1] * 19 + [2]) is True  # 0.95
    assert choices.constant_answer([1] * 18 + [2, 3]) is False
    assert choices.constant_answer([1] * 19) is None  # too few
    assert choices.constant_answer([0, 1, 2, 3] * 10) is False


@pytest.fixture
def path(tmp_path):
    rows = [
        {
            "subject": q.subject,
            "split": q.split,
            "question": q.question,
            "choices": list(q.choices),
            "answer": q.answer,
        }
        for q in DEV + TEST
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "mmlu.parquet")
    return str(tmp_path / "mmlu.parquet")


def test_the_suite_says_what_answer_mmlu_says_and_lists_every_question(tiny, tokenizer, path):
    reader = reader_of(tiny, tokenizer)
    found = mmlu_suite(reader, Mmlu(path=path, shots=2))
    plain = answer_mmlu(reader, DEV + TEST, Mmlu(shots=2))
    assert plain is not None
    assert found.numbers["accuracy"].value == pytest.approx(plain["accuracy"])
    assert found.numbers["macro"].value == pytest.approx(plain["macro"])
    assert found.numbers["subject.maths"].n == 7
    assert found.facts["letters"] == plain["letters"]
    assert [item["group"] for item in found.items] == ["world_facts"] * 7 + ["maths"] * 7
    assert found.items[0].keys() == {"group", "id", "text", "answer", "chosen", "correct"}
    assert found.items[0]["id"] == "world_facts/0"
    assert found.items[0]["answer"] == "C"  # 10 mod 4


def test_questions_that_a_sample_leaves_out_are_items_without_an_answer(tiny, tokenizer, path):
    found = mmlu_suite(reader_of(tiny, tokenizer), Mmlu(path=path, shots=0, per_subject=2))
    assert len(found.items) == 14
    assert sum(item["chosen"] is None for item in found.items) == 10
    assert all((item["chosen"] is None) == (item["correct"] is None) for item in found.items)
    assert found.numbers["accuracy"].n == 4
    assert found.facts["sampled"]


def test_a_model_that_always_says_a_is_found_out_beside_one_that_reads():
    subjects, answers = ["s"] * 40, [0, 1, 2, 3] * 10
    same = choices.measure_choices(subjects, answers, [0] * 40, [""] * 40)
    assert same.numbers["constant_answer"].value == 1.0
    assert same.numbers["accuracy"].value == same.facts["always"]["A"] == 0.25
    reads = choices.measure_choices(subjects, answers, answers, [""] * 40)
    assert reads.numbers["constant_answer"].value == 0.0
    assert reads.numbers["accuracy"].value == 1.0


def test_subjects_of_one_question_give_no_interval_for_their_mean():
    one = choices.measure_choices(list("stt"), [0] * 3, [0, 1, 0], list("xyz")).numbers["macro"]
    assert (one.value, one.n, one.low, one.high) == (0.75, 3, None, None)
    two = choices.measure_choices(list("sstt"), [0] * 4, [0, 1, 0, 0], [""] * 4).numbers["macro"]
    assert two.low == 0.5  # s may be drawn as 0, t is always 1
    assert two.high == 1.0


def test_a_file_without_test_questions_is_refused(tiny, tokenizer, tmp_path):
    rows = [{"subject": "s", "split": "dev", "question": "q", "choices": list("wxyz"), "answer": 3}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "dev.parquet")
    with pytest.raises(DataError, match="no question of the split 'test'"):
        mmlu_suite(reader_of(tiny, tokenizer), Mmlu(path=str(tmp_path / "dev.parquet")))


def test_the_two_styles_differ_in_white_space_and_in_what_is_cut(tiny, tokenizer):
    reader = reader_of(tiny, tokenizer)
    padded = [Question("maths", "test", " What? ", ("w", "x", "y", "z"), 0)]
    bare = [Question("maths", "test", "What?", ("w", "x", "y", "z"), 0)]

    def logits(asked, style, shots=0):
        return letter_logits(reader, asked, {"maths": DEV[5:]}, shots=shots, style=style)

    assert (logits(padded, "harness")[0] == logits(bare, "original")[0]).all()
    assert (logits(padded, "original")[0] != logits(bare, "original")[0]).any()
    long = [Question("maths", "test", "What is it? " * 30, ("w", "x", "y", "z"), 0)]
    assert logits(long, "original", 5)[1][0] < 5  # examples dropped, whole ones
    assert logits(long, "harness", 5)[1] == [5]  # the beginning cut
