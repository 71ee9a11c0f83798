"""`relearn` of a recipe: each scored model is attacked once, beside its scores, and told of."""

import json

import pytest
import yaml

import expunge
from expunge.errors import RecipeError
from expunge.evaluate.revival import Relearn
from expunge.leaderboard.run import run_leaderboard
from expunge.leaderboard.section import Board
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
    assert (work.trained, work.steps, work.longest, work.batch) == (100, 5, 10, 2)
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
