"""Candidates, floors, objectives and the front, by hand."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from expunge.calibrate.candidate import TARGET, Candidate, End, alone, plain
from expunge.calibrate.floors import refusal, said, shortfalls
from expunge.calibrate.objectives import OBJECTIVES
from expunge.calibrate.outcome import candidate_of, front
from expunge.calibrate.reading import Material, Reading
from expunge.calibrate.resident import Resident
from expunge.calibrate.search import Point, Search
from expunge.calibrate.section import Calibrate, Floors
from expunge.config import parse_section
from expunge.data.batches import TokenSequence, encode_document
from expunge.data.examples import Document
from expunge.errors import CalibrationError, RecipeError
from expunge.merge.methods import METHODS
from expunge.models import load_tokenizer

DEEP, SHALLOW, NONE = End(branch="deep"), End(branch="shallow", step=40), End(branch=TARGET)


def reading(forget=0.0, retain=1.0, auc=0.5, two_sided=0.5, ks=0.1, neutral=3.0) -> Reading:
    terms = {
        f"{half}/Task{n}/{kind}": value
        for half, value in (("forget", forget), ("retain", retain))
        for n in (1, 2, 3)
        for kind in ("sc", "qa")
    }
    found = {"auc": auc, "two_sided": two_sided, "ks": ks, "gap": auc - 0.5}
    return Reading(terms, {"loss": found}, neutral)


def test_a_point_of_a_line_has_its_weights():
    candidate = Candidate(over=DEEP, under=SHALLOW, t=0.25, scale=2.0)
    assert candidate.parts == [(DEEP, 1.5), (SHALLOW, 0.5)]
    assert candidate.merge is not None
    assert candidate.merge.weights == (1.5, 0.5)
    assert candidate.merge.space == "delta"  # a plain sum is exact there
    assert candidate.label == "linear deep–shallow@40 t=0.250"


def test_the_target_adds_no_update():
    candidate = Candidate(over=DEEP, under=NONE, t=0.25)
    assert candidate.parts == [(DEEP, 0.75)]
    assert alone(NONE).merge is None
    assert Candidate(over=DEEP, under=SHALLOW, t=1.0).parts == [(SHALLOW, 1.0)]


def test_the_papers_merge_is_that_of_the_factors_with_weights_of_one():
    merge = plain("ties", DEEP, SHALLOW, 0.8).merge
    assert merge is not None
    assert (merge.method, merge.weights, merge.density) == ("ties", (1.0, 1.0), 0.8)
    assert merge.space == "factors"


def test_floors_say_what_is_lacking_and_by_how_much():
    target, now = reading(), reading(retain=0.63, neutral=3.6)
    lacks = shortfalls(now, target, Floors(retain=0.9, neutral=1.1))
    assert lacks["retain/Task1/qa"] == pytest.approx(0.3)
    assert lacks["neutral NLL"] == pytest.approx(3.6 / 3.3 - 1)
    assert "retain/Task1/qa 0.63 (floor 0.90)" in said(now, target, Floors())
    assert not shortfalls(target, target, Floors())


def test_a_term_that_the_target_lacks_is_no_floor():
    assert not shortfalls(reading(retain=0.0), reading(retain=0.0), Floors())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_greatest_where_all_is_well_and_falls_with_what_it_is_named_for(name):
    best = OBJECTIVES[name].fn(reading(ks=0.0))
    assert best == 1
    worse = {
        "balanced": reading(two_sided=0.9),
        "final": reading(auc=0.2),
        "aggregate": reading(retain=0.5),
        "membership": reading(auc=0.9),
        "two_sided": reading(two_sided=0.8),
        "distribution": reading(ks=0.4),
    }[name]
    assert OBJECTIVES[name].fn(worse) < best


def test_balanced_is_the_harmonic_mean():
    # aggregate 0.5: six terms at 1, six at 1/3; balance 1 - 2 * 0.125 = 0.75
    found = OBJECTIVES["balanced"].fn(reading(retain=1 / 3, two_sided=0.625))
    assert found == pytest.approx(2 * 0.5 * 0.75 / 1.25)


def test_an_auc_that_two_sided_attacks_see_through_is_no_balance():
    assert reading(two_sided=1.0).membership_balance == 0
    assert reading(two_sided=0.0).membership_balance == 0


def test_members_that_lie_too_close_together_are_no_balance_either():
    """The worst of two attacks is the one furthest from 1/2, not the greatest."""
    close = reading(two_sided=0.2)
    both = {"zlib": reading(two_sided=0.6).membership["loss"], **close.membership}
    found = replace(close, membership=both)
    assert found.two_sided == 0.2
    assert found.membership_balance == pytest.approx(0.4)
    assert OBJECTIVES["two_sided"].fn(found) == pytest.approx(0.4)


def test_the_front_holds_what_nothing_beats():
    readings = [
        reading(forget=0.1, retain=0.9, auc=0.5),
        reading(forget=0.0, retain=0.8, auc=0.5),
        reading(forget=0.1, retain=0.8, auc=0.5),  # beaten by both
        reading(forget=0.1, retain=0.9, auc=0.5),  # equal to the first: stays
    ]
    assert front(readings) == [0, 1, 3]


def test_a_point_that_is_not_there_is_refused():
    found = {"points": [{"candidate": alone(DEEP).model_dump(mode="json")}]}
    assert candidate_of(found, 0) == alone(DEEP)
    with pytest.raises(CalibrationError, match=r"there is no point 1; .* 0 to 0"):
        candidate_of(found, 1)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"objective": "best"}, "no calibration objective is called 'best'"),
        ({"attacks": ["recall"]}, "'recall' is none of loss"),
        ({"methods": ["slerp"]}, "slerp"),
        ({"methods": ["linear", "nuslerp"]}, "nuslerp does not take one branch as well as two"),
        ({"methods": ["multislerp"]}, "multislerp makes the same of one branch whatever"),
        ({"methods": ["linear", "sce"]}, "sce makes the same of one branch whatever"),
        ({"methods": ["ram"]}, "ram makes the same"),
        ({"methods": ["ramplus_tl"]}, "ramplus_tl makes the same"),
        ({"methods": ["consensus"]}, "consensus makes the same"),
        ({"methods": ["pcb"], "groups": 3}, "groups is not for pcb"),
        ({"methods": ["multislerp"], "groups": 3}, "multislerp"),
        ({"density": [0.5, 1.5]}, "density is at most 1"),
        ({"scale": [2, 1]}, "the lesser first"),
        ({"floors": {"retention": 1}}, "retention"),
    ],
)
def test_what_cannot_be_searched_is_refused(fields, said):
    with pytest.raises(RecipeError, match=said):
        parse_section(fields, Calibrate, origin="calibrate")


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_that_is_accepted_makes_a_merge_of_each_of_its_candidates(method, groups):
    try:
        Calibrate(methods=(method,), groups=groups)
    except ValueError:
        return
    weights = (1.1,) * groups if groups > 1 else None
    for under in (SHALLOW, NONE):
        candidate = Candidate(over=DEEP, under=under, t=0.5, method=method, groups=weights)
        assert candidate.merge is not None


def test_more_groups_than_blocks_are_refused():
    layers = [f"model.layers.{n}.mlp.up_proj" for n in (0, 2)]
    Calibrate(groups=3).check_blocks("calibrate 'c'", layers)  # control
    with pytest.raises(RecipeError, match=r"'c': groups is 4, and the branches adapt 3 blocks"):
        Calibrate(groups=4).check_blocks("calibrate 'c'", layers)


def test_what_is_balanced_is_chosen_before_what_is_not_whatever_is_maximised():
    """The line of the first ended short of 1/2; its aggregate is the greater all the same."""
    search = Search.__new__(Search)
    search.config, search.value = Calibrate(finalists=2), OBJECTIVES["aggregate"].fn
    search.whole = search.given = Material([], [], [], [])
    line = Candidate(over=DEEP, under=NONE, t=0.5)
    told = [(reading(auc=0.9), False), (reading(retain=0.95), True)]
    search.points = [Point(alone(NONE), "target", reading(), {})]
    search.points += [Point(line, "trial", now, {}, balanced=yes) for now, yes in told]
    entry = {"collapse": {"collapsed": False}, "semeval": {"mmlu": None}}
    search._official = lambda candidate, now, judge: (now, entry)  # pyright: ignore
    assert search.finals(lambda reader: entry) == 2
    search.points[2] = replace(search.points[2], short={"neutral NLL": 1.0})
    assert search.finals(lambda reader: entry) == 1  # the control: it is better than nothing


def sampled_search(**fields) -> Search:
    """A search that read a sample of one member, of two that there are, and found no trial yet."""
    search = Search.__new__(Search)
    search.config, search.value = Calibrate(**fields), OBJECTIVES["aggregate"].fn
    text = ("a", TokenSequence(tokens=(1, 2), answer_start=1, id="a"))
    search.given, search.whole = (Material([], [text] * n, [], []) for n in (1, 2))
    search.points = [Point(alone(NONE), "target", reading(auc=1.0), {})]
    return search


def line(t: float) -> Candidate:
    return Candidate(over=DEEP, under=NONE, t=t)


def entry(*, collapsed: bool = False, accuracy: float = 0.3) -> dict:
    reasons = ["writes no language"] if collapsed else []
    mmlu = {"accuracy": accuracy}
    return {"collapse": {"collapsed": collapsed, "reasons": reasons}, "semeval": {"mmlu": mmlu}}


def test_the_nearest_is_the_finalist_that_lacks_least_and_no_collapsed_one():
    """The first of three writes nothing any more; the second lost much MMLU, the third a little."""
    search = sampled_search(finalists=3, floors=Floors(mmlu=0.01))
    search.whole = search.given
    search.points += [Point(line(t), "trial", reading(), {}) for t in (0.1, 0.2, 0.3)]
    search.points += [Point(line(0.4), "trial", reading(), {"neutral NLL": 0.5})]
    told = {
        0.0: (reading(), entry()),
        0.1: (reading(retain=0), entry(collapsed=True, accuracy=0)),
        0.2: (reading(), entry(accuracy=0.2)),
        0.3: (reading(), entry(accuracy=0.288)),
    }
    search._official = lambda candidate, now, judge: told[candidate.t]  # pyright: ignore
    assert search.finals(lambda reader: {}) is None
    assert search.nearest() == (3, "MMLU fell by 0.012 (most 0.01)")
    search.points = [p for p in search.points if p.candidate.t not in (0.2, 0.3)]
    assert search.nearest()[0] == 2  # one that falls short, before the collapsed one
    del search.points[2]
    assert search.nearest() == (1, search.points[1].refused.why)  # pyright: ignore
    assert "it has collapsed (writes no language), generated: retain" in search.nearest()[1]


def test_a_finalist_is_refused_for_all_that_it_lacks():
    before = reading(), entry()
    config = Calibrate(floors=Floors(retain=0.9, mmlu=0.01))
    assert refusal(before, before, config) is None
    found = refusal((reading(retain=0.81), entry(accuracy=0.261)), before, config)
    assert found is not None
    assert not found.collapsed
    assert found.short["retain/Task1/qa"] == pytest.approx(0.1)
    assert found.short["MMLU"] == pytest.approx(0.1)
    assert found.why.startswith("generated: retain/Task1/sc 0.81 (floor 0.90), ")
    assert found.why.endswith("MMLU fell by 0.039 (most 0.01)")


@pytest.mark.parametrize(
    ("members", "auc", "near"),
    [(100, 0.52, True), (100, 0.53, False), (10, 0.55, True), (10, 0.56, False)],
)
def test_balanced_is_within_the_tolerance_or_within_half_a_member(members, auc, near):
    search = sampled_search(tolerance=0.02)
    given = Material([], search.given.members * members, [], [])
    assert search.near(reading(auc=auc), given) is near
    tasks = (["a", "b"] * (members // 2), [])
    both = replace(given, members=search.given.members * members, tasks=tasks)
    assert search.near(reading(auc=0.5 + 0.9 / members), both)  # half as many of each task


def test_a_line_that_is_bracketed_and_not_balanced_comes_after_one_that_is():
    search = sampled_search(finalists=1, tolerance=0.02)
    search.whole = search.given
    steep, near = (reading(auc=auc, forget=f) for auc, f in ((0.1, 0.0), (0.5, 0.2)))
    found = [Point(line(0.1), "trial", steep, {}, balanced=False, bracketed=True)]
    found += [Point(line(0.2), "trial", steep, {}, balanced=False, bracketed=False)]
    search._official = lambda candidate, now, judge: (now, entry())  # pyright: ignore
    search.points += [found[1], found[0]]
    assert search.finals(lambda reader: {}) == 2  # the control: bracketed is better than not
    search.points += [Point(line(0.3), "trial", near, {})]
    assert search.finals(lambda reader: {}) == 3


@pytest.mark.parametrize("finalists", [1, 2])
def test_finalists_are_judged_until_one_is_balanced_by_all_documents(finalists):
    """The sample balanced all of four; all documents balance the third alone."""
    search = sampled_search(finalists=finalists)
    search.points += [Point(line(t), "trial", reading(forget=t), {}) for t in (0.1, 0.2, 0.3, 0.4)]
    asked = []

    def settled(point):
        balanced = point.candidate.t == 0.3
        return replace(point, balanced=balanced, reading=reading(forget=point.candidate.t))

    def official(candidate, now, judge):
        asked.append(candidate.t)
        return now, entry()

    search._settled, search._official = settled, official  # pyright: ignore
    assert search.finals(lambda reader: {}) == 3
    assert asked == [0.0, 0.1, 0.2, 0.3]  # the target first


def test_no_more_than_three_times_the_finalists_are_judged():
    search = sampled_search(finalists=1)
    search.points += [Point(line(t / 10), "trial", reading(), {}) for t in range(1, 7)]
    asked = []
    search._settled = lambda point: replace(point, balanced=False)  # pyright: ignore
    search._official = lambda candidate, now, judge: (  # pyright: ignore
        asked.append(candidate.t) or now,
        entry(),
    )
    assert search.finals(lambda reader: {}) == 1
    assert asked == [0.0, 0.1, 0.2, 0.3]


def test_a_finalist_is_balanced_by_all_documents_where_a_sample_chose_its_line():
    """The sample has the balance at 0.3, all documents at 0.6; no trial but the finalist moves."""
    search = Search.__new__(Search)
    search.config, search.value = Calibrate(finalists=1), OBJECTIVES["aggregate"].fn
    text = ("a", TokenSequence(tokens=(1, 2), answer_start=1, id="a"))
    search.given, search.whole = (Material([], [text] * n, [], []) for n in (1, 2))
    line, asked = Candidate(over=DEEP, under=NONE, t=0.3), []
    search.points = [Point(alone(NONE), "target", reading(auc=1.0), {})]
    search.points += [Point(alone(DEEP), "end", reading(auc=0.2), {})]
    search.points += [Point(line, "trial", reading(forget=f), {}) for f in (0.1, 0.2)]

    def membership(candidate, given):
        zero = 0.3 if given is search.given else 0.6
        asked.append(candidate.t)
        return reading(auc=min(1.0, max(0.0, 0.5 + candidate.t - zero)))

    def screened(candidate, role, target, given):
        return Point(candidate, role, membership(candidate, given), {})

    entry = {"collapse": {"collapsed": False}, "semeval": {"mmlu": None}}
    search._membership, search._screened = membership, screened  # pyright: ignore
    search._official = lambda candidate, now, judge: (now, entry)  # pyright: ignore
    assert search.finals(lambda reader: entry) == 2
    assert asked[0] == 0.3  # begins where the sample had it
    assert abs(search.points[2].reading.auc - 0.5) <= search.config.tolerance
    assert abs(search.points[2].candidate.t - 0.6) <= search.config.tolerance
    assert search.points[3].candidate.t == 0.3


def test_a_search_of_other_texts_or_of_other_sides_shares_no_trials():
    """The ids stay where documents are cut elsewhere, or lie on the other side."""
    one, longer, other = (
        TokenSequence(tokens=tokens, answer_start=1, id=id)
        for tokens, id in (((1, 2), "a"), ((1, 2, 3), "a"), ((1, 4), "b"))
    )

    def key(members, nonmembers):
        search = Search.__new__(Search)
        search.config, search.ends = Calibrate(), []
        search.resident = SimpleNamespace(key="k", dtype="float32", hashes={})  # pyright: ignore
        sides = ([("", text) for text in side] for side in (members, nonmembers))
        search.given = Material([], *sides, [])
        return search._key()

    assert key([one], [other]) == key([one], [other])
    assert len({key([one], [other]), key([longer], [other]), key([other], [one])}) == 3


def test_a_repair_by_other_texts_is_another_candidate(tiny_folder, tmp_path):
    """What a repair keeps is the retain half's, which other folds change; nothing else reads it."""

    def key(repair: float, text: str) -> str:
        kept = [encode_document(Document("kept", text), load_tokenizer(tiny_folder), max_length=64)]
        given = {"key": "k", "hashes": {"deep": "h"}, "dtype": "float32", "folder": tmp_path}
        resident = Resident(tiny_folder, {"deep": tmp_path}, kept=kept, max_batch=1, **given)
        with resident.reader(Candidate(over=DEEP, under=NONE, t=0.5, repair=repair)) as reader:
            return reader.key

    assert key(1.0, "one text") != key(1.0, "another")
    assert key(0.0, "one text") == key(0.0, "another")
