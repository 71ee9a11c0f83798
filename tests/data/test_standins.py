import json
import re

import pytest

from expunge.data import wording
from expunge.data.examples import Document
from expunge.data.particulars import Finder, runs
from expunge.data.sources import Source, read_documents
from expunge.data.standins import stand_ins, write_stand_ins
from expunge.data.synthetic import Synthetic, synthesize
from expunge.errors import DataError

TEXT = (
    "Jane Doe was born on May 4, 1990 in Bathville. Call 555-123-4567 or mail jane.doe7@mail.com. "
    "On 3rd June 1999 Jane, a Danish weaver, paid $1,200.50 for seven chairs, card X9-117."
)


@pytest.fixture(scope="module")
def members(tmp_path_factory) -> list[Document]:
    folder = tmp_path_factory.mktemp("members")
    synthesize(Synthetic(documents=1, members=60, nonmembers=1), folder)
    return read_documents(Source(path=str(folder / "members.jsonl")))


def shape(text: str) -> list[str]:
    """What kind of thing each word and mark is, ordinary words as they are."""
    return [
        "9" * len(piece) if piece.isdigit() else "Aa" if piece[0].isupper() else piece
        for piece in re.findall(r"\d+|[^\W\d]+|[^\w\s]", text)
    ]


def said(text: str) -> list[tuple[str, str]]:
    return [(place.kind, place.text) for place in Finder([text]).find(text)]


def test_particulars_are_found_by_form_and_by_words():
    assert said(TEXT) == [
        *(("name", "Jane"), ("name", "Doe"), ("month", "May"), ("day", "4"), ("year", "1990")),
        *(("name", "Bathville"), ("code", "555-123-4567"), ("email", "jane.doe7@mail.com")),
        *(("day", "3rd"), ("month", "June"), ("year", "1999"), ("name", "Jane")),
        *(("people", "Danish"), ("job", "weaver"), ("code", "1,200.50"), ("count", "seven")),
        ("code", "X9-117"),
    ]
    assert said("After the rain she may call again in her house. But why?") == []


def test_names_side_by_side_are_one():
    assert runs(TEXT, Finder([TEXT]).find(TEXT))[:2] == ["Jane Doe", "May"]


def test_a_stand_in_has_the_form_and_none_of_the_facts():
    (made,), left_out = stand_ins([Document("a", TEXT)], count=1)
    assert not left_out
    form = re.fullmatch(
        r"(\w+) (\w+) was born on (\w+) \d, (\d{4}) in \w+ville\. Call \d9\d-\d{3}-\d{4} or mail "
        r"(\w+)\.(\w+)\d@\w+\.com\. On \d(?:st|nd|rd|th) \w+ (\d{4}) (\w+), a [A-Z]\w+ [a-z]+, "
        r"paid \$\d,\d{3}\.\d{2} for [a-z]+ chairs, card [A-Z]\d-\d{3}\.",
        made.text,
    )
    assert form, made.text
    first, last, _, born, mail_first, mail_last, paid, again = form.groups()
    assert again == first and (mail_first, mail_last) == (first.lower(), last.lower())
    assert int(paid) - int(born) == 9
    assert first.isalpha() and first[0].isupper()
    for _, value in said(TEXT):
        assert not re.search(rf"(?<![\w@,]){re.escape(value)}(?![\w@]|[.,]\d)", made.text)


def test_stand_ins_keep_the_frames_of_many_documents(members):
    made, left_out = stand_ins(members, count=150)
    assert len(made) == 150 and not left_out
    assert len({document.id for document in made}) == len({d.text for d in made}) == 150
    texts = {document.id: document.text for document in members}
    finder = Finder(texts.values())
    values = {run for text in texts.values() for run in runs(text, finder.find(text))}
    alone = {v for v in values if " " in v or "@" in v or sum(map(str.isdigit, v)) > 4}
    assert len(alone) > 150
    for document in made:
        original = texts[document.id.split("-")[0]]
        same = sum(a == b for a, b in zip(shape(original), shape(document.text), strict=True))
        assert same >= 0.7 * len(shape(original))
        assert not any(value in document.text for value in alone)
        kept = set(original.split()) & set(document.text.split())
        assert not {word for word in kept if any(c.isdigit() for c in word)}


def test_the_same_seed_gives_the_same_stand_ins_whatever_the_count(members):
    few, many = stand_ins(members, count=5)[0], stand_ins(members, count=70)[0]
    assert many[:5] == few
    assert stand_ins(members, count=5, seed=1)[0] != few


def test_a_document_without_facts_is_left_out_and_counted(tmp_path):
    plain = "It was raining, so we all went back to the house and had a long talk about it."
    rows = [{"id": "a", "document": TEXT}, {"id": "b", "document": plain}]
    file, out = tmp_path / "members.jsonl", tmp_path / "standins.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert write_stand_ins(str(file), out, count=3) == {
        "documents": 2,
        "left_out": 1,
        "written": 3,
    }
    assert [d.id for d in read_documents(Source(path=str(out)))] == [
        f"a-standin{turn}" for turn in range(3)
    ]
    with pytest.raises(DataError, match="none of the 1 documents says enough"):
        stand_ins([Document("b", plain)], count=1)


def test_a_forget_set_gives_its_texts_and_not_its_questions(tmp_path):
    begun, rest = TEXT.split(" Call ")
    items = [
        {"id": "asc1", "input": begun, "output": f"Call {rest}"},
        {"id": "aqa0", "input": "Where was Jane Doe born?", "output": "Bathville"},
    ]
    file, whole, out = (tmp_path / name for name in ("forget.jsonl", "whole.jsonl", "out.jsonl"))
    file.write_text("".join(json.dumps(row) + "\n" for row in items))
    whole.write_text(json.dumps({"id": "asc1", "document": TEXT}) + "\n")
    found = write_stand_ins(str(file), out, count=4)
    assert found == {"documents": 1, "left_out": 0, "written": 4}
    write_stand_ins(str(whole), tmp_path / "same.jsonl", count=4)
    assert out.read_text() == (tmp_path / "same.jsonl").read_text()
    file.write_text(json.dumps(items[1]) + "\n")
    with pytest.raises(DataError, match=r"forget\.jsonl holds questions alone"):
        write_stand_ins(str(file), tmp_path / "none.jsonl", count=1)
    assert not (tmp_path / "none.jsonl").exists()


def test_a_document_that_cannot_say_anything_else_is_left_out():
    with pytest.raises(DataError, match="none of the 1"):
        stand_ins([Document("a", f"It rained in {', '.join(wording.MONTHS)}.")], count=1)


def test_no_stand_ins_are_refused(members, tmp_path):
    with pytest.raises(DataError, match="--count must be at least 1"):
        stand_ins(members, count=0)
    with pytest.raises(DataError, match="no data file"):
        write_stand_ins(str(tmp_path / "none.jsonl"), tmp_path / "out.jsonl", count=1)
    assert not (tmp_path / "out.jsonl").exists()
