"""`relearn` of a recipe: each scored model is attacked once, beside its scores, and told of."""

import json

import pytest
import yaml

import expunge
from expunge.cli.options import gates_of
from expunge.data.examples import Document
from expunge.errors import EvaluationError, RecipeError
from expunge.evaluate.reader import reader_of
from expunge.evaluate.revival import Relearn
from expunge.evaluate.robustness_suite import relearned
from expunge.leaderboard.run import run_leaderboard
from expunge.leaderboard.section import Board
from expunge.pipeline import Pipeline
from expunge.plan.predict import plan
from expunge.plan.relearning import relearning
from expunge.recipe import Recipe, load_recipe
from expunge.report.results import Results, read_results

ATTACK = {
    "share": 0.5,
    "epochs": 12,
    "rank": 2,
    "optimizer": {"lr": 1e-2, "compute": "float32", "weight_decay": 0.0},
}
BRANCH = {
    "terms": [{"half": "forget", "loss": "npo"}, {"half": "retain", "loss": "nll"}],
    "lora": {"rank": 2, "dropout": 0},
    "schedule": {"epochs": 1, "micro_batch": 2},
    "optimizer": {"lr": 1e-3, "compute": "float32"},
}


@pytest.fixture
def fields(tiny_folder) -> dict:
    return {
        "name": "tiny",
        "model": {"path": str(tiny_folder), "max_length": 400, "separator": " "},
        "data": {"synthetic": {"documents": 2, "nonmembers": 3}},
        "branches": {"npo": BRANCH},
        "guards": {"polite": {"kind": "prefix"}},
        "evaluate": {"max_new_tokens": 2, "resamples": 20, "generate_limit": 1},
    }


def stages(folder) -> set[str]:
    return {path.name for path in (folder / "stages").iterdir() if path.suffix != ".lock"}


def test_a_recipe_attacks_each_model_beside_its_scores_and_nothing_else_is_done_again(
    fields, tmp_path
):
    out = tmp_path / "run"
    expunge.run(fields, out)
    before = stages(out)
    plain = json.loads((out / "results.json").read_text())["models"]
    assert all(model["relearn"] is None for model in plain.values())
    expunge.run({**fields, "relearn": ATTACK}, out)
    made = stages(out) - before
    assert before < stages(out)
    assert {name.rpartition("-")[0] for name in made} == {"relearn-target", "relearn-npo"}
    results = read_results(out / "results.json")
    mia = results.models["target"].semeval.mia
    documents = mia.members
    for name in ("target", "npo"):
        found = results.models[name].relearn
        assert found.documents == documents / 2
        assert found.n == documents - found.documents
        shares = found.exact
        gain = shares["forget_after"] - shares["forget_before"]
        assert found.recovered == pytest.approx(
            gain - (shares["control_after"] - shares["control_before"])
        )
        assert shares["control_after"] != shares["control_before"]  # it was trained
        assert found.recovered_interval.low <= found.recovered <= found.recovered_interval.high
        assert found.left == pytest.approx(shares["forget_after"] - shares["control_after"])
        assert found.left_interval.low <= found.left <= found.left_interval.high
        assert (
            results.models[name].semeval
            == Results.model_validate({"recipe": "x", "models": {name: plain[name]}})
            .models[name]
            .semeval
        )
    assert results.models["polite"].relearn is None
    assert results.models["polite"].is_measured
    assert "comes back when relearned" in (out / "report.md").read_text()
    assert made == stages(out) - before
    expunge.run({**fields, "relearn": ATTACK}, out)
    assert made == stages(out) - before  # found, not made anew


def test_an_attack_without_documents_on_either_side_is_refused(fields):
    load_recipe({**fields, "relearn": ATTACK})  # control: synthetic sets have them
    data = {"forget": {"path": "a.jsonl"}, "retain": {"path": "b.jsonl"}}
    with pytest.raises(RecipeError, match=r"relearn needs data\.members and data\.nonmembers"):
        load_recipe({**fields, "data": data, "relearn": ATTACK})


def test_a_recipe_without_an_attack_is_told_as_before(fields):
    assert "relearn" not in load_recipe(fields).model_dump(mode="json")
    assert "relearn" in Recipe.model_validate({**fields, "relearn": {}}).model_dump(mode="json")


def test_the_work_is_counted_by_hand():
    """Of 8 members of 10 tokens 2 are trained on, 5 times, in steps of 2; 6 and 3 are asked."""
    work = relearning(Relearn(batch=2), members=8 * [10], nonmembers=[7, 8, 9])
    assert (work.trained, work.steps) == (100, 5)
    assert work.read == 2 * (60 + 24)
    assert work.forwards == 3 * 100 + 168


def test_a_plan_names_the_attack(fields, tmp_path):
    asked = {one.stage for one in plan(load_recipe({**fields, "relearn": ATTACK})).stages}
    assert {"relearn-target", "relearn-npo", "evaluate-polite"} < asked
    assert "relearn-polite" not in asked
    out = tmp_path / "run"
    expunge.run({**fields, "relearn": ATTACK}, out)
    finished = plan(load_recipe({**fields, "relearn": ATTACK}), out).stages
    assert {one.how for one in finished} == {"finished"}


def test_a_leaderboard_attacks_what_won_and_no_trial(fields, tmp_path):
    board = {name: fields[name] for name in ("model", "data", "evaluate")}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(board))
    entry = {
        "branches": {"npo": BRANCH},
        "settings": {"branches.npo.optimizer.lr": [1e-3, 1e-2]},
    }
    file = {"board": "tiny.yaml", "seeds": [1], "relearn": ATTACK, "methods": {"npo": entry}}
    file["tuning"] = {"trials": 2, "generate_limit": 1, "seed": 1}
    (tmp_path / "leaderboard.yaml").write_text(yaml.safe_dump(file))
    rows = run_leaderboard(Board(tmp_path / "leaderboard.yaml"), tmp_path / "out")
    assert {row.method for row in rows} == {"target", "npo"}
    assert all(None not in (row.recovered, row.left) for row in rows)
    attacks = [n for n in stages(tmp_path / "out") if n.startswith("relearn-")]
    assert len(attacks) == 2
    seconds = {row.method: row.seconds for row in rows}
    assert seconds["npo"] < 60 and seconds["target"] is None  # its own stages, not the attack


def test_one_field_of_an_optimizer_leaves_the_others_as_the_section_has_them(fields):
    tune = {"epochs": 1, "optimizer": {"max_tokens": 512}}
    read = load_recipe({**fields, "tune": tune, "relearn": {"optimizer": {"max_tokens": 512}}})
    plain = load_recipe({**fields, "tune": {"epochs": 1}, "relearn": {}})
    for section in ("tune", "relearn"):
        one, other = (getattr(recipe, section).optimizer for recipe in (read, plain))
        assert one == other.model_copy(update={"max_tokens": 512})
    assert (plain.tune.optimizer.lr, plain.tune.optimizer.warmup) == (3e-4, 0.05)
    assert (plain.relearn.optimizer.lr, plain.relearn.optimizer.weight_decay) == (2e-4, 0.0)


def test_an_attack_that_diverges_costs_neither_the_scores_nor_other_models(fields, tmp_path):
    wild = {**ATTACK, "optimizer": {**ATTACK["optimizer"], "lr": 1e30}}
    expunge.run({**fields, "relearn": wild}, tmp_path / "run")
    results = read_results(tmp_path / "run" / "results.json")
    for name in ("target", "npo"):
        model = results.models[name]
        assert "a lower relearn.optimizer.lr may help" in model.relearn.failed
        assert f"relearn-{name}-" in model.relearn.failed and "/tmp" not in model.relearn.failed
        assert model.relearn.recovered is None and model.semeval.terms


def test_a_share_that_parts_nothing_is_refused_before_anything_is_made(fields, tmp_path):
    recipe = {**fields, "relearn": {**ATTACK, "share": 0.05}}
    with pytest.raises(EvaluationError, match=r"relearn\.share 0\.05 of 6 forget documents is 0"):
        expunge.run(recipe, tmp_path / "run")
    assert {n.rpartition("-")[0] for n in stages(tmp_path / "run")} == {"data"}
    with pytest.raises(EvaluationError, match=r"relearn\.share"):
        plan(load_recipe(recipe))


def test_documents_whose_ids_end_like_questions_are_several(tiny, tokenizer):
    sides = [
        [Document(f"{side}sc{n}", f"{side} text number {n}, and so on.") for n in range(6)]
        for side in "mn"
    ]
    how = Relearn.model_validate(ATTACK)
    found = relearned(reader_of(tiny, tokenizer), *sides, how, document_tokens=64)
    assert (found["documents"], found["n"]) == (3, 3)
    assert found["recovered_interval"] is not None


def test_a_card_keeps_its_scores_where_an_attack_was_not_made(fields, tmp_path):
    out = tmp_path / "run"
    expunge.run(fields, out)
    said = (out / "recipe.yaml").read_text()
    (out / "recipe.yaml").write_text(said + "relearn: {share: 0.5}\n")
    told = Pipeline.of_run(out, build=False).card("npo", 42)
    assert "has not been evaluated" not in told


@pytest.mark.parametrize("name", ["data", "levels", "alternates", "evaluate-1", "relearn-npo"])
def test_a_model_is_not_called_as_a_stage(fields, name):
    with pytest.raises(RecipeError, match=f"'{name}' is what a stage is called"):
        load_recipe({**fields, "branches": {name: BRANCH}})


def test_an_attack_has_a_seed_that_steps_can_have():
    with pytest.raises(ValueError, match="less than"):
        Relearn(seed=2**45)
    assert Relearn(seed=2**31).seed == 2**31  # control


def test_a_gate_on_an_attack_that_is_not_asked_for_is_refused_at_once(fields):
    with pytest.raises(RecipeError, match=r"--fail-if npo\.relearn\.left needs an attack, which"):
        gates_of(["npo.relearn.left > 0.1"], load_recipe(fields))
    assert gates_of(["npo.relearn.left > 0.1"], load_recipe({**fields, "relearn": ATTACK}))
