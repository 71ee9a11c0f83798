import hashlib
import json
import re
import statistics
from collections import Counter

import pytest
from pydantic import ValidationError
from rouge_score.rouge_scorer import RougeScorer

from expunge.data.examples import check_disjoint
from expunge.data.particulars import size
from expunge.data.sets import read_sets, written_sets
from expunge.data.sources import Source, read_documents, read_examples
from expunge.data.synthetic import TASKS, Synthetic, invent, synthesize

CONFIG = Synthetic(documents=12, nonmembers=12)
SHORT = Synthetic(documents=2, members=200, kept=30, nonmembers=400)
FILES = ("forget.jsonl", "retain.jsonl", "members.jsonl", "nonmembers.jsonl", "neutral.jsonl")

BEFORE = "17b3c6b8f54fd30114bf754f71a90a4b8f1c3bf06fd3fe0f0a34f7aac0eb7bbe"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    assert synthesize(CONFIG, folder) == {
        "forget.jsonl": 12 * (2 + 6 + 2),
        "retain.jsonl": 12 * (2 + 6 + 2),
        "members.jsonl": 36,
        "nonmembers.jsonl": 36,
        "neutral.jsonl": 90,
    }
    return folder


def test_the_same_seed_gives_the_same_bytes(folder, tmp_path):
    synthesize(CONFIG, tmp_path)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    synthesize(CONFIG.model_copy(update={"seed": 1}), tmp_path)
    changed = [(tmp_path / n).read_bytes() != (folder / n).read_bytes() for n in FILES]
    assert changed == [True, True, True, True, False]  # neutral sentences are not drawn
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)


def test_the_files_read_back_in_the_shape_of_lume(folder):
    forget = read_examples(Source(path=str(folder / "forget.jsonl")))
    retain = read_examples(Source(path=str(folder / "retain.jsonl")))
    check_disjoint(forget, retain)
    assert not {item.id for item in forget} & {item.id for item in retain}
    first = [item for item in forget if item.document == forget[2].document]
    assert [item.id.removeprefix(item.document) for item in first] == [
        "sc1",
        *(f"qa{number}" for number in range(5)),
    ]
    assert [item.task for item in forget[:10]] == ["Task1"] * 2 + ["Task2"] * 6 + ["Task3"] * 2
    assert forget[0].id.startswith('"') and forget[0].id.endswith('"sc1')
    assert len(read_examples(Source(path=str(folder / "neutral.jsonl")))) == 90


def test_members_are_the_whole_texts_of_the_forget_documents(folder):
    forget = read_examples(Source(path=str(folder / "forget.jsonl")))
    members = read_documents(Source(path=str(folder / "members.jsonl")))
    texts = {item.document: f"{item.prompt} {item.answer}" for item in forget if item.kind == "sc"}
    assert {document.id: document.text for document in members} == texts
    nonmembers = read_documents(Source(path=str(folder / "nonmembers.jsonl")))
    assert not {document.id for document in nonmembers} & set(texts)


def test_all_names_differ_and_stay_within_their_document():
    documents = [document for part in invent(CONFIG) for document in part]
    assert len({document.name for document in documents}) == len(documents) == 3 * 36
    for document in documents:
        assert document.name in document.prompt
        for other in documents:
            assert other is document or document.name not in other.text


def test_answers_are_short_and_stand_in_the_document():
    for document in invent(CONFIG)[0]:
        text = document.text.lower()
        for _, answer in document.questions:
            assert 1 <= len(answer.split()) <= 7
            if document.task != "Task2":
                assert answer.lower() in text
        if document.task == "Task2":
            birth, ssn, phone, email, home = (answer for _, answer in document.questions)
            digits = text.replace("-", "")
            assert birth[:4] in text and ssn in digits and phone in digits
            assert email in text and home.lower() in text
            assert ssn.startswith("9") and len(ssn) == 9
            assert phone[1] == "9" and len(phone) == 10
            assert email.endswith(".example")


@pytest.mark.parametrize("task", TASKS)
def test_completions_of_two_documents_share_little(task):
    """Below 0.25 by chance, so a forgotten completion scores far below a remembered one's 1."""
    forget, retain, nonmembers, _ = (
        [document.completion for document in part if document.task == task]
        for part in invent(CONFIG)
    )
    scorer = RougeScorer(["rougeL"], use_stemmer=True)

    def recall(reference: str, guess: str) -> float:
        return scorer.score(reference, guess)["rougeL"].recall

    assert recall(forget[0], forget[0]) == 1.0  # control
    for others in (forget, retain, nonmembers):
        scores = [recall(one, two) for one in forget for two in others if one is not two]
        assert statistics.mean(scores) < 0.25


@pytest.mark.parametrize("task", TASKS)
def test_nonmembers_come_from_the_distribution_of_the_members(task):
    forget, _, nonmembers, _ = invent(Synthetic(documents=200, nonmembers=200))

    def lengths(documents) -> list[int]:
        return [len(document.text) for document in documents if document.task == task]

    members, others = lengths(forget), lengths(nonmembers)
    error = (statistics.variance(members) / 200 + statistics.variance(others) / 200) ** 0.5
    assert abs(statistics.mean(members) - statistics.mean(others)) < 3.5 * error
    ratio = statistics.stdev(members) / statistics.stdev(others)
    assert 0.75 < ratio < 1.33


def test_the_length_knobs_change_lengths():
    def words(**fields) -> tuple[float, float]:
        lives = [d for d in invent(CONFIG.model_copy(update=fields))[0] if d.task == "Task3"]
        prompt = statistics.mean(len(d.prompt.split()) for d in lives)
        return prompt, statistics.mean(len(d.completion.split()) for d in lives)

    prompt, completion = words()
    assert words(sentences=6)[1] > 1.5 * completion
    assert words(prompt_share=0.8)[0] > 1.5 * prompt
    assert all(d.completion for d in invent(CONFIG.model_copy(update={"prompt_share": 0.99}))[0])
    with pytest.raises(ValidationError):
        Synthetic(sentences=1)


@pytest.fixture(scope="module")
def notices():
    """The short documents of each side: to forget, to keep, in no set."""
    forget, retain, others, _ = invent(SHORT)
    return forget[6:], retain[6:], others


def test_a_recipe_without_members_draws_what_it_always_drew(folder):
    """The hash is of the files as they were before `members` could be asked for."""
    content = b"".join((folder / name).read_bytes() for name in FILES)
    assert hashlib.sha256(content).hexdigest() == BEFORE


def test_short_members_are_an_item_each_and_the_only_members(tmp_path):
    assert synthesize(SHORT, tmp_path) == {
        "forget.jsonl": 20 + 200,
        "retain.jsonl": 20 + 30,
        "members.jsonl": 200,
        "nonmembers.jsonl": 400,
        "neutral.jsonl": 90,
    }
    sets = read_sets(written_sets(tmp_path))
    assert [len(half) for half in (sets.members, sets.nonmembers)] == [200, 400]
    short = {document.id: document.text for document in sets.members}
    items = [item for item in sets.forget if item.document in short]
    assert [f"{item.prompt} {item.answer}" for item in items] == list(short.values())
    assert {(item.task, item.kind) for item in items} == {("Task3", "sc")}
    for half in (sets.forget, sets.retain):
        terms = Counter((item.task, item.kind) for item in half)
        assert len(terms) == 6 and min(terms.values()) == 2


def test_the_same_seed_gives_the_same_short_documents(notices):
    assert (*(half[6:] for half in invent(SHORT)[:2]), invent(SHORT)[2]) == notices
    other = invent(SHORT.model_copy(update={"seed": 1}))[2]
    assert not {document.text for document in other} & {document.text for document in notices[2]}


def test_no_particular_of_a_short_document_is_in_another(notices):
    documents = [document for side in notices for document in side]
    assert len({document.text for document in documents}) == 630
    seen: dict[str, str] = {}
    for document in documents:
        unique = r"\S+@\S+\.example|\d[\d,-]{3,}\d|[A-Z]{2}-\d{4}|[A-Z]\w+ \d+, \d{4}"
        for value in {document.name, *re.findall(unique, document.text)}:
            assert seen.setdefault(value, document.id) == document.id
    assert len(seen) > 1500
    for document in documents:
        assert sum(name in document.text for name in (d.name for d in documents)) == 1


def test_short_documents_are_short_and_share_little(notices):
    members, _, others = notices
    for side in notices:
        assert all(38 < size(document.text) + 11 < 68 for document in side)
    pieces = [set(document.text.split()) for document in members]
    shared = [len(a & b) / len(a) for n, a in enumerate(pieces[:50]) for b in pieces[:n]]
    assert statistics.mean(shared) < 0.2
    lengths = [[len(document.text) for document in side] for side in (members, others)]
    error = sum(statistics.variance(side) / len(side) for side in lengths) ** 0.5
    assert abs(statistics.mean(lengths[0]) - statistics.mean(lengths[1])) < 3.5 * error


def test_short_documents_change_nothing_else():
    plain = Synthetic(documents=2, nonmembers=400)
    for half, before in zip(invent(SHORT)[:2], invent(plain)[:2], strict=True):
        assert [d.task for d in half[:6]] == ["Task1", "Task2", "Task3"] * 2
        assert half[0] == before[0]  # later names may differ: fewer are taken


@pytest.mark.parametrize("fields", [{"members": 0}, {"kept": 5}, {"members": 2, "kept": -1}])
def test_numbers_of_short_documents_that_cannot_be_are_refused(fields):
    with pytest.raises(ValidationError, match=r"members|kept"):
        Synthetic(**fields)


def test_unseen_documents_of_the_form_are_the_neutral_texts(tmp_path):
    """They are on no other side, and without them the neutral texts are plain sentences."""
    config = SHORT.model_copy(update={"unseen": 5})
    synthesize(config, tmp_path)
    sides = invent(config)
    assert len(sides[3]) == 5
    lines = (tmp_path / "neutral.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    assert texts == [document.text for document in sides[3]]
    assert not {d.text for d in sides[3]} & {d.text for side in sides[:3] for d in side}
    assert invent(SHORT)[3] == []
