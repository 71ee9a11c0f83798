"""`expunge evaluate MODEL`: suites by name, results on disk, gates with exit code 3."""

import json
import re
import shutil

import pytest

from commands import run as command
from expunge.config import Section
from expunge.errors import EvaluationError, GateError, ModelError, RecipeError, RunError
from expunge.evaluate import suites
from expunge.evaluate.gates import check_gates, gated, parse_gates
from expunge.evaluate.numbers import (
    Measured,
    Number,
    bootstrap,
    estimate,
    harmonic_mean,
    mean_of,
    resampled,
    wilson,
)
from expunge.evaluate.run import evaluate_model, numbers_of, read_run
from expunge.evaluate.suites import SUITES, Suite, measure, parse_suites


@pytest.fixture
def halves(tmp_path):
    for half in ("forget", "retain"):
        rows = [
            {"id": f"{half}{n}{kind}0", "input": f"{half} {n}?", "output": f"a{n}", "task": "Task1"}
            for n in range(3)
            for kind in ("sc", "qa")
        ]
        (tmp_path / f"{half}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"semeval.{half}={tmp_path / half}.jsonl" for half in ("forget", "retain")]


SHORT = ["semeval.evaluate.max_new_tokens=4", "semeval.evaluate.resamples=20"]


def test_a_model_is_measured_written_and_measured_again_from_what_it_said(
    tiny_folder, tmp_path, halves
):
    sections = parse_suites(["semeval"], [*halves, *SHORT])
    how = {"cache": tmp_path / "cache", "out": tmp_path / "out"}
    first = evaluate_model(str(tiny_folder), sections, **how)
    again = evaluate_model(str(tiny_folder), sections, **how)
    assert first["read"] > 0
    assert again["read"] == 0
    assert again["suites"] == first["suites"]
    results, items = read_run(tmp_path / "out")
    assert numbers_of(results) == numbers_of(first)
    assert len(items) == 12
    assert {item["group"] for item in items} == {
        f"{half}.Task1.{kind}" for half in ("forget", "retain") for kind in ("sc", "qa")
    }
    number = results["suites"]["semeval"]["numbers"]["forget.Task1.sc"]
    assert number["n"] == 3
    assert number["low"] <= number["value"] <= number["high"]


def test_the_command_prints_and_fails_by_gate(tiny_folder, tmp_path, halves):
    words = ["evaluate", tiny_folder, "--suite", "semeval", "--cache", tmp_path / "cache"]
    for option in [*halves, *SHORT]:
        words += ["-o", option]
    sound = ["--fail-if", "semeval.collapsed > 1"]  # an untrained model fails every gate otherwise
    done = command(*words, *sound, "--fail-if", "forget.Task1.qa > 0.5")
    assert done.returncode == 0, done.stderr
    assert "semeval.forget.Task1.qa" in done.stdout
    assert "collapsed" in done.stdout  # an untrained model has no aggregate
    done = command(*words, *sound, "--fail-if", "forget.knowledge > 0.05")
    assert done.returncode == 0, done.stderr
    done = command(*words, *sound, "--fail-if", "retain.knowledge <= 0")
    assert (done.returncode, "semeval.retain.knowledge is 0" in done.stderr) == (3, True)
    done = command(*words, "--fail-if", "forget.Task1.qa > 0.5")
    assert done.returncode == 3
    assert done.stderr == "expunge: semeval.collapsed is 1: the model no longer writes language\n"
    done = command(*words, *sound, "--fail-if", "forget.Task1.qa < 0.5")
    assert done.returncode == 3
    assert done.stderr.startswith("expunge: semeval.forget.Task1.qa is 0, and must not")
    done = command(*words, "--fail-if", "forget.Task9.qa < 0.5")
    assert done.returncode == 2
    assert "Did you mean" in done.stderr


def test_every_run_asks_whether_the_model_still_writes(tiny_folder, tmp_path, halves):
    own = ["memorisation." + halves[0].partition(".")[2], "memorisation.max_new_tokens=8"]
    words = ["evaluate", tiny_folder, "--cache", tmp_path / "cache"]
    words += [word for option in own for word in ("-o", option)]
    both = [*words, "--suite", "memorisation,knowledge", "-o", "knowledge.limit=2"]
    done = command(*both)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("The model has collapsed: neutral: ") == 1
    assert re.search(r"memorisation\.forget\.exact_memorisation +collapsed", done.stdout)
    assert re.search(r"knowledge\.generated +0 ", done.stdout)  # control: none that it wins
    done = command(*both, "--fail-if", "forget.exact_memorisation > 0.9")
    assert (done.returncode, done.stderr.count("collapsed is 1")) == (3, 1)
    sound = ["--fail-if", "collapsed > 1"]
    assert command(*both, *sound, "--fail-if", "generated > 0.9").returncode == 0
    results = json.loads(command(*both, "--json").stdout)
    assert results["read"] == 0  # the openings are kept, too
    facts = [results["suites"][suite]["facts"] for suite in ("memorisation", "knowledge")]
    assert [one["collapsed"] for one in facts] == [True, True]
    assert facts[0]["reasons"] == facts[1]["reasons"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["m", "--suite", "collapse", "--seed", "3"], "--model and --seed belong to a recipe"),
        (["r.yaml", "--out", "o", "--dtype", "float32"], "--max-batch belong to a model"),
        (["r.yaml", "--out", "o", "--max-batch", "3"], "--max-batch belong to a model"),
    ],
)
def test_options_of_the_other_kind_are_refused(words, said):
    done = command("evaluate", *words)
    assert (done.returncode, said in done.stderr) == (2, True)


def test_one_suite_that_hears_a_collapse_speaks_for_all(monkeypatch):
    def suite(*aggregates, **facts):
        numbers = {"final": Number(1.0, 3), "forget.a": Number(0.0, 3), "kept": Number(0.0, 3)}

        def said(*_):
            return Measured(dict(numbers), [], dict(facts))

        return Suite(Section, said, "", "", aggregates)

    def asked(*names):
        found = measure(None, dict.fromkeys(names, Section()))  # pyright: ignore
        return {name: (m.facts["collapsed"], m.facts["aggregates"]) for name, m in found.items()}

    table = {
        "sound": suite("final", collapsed=False, reasons=[]),
        "fell": suite(collapsed=True, reasons=["retain: looping"]),
        "silent": suite("forget.*"),
    }
    monkeypatch.setattr(suites, "SUITES", table)
    monkeypatch.setattr(suites, "NUMBERS", dict.fromkeys(table, ("final", "forget.a", "kept")))
    openings = {"collapsed": True, "reasons": ["neutral: surprise"]}
    monkeypatch.setattr(suites, "collapse_facts", lambda *_, **__: openings)
    assert asked("silent", "sound") == {
        "silent": (False, ["forget.a"]),
        "sound": (False, ["final"]),
    }
    assert asked("silent", "sound", "fell")["sound"] == (True, ["final"])
    assert asked("silent") == {"silent": (True, ["forget.a"])}  # no suite judges: the openings do


@pytest.mark.parametrize("name", SUITES)
def test_what_a_destroyed_model_would_win_is_named(name):
    harmless = {"knowledge", "collapse", "lm_eval"}  # there it scores as badly as it is
    assert bool(SUITES[name].aggregates) != (name in harmless)


@pytest.mark.parametrize(
    "text", ["", "a", "a >", "a > b", "a ~ 1", "> 1", "a > 1 2", "a > nan", "a < inf"]
)
def test_conditions_that_are_none_are_refused(text):
    with pytest.raises(EvaluationError, match="is not of the form"):
        parse_gates([text])


def test_gates_compare_as_they_say():
    numbers = {"s.a": {"value": 0.5}, "t.a": {"value": 1.0}, "s.b": {"value": None}}
    for sign, fails in ((">", False), (">=", True), ("<=", True), ("==", True), ("!=", False)):
        gates = parse_gates([f"s.a {sign} 0.5"])
        if fails:
            with pytest.raises(GateError, match=r"s\.a is 0\.5"):
                check_gates(gates, numbers)
        else:
            check_gates(gates, numbers)
    with pytest.raises(EvaluationError, match=r"it may be s\.a or t\.a"):
        check_gates(parse_gates(["a > 0"]), numbers)
    with pytest.raises(EvaluationError, match="was not measured"):
        check_gates(parse_gates(["b > 0"]), numbers)
    with pytest.raises(EvaluationError, match=r"there is no number 'zzz'\.$"):
        check_gates(parse_gates(["zzz > 0"]), numbers)


def test_a_collapsed_model_passes_no_gate_that_does_not_say_so():
    def suite(collapsed):
        numbers = {"x": {"value": 0.0}}
        return {"suites": {"s": {"numbers": numbers, "facts": {"collapsed": collapsed}}}}

    check_gates(parse_gates(["x > 0.5"]), gated(suite(False)))  # control
    check_gates([], gated(suite(True)))
    check_gates(parse_gates(["x > 0.5", "s.collapsed > 1"]), gated(suite(True)))
    with pytest.raises(GateError, match=r"^s\.collapsed is 1"):
        check_gates(parse_gates(["x > 0.5"]), gated(suite(True)))
    with pytest.raises(GateError, match=r"^s\.collapsed is 1, and must not be =="):
        check_gates(parse_gates(["collapsed == 1"]), gated(suite(True)))


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["nope"], [], "no suite is called 'nope'"),
        (["semeval"], ["semeval"], "takes name=value; 'semeval' is not that"),
        (["semeval"], ["other.x=1"], "--option other: no suite of that name is asked for"),
        (["semeval"], ["semeval.x={"], "the value is not valid YAML"),
        (["semeval"], ["semeval.nope=1"], "nope"),
        (["semeval"], ["semeval=1"], "--option semeval takes semeval.field=value"),
        (["semeval"], ["semeval.mmlu=1", "semeval.mmlu.x=1"], "there is no 'x' there"),
    ],
)
def test_wrong_options_are_one_line(names, options, message):
    with pytest.raises((EvaluationError, RecipeError), match=message):
        parse_suites(names, options)


def test_intervals_hold_the_mean_and_narrow_with_n():
    few = estimate([0.0, 1.0] * 5, name="a")
    many = estimate([0.0, 1.0] * 500, name="a")
    assert few.value == many.value == 0.5
    assert few.high - few.low > 5 * (many.high - many.low)
    assert 0.1 < few.low < 0.5 < few.high < 0.9
    assert estimate([], name="a") == Number(None, 0)
    assert resampled([0.3] * 4, name="a") == Number(
        pytest.approx(0.3), 4, *[pytest.approx(0.3)] * 2
    )
    assert estimate([0.3], name="a") == Number(0.3, 1)  # one item tells no spread
    with pytest.raises(EvaluationError, match="a: item 1 is NaN"):
        estimate([0.0, float("nan")], name="a")


def test_hits_and_misses_have_wilsons_interval():
    # By hand, z² = 3.8415: 0 of 2 gives z²/2n ± z²/2n over 1 + z²/n, so 0 to 3.8415 / 5.8415.
    none = estimate([0.0, 0.0], name="a")
    assert (none.value, none.n, none.low) == (0.0, 2, 0.0)
    assert none.high == pytest.approx(0.6576, abs=1e-4)
    every = estimate([1.0] * 4, name="a")
    assert (every.low, every.high) == (pytest.approx(4 / 7.8415, abs=1e-4), 1.0)
    # Brown, Cai and DasGupta's form, p ± with shrinkage: 3 of 10.
    assert wilson(3, 10) == (pytest.approx(0.1078, abs=1e-4), pytest.approx(0.6032, abs=1e-4))
    # control: what is no share has the bootstrap's, which is 0 wide where all are alike
    assert resampled([0.0, 0.0], name="a") == Number(0.0, 2, 0.0, 0.0)


def test_a_mean_of_numbers_has_the_interval_of_their_independent_spreads():
    one, two = Number(0.2, 5, 0.1, 0.5), Number(0.6, 7, 0.2, 0.7)
    found = mean_of([one, two, Number(None, 0)])
    assert (found.value, found.n) == (pytest.approx(0.4), 12)
    assert found.low == pytest.approx(0.4 - (0.1**2 + 0.4**2) ** 0.5 / 2)
    assert found.high == pytest.approx(0.4 + (0.3**2 + 0.1**2) ** 0.5 / 2)
    assert mean_of([one, Number(0.4, 1)]) == Number(pytest.approx(0.3), 6)
    assert mean_of([]) == Number(None, 0)


def test_a_function_of_means_is_resampled_group_by_group():
    groups = {"one": [0.2, 0.4], "two": [1.0, 1.0], "none": []}
    found = bootstrap(groups, lambda means: harmonic_mean(list(means.values())), name="h")
    assert found.value == pytest.approx(2 / (1 / 0.3 + 1 / 1.0))
    assert found.n == 4
    assert found.low == pytest.approx(2 / (1 / 0.2 + 1))
    assert harmonic_mean([0.0, 1.0]) == 0.0
    assert harmonic_mean([]) is None


@pytest.mark.parametrize("config", ["[]", "{}", '{"text_config": 3}', '{"vocab_size": "many"}'])
def test_a_config_that_is_no_language_models_is_refused(tiny_folder, tmp_path, halves, config):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / "config.json").write_text(config)
    with pytest.raises(ModelError, match="names no vocab_size"):
        evaluate_model(str(folder), parse_suites(["semeval"], [*halves, *SHORT]))


def test_a_file_in_the_place_of_the_results_is_one_line(tiny_folder, tmp_path, halves):
    (tmp_path / "out").write_text("")
    sections = parse_suites(["semeval"], [*halves, *SHORT])
    with pytest.raises(RunError, match="a file of that name is in the way"):
        how = {"cache": tmp_path / "cache", "out": tmp_path / "out"}
        evaluate_model(str(tiny_folder), sections, **how)
