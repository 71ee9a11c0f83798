"""General knowledge: what counts as an answer, and the two forms of one question."""

import json

import pytest
import torch

from expunge.errors import DataError
from expunge.evaluate import knowledge
from expunge.evaluate.knowledge import (
    OWN,
    Knowledge,
    contains_answer,
    knowledge_suite,
    likeliest_first,
    read_items,
)
from expunge.evaluate.reader import reader_of

ROW = {
    "id": "a",
    "group": "g",
    "question": "Which animal meows?",
    "answers": ["cat"],
    "cloze": "The animal that meows is the",
    "options": ["cat", "dog"],
}


@pytest.mark.parametrize(
    ("answers", "generation", "found"),
    [
        (["Paris"], " Paris", True),
        (["Paris"], "It is PARIS, of course.", True),
        (["Paris"], "Parisian", False),
        (["18"], "180", False),
        (["18"], "it is 18.", True),
        (["4", "four"], "Four", True),
        (["da Vinci"], "Leonardo da  Vinci", True),
        (["da Vinci"], "Vinci da Leonardo", False),
        (["twenty-five"], "twenty five", True),
        (["Café"], "cafe", True),
        (["H2O"], "H₂O", True),
        (["Paris"], "\n Paris", True),
        (["Paris"], "Rome\nParis", False),
        (["Paris"], "", False),
        (["Paris"], " \n", False),
        (["?"], "anything", False),
        ([], "Paris", False),
    ],
)
def test_an_answer_is_found_as_whole_words_of_the_first_line(answers, generation, found):
    assert contains_answer(answers, generation) is found


def test_the_right_end_must_be_likelier_than_every_other():
    assert likeliest_first([-1.0, -2.0, -3.0])
    assert not likeliest_first([-2.0, -1.0, -3.0])
    assert not likeliest_first([-1.0, -1.0])  # told apart by nothing


def test_the_built_in_questions_are_sixty_and_well_formed():
    items = read_items(OWN)
    assert len(items) == 60
    assert len({item.question for item in items}) == 60
    assert {len(item.options) for item in items} == {4}
    for item in items:
        assert contains_answer(item.answers, item.answers[0])
        assert not any(contains_answer(item.answers, wrong) for wrong in item.options[1:])


def given(tmp_path, rows):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@torch.no_grad()
def test_ends_are_scored_as_the_model_scores_them(tiny, tokenizer, tmp_path):
    path = given(tmp_path, [ROW, {**ROW, "id": "b", "options": ["dog", "cat"]}])
    found = knowledge_suite(reader_of(tiny, tokenizer), Knowledge(path=path, max_new_tokens=4))
    logps = {}
    for end in ROW["options"]:
        before = len(tokenizer(knowledge.LEAD + ROW["cloze"])["input_ids"])
        tokens = tokenizer(f"{knowledge.LEAD}{ROW['cloze']} {end}")["input_ids"]
        log_p = tiny(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
        logps[end] = sum(float(log_p[t - 1, tokens[t]]) for t in range(before, len(tokens)))
    likelier = max(logps, key=logps.__getitem__)
    assert [item["chosen"] for item in found.items] == [likelier, likelier]
    assert found.numbers["cloze"].value == 0.5  # the same ends, once each way round
    assert found.numbers["generated"].value == 0.0
    assert found.numbers["cloze"].n == 2


def test_a_model_that_knows_and_one_that_forgot(tiny, tokenizer, tmp_path, monkeypatch):
    path = given(tmp_path, [ROW])
    section = Knowledge(path=path, max_new_tokens=4)
    reader = reader_of(tiny, tokenizer)
    monkeypatch.setattr(reader, "text", lambda tokens: " a cat\n")
    assert knowledge_suite(reader, section).numbers["generated"].value == 1.0
    monkeypatch.setattr(reader, "text", lambda tokens: " a dog\ncat")
    assert knowledge_suite(reader, section).numbers["generated"].value == 0.0


def test_every_question_has_a_row_also_beyond_the_limit(tiny, tokenizer, tmp_path):
    path = given(tmp_path, [{**ROW, "id": str(n)} for n in range(5)])
    section = Knowledge(path=path, limit=2, max_new_tokens=2)
    found = knowledge_suite(reader_of(tiny, tokenizer), section)
    assert [item["id"] for item in found.items] == list("01234")
    assert [item["cloze"] is None for item in found.items] == [False] * 2 + [True] * 3
    assert found.numbers["generated"].n == found.numbers["generated.g"].n == 2
    assert found.facts["prompts_cut"] == 0
    long = given(tmp_path, [{**ROW, "question": "long " * 200}, {**ROW, "id": "short"}])
    section = Knowledge(path=long, max_new_tokens=2)
    assert knowledge_suite(reader_of(tiny, tokenizer), section).facts["prompts_cut"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": " "}, "line 2: 'question' must be text"),
        ({"answers": "cat"}, "'answers' must be a list of texts"),
        ({"answers": []}, "'answers' needs 1 or more"),
        ({"options": ["cat"]}, "'options' needs 2 or more"),
        ({"options": ["cat", "cat"]}, "none of them twice"),
        ({"id": "a"}, "the id 'a' twice"),
    ],
)
def test_wrong_questions_are_refused_by_their_place(tmp_path, change, message):
    path = given(tmp_path, [ROW, {**ROW, "id": "b", **change}])
    with pytest.raises(DataError, match=message):
        read_items(tmp_path / path)
