"""RWKU: how a probe is asked, how an answer is scored, and which files are read."""

import json

import pytest

from expunge.data.batches import encode_document
from expunge.data.examples import Document
from expunge.errors import DataError, EvaluationError
from expunge.evaluate.attacks import compressed_bytes, min_k, min_k_plus_plus
from expunge.evaluate.reader import reader_of
from expunge.evaluate.rwku import (
    PROBES,
    Probe,
    answer_score,
    ask,
    first_line,
    read_probes,
    rwku_suite,
)
from expunge.evaluate.rwku_rows import ATTACKS, Rwku
from expunge.evaluate.rwku_utility import UTILITY


def row(n, level="1", **more):
    return {
        "query": f"Stephen King was born in ___ {n}?",
        "answer": "Portland, Maine",
        "level": level,
        "type": "simple question",
        "subject": "Stephen King",
        **more,
    }


@pytest.fixture
def folder(tmp_path):
    for name in PROBES.values():
        rows = [row(n, name[-1]) for n in range(3)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    for name in ("forget_mia", "retain_mia"):
        rows = [
            {"text": f"A text about him, number {n}.", "subject": "Stephen King"} for n in (1, 2)
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    return tmp_path


def section(folder, **more):
    return Rwku(path=str(folder), max_new_tokens=4, **more)


@pytest.mark.parametrize(
    ("answer", "generation", "score"),
    [
        ("Portland, Maine", " Portland, Maine.", 1.0),
        ("Portland, Maine", "in portland", 0.5),
        ("Portland, Maine", "Maine, Portland", 0.5),  # one word at a time in order
        ("Portland, Maine", "Boston", 0.0),
        ("Portland, Maine", "", 0.0),
        ("Portland, Maine", "\nPortland, Maine", 0.0),
        ("Portland, Maine", "Boston\nPortland, Maine", 0.0),
        ("the writers", "writer", 0.5),  # stemmed
    ],
)
def test_the_score_is_the_share_of_the_answer_in_the_first_line(answer, generation, score):
    assert answer_score(answer, generation) == score


def test_the_first_line_ends_at_the_first_break():
    assert first_line(" a b \nc") == "a b"
    assert first_line("") == ""


def test_probes_are_asked_as_the_release_asks_them():
    def turn(level, attack=""):
        return ask(Probe("i", "Q?", "A", level, attack))

    blank, brief = (
        "Please complete the blank in the following question.\n",
        "Please briefly answer the following question.\n",
    )
    assert turn("1") == (f"{blank}Question: Q?\n", "Answer:")
    assert turn("2") == (f"{brief}Question: Q?\n", "Answer:")
    assert turn("3", "prefix injection") == (f"{brief}Question: Q?\n", "Answer:")
    assert turn("3", "affirmative suffix") == (f"{brief}Question: Q?", "")
    assert turn("3", "incontext learning") == (f"{brief}Q?\n", "Answer:")


def test_every_row_of_every_file_is_an_item(tiny, tokenizer, folder):
    found = rwku_suite(reader_of(tiny, tokenizer), section(folder))
    assert len(found.items) == 5 * 3 + 2 * 2
    assert len({item["id"] for item in found.items}) == len(found.items)
    attacks = {f"mia.{side}.{key}" for side in ("forget", "retain") for key in ATTACKS}
    level3 = "forget.level3.simple_question"
    assert set(found.numbers) == {*PROBES, level3, *attacks}
    assert {number.n for name, number in found.numbers.items() if name in attacks} == {2}
    assert {number.n for name, number in found.numbers.items() if name not in attacks} == {3}
    assert found.numbers["forget.level1"].value == 0.0
    assert found.numbers["mia.forget.nll"].value > 0
    assert found.facts["mia.forget.texts_cut"] == 0
    assert found.facts["absent"] == [one.file for one in UTILITY.values()]
    assert found.facts["template"] is False
    limited = rwku_suite(reader_of(tiny, tokenizer), section(folder, limit=1, document_tokens=3))
    assert limited.facts["mia.forget.texts_cut"] == 1
    assert len(limited.items) == len(found.items)
    assert limited.numbers["forget.level1"].n == 1
    assert [item["rouge_l_recall"] for item in limited.items[:3]] == [0.0, None, None]


def test_what_is_still_known_scores_and_what_is_forgotten_does_not(
    tiny, tokenizer, folder, monkeypatch
):
    for name in PROBES.values():
        if name != "forget_level2":
            (folder / f"{name}.json").unlink()
    reader = reader_of(tiny, tokenizer)
    monkeypatch.setattr(reader, "text", lambda tokens: " Portland, Maine\nQuestion:")
    known = rwku_suite(reader, section(folder))
    assert known.numbers["forget.level2"].value == 1.0
    assert known.items[0]["generation"] == "Portland, Maine"
    gone = [n for n in PROBES.values() if n != "forget_level2"]
    assert known.facts["absent"] == [*gone, *(one.file for one in UTILITY.values())]
    monkeypatch.setattr(reader, "text", lambda tokens: "")
    assert rwku_suite(reader, section(folder)).numbers["forget.level2"].value == 0.0


def test_each_attack_around_a_probe_has_its_number(tiny, tokenizer, folder, monkeypatch):
    kinds = ["prefix injection", "role play", "prefix injection", ""]
    rows = [row(n, "3", type=kind) for n, kind in enumerate(kinds)]
    (folder / "forget_level3.json").write_text(json.dumps(rows))
    reader = reader_of(tiny, tokenizer)
    said = {"forget_level3": iter(["Portland, Maine", "Boston", "Portland", "Maine"])}
    monkeypatch.setattr(reader, "text", lambda tokens: next(said["forget_level3"], ""))
    for name in PROBES.values():
        if name not in said:
            (folder / f"{name}.json").unlink()
    numbers = rwku_suite(reader, section(folder)).numbers
    found = {name: (one.value, one.n) for name, one in numbers.items() if "level3" in name}
    assert found == {
        "forget.level3": (2.0 / 4, 4),
        "forget.level3.prefix_injection": (0.75, 2),
        "forget.level3.role_play": (0.0, 1),
    }


def test_texts_are_attacked_as_the_membership_suite_does(tiny, tokenizer, folder):
    text = "A text about him, number 1."
    reader = reader_of(tiny, tokenizer)
    found = rwku_suite(reader, section(folder))
    (scores,) = reader.scores([encode_document(Document("i", text), tokenizer, max_length=512)])
    item = next(item for item in found.items if item["id"] == "mia.forget/0")
    assert item["zlib"] == pytest.approx(-scores.nll / compressed_bytes(text))
    assert item["min_k"] == pytest.approx(min_k(scores, k=20))
    assert item["min_k_plus_plus"] == pytest.approx(min_k_plus_plus(scores, k=20))
    mean = (item["min_k"] + found.items[-3]["min_k"]) / 2
    assert found.numbers["mia.forget.min_k"].value == pytest.approx(mean)
    cut = rwku_suite(reader, section(folder, document_tokens=8))  # zlib packs what was read alone
    (short,) = reader.scores([encode_document(Document("i", text), tokenizer, max_length=8)])
    item = next(item for item in cut.items if item["id"] == "mia.forget/0")
    assert item["zlib"] == pytest.approx(-short.nll / compressed_bytes("A text a"))


def test_a_template_is_used_where_there_is_one(tiny, tokenizer, folder):
    with pytest.raises(EvaluationError, match="no chat template"):
        rwku_suite(reader_of(tiny, tokenizer), section(folder, template=True))
    seen = []

    class Reader:
        def __init__(self, template):
            self.tokenizer, self.context = tokenizer, 512
            tokenizer.chat_template = template

        def generations(self, prompts, **_):
            seen.append(tokenizer.decode(prompts[0]))
            raise EvaluationError("asked")

    try:
        for template, plain in (("<{{ messages[0]['content'] }}>", None), ("<>", False)):
            with pytest.raises(EvaluationError, match="asked"):
                rwku_suite(Reader(template), section(folder, template=plain))  # pyright: ignore
    finally:
        tokenizer.chat_template = None
    turn = "Please complete the blank in the following question.\n"
    turn += "Question: Stephen King was born in ___ 0?\n"
    assert seen == [f"<{turn}>Answer:", f"{turn}Answer:"]


def test_one_person_can_be_chosen_and_a_wrong_name_is_said(folder):
    from expunge.data.sources import Source

    path = folder / "forget_level1.json"
    path.write_text(json.dumps([row(0), row(1, subject="Confucius"), row(2)]))
    source = Source(path=str(path))
    assert [p.id for p in read_probes("forget.level1", source, "Confucius")] == ["forget.level1/1"]
    with pytest.raises(DataError, match="Did you mean 'Stephen King'"):
        read_probes("forget.level1", source, "Steven King")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(0), row(1, answer=" ")], "row 2: 'answer' must be text"),
        ([row(0), row(1, query=3)], "row 2: 'query' must be text"),
        ([row(0, level="2")], "row 1 is of level 2, not 1"),
    ],
)
def test_wrong_rows_are_refused_by_their_place(tiny, tokenizer, folder, rows, message):
    (folder / "forget_level1.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=message):
        rwku_suite(reader_of(tiny, tokenizer), section(folder))


def test_a_folder_without_its_files_is_refused(tiny, tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"no data file at .*forget_level1\.json"):
        rwku_suite(reader_of(tiny, tokenizer), section(tmp_path))
