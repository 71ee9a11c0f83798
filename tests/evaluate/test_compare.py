"""Two models' results: paired item by item where there are items, and never across other items."""

import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

import expunge
from commands import run as command
from expunge.errors import EvaluationError, RunError
from expunge.evaluate import compare as compare_module
from expunge.evaluate.balance import two_sided_auc
from expunge.evaluate.compare import (
    Comparison,
    Difference,
    compare,
)
from expunge.evaluate.membership import auc
from expunge.evaluate.numbers import Behind, Measured, Number, estimate
from expunge.evaluate.paired import paired_difference, unpaired_difference
from expunge.evaluate.readings import Reading, SuiteReading, by_key, read_place
from expunge.evaluate.run import _write
from expunge.report.compared import print_comparison


def item(group, name, **metrics):
    return {"group": group, "id": name, "prompt": f"{name}?", "truth": name, **metrics}


def reading(name, items, numbers=None, **facts):
    return Reading(name, {"s": SuiteReading(numbers or {}, by_key(items, name), facts)})


def scored(name, values, numbers=None, metric="score", **facts):
    items = [item("forget", f"i{n}", **{metric: value}) for n, value in enumerate(values)]
    return reading(name, items, numbers, **facts)


def only(comparison):
    (row,) = comparison.differences
    return row


def test_a_paired_difference_by_hand():
    """0.5 - 0.1, 0.7 - 0.5, 0.9 - 0.9: 0.4, 0.2, 0, mean 0.2."""
    found = paired_difference([0.1, 0.5, 0.9], [0.5, 0.7, 0.9], name="d")
    assert found.value == pytest.approx(0.2)
    assert found.n == 3
    assert 0 <= found.low < 0.2 < found.high <= 0.4
    back = paired_difference([0.5, 0.7, 0.9], [0.1, 0.5, 0.9], name="d")
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))
    assert paired_difference([0.25], [0.75], name="d") == Number(0.5, 1)
    assert paired_difference([], [], name="d") == Number(None, 0)


def test_pairs_see_what_two_means_do_not():
    """Items from 0 to 1, each 0.05 better: far less than they differ among themselves."""
    rng = np.random.default_rng(0)
    before = rng.uniform(0, 1, 50)
    after = before + 0.05 + rng.normal(0, 0.01, 50)
    paired = paired_difference(list(before), list(after), name="d")
    apart = unpaired_difference(estimate(before, name="a"), estimate(after, name="b"))
    assert paired.value == pytest.approx(apart.value)
    assert paired.low > 0
    assert apart.low < 0 < apart.high  # control: without the pairs it looks like noise


def test_noise_is_called_noise_about_nineteen_times_in_twenty():
    rng = np.random.default_rng(1)
    calls = []
    for trial in range(200):
        a, b = rng.normal(size=(2, 40))
        found = paired_difference(list(a), list(b), name=f"trial {trial}")
        calls.append(found.low <= 0 <= found.high)
    assert 0.88 <= np.mean(calls) <= 0.99


def test_an_unpaired_difference_by_hand():
    """0.8 (0.5 to 0.9) - 0.4 (0.36 to 0.8): √(0.3² + 0.4²) = 0.5 below, √(0.1² + 0.04²) above."""
    found = unpaired_difference(Number(0.4, 9, 0.36, 0.8), Number(0.8, 7, 0.5, 0.9))
    assert found.value == pytest.approx(0.4)
    assert found.low == pytest.approx(-0.1)
    assert found.high == pytest.approx(0.4 + math.sqrt(0.0116))
    assert found.n == 7
    assert unpaired_difference(Number(0.4, 9), Number(0.8, 7, 0.5, 0.9)) == Number(0.4, 7)
    assert unpaired_difference(Number(None, 0), Number(0.8, 7)) == Number(None, 0)


def test_a_number_is_paired_only_where_it_is_the_mean_of_its_items():
    values = [0.0, 1.0] * 5
    same = {"forget": Number(0.5, 10, 0.2, 0.8), "total": Number(0.5, 10, 0.2, 0.8)}
    rows = compare(scored("a", values, same), scored("b", values, same)).differences
    assert [(row.name, row.how) for row in rows] == [
        ("s.forget", "paired"),
        ("s.total", "unpaired"),
    ]
    other = {"forget": Number(0.4, 10, 0.1, 0.7)}  # not the mean of the items: something else
    rows = compare(scored("a", values, other), scored("b", values, other)).differences
    assert [(row.name, row.how) for row in rows] == [
        ("s.forget", "unpaired"),
        ("s.forget.score", "paired"),
    ]
    dotted = {"forget.score": Number(0.4, 10)}  # likewise, under the items' own name
    row = only(compare(scored("a", values, dotted), scored("b", values, dotted)))
    assert (row.name, row.how) == ("s.forget.score", "unpaired")
    dotted = {"forget.score": Number(0.5, 10)}
    row = only(compare(scored("a", values, dotted), scored("b", values, dotted)))
    assert (row.name, row.how, row.difference) == ("s.forget.score", "paired", 0.0)


def test_what_changed_is_told_from_what_did_not():
    rng = np.random.default_rng(0)
    values = rng.uniform(size=20)
    items = [
        [
            item(group, f"i{n}", score=value + shift * rng.uniform(0.5, 1))
            for group, shift in (("forget", drop), ("retain", 0.0))
            for n, value in enumerate(values)
        ]
        for drop in (0.0, -0.5)
    ]
    forget, retain = compare(reading("a", items[0]), reading("b", items[1])).differences
    assert forget.within_noise is False
    assert forget.difference == pytest.approx(forget.b - forget.a)
    assert -0.5 < forget.low < forget.high < -0.25
    assert retain.within_noise is True  # control
    assert retain.difference == 0


def test_order_of_items_changes_nothing_and_bookkeeping_is_no_metric():
    items = [item("g", str(n), score=n / 7, tokens=n, complete=True, hit=n > 3) for n in range(8)]
    one = compare(reading("a", items), reading("b", items[::-1]))
    assert one.differences == compare(reading("a", items), reading("b", items)).differences
    assert [row.name for row in one.differences] == ["s.g.score", "s.g.hit"]
    assert one.differences[1].a == 0.5  # four of eight


def test_items_that_do_not_differ_are_no_evidence():
    for n, verdict in ((compare_module.FEWEST - 1, None), (compare_module.FEWEST, False)):
        row = only(compare(scored("a", [1.0] * 60), scored("b", [0.0] * n + [1.0] * (60 - n))))
        assert row.high < 0 and row.n == 60
        assert row.within_noise is verdict


def test_ten_answers_of_two_persons_are_less_than_ten_of_ten():
    def of(name, ids, value):
        return reading(name, [item("forget", one, score=value) for one in ids])

    persons = [f"p{person}-qa{n}" for person in range(2) for n in range(5)]
    row = only(compare(of("a", persons, 1.0), of("b", persons, 0.0)))
    assert (row.n, row.within_noise) == (10, None)
    alone = [f"p{person}-qa0" for person in range(10)]
    row = only(compare(of("a", alone, 1.0), of("b", alone, 0.0)))
    assert (row.n, row.within_noise) == (10, False)  # control


def test_a_persons_answers_make_noise_wider():
    """Persons whose five answers go up or down together, by chance: 5 % may be called real."""
    rng, calls = np.random.default_rng(2), []
    ids = [f"p{person}-qa{n}" for person in range(20) for n in range(5)]
    for trial in range(60):
        shift = np.repeat(rng.normal(size=20), 5)
        a = [item("forget", one, score=0.0) for one in ids]
        b = [item("forget", one, score=x) for one, x in zip(ids, shift, strict=True)]
        calls.append(only(compare(reading(f"a{trial}", a), reading("b", b))).within_noise)
    assert sum(call is False for call in calls) <= 9  # of 60; by items it would be about 23


def test_few_items_are_no_evidence_though_the_interval_lacks_0():
    for n, verdict in ((compare_module.FEWEST - 1, None), (compare_module.FEWEST, False)):
        row = only(compare(scored("a", [1.0] * n), scored("b", [0.0] * n)))
        assert row.high < 0
        assert row.within_noise is verdict


def test_other_items_are_refused_or_left_out_and_counted():
    a, b = scored("a", [0.0] * 8), scored("b", [1.0] * 6)
    with pytest.raises(EvaluationError, match=r"2 only in a \(first: forget i6\); --common"):
        compare(a, b)
    found = compare(a, b, common=True)
    assert only(found).n == 6
    assert found.notes == ["s: items left out: 2 only in a (first: forget i6); 6 in both"]
    sampled = scored("b", [1.0] * 6 + [None] * 2)
    with pytest.raises(EvaluationError, match=r"2 of 8 items \(first: i6\) were measured in only"):
        compare(a, sampled)
    found = compare(a, sampled, common=True)
    assert only(found).n == 6
    assert "2 of 8" in found.notes[0]
    both = compare(sampled, sampled)
    assert only(both).n == 6
    assert not both.notes


def test_the_same_id_for_another_text_is_refused_even_with_common():
    a, b = scored("a", [0.0] * 3), scored("b", [0.0] * 3)
    b.suites["s"].items["forget", "i1"]["truth"] = "else"
    with pytest.raises(EvaluationError, match=r"'i1' of forget has another truth in b than in a"):
        compare(a, b, common=True)


@pytest.mark.parametrize("part", ["text", "answer"])
def test_rows_that_hold_no_text_are_told_apart_by_what_stands_for_it(part):
    a, b = (
        reading(name, [{"group": "members", "id": "m", part: said, "nll": 1.0}])
        for name, said in (("a", "12ab"), ("b", "34cd"))
    )
    with pytest.raises(EvaluationError, match=rf"'m' of members has another {part} in b than in a"):
        compare(a, b)
    assert only(compare(a, a)).difference == 0  # control


def test_an_aggregate_of_a_collapsed_model_does_not_come_back_under_another_name():
    rows = [{"group": "bio", "id": str(n), "correct": n < 3, "nll": n / 3} for n in range(8)]
    numbers = {"bio": Number(3 / 8, 8, 0.1, 0.7)}
    behind = {"bio": Behind("correct", ("bio",))}

    def of(name, fell):
        facts = {"collapsed": fell, "aggregates": ["bio"]}
        suite = SuiteReading(numbers, by_key(rows, name), facts, behind=behind)
        return Reading(name, {"s": suite})

    whole = compare(of("a", False), of("b", False))
    assert [row.name for row in whole.differences] == ["s.bio", "s.bio.nll"]
    found = compare(of("a", False), of("b", True))
    assert [row.name for row in found.differences] == ["s.bio.nll"]


@pytest.mark.parametrize(
    ("value", "message"), [(math.nan, "item 1 is NaN"), (math.inf, "holds an infinite value")]
)
def test_values_without_a_mean_are_named(value, message):
    with pytest.raises(EvaluationError, match=rf"s\.forget\.score.*{message}"):
        compare(scored("a", [0.0, value]), scored("b", [0.0, 1.0]))


def test_aggregates_of_a_collapsed_model_are_left_out():
    numbers = {"final": Number(0.4, 3, 0.3, 0.5), "mia": Number(0.5, 3, 0.4, 0.6)}
    whole, broken = (
        Reading(
            name, {"s": SuiteReading(numbers, {}, {"collapsed": fell, "aggregates": ["final"]})}
        )
        for name, fell in (("a", False), ("b", True))
    )
    assert [row.name for row in compare(whole, whole).differences] == ["s.final", "s.mia"]
    found = compare(whole, broken)
    assert [row.name for row in found.differences] == ["s.mia"]
    assert found.notes[0].startswith("s: b has collapsed")


def test_suites_and_settings_that_differ_are_said():
    a, b = (
        Reading(
            n, {"s": SuiteReading({}, {}, {}, {"seed": 0, "max": m}), n: SuiteReading({}, {}, {})}
        )
        for n, m in (("a", 1), ("b", 2))
    )
    assert compare(a, b).notes == [
        "only a was measured by a",
        "only b was measured by b",
        "s: measured with other settings: max",
    ]
    with pytest.raises(EvaluationError, match="have no suite in common"):
        compare(a, Reading("c", {}))


def written(folder, items, numbers=None):
    results = {"model": "m", "suites": {}, "read": 0}
    measured = {"tofu": Measured(numbers or {}, items)}
    results["suites"] = {
        name: {"settings": {"seed": 0}, **one.as_json()} for name, one in measured.items()
    }
    _write(folder, results, measured)
    return str(folder)


def test_the_command_compares_folders_and_says_what_is_wrong(tmp_path):
    def folder(name, values):
        items = [item("forget", f"i{n}", score=v) for n, v in enumerate(values)]
        return written(tmp_path / name, items, {"forget": estimate(values, name="x")})

    a, b, c = folder("a", [1.0] * 8), folder("b", [0.0] * 7 + [1.0]), folder("c", [1.0] * 6)
    done = command("compare", a, b, a)
    assert done.returncode == 0, done.stderr
    assert "Of 1 number that can be judged, 1 differs" in done.stdout
    assert "Of 1 number that can be judged, none differs" in done.stdout  # control: itself
    done = command("compare", a, b, "--json")
    (found,) = json.loads(done.stdout)
    (row,) = found["differences"]
    assert row["difference"] == pytest.approx(-7 / 8)
    assert row["within_noise"] is False
    assert expunge.compare(a, b) == [found]
    done = command("compare", a, b, "--out", str(tmp_path / "page.txt"))
    assert (done.returncode, (tmp_path / "page.txt").exists()) == (2, False)
    assert "ends in .html" in done.stderr
    done = command("compare", a, c)
    assert (done.returncode, done.stdout) == (2, "")
    assert "2 only in" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def choices(name, hits):
    """40 questions of a large subject, 4 of a small one."""
    items = [item("large", f"l{n}", correct=hit) for n, hit in enumerate(hits[:40])]
    items += [item("small", f"s{n}", correct=hit) for n, hit in enumerate(hits[40:])]
    values = {"large": np.mean(hits[:40]), "small": np.mean(hits[40:])}
    numbers = {f"subject.{group}": Number(float(v), 1) for group, v in values.items()}
    numbers["accuracy"] = Number(float(np.mean(hits)), 44)
    numbers["macro"] = Number(float(np.mean(list(values.values()))), 44)
    behind = {f"subject.{group}": Behind("correct", (group,)) for group in values}
    behind |= {"accuracy": Behind("correct"), "macro": Behind("correct", how="means")}
    return Reading(name, {"s": SuiteReading(numbers, by_key(items, name), {}, behind=behind)})


def test_what_a_suite_says_stands_behind_a_number_is_paired():
    """Ten of forty questions are won, none lost: two shares by themselves may not tell."""
    a, b = [n % 2 == 0 for n in range(44)], [n % 2 == 0 or n < 20 for n in range(44)]
    found = {one.name: one for one in compare(choices("a", a), choices("b", b)).differences}
    assert list(found) == ["s.subject.large", "s.subject.small", "s.accuracy", "s.macro"]
    assert {one.how for one in found.values()} == {"paired"}
    assert found["s.accuracy"].difference == pytest.approx(10 / 44)
    assert found["s.macro"].difference == pytest.approx((10 / 40 + 0) / 2)
    assert found["s.accuracy"].within_noise is False
    assert found["s.macro"].low > 0


def test_items_that_do_not_make_up_a_number_are_not_behind_it():
    a, b = (choices(name, [n % 2 == 0 for n in range(44)]) for name in "ab")
    b.suites["s"].numbers["accuracy"] = Number(0.75, 44, 0.6, 0.9)
    found = {one.name: one for one in compare(a, b).differences}
    assert (found["s.accuracy"].how, found["s.macro"].how) == ("unpaired", "paired")


def test_a_number_is_paired_over_the_common_items_where_one_has_more():
    a, b = (choices(name, [n % 2 == 0 for n in range(44)]) for name in "ab")
    items = dict(list(b.suites["s"].items.items())[2:])
    hits = [row["correct"] for row in items.values()]
    b.suites["s"].items.clear()
    b.suites["s"].items.update(items)
    b.suites["s"].numbers["accuracy"] = Number(float(np.mean(hits)), len(hits))
    found = {one.name: one for one in compare(a, b, common=True).differences}
    assert (found["s.accuracy"].how, found["s.accuracy"].n) == ("paired", 42)
    assert found["s.accuracy"].difference == 0.0


def aucs(name, members):
    rows = [item("members", f"m{n}", nll=value) for n, value in enumerate(members)]
    rows += [item("nonmembers", f"n{n}", nll=2.0 + n / 100) for n in range(20)]
    value = auc([-v for v in members], [-(2.0 + n / 100) for n in range(20)])
    sides = [-v for v in members], [-(2.0 + n / 100) for n in range(20)]
    behind = {"mia.auc": Behind("nll", ("members", "nonmembers"), "auc")}
    behind["mia.two_sided"] = replace(behind["mia.auc"], how="two_sided")
    numbers = {"mia.auc": Number(value, len(rows), 0.0, 1.0)}
    numbers["mia.two_sided"] = Number(two_sided_auc(*sides), len(rows))
    return Reading(name, {"s": SuiteReading(numbers, by_key(rows, name), {}, behind=behind)})


def test_an_auc_is_compared_by_the_same_documents():
    a = aucs("a", [1.0 + n / 10 for n in range(20)])  # ten lie below every non-member
    row = compare(a, aucs("b", [1.4 + n / 10 for n in range(20)])).differences[0]
    assert (row.name, row.how, row.n) == ("s.mia.auc", "paired", 40)
    assert row.difference < 0 and row.within_noise is False
    row = compare(a, aucs("b", [2.1] * 20)).differences[1]
    assert (row.name, row.how, row.b) == ("s.mia.two_sided", "paired", 0.0)
    assert row.difference < 0 and row.within_noise is False
    same = compare(a, aucs("c", [1.0 + n / 10 for n in range(20)])).differences[0]
    assert (same.difference, same.within_noise) == (0.0, True)  # control


def test_a_task_aggregate_is_compared_by_its_items():
    """Harmonic mean of 1 - forget and retain: 1 - 0.5 and 1, then 1 - 0.25 and 1."""

    def of(name, forget):
        rows = [item("forget.T.sc", f"f{n}", score=v) for n, v in enumerate(forget)]
        rows += [item("retain.T.sc", f"r{n}", score=1.0) for n in range(8)]
        value = 2 / (1 / (1 - np.mean(forget)) + 1)
        behind = {"task_aggregate": Behind("score", ("forget.T.sc", "retain.T.sc"), "aggregate")}
        numbers = {"task_aggregate": Number(float(value), 16)}
        return Reading(name, {"s": SuiteReading(numbers, by_key(rows, name), {}, behind=behind)})

    row = compare(of("a", [0.5] * 8), of("b", [0.25] * 8)).differences[0]
    assert (row.how, row.difference) == ("paired", pytest.approx(6 / 7 - 2 / 3))
    assert row.low == row.high == pytest.approx(6 / 7 - 2 / 3)


def test_what_stands_behind_a_number_is_read_back(tmp_path):
    behind = {"accuracy": Behind("correct", ("g",), "means")}
    rows = [item("g", "i", correct=True)]
    measured = Measured({"accuracy": Number(1.0, 1)}, rows, {}, behind)
    results = {"suites": {"s": measured.as_json()}}
    _write(tmp_path, results, {"s": measured})
    (found,) = read_place(str(tmp_path))
    assert found.suites["s"].behind == behind


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ({"suites": []}, "suites '' has no numbers"),
        ({"suites": {"s": {"numbers": {}}}}, "suites 's' has no facts"),
        ({"models": {"a": {}}}, r"models 'a' has no semeval\.terms"),
        ({"suites": {"s": {"numbers": {"x": {"n": 1}}, "facts": {}}}}, "x is not a number"),
        ({"suites": {"s": {"numbers": {"x": {"value": "1", "n": 1}}, "facts": {}}}}, "x is not a"),
    ],
)
def test_results_that_are_not_what_is_written_are_one_line(tmp_path, content, fault):
    (tmp_path / "results.json").write_text(json.dumps(content))
    (tmp_path / "items.jsonl").write_text("")
    with pytest.raises(EvaluationError, match=fault):
        read_place(str(tmp_path))


def test_a_results_file_stands_for_its_folder(tmp_path):
    place = written(tmp_path / "a", [item("forget", "i", score=1.0)])
    (by_folder,), (by_file,) = read_place(place), read_place(f"{place}/results.json")
    assert by_file.suites == by_folder.suites != {}
    with pytest.raises(EvaluationError, match="there is no folder of results at"):
        read_place(f"{place}/items.jsonl")


def test_places_that_hold_no_results_are_one_line(tmp_path):
    with pytest.raises(EvaluationError, match="there is no folder of results at"):
        read_place(str(tmp_path / "none"))
    with pytest.raises(EvaluationError, match=r"holds no results\.json; expunge evaluate"):
        read_place(str(tmp_path))
    place = written(tmp_path / "a", [item("forget", "i", score=1.0)])
    with pytest.raises(EvaluationError, match="holds one model, so 'x' cannot be chosen"):
        read_place(f"{place}:x")
    with pytest.raises(EvaluationError, match=r"name one of its folders: a"):
        read_place(str(tmp_path))
    (tmp_path / "a" / "items.jsonl").write_text('{"id": 1}\n{"id"')
    with pytest.raises(RunError, match=r"items\.jsonl, line 2 is not valid JSON"):
        read_place(place)
    (tmp_path / "a" / "items.jsonl").write_text('{"id": 1}\n["id"]\n')
    with pytest.raises(EvaluationError, match=r"items\.jsonl, line 2 is no item"):
        read_place(place)
    (tmp_path / "a" / "results.json").write_text("{}")
    with pytest.raises(EvaluationError, match="holds neither suites nor the models of a run"):
        read_place(place)
    with pytest.raises(EvaluationError, match="holds the item '1' twice"):
        by_key([{"id": 1, "group": "g"}, {"id": "1", "group": "g"}], "x")


def run_folder(root):
    """The run of a recipe with two models, and a stage of older scores of one of them."""
    models = {}
    for name, value, key in (("target", 1.0, "aa"), ("weak", 0.0, "bb"), ("weak", 0.5, "cc")):
        terms = {"forget/Task1/sc": value, "retain/Task1/sc": None}
        scores = {
            "semeval": {
                "terms": terms,
                "counts": {"forget/Task1/sc": 7, "retain/Task1/sc": 0},
                "intervals": {"forget/Task1/sc": None, "retain/Task1/sc": None}
                | {"task_aggregate": None},
                "task_aggregate": None,
                "mia": None,
                "mmlu": None,
                "final": None,
            },
            "collapse": {"collapsed": False, "reasons": []},
            "nll": {"forget": value},
        }
        stage = root / "stages" / f"evaluate-{name}-{key}"
        stage.mkdir(parents=True)
        (stage / "scores.json").write_text(json.dumps(scores))
        where = {"half": "forget", "task": "Task1", "kind": "sc"}
        rows = [{"id": f"d{n}sc0", **where, "score": value} for n in range(7)]
        (stage / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        models.setdefault(name, scores)
    models["original"] = {"semeval": {"terms": {}}, "nll": {}}
    (root / "results.json").write_text(json.dumps({"format": 1, "models": models}))
    return root


def test_a_run_is_read_model_by_model_with_the_items_of_its_own_scores(tmp_path):
    run = run_folder(tmp_path)
    target, weak = read_place(str(run))
    assert [target.name, weak.name] == [f"{run}:target", f"{run}:weak"]
    row = compare(target, weak).differences[0]
    assert (row.name, row.how, row.difference) == ("semeval.forget.Task1.sc", "paired", -1.0)
    assert read_place(f"{run}:weak") == [weak]
    with pytest.raises(EvaluationError, match=r"no scored model 'waek'. Did you mean 'weak'\?"):
        read_place(f"{run}:waek")
    (run / "stages" / "evaluate-weak-bb" / "scores.json").unlink()
    (run / "stages" / "evaluate-weak-bb" / "items.jsonl").unlink()
    (run / "stages" / "evaluate-weak-bb").rmdir()
    with pytest.raises(EvaluationError, match=r"the items of weak in .* are not on disk any more"):
        read_place(str(run))


def test_documents_and_questions_of_a_run_are_compared_one_by_one(tmp_path):
    run, results = run_folder(tmp_path), json.loads((tmp_path / "results.json").read_text())
    for name, key, shift in (("target", "aa", 0.0), ("weak", "bb", 0.3)):
        sides = {"members": [1 + n / 10 + shift for n in range(20)], "nonmembers": [2.0] * 20}
        hits = {"law": [True] * 8, "art": [n < 6 - 20 * shift for n in range(8)]}
        rows = [item(s, f"{s}{n}", nll=v) for s, own in sides.items() for n, v in enumerate(own)]
        rows += [
            item(f"mmlu.{s}", f"{s}/{n}", correct=hit)
            for s, own in hits.items()
            for n, hit in enumerate(own)
        ]
        right = {s: {"n": 8, "correct": sum(own)} for s, own in hits.items()}
        total, mean = sum(map(sum, hits.values())), np.mean([sum(h) / 8 for h in hits.values()])
        auc = float(np.mean([(m < 2) + (m == 2) / 2 for m in sides["members"]]))
        scored = results["models"][name]["semeval"]
        scored["mmlu"] = {"accuracy": total / 16, "macro": mean, "n": 16, "per_subject": right}
        scored["mia"] = {"auc": auc, "n": 40, "low": 0.0, "high": 1.0}
        stage = run / "stages" / f"evaluate-{name}-{key}"
        (stage / "scores.json").write_text(json.dumps(results["models"][name]))
        (stage / "beside.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "results.json").write_text(json.dumps(results))
    found = {row.name: row for row in compare(*read_place(str(run))).differences}
    for name, n in (("mmlu", 16), ("mmlu.macro", 16), ("mia.auc", 40)):
        assert (found[f"semeval.{name}"].how, found[f"semeval.{name}"].n) == ("paired", n)
    assert found["semeval.mmlu"].difference == pytest.approx(-6 / 16)
    assert found["semeval.mia.auc"].within_noise is False
    assert "semeval.members.nll" in found  # and no row for each subject
    assert not [name for name in found if name.startswith("semeval.mmlu.") and "macro" not in name]
    (run / "stages" / "evaluate-weak-bb" / "beside.jsonl").unlink()
    with pytest.raises(EvaluationError, match="semeval was not asked the same items: 56 only in"):
        compare(*read_place(str(run)))
    found = compare(*read_place(str(run)), common=True).differences
    assert {row.how for row in found if "mmlu" in row.name} == {"unpaired"}


def test_numbers_are_whole_where_there_is_little_room():
    name = "mmlu.high_school_government_and_politics.correct"
    row = Difference(name, "paired", 0.1234, 0.2345, 0.1111, -0.2222, 0.3333, 684, True)
    out = Console(width=80, file=io.StringIO())
    print_comparison(Comparison("one", "two", [row]), out)
    told = out.file.getvalue()
    assert all(part in told for part in ("0.123", "+0.111", "-0.222 to +0.333", "684", "noise"))
    assert "…" not in told
