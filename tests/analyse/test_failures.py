"""Failures told apart by hand: kinds of collapse, groups of them, damage by distance, returns."""

import json

import pytest

from expunge.analyse.clusters import clusters, collapsed, kind_of
from expunge.analyse.collateral import NEAR, NEUTRAL, OTHER, SAME, collateral, distances
from expunge.analyse.failures import LookAtFailures, failures_tables
from expunge.analyse.returns import returned, risen
from expunge.analyse.texts import groups_of, nearest
from expunge.data.examples import Example


def item(id="d-qa0", generation="", truth="Ada", score=0.0, half="forget", **more):
    kind = "sc" if "sc" in id else "qa"
    told = {"id": id, "half": half, "task": "Task1", "kind": kind, "prompt": f"{id}?"}
    return {**told, "truth": truth, "generation": generation, "score": score, "nll": 1.0, **more}


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", "empty"),
        (" \n ", "empty"),
        ("6 6 6 6 6 6 6 6", "repeat"),
        ("She went to to to to to to to to", "repeat"),
        ("666666666666", "repeat"),
        ("of the of the of the of the of the", "loop"),
        ("abc" * 8, "loop"),
        ("1 2 3 4", "wordless"),
        ("I'm sorry, but I can tell you nothing.", "refusal"),
        ("There is a gap in what I know here.", "refusal"),
        ("Ada Lovelace wrote the first program for a machine.", None),
        ("6 6", "wordless"),  # too few to be a loop
    ],
)
def test_kinds_of_collapse(text, kind):
    assert kind_of(text, "Ada Lovelace was born in London") == kind


def test_numbers_are_a_sound_answer_to_a_question_about_numbers():
    assert kind_of("555 0142", "555-0199") is None
    assert kind_of("1815-12-11", "10 December 1815") is None  # wrong, and no collapse


def test_only_the_beginning_of_a_generation_counts():
    sound = " ".join(f"word{chr(97 + n % 26)}{chr(97 + n // 26)}" for n in range(40))
    assert kind_of(sound + " again" * 60) is None
    assert kind_of(" ".join(sound.split()[:10]) + " again" * 60) == "repeat"


def test_a_constant_answer_is_one_that_is_given_to_unlike_prompts():
    items = [item(f"d{n}-qa0", "Paris", truth=f"city {n}") for n in range(3)]
    assert [kind for _, kind in collapsed(items)] == ["constant"] * 3
    assert not collapsed(items[:2])
    assert not collapsed([*items[:2], item("d9-qa0", "Paris", truth="Paris")])  # it is one's truth
    same = [item(f"d{n}-qa0", "Paris", truth="London") for n in range(3)]
    assert not collapsed(same)  # one wrong answer to one question asked thrice


def test_a_right_answer_has_not_collapsed():
    loop = "ha " * 9
    assert not collapsed([item(generation=loop, score=1.0), item("e-qa0", None)])
    assert len(collapsed([item(generation=loop)])) == 1


def test_clusters_have_a_size_a_description_and_examples():
    items = [
        *(item(f"a{n}-sc1", "6 " * (8 + n), half="retain") for n in range(5)),
        *(item(f"b{n}-qa0", "") for n in range(3)),
        *(item(f"c{n}-qa0", "of the " * 8, score=0.5) for n in range(2)),
        item("e-qa0", "a sound answer"),
    ]
    rows, examples = clusters(items, 0.6)
    assert [(r["size"], r["description"]) for r in rows] == [
        (5, "one repeated token: 6"),
        (3, "nothing is written"),
        (2, "a loop: of the"),
    ]
    assert rows[0]["halves"] == {"retain": 5}
    assert [r["score"] for r in rows] == [0, 0, 0.5]
    assert [(e["cluster"], e["id"]) for e in examples[:4]] == [
        *((1, f"a{n}-sc1") for n in range(3)),
        (2, "b0-qa0"),
    ]
    assert clusters(items, 0.6) == (rows, examples)
    assert clusters([], 0.6) == ([], [])


def test_like_texts_are_of_one_group():
    texts = ["the the the a", "the the the b", "6 6 6 6"]
    assert groups_of(texts, 0.6) == [0, 0, 1]
    assert groups_of(texts[:1], 0.6) == [0]


def test_the_nearest_text_is_the_one_with_the_same_words():
    found = nearest(["red fox", "blue whale", "green"], ["a red fox", "one whale"])
    assert found[0] > found[1] > found[2] == 0
    assert nearest(["red fox"], ["red fox"])[0] == pytest.approx(1)


def retain_items() -> list[Example]:
    return [
        Example("r0-qa0", "Where does Ada Miller live?", "Leeds", "Task2"),
        Example("r1-qa0", "What grows in the garden?", "roses", "Task1"),
        Example("r2-qa0", "Which river is long?", "Nile", "Task1"),
        Example("r3-qa0", "Who sang?", "Bo", "Task3"),
    ]


FORGET = [
    Example("f-qa0", "When was Ada Miller born?", "1815", "Task1"),
    Example("f-qa1", "Where was Ada Miller born?", "London", "Task1"),
]


def test_retain_items_lie_near_or_far_by_their_words_and_tasks():
    found = distances(retain_items(), FORGET, 0.25)
    assert {id: group for id, (group, _) in found.items()} == {
        "r0-qa0": NEAR,
        "r1-qa0": SAME,
        "r2-qa0": SAME,
        "r3-qa0": OTHER,
    }
    assert found["r0-qa0"][1] == max(similar for _, similar in found.values())
    stranger = [Example("r-qa0", "xyz?", "uvw", "Task1")]
    assert distances(stranger, FORGET, 1.0)["r-qa0"] == (SAME, 0)  # no word in common


def test_damage_by_group_by_hand():
    groups = {"a-qa0": (NEAR, 0.5), "b-qa0": (NEAR, 0.3), "c-sc1": (SAME, 0.0)}
    before = [item(id, half="retain", score=1.0, nll=0.5) for id in groups]
    after = [
        item("a-qa0", half="retain", score=0.0, nll=2.5),
        item("b-qa0", half="retain", score=1.0, nll=0.5),
        item("c-sc1", half="retain", score=None, nll=1.0),
        item("f-qa0", half="forget", score=0.0),
    ]
    found = {(r["group"], r["kind"]): r for r in collateral("m", before, after, groups, (3.0, 3.5))}
    assert found.keys() == {(NEAR, "all"), (NEAR, "qa"), (SAME, "all"), (SAME, "sc")} | {
        (NEUTRAL, "all")
    }
    near = found[NEAR, "all"]
    assert (near["drop"]["value"], near["drop"]["n"]) == (0.5, 2)
    assert (near["drop"]["low"], near["drop"]["high"]) == (0, 1)
    assert near["rise"]["value"] == 1.0
    assert near["similarity"] == pytest.approx(0.4)
    assert found[SAME, "sc"]["drop"] is None  # it was not scored
    assert found[SAME, "sc"]["rise"]["value"] == 0.5
    assert found[NEUTRAL, "all"]["rise"]["value"] == 0.5


def test_items_that_a_merge_says_better_than_its_branches():
    strong = [item("a-qa0", score=0.0), item("b-qa0", score=0.2), item("c-qa0", score=0.0)]
    weak = [item("a-qa0", score=0.5), item("b-qa0", score=0.0), item("c-qa0", score=None)]
    merged = [
        item("a-qa0", score=0.9),
        item("b-qa0", score=0.25),  # within the margin
        item("c-qa0", score=1.0),  # the weak branch was not asked
        item("r-qa0", score=1.0, half="retain"),
    ]
    (row,) = risen("merged", merged, {"strong": strong, "weak": weak}, 0.1)
    assert (row["id"], row["best_source"], row["source_score"]) == ("a-qa0", "weak", 0.5)
    assert row["rise"] == pytest.approx(0.4)
    assert risen("merged", merged, {}, 0.1) == []


def test_documents_that_come_back_in_a_later_model():
    models = {
        "strong": [item("a-sc1", score=0.1), item("a-qa0", score=0.0), item("b-qa0", score=1.0)],
        "merged": [item("a-sc1", score=0.9), item("a-qa0", score=0.0), item("b-qa0", score=0.0)],
    }
    (row,) = returned(models, gone=0.4, back=0.7)
    # b was forgotten by the later model alone, so it did not return.
    assert (row["document"], row["forgotten_in"], row["back_in"]) == ("a-", ["strong"], ["merged"])
    assert row["scores"] == {"strong": 0.1, "merged": 0.9}


def test_all_tables_of_three_models():
    def scored(score):
        rows = [item(e.id, "6 " * 9, e.answer, score, nll=1 - score) for e in FORGET]
        rows += [item(e.id, e.answer, e.answer, 1.0, "retain") for e in retain_items()]
        return {"nll": {"neutral": 3.0}}, rows

    models = {"target": scored(0.9), "a": scored(0.0), "b": scored(0.2), "merged": scored(0.8)}
    sources = {"a": ["target"], "b": ["target"], "merged": ["a", "b"]}
    found = failures_tables(models, sources, FORGET, retain_items(), LookAtFailures())
    assert {(r["model"], r["size"]) for r in found["clusters"]} == {(name, 2) for name in models}
    assert {r["model"] for r in found["collateral"]} == {"a", "b", "merged"}
    assert [(r["model"], r["best_source"]) for r in found["risen"]] == [("merged", "b")] * 2
    assert [r["document"] for r in found["returned"]] == ["f-"]
    json.dumps(found, allow_nan=False)
