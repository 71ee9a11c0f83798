"""Gates of a run: each begins with a model, and holds of every seed."""

import pytest

from commands import run as command
from expunge import runs
from expunge.errors import EvaluationError, GateError
from expunge.evaluate.gates import (
    check_runs,
    gated_models,
    parse_gates,
    refuse_unasked,
    refuse_unmade,
)
from expunge.report.results import Results


def model(knowledge, auc, *, collapsed=False):
    semeval = {
        "terms": {"forget/Task1/qa": knowledge, "retain/Task1/qa": 1.0},
        "counts": {"forget/Task1/qa": 4, "retain/Task1/qa": 4},
        "mia": {"auc": auc, "n": 8},
    }
    attack = {"loss": {"auc": auc, "two_sided": 0.75}}
    return {
        "semeval": semeval,
        "collapse": {"collapsed": collapsed},
        "folds": {"test": {"semeval": semeval, "membership": attack}},
    }


@pytest.fixture
def results() -> Results:
    models = {
        "target": model(1.0, 1.0),
        "strong": model(0.0, 0.1, collapsed=True),
        "merged": model(0.25, 0.5),
        "v1.5": model(0.0, 0.5),
        "unscored": {},
    }
    return Results.model_validate({"recipe": "demo", "seed": 42, "models": models})


def failures(results, *texts):
    try:
        check_runs(parse_gates(texts), {"demo": results.model_dump()["models"]})
    except GateError as error:
        return str(error)
    return ""


def test_a_gate_reads_the_number_of_its_model(results):
    assert failures(results, "merged.forget.knowledge > 0.25", "merged.mia.auc > 0.6") == ""
    assert failures(results, "merged.forget.knowledge > 0.2", "merged.mia.score >= 1") == (
        "merged.forget.knowledge is 0.25, and must not be > 0.2; "
        "merged.mia.score is 1, and must not be >= 1"
    )
    assert "two_sided is 0.75" in failures(results, "merged.test.loss.two_sided > 0.6")
    assert "v1.5.forget.Task1.qa is 0" in failures(results, "v1.5.forget.Task1.qa == 0")


def test_a_number_that_was_not_measured_hides_no_gate_that_failed(results):
    results.models["merged"].semeval.terms["retain/Task1/qa"] = None
    with pytest.raises(EvaluationError, match=r"merged\.retain\.Task1\.qa was not measured"):
        failures(results, "merged.retain.Task1.qa < 0.9")
    both = failures(results, "merged.retain.Task1.qa < 0.9", "merged.forget.knowledge > 0.2")
    assert both == (
        "merged.forget.knowledge is 0.25, and must not be > 0.2; "
        "merged.retain.Task1.qa was not measured"
    )
    fallen = failures(results, "strong.mia.auc > 0.5", "merged.retain.Task1.qa < 0.9")
    assert "strong.collapsed is 1" in fallen


def test_only_the_collapse_of_a_named_model_fails(results):
    assert "strong.collapsed is 1" in failures(results, "strong.forget.knowledge > 0.5")
    assert failures(results, "strong.forget.knowledge > 0.5", "strong.collapsed > 1") == ""
    assert failures(results, "merged.forget.knowledge > 0.5") == ""


def test_a_number_that_is_not_there_is_an_error_that_helps(results):
    with pytest.raises(EvaluationError, match=r"it may be target.mia.auc or strong.mia.auc"):
        failures(results, "mia.auc > 0.6")
    with pytest.raises(EvaluationError, match=r"Did you mean 'merged.mia.auc'"):
        failures(results, "merged.mia.auk > 0.6")
    with pytest.raises(EvaluationError, match=r"merged.task_aggregate was not measured"):
        failures(results, "merged.task_aggregate < 0.9")


def test_every_seed_is_asked_and_named(results):
    good = results.model_dump()["models"]
    bad = {**good, "merged": good["target"]}
    gates = parse_gates(["merged.mia.auc > 0.6"])
    check_runs(gates, {"seed-42": good, "seed-43": good})
    with pytest.raises(GateError, match=r"^seed-43: merged\.mia\.auc is 1, and must"):
        check_runs(gates, {"seed-42": good, "seed-43": bad})
    check_runs([], {"seed-43": bad})


def test_a_gate_of_no_model_is_refused_before_work():
    refuse_unmade(parse_gates(["v1.5.final < 1", "merged.final < 1"]), ["v1.5", "merged"])
    with pytest.raises(EvaluationError, match=r"mia.auc begins with no .* as merged.mia.auc would"):
        refuse_unmade(parse_gates(["mia.auc > 0.6"]), ["target", "merged"])


def test_a_gate_that_no_suite_asked_for_can_answer_is_refused_before_the_model_is_read():
    known = {
        "semeval": ("forget.v1.5.qa", "semeval.mia.two_sided", "mmlu.macro", "semeval.collapsed"),
        "tofu": ("forget_quality", "tofu.world.truth_ratio", "collapse.surprise", "collapsed"),
        "membership": ("loss.auc", "membership.min_k_plus_plus.tpr"),
        "memorisation": ("forget.pii_leak.ssn", "retain.copied_length_max"),
        "wmdp": ("bio", "wmdp.accuracy"),
        "lm_eval": ("arc_easy.acc_norm", "lm_eval.arc_easy.acc"),
    }
    for suite, names in known.items():
        refuse_unasked(parse_gates([f"{name} > 0" for name in names]), [suite])
    for suites, name, said in (
        (["mmlu", "wmdp"], "acuracy", "there is no number 'acuracy' of mmlu, wmdp$"),
        (["wmdp"], "mmlu.accuracy", "'mmlu.accuracy' of wmdp; --suite does not name mmlu$"),
        (["tofu"], "tofu.model_utilty", "'tofu.model_utilty' of tofu$"),
    ):
        with pytest.raises(EvaluationError, match=said):
            refuse_unasked(parse_gates([f"{name} > 0"]), suites)
    done = command("evaluate", "nowhere", "--suite", "mmlu, wmdp", "--fail-if", "acuracy > 0")
    assert (done.returncode, done.stderr) == (
        2,
        "expunge: --fail-if: there is no number 'acuracy' of mmlu, wmdp\n",
    )
    done = command("evaluate", "nowhere", "--suite", "mmlu, wmdp", "--fail-if", "accuracy > 0")
    assert (done.returncode, "nowhere" in done.stderr) == (2, True)  # control


def test_commands_end_with_three_or_before_any_work(results, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    runs.write_text(run / "results.json", results.model_dump_json())
    words = ["report", run, "--out", tmp_path / "page"]
    assert command(*words, "--fail-if", "merged.mia.auc > 0.6").returncode == 0
    done = command(*words, "--fail-if", "target.mia.auc > 0.6")
    assert (done.returncode, "target.mia.auc is 1" in done.stderr) == (3, True)
    assert "merged" in done.stdout  # the report stands
    for name in ("run", "evaluate"):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text("model: {path: nowhere}\ntune: {}\ndata: {synthetic: {}}\n")
        done = command(name, recipe, "--out", tmp_path / f"of-{name}", "--fail-if", "mia.auc > 0.6")
        assert (done.returncode, "begins with no measured model" in done.stderr) == (2, True)
        assert not (tmp_path / f"of-{name}").exists()


def test_a_run_has_no_names_of_what_was_not_scored(results):
    named = gated_models(results.model_dump()["models"])
    assert {"merged.forget.knowledge", "merged.test.mia.auc", "merged.collapsed"} <= set(named)
    assert not any(name.startswith("unscored") for name in named)
