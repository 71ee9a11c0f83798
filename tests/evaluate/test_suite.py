"""The whole evaluation of the tiny model."""

import copy
import importlib
import json

import pytest

from expunge.data.examples import Document, Example
from expunge.errors import EvaluationError
from expunge.evaluate import semeval
from expunge.evaluate.membership import auc
from expunge.evaluate.mmlu import Mmlu, Question
from expunge.evaluate.numbers import Number, wilson
from expunge.evaluate.reader import reader_of
from expunge.evaluate.semeval import TERMS
from expunge.evaluate.semeval_suite import entry_numbers
from expunge.evaluate.suite import Evaluate, EvaluationData, beside_items, evaluate

CONFIG = Evaluate(max_new_tokens=8, resamples=20, mmlu=Mmlu(shots=0))


def examples(half, count=2):
    return [
        Example(f"{half}{task}-{n}{kind}{n}", f"{half} {task} {kind} {n}", f"answer {n}", task)
        for task in ("Task1", "Task2", "Task3")
        for kind in ("sc", "qa")
        for n in range(count)
    ]


def documents(name):
    return [Document(f"{name}{n}", f"{name} text {n} " * 3) for n in range(3)]


DATA = EvaluationData(
    forget=examples("forget"),
    retain=examples("retain", 3),
    members=documents("in"),
    nonmembers=documents("out"),
    neutral=documents("neutral"),
    mmlu=[Question("s", "test", f"q{n}", ("a", "b", "c", "d"), n % 4) for n in range(4)],
)


def run(model, tokenizer, data=DATA, config=CONFIG):
    reader = reader_of(model, tokenizer, max_batch=config.max_batch)
    return evaluate(reader, data, config, max_length=64, prompt_tail=32, separator="")


def test_every_part_is_measured_and_every_item_has_its_row(tiny, tokenizer):
    entry, rows = run(tiny, tokenizer)
    assert [row["id"] for row in rows] == [e.id for e in [*DATA.forget, *DATA.retain]]
    assert all(isinstance(row["generation"], str) for row in rows)
    semeval = entry["semeval"]
    assert tuple(semeval["terms"]) == TERMS
    assert None not in semeval["terms"].values()
    assert semeval["counts"] == {t: 2 if t.startswith("forget") else 3 for t in TERMS}
    assert semeval["task_aggregate"] == 0  # the tiny model knows no answer
    parts = [semeval["task_aggregate"], semeval["mia"]["score"], semeval["mmlu"]["accuracy"]]
    assert semeval["final"] == pytest.approx(sum(parts) / 3)
    assert entry["collapse"]["collapsed"]  # an untrained model writes noise
    assert all(value > 0 for value in entry["nll"].values())
    json.dumps([entry, rows], allow_nan=False)


def test_documents_and_questions_have_rows_that_make_up_their_numbers(tiny, tokenizer):
    reader = reader_of(tiny, tokenizer)
    entry, _ = evaluate(reader, DATA, CONFIG, max_length=64, prompt_tail=32, separator="")
    read = reader.forwards
    rows = beside_items(reader, DATA, CONFIG)
    assert reader.forwards == read
    sides = {s: [r["nll"] for r in rows if r["group"] == s] for s in ("members", "nonmembers")}
    assert (
        auc(*([-nll for nll in side] for side in sides.values())) == entry["semeval"]["mia"]["auc"]
    )
    asked = [row for row in rows if row["group"] == "mmlu.s"]
    assert [row["id"] for row in asked] == [f"s/{n}" for n in range(4)]
    assert sum(row["correct"] for row in asked) / 4 == entry["semeval"]["mmlu"]["accuracy"]
    assert len(rows) == 10
    assert len(beside_items(reader, DATA, CONFIG.model_copy(update={"mmlu": None}))) == 6


def test_texts_that_are_cut_are_counted(tiny, tokenizer):
    """64 tokens of an item and 32 of its prompt are read, and here 20 of a document."""
    long = EvaluationData(
        forget=[Example("asc0", "p", "x" * 80, "Task1"), Example("bsc0", "p" * 40, "x", "Task1")],
        retain=[Example("csc0", "p", "x", "Task1")],
        members=[Document("m", "a" * 30), Document("n", "b" * 20)],
        nonmembers=[Document("o", "c" * 30), Document("q", "d" * 21)],
        neutral=documents("neutral"),
    )
    config = CONFIG.model_copy(update={"mmlu": None, "document_tokens": 20})
    entry = run(tiny, tokenizer, long, config)[0]
    assert entry["texts_cut"] == {"answers": 2, "members": 1, "nonmembers": 2, "neutral": 3}
    two_sided, mia = entry_numbers(entry)["mia.two_sided"], entry["semeval"]["mia"]
    assert two_sided.low <= two_sided.value == mia["two_sided"] <= two_sided.high
    whole = run(tiny, tokenizer)[0]["texts_cut"]
    assert not any(whole.values())  # control


def test_batch_size_changes_nothing(tiny, tokenizer):
    one = run(tiny, tokenizer, config=CONFIG.model_copy(update={"max_batch": 1}))[1]
    many = run(tiny, tokenizer)[1]
    for name in ("id", "generation", "score", "tokens"):
        assert [row[name] for row in one] == [row[name] for row in many]


def test_what_is_not_given_is_null_not_zero(tiny, tokenizer):
    data = EvaluationData(retain=DATA.retain[:3])
    entry, rows = run(tiny, tokenizer, data, CONFIG.model_copy(update={"mmlu": None}))
    semeval = entry["semeval"]
    assert len(rows) == 3
    assert semeval["terms"]["retain/Task1/sc"] is not None
    assert semeval["terms"]["forget/Task1/sc"] is None
    for part in ("task_aggregate", "mia", "mmlu", "final"):
        assert semeval[part] is None
    assert entry["nll"]["members"] is None


def test_a_sample_keeps_every_row_and_states_its_counts(tiny, tokenizer):
    config = CONFIG.model_copy(update={"generate_limit": 1})
    entry, rows = run(tiny, tokenizer, config=config)
    assert len(rows) == len(DATA.forget) + len(DATA.retain)
    assert sum(row["generation"] is not None for row in rows) == 12
    assert set(entry["semeval"]["counts"].values()) == {1}
    assert sum(entry["semeval"]["given"].values()) == len(rows)


def test_sets_of_other_tasks_are_scored_by_terms_of_their_own(tiny, tokenizer):
    own = EvaluationData(
        forget=[Example("1", "", "one two three four"), Example("2", "Who?", "Ada")],
        retain=[Example("3", "It is", "so", "mail")],
    )
    entry, rows = run(tiny, tokenizer, own)
    found = entry["semeval"]
    names = ("forget/items/sc", "forget/items/qa", "retain/mail/sc")
    assert tuple(found["terms"]) == tuple(found["counts"]) == names
    assert set(found["intervals"]) == {*names, "task_aggregate"}
    assert found["partial"]
    assert found["task_aggregate"] is not None
    shown = [(row["task"], row["kind"], row["prompt"], row["truth"]) for row in rows]
    assert shown == [
        ("items", "sc", "one two", "three four"),
        ("items", "qa", "Who?", "Ada"),
        ("mail", "sc", "It is", "so"),
    ]


def test_questions_are_asked_and_scored_as_turns(tiny, tokenizer):
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    reader, asked = reader_of(tiny, chatty), []
    real = reader.generations

    def noted(prompts, **how):
        asked.extend(prompts)
        return real(prompts, **how)

    reader.generations = noted
    sets = EvaluationData(
        forget=[Example("1qa0", "Who?", "Ada"), Example("2", "", "One two three")],
        retain=[Example("3qa0", "Why?", "So")],
    )
    config = Evaluate(max_new_tokens=4, resamples=10)
    how = {"max_length": 100, "prompt_tail": None, "separator": ""}
    told = evaluate(reader, sets, config, chat=True, **how)[0]
    shown = [chatty.decode(prompt) for prompt in asked[:3]]
    assert shown == ["<user>Who?</s><assistant>", "One two", "<user>Why?</s><assistant>"]
    assert told["nll"]["forget"] != evaluate(reader, sets, config, **how)[0]["nll"]["forget"]


def test_stopping_early_changes_no_score_and_no_collapse_measure(tiny, tokenizer, monkeypatch):
    config = CONFIG.model_copy(update={"max_new_tokens": 120})
    entry, rows = run(tiny, tokenizer, config=config)
    assert not all(row["complete"] for row in rows)
    generation = importlib.import_module("expunge.evaluate.generate")
    monkeypatch.setattr(generation, "EARLIEST_STOP", 1000)
    whole, slow = run(tiny, tokenizer, config=config)
    assert sum(row["tokens"] for row in slow) > sum(row["tokens"] for row in rows)
    assert whole == entry


def test_another_definition_has_what_was_stopped_written_on(tiny, tokenizer, monkeypatch):
    config = CONFIG.model_copy(update={"max_new_tokens": 120})
    reader = reader_of(tiny, tokenizer)

    def evaluated(reader):
        return evaluate(reader, DATA, config, max_length=64, prompt_tail=32, separator="")[1]

    first = evaluated(reader)
    stopped = [not row["complete"] for row in first]
    assert any(stopped)
    before = reader.forwards
    assert evaluated(reader) == first and reader.forwards == before  # control
    monkeypatch.setitem(semeval.SCORES, "qa", lambda truth, text: float(len(text)))
    again = evaluated(reader)
    questions = [row["kind"] == "qa" for row in first]
    assert reader.forwards - before == sum(map(all, zip(stopped, questions, strict=True))) > 0
    assert again == evaluated(reader_of(tiny, tokenizer))
    assert all(row["complete"] for row in again if row["kind"] == "qa")
    assert all(row["score"] == len(row["generation"]) for row in again if row["kind"] == "qa")


def test_an_item_that_cannot_be_scored_is_refused_before_any_work(tiny, tokenizer):
    broken = EvaluationData(forget=[Example(f"{n}sc1", "a", "b", f"Task{n}") for n in (3, 4)])
    with pytest.raises(EvaluationError, match="'4sc1' has the task 'Task4'"):
        run(tiny, tokenizer, broken)
    empty = EvaluationData(forget=[Example("asc1", "", "b", "Task1")])
    with pytest.raises(EvaluationError, match="'asc1' has no prompt"):
        run(tiny, tokenizer, empty)
    one_sided = EvaluationData(members=documents("in"))
    with pytest.raises(EvaluationError, match="no non-member"):
        run(tiny, tokenizer, one_sided)


def test_mmlu_has_an_interval_of_its_questions_and_of_its_subjects():
    mmlu = {"accuracy": 0.25, "macro": 0.25, "n": 8}
    per_subject = {"a": {"n": 4, "correct": 2}, "b": {"n": 4, "correct": 0}}
    semeval = {"terms": {}, "counts": {}, "intervals": {"task_aggregate": None}, "mia": None}
    scored = semeval | {"task_aggregate": None, "final": None}
    numbers = entry_numbers({"semeval": scored | {"mmlu": mmlu | {"per_subject": per_subject}}})
    low, high = wilson(2, 8)
    assert numbers["mmlu"] == Number(0.25, 8, low, high) and low < 0.25 < high < 0.7
    macro = numbers["mmlu.macro"]
    assert (macro.low, macro.high) == (0.0, 0.5)
    old = entry_numbers({"semeval": scored | {"mmlu": mmlu}})  # without the subjects' counts
    assert old["mmlu"].low == low and old["mmlu.macro"] == Number(0.25, 8)
