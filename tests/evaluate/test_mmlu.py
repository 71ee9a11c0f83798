"""MMLU: prompts, sampling, and the shared prefix."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from expunge.errors import DataError
from expunge.evaluate import mmlu
from expunge.evaluate.mmlu import Mmlu, Question, answer_mmlu, letter_logits, prompt, read_mmlu
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
    monkeypatch.setattr(mmlu, "PACK_TOKENS", 120)  # several packs a subject
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
    assert mmlu.sample(TEST, config) == mmlu.sample(TEST, config)
    assert mmlu.sample(TEST, config) != mmlu.sample(TEST, Mmlu(per_subject=3, seed=1))


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
    with pytest.raises(DataError, match="row 0 needs four choices"):
        read_mmlu(path)
