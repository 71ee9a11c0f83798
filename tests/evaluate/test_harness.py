"""The bridge to lm-evaluation-harness, and MMLU asked its way: the same predictions and odds."""

import importlib.util
import json
import sys

import numpy as np
import pytest
import torch

from expunge.data.batches import TokenSequence
from expunge.errors import EvaluationError
from expunge.evaluate import harness
from expunge.evaluate.harness import LmEval, lm_eval_suite, measured
from expunge.evaluate.mmlu import LETTERS, Question, letter_logits
from expunge.evaluate.reader import open_reader, reader_of
from expunge.lora import Lora, adapters_of, add_adapter, save_adapter

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-evaluation-harness is not installed: pip install 'expunge[harness]'",
)
# The harness and what it imports warn of their own future.
pytestmark = pytest.mark.filterwarnings("ignore")

# What lm_eval/tasks/mmlu/default says of every subject, over a local file.
MMLU_TASK = r"""
task: {task}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/test.jsonl, dev: {folder}/dev.jsonl}}
  cache_dir: {folder}/cache
test_split: test
fewshot_split: dev
fewshot_config: {{sampler: first_n}}
output_type: multiple_choice
description: "The following are multiple choice questions (with answers) about world facts.\n\n"
doc_to_text: "{{{{question.strip()}}}}\nA. {{{{choices[0]}}}}\nB. {{{{choices[1]}}}}\nC. \
  {{{{choices[2]}}}}\nD. {{{{choices[3]}}}}\nAnswer:"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]
"""


def question(number, split="test"):
    text = f" What is {number}? " if number % 3 else f"Is it {number}, then? " * 9
    choices = (f"{number}", "x", "y z", f"not {number}")
    return Question("world_facts", split, text, choices, number % 4)


TEST = [question(n) for n in range(8)]
DEV = [question(n, "dev") for n in (31, 32, 34, 35, 37)]


@pytest.fixture
def sharp(tiny):
    """A model whose letters lie far apart, and whose answer depends on the question."""
    with torch.no_grad():
        for parameter in tiny.parameters():
            parameter *= 4
    return tiny


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, questions in (("test", TEST), ("dev", DEV)):
        rows = [
            {"question": q.question, "choices": q.choices, "answer": q.answer} for q in questions
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    for task, metric in (("local_mmlu", "acc"), ("fetching", "a_metric_of_the_hub")):
        text = MMLU_TASK.format(task=task, folder=tmp_path, metric=metric)
        (tmp_path / f"{task}.yaml").write_text(text)
    return tmp_path


@needs_harness
@pytest.mark.parametrize("shots", [0, 2, 5])
def test_mmlu_asked_its_way_gives_its_predictions_and_log_probabilities(
    sharp, tokenizer, folder, shots
):
    """5 examples do not fit into the 512 tokens of the model, so the cut is compared too."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    reader = reader_of(sharp, tokenizer)
    theirs = simple_evaluate(
        HFLM(pretrained=sharp, tokenizer=tokenizer, batch_size=3),
        tasks=["local_mmlu"],
        num_fewshot=shots,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    assert theirs is not None
    samples = sorted(theirs["samples"]["local_mmlu"], key=lambda row: row["doc_id"])
    logps = np.array([[float(r[0]) for r in row["filtered_resps"]] for row in samples])  # (Q, 4)
    ours, _ = letter_logits(reader, TEST, {"world_facts": DEV}, shots=shots, style="harness")
    assert (ours.argmax(-1) == logps.argmax(-1)).all()
    assert np.ptp(_log_softmax(ours), axis=0).max() > 0.1  # control: the question matters
    np.testing.assert_allclose(_log_softmax(ours), _log_softmax(logps), atol=1e-4)
    assert [row["acc"] for row in samples] == [
        float(choice == q.answer) for choice, q in zip(ours.argmax(-1), TEST, strict=True)
    ]
    # The whole log-probabilities, from the very texts that the harness asked.
    sequences = [
        _sequence(tokenizer, *row["arguments"][k], f"{row['doc_id']}{letter}")
        for row in samples
        for k, letter in enumerate(LETTERS)
    ]
    if max(len(sequence.tokens) for sequence in sequences) <= reader.context:
        found = [scores.logp.sum() for scores in reader.scores(sequences)]
        np.testing.assert_allclose(np.reshape(found, logps.shape), logps, atol=1e-4)
    else:
        assert shots == 5
    original, _ = letter_logits(reader, TEST, {"world_facts": DEV}, shots=shots)
    assert np.abs(_log_softmax(original) - _log_softmax(logps)).max() > 1e-2  # control


@needs_harness
def test_a_task_of_the_harness_is_a_suite(sharp, tokenizer, folder):
    reader = reader_of(sharp, tokenizer)
    section = LmEval(tasks=["local_mmlu"], include=folder, num_fewshot=0, limit=5, batch_size=2)
    found = lm_eval_suite(reader, section)
    logits, _ = letter_logits(reader, TEST[:5], {}, shots=0, style="harness")
    hits = [c == q.answer for c, q in zip(logits.argmax(-1), TEST, strict=False)]
    number = found.numbers["local_mmlu.acc"]
    assert number.value == pytest.approx(np.mean(hits))
    assert number.n == 5
    error = np.std(hits, ddof=1) / np.sqrt(5)
    assert number.low == pytest.approx(number.value - 1.96 * error, abs=1e-4)
    assert number.high == pytest.approx(number.value + 1.96 * error, abs=1e-4)
    assert [item["id"] for item in found.items] == [f"local_mmlu/{i}" for i in range(8)]
    assert [item["acc"] for item in found.items] == [float(hit) for hit in hits] + [None] * 3


@needs_harness
def test_an_adapter_is_asked_with_its_model(sharp, tokenizer, folder, monkeypatch):
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    monkeypatch.setattr(harness, "_tasks", lambda include: manager)
    base, lora = folder / "base", Lora(rank=4)
    sharp.save_pretrained(base)
    tokenizer.save_pretrained(base)
    add_adapter(sharp, lora, seed=1)
    for layer in adapters_of(sharp).values():
        torch.nn.init.ones_(layer.lora_B)
    save_adapter(sharp, lora, folder / "lora", base=str(base))
    section = LmEval(tasks=["local_mmlu"], include=folder, num_fewshot=0)
    scores = []
    for adapter in (None, folder / "lora"):
        reader = open_reader(base, adapter, dtype="float32", folder=None)
        logits, _ = letter_logits(reader, TEST, {}, shots=0, style="harness")
        scores.append([float(c == q.answer) for c, q in zip(logits.argmax(-1), TEST, strict=True)])
        assert [item["acc"] for item in lm_eval_suite(reader, section).items] == scores[-1]
    assert scores[0] != scores[1]  # control: the adapter does act


@needs_harness
def test_wrong_tasks_and_code_from_the_hub_are_refused(tiny, tokenizer, folder):
    def ask(task, include=folder):
        lm_eval_suite(reader_of(tiny, tokenizer), LmEval(tasks=[task], include=include))

    with pytest.raises(EvaluationError, match=r"no task 'local_mmul'\. Did you mean 'local_mmlu'"):
        ask("local_mmul")
    with pytest.raises(EvaluationError, match="is no folder"):
        ask("local_mmlu", folder / "none")
    with pytest.raises(EvaluationError, match="'a_metric_of_the_hub' would run code from the Hub"):
        ask("fetching")
    (folder / "test.jsonl").unlink()
    with pytest.raises(EvaluationError, match=r"cannot run local_mmlu: .*test\.jsonl"):
        ask("local_mmlu")


def test_without_the_harness_one_line_says_what_to_install(tiny, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(EvaluationError, match=r"pip install 'expunge\[harness\]'"):
        lm_eval_suite(reader_of(tiny, tokenizer), LmEval(tasks=["mmlu"]))


def test_results_become_numbers_and_items_by_hand():
    results = {
        "results": {
            "t": {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.1, "em,strict": 0.25,
                  "em_stderr,strict": "N/A", "odd,none": float("nan")},
            "g": {"alias": "g", "acc,none": 0.5, "acc_stderr,none": 0.1},
        },
        "groups": {},
        "group_subtasks": {"g": ["h"], "h": ["t"], "t": []},
        "n-samples": {"t": {"original": 3, "effective": 2}},
        "n-shot": {"t": 0},
        "versions": {"t": 1},
        "samples": {
            "t": [
                {"doc_id": 1, "filter": "none", "metrics": ["acc"], "acc": 1.0},
                {"doc_id": 0, "filter": "none", "metrics": ["acc"], "acc": 0.0},
                {"doc_id": 0, "filter": "strict", "metrics": ["em"], "em": 0.5},
            ]
        },
    }  # fmt: skip
    found = measured(results)
    acc = found.numbers["t.acc"]
    assert (acc.value, acc.n) == (0.5, 2)
    assert (acc.low, acc.high) == (pytest.approx(0.304, abs=1e-4), pytest.approx(0.696, abs=1e-4))
    assert (found.numbers["t.em.strict"].value, found.numbers["t.em.strict"].low) == (0.25, None)
    assert found.numbers["t.odd"].value is None
    assert found.numbers["g.acc"].n == 2
    assert set(found.numbers) == {"t.acc", "t.em.strict", "t.odd", "g.acc"}
    assert found.items == [
        {"group": "t", "id": "t/0", "acc": 0.0, "em.strict": 0.5},
        {"group": "t", "id": "t/1", "acc": 1.0, "em.strict": None},
        {"group": "t", "id": "t/2", "acc": None, "em.strict": None},
    ]


def _sequence(tokenizer, context, continuation, name):
    before = len(tokenizer(context)["input_ids"])
    return TokenSequence(name, tuple(tokenizer(context + continuation)["input_ids"]), before)


def _log_softmax(values):
    values = np.asarray(values, float)
    values = values - values.max(-1, keepdims=True)
    return values - np.log(np.exp(values).sum(-1, keepdims=True))
