"""Folds: a document lies on one side with all that is made of it, whoever asks and whenever."""

import unicodedata

import pytest

from expunge.data.examples import Document, Example
from expunge.data.folds import Folds, assigned, dealt, interval_width, part, test_documents
from expunge.data.sets import Sets
from expunge.errors import DataError

test_documents.__test__ = False  # pyright: ignore


def sets(count: int = 20, nonmembers: int = 24) -> Sets:
    def items(half: str) -> list[Example]:
        return [
            Example(f"{half}{task}d{n}{kind}0", f"{half} {task} {n} {kind}?", "answer", task)
            for task in ("Task1", "Task3")
            for n in range(count)
            for kind in ("sc", "qa")
        ]

    members = [Document(f"forgetTask3d{n}", f"text {n}") for n in range(count)]
    others = [Document(f"other{n}", f"unseen {n}") for n in range(nonmembers)]
    return Sets(items("forget"), items("retain"), members, others, [])


def test_every_group_is_split_by_the_share_asked_for():
    given = sets()
    chosen = test_documents(given, Folds(test=0.25, least=2))
    test = part(given, chosen, inside=True)
    assert (len(test.members), len(test.nonmembers)) == (5, 6)
    for half in (test.forget, test.retain):
        by_task = [len({e.document for e in half if e.task == task}) for task in ("Task1", "Task3")]
        assert by_task == [5, 5]


def test_the_two_sides_share_no_document_and_lose_none():
    given = sets()
    chosen = test_documents(given, Folds())
    sides = [part(given, chosen, inside=inside) for inside in (True, False)]
    ids = [{e.document for e in s.forget} | {d.id for d in s.members} for s in sides]
    assert not ids[0] & ids[1]
    assert sum(len(s.forget) for s in sides) == len(given.forget)
    assert sum(len(s.nonmembers) for s in sides) == len(given.nonmembers)


def test_a_member_lies_where_its_items_lie():
    given = sets()
    chosen = test_documents(given, Folds(test=0.3, seed=3, least=2))
    side = part(given, chosen, inside=True)
    assert {d.id for d in side.members} == {e.document for e in side.forget if e.task == "Task3"}


def test_one_text_under_two_ids_is_one_document():
    groups = {"a": {f"x{n}": f"text {n // 2}" for n in range(40)}}
    found = assigned(groups, (0.5, 0.5), seed=1)
    assert all(found[f"x{n}"] == found[f"x{n + 1}"] for n in range(0, 40, 2))
    assert len(set(found.values())) == 2


def test_one_prompt_before_many_answers_is_not_one_document():
    """A set of plain texts, or of one instruction: only the answers differ."""
    items = [Example(f"doc{n}", "Tell me of", f"answer {n}", "letters") for n in range(20)]
    kept = [Example(f"kept{n}", "", f"text {n}", "letters") for n in range(20)]
    given = Sets(items, kept, sets().members, sets().nonmembers, [])
    test = part(given, test_documents(given, Folds()), inside=True)
    assert (len(test.forget), len(test.retain)) == (10, 10)
    items[1] = Example("doc1", "Tell me of", "Answer  0", "letters")  # the control
    found = dealt(given, (0.5, 0.5), seed=0)
    assert found["doc0"] == found["doc1"]


def test_two_ids_with_one_text_lie_together_though_their_items_differ():
    members = {f"x{n}": f"text {n // 2}" for n in range(40)}
    items = {f"x{n}": f"question {n}" for n in range(40)}
    found = assigned({"items": items, "members": members}, (0.5, 0.5), seed=1)
    assert all(found[f"x{n}"] == found[f"x{n + 1}"] for n in range(0, 40, 2))
    assert len(set(found.values())) == 2


def test_sets_without_members_are_split_too():
    given = Sets(sets().forget, sets().retain, [], [], [])
    test = part(given, test_documents(given, Folds(interval=0.1)), inside=True)
    assert len(test.forget) == len(given.forget) / 2


def test_folds_are_the_same_each_time_and_others_for_another_seed():
    given = sets()
    first = dealt(given, [0.2] * 5, seed=0)
    assert first == dealt(given, [0.2] * 5, seed=0)
    assert first != dealt(given, [0.2] * 5, seed=1)
    sizes = [sum(first[d.id] == fold for d in given.members) for fold in range(5)]
    assert sizes == [4, 4, 4, 4, 4]


def test_given_ids_judge_and_an_unknown_one_is_named(tmp_path):
    given = sets()
    path = tmp_path / "ids.txt"
    own = [f"forgetTask3d{n}" for n in range(10)] + [f"other{n}" for n in range(10)]
    own += [f"{half}Task{task}d0" for half in ("forget", "retain") for task in (1, 3)]
    path.write_text("\n".join(own))
    assert test_documents(given, Folds(test_ids=str(path))) == frozenset(own)
    path.write_text("\n".join([*own, "nobody"]))
    with pytest.raises(DataError, match="'nobody', which is the id of no document"):
        test_documents(given, Folds(test_ids=str(path)))


def test_given_ids_that_part_one_text_are_refused(tmp_path):
    given = sets()
    given.nonmembers.append(Document("twin", "Unseen  0"))
    path = tmp_path / "ids.txt"
    path.write_text("\n".join([f"other{n}" for n in range(9)]))
    with pytest.raises(DataError, match=r"'other0' but not 'twin'.*share a document"):
        test_documents(given, Folds(test_ids=str(path)))


def test_too_few_documents_are_refused_with_how_many_there_are():
    with pytest.raises(DataError, match="calibration fold has 3 documents of members, and needs 8"):
        test_documents(sets(count=6), Folds())


def test_an_interval_too_narrow_for_the_documents_says_how_many_would_do():
    with pytest.raises(DataError, match=r"interval of 0\.50.*asks for 0\.2; 65 of each would do"):
        test_documents(sets(), Folds(interval=0.2))
    assert interval_width(65, 65) <= 0.2 < interval_width(64, 64)
    with pytest.raises(DataError, match="256106668 of each would do"):
        test_documents(sets(), Folds(interval=1e-4))


def test_the_width_is_that_of_the_rank_test():
    # σ² = (M + N + 1) / (12 M N) = 41 / 4800 at 20 and 20
    assert interval_width(20, 20) == pytest.approx(2 * 1.96 * (41 / 4800) ** 0.5)


def test_two_ids_with_one_text_in_two_forms_of_unicode_lie_on_one_side():
    text = "Zoë Müller, {} Straße, was born in Århus."
    twins = [
        Document(f"{form}{n}", unicodedata.normalize(form, text.format(n)))
        for n in range(20)
        for form in ("NFC", "NFD")
    ]
    others = [Document(f"other{n}", f"unseen {n}") for n in range(24)]
    given = Sets([], [], twins, others, [])
    chosen = test_documents(given, Folds())
    assert all((f"NFC{n}" in chosen) == (f"NFD{n}" in chosen) for n in range(20))
    assert 0 < len(part(given, chosen, inside=True).members) < 40


def test_a_file_of_test_ids_may_begin_with_a_mark_and_must_be_utf8(tmp_path):
    path, given = tmp_path / "ids.txt", sets()
    asked = sorted(test_documents(given, Folds()))
    path.write_bytes("\n".join(asked).encode("utf-8-sig"))
    assert test_documents(given, Folds(test_ids=str(path))) >= {*asked}
    path.write_bytes("Zoë".encode("latin-1"))
    with pytest.raises(DataError, match=r"ids\.txt is not UTF-8 text"):
        test_documents(given, Folds(test_ids=str(path)))
