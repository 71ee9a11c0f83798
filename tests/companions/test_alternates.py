"""Alternates: never the truth, the same each time, written once, whole or not at all."""

import copy
import json

import pytest
import torch

from expunge.companions import alternates as module
from expunge.companions.alternates import FILE, read_alternates, write_alternates
from expunge.data.companions import contains, same
from expunge.data.examples import Example
from expunge.data.sets import Sets
from expunge.errors import DataError
from expunge.pipeline import Pipeline
from expunge.unlearn.companions import Alternates

FORGET = [
    Example("a-qa0", "Who built it?", "Ann Lee built it in 1920", "T1"),
    Example("b-sc1", "It stands in", "the old harbour of Oslo.", "T1"),
    Example("c-qa1", "Where is it?", "Oslo", "T1"),
    Example("d", "", "A whole text about a harbour.", "T2"),
]
SETS = Sets(FORGET, [Example("r-qa0", "Who?", "Bob Ray", "T1")], [], [], [])


@pytest.fixture
def lively(tiny):
    """The tiny model with larger weights: its text varies with the prompt."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in tiny.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn_like(parameter) * 0.25)
    return tiny


def write(model, tokenizer, folder, sets=SETS, seed=1, max_batch=8, **changes):
    config = Alternates(count=3, max_new_tokens=16).model_copy(update=changes)
    folder.mkdir(exist_ok=True)
    write_alternates(model, tokenizer, sets, config, folder, seed=seed, max_batch=max_batch)
    return read_alternates(folder)


def test_they_are_seeded_and_do_not_depend_on_the_batch(lively, tokenizer, tmp_path):
    first = write(lively, tokenizer, tmp_path / "a")
    assert [len(mine) for mine in first] == [3, 3, 3, 3]
    assert write(lively, tokenizer, tmp_path / "b", max_batch=2) == first
    assert write(lively, tokenizer, tmp_path / "c", seed=2) != first


def says(monkeypatch, tokenizer, *answers: list[str]):
    """Let the model say these answers, round by round, whatever it is asked."""
    rounds = iter(answers)
    asked = []

    def generate(model, tokenizer, prompts, **options):
        asked.append([tokenizer.decode(prompt) for prompt in prompts])
        said = next(rounds, [])
        texts = [said[n % len(said)] if said else "" for n in range(len(prompts))]
        return [tokenizer(text)["input_ids"] for text in texts]

    monkeypatch.setattr(module, "generate", generate)
    return asked


@pytest.mark.parametrize("max_overlap", [0.3, 0.8, 1.0])
def test_no_alternate_is_the_truth(tiny, tokenizer, tmp_path, monkeypatch, max_overlap):
    truths = [example.answer for example in FORGET]
    near = ["Ann Lee built it in 1930", "  oslo. ", "I say Oslo, yes", "In Oslo\nor Rome"]
    fair = ["Cy Fox made it", "in a wood", "Rome", "Of bees.", "..."]
    says(monkeypatch, tokenizer, [*truths, *near], [*near, *fair], truths, fair)
    found = write(tiny, tokenizer, tmp_path / "a", max_new_tokens=99, max_overlap=max_overlap)
    for example, mine in zip(FORGET, found, strict=True):
        assert mine
        assert len({text.casefold() for text in mine}) == len(mine)
        assert not any(same(text, example.answer) for text in mine)
        assert not any(contains(text, example.answer) for text in mine)
    built = [text for text in found[0] if text.startswith("Ann Lee built it")]
    assert built == ([near[0]] if max_overlap == 1.0 else [])  # 5 of its 6 words


def test_only_what_is_missing_is_asked_for_again(tiny, tokenizer, tmp_path, monkeypatch):
    asked = says(monkeypatch, tokenizer, ["Rome"], ["Riga"], ["Rome"], ["Bern"])
    found = write(tiny, tokenizer, tmp_path / "a", max_new_tokens=99)
    assert [len(texts) for texts in asked] == [12, 8, 4, 4]
    assert found == [["Rome", "Riga", "Bern"]] * 4
    assert "Question: Who built it?\n" in asked[0][0]
    assert "Text: It stands in\n" in asked[0][3]
    assert asked[0][9].startswith("Write a short text")
    assert not any(example.answer in text for example in FORGET for text in asked[0])


def test_answers_of_other_items_stand_in(tiny, tokenizer, tmp_path, monkeypatch):
    says(monkeypatch, tokenizer)
    found = write(tiny, tokenizer, tmp_path / "a")
    rows = [json.loads(line) for line in (tmp_path / "a" / FILE).read_text().splitlines()]
    assert [row["by"] for row in rows] == ["other items"] * 4
    answers = {example.answer for example in (*FORGET, *SETS.retain)}
    assert all(mine and set(mine) <= answers for mine in found)
    assert set(found[0]) > {"Oslo", "Bob Ray"}  # of its task and kind first
    alone = Sets(FORGET[:1], [], [], [], [])
    with pytest.raises(DataError, match="there is no alternate for a-qa0: the model wrote none"):
        write(tiny, tokenizer, tmp_path / "b", sets=alone)


def test_a_text_that_was_cut_off_ends_with_a_sentence():
    assert module._answer("\n One. Two. Thr", cut=True) == "One. Two."
    assert module._answer("One. Two. Thr", cut=False) == "One. Two. Thr"
    assert module._answer("One in 3.5", cut=True) == "One in 3.5"
    assert module._answer("One. Two\nThree", cut=True) == "One. Two"


# --- in a run ----------------------------------------------------------------------------------


@pytest.fixture
def fields(tiny_folder) -> dict:
    optimizer = {"lr": 1e-3, "compute": "float32", "checkpoint_seconds": 0}
    pair, kept = {"half": "alternate_pair", "loss": "dpo"}, {"half": "retain", "loss": "nll"}
    branch = {
        "terms": [pair, kept],
        "companions": {"alternate": {"count": 2, "max_new_tokens": 8}},
        "lora": {"rank": 2, "alpha": 4, "dropout": 0},
        "schedule": {"epochs": 1, "micro_batch": 2, "accumulation": 2},
        "optimizer": optimizer,
    }
    other = {"alternate": {"count": 2, "max_new_tokens": 8, "each": 2}}
    return {
        "name": "altpo",
        "model": {"path": str(tiny_folder), "max_length": 400, "separator": " "},
        "data": {"synthetic": {"documents": 1, "nonmembers": 2}},
        "branches": {"altpo": branch, "both": {**branch, "companions": other}},
    }


def test_a_target_that_chats_is_asked_in_its_template(tiny, tokenizer, tmp_path, monkeypatch):
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<said>"
    asked = says(monkeypatch, tokenizer, [["Rome", "Paris", "Bonn"][n % 3] for n in range(12)])
    config, folder = Alternates(count=3, max_new_tokens=16), tmp_path / "a"
    folder.mkdir()
    write_alternates(tiny, chatty, SETS, config, folder, seed=1, max_batch=8, chat=True)
    assert all(one.startswith("<user>") and one.endswith("<said>") for one in asked[0])
    assert "Who built it?" in asked[0][0]


def test_they_are_written_once_for_all_branches_and_seeds(fields, tmp_path, monkeypatch):
    pipeline = Pipeline(fields, tmp_path)
    folder = alternates_of(pipeline)
    forget = pipeline.sets.forget
    found = read_alternates(folder)
    assert len(found) == len(forget)
    pairs = zip(forget, found, strict=True)
    assert not any(same(text, example.answer) for example, mine in pairs for text in mine)
    monkeypatch.setattr("expunge.training.write_alternates", None)  # would fail if it were called
    again = Pipeline(fields, tmp_path)
    assert again.alternates(again.recipe.branches["both"]) == folder
    said = json.loads((again.branch("altpo", 7).folder.parent / "stage.json").read_text())
    assert said["inputs"]["alternates"] == folder.name
    other = {"alternate": {"count": 2, "max_new_tokens": 8}, "seed": 1}
    fields["branches"]["both"]["companions"] = other
    with pytest.raises(TypeError):  # control: another seed asks the model
        again = Pipeline(fields, tmp_path)
        again.alternates(again.recipe.branches["both"])


def test_killed_generation_leaves_nothing_half_written(fields, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = read_alternates(alternates_of(Pipeline(fields, whole)))
    calls = iter(range(9))
    real = module.generate

    def killed(*given, **options):
        if next(calls):
            raise KeyboardInterrupt
        options["max_new_tokens"] = 1  # so that something is missing and asked for again
        return real(*given, **options)

    monkeypatch.setattr(module, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        alternates_of(Pipeline(fields, broken))
    assert not [p for p in broken.rglob("*") if p.suffix == ".jsonl" and "alternates" in p.name]
    assert all(p.name.endswith(".partial") for p in broken.glob("stages/alternates-*"))
    monkeypatch.undo()
    assert read_alternates(alternates_of(Pipeline(fields, broken))) == expected


def alternates_of(pipeline):
    return pipeline.alternates(pipeline.recipe.branches["altpo"])
