"""Without a retain set a recipe runs where nothing reads one, and what reads one is named."""

import json
from pathlib import Path

import pytest

import expunge
from expunge.errors import RecipeError
from expunge.plan.predict import plan
from expunge.recipe import Recipe, load_recipe
from expunge.unlearn.objectives import OBJECTIVES

ASCENT = {"half": "forget", "loss": "gradient_ascent"}
FORGOTTEN = {"retain_growth": None, "forget_nll": 20}
NAMES = {"ann": "Fog", "bob": "Rye", "cyd": "Ely"}


@pytest.fixture
def fields(tiny_folder, tmp_path) -> dict:
    """A recipe of three items to forget, with documents on both sides."""
    rows = {
        "forget": [
            {"id": n, "prompt": f"{n} was born in", "completion": t} for n, t in NAMES.items()
        ],
        "members": [{"id": n, "document": f"{n} was born in {t}"} for n, t in NAMES.items()],
        "nonmembers": [{"id": n, "document": f"{n} sails to {n}"} for n in ("dan", "eve")],
    }
    quick = {"lr": 1e-3, "compute": "float32"}
    branch = {"terms": [ASCENT], "lora": {"rank": 2}, "optimizer": quick}
    for name, given in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    watch = {"every": 1, "until": FORGOTTEN}
    return {
        "name": "alone",
        "model": {"path": str(tiny_folder), "max_length": 64, "separator": " "},
        "data": {name: {"path": str(tmp_path / f"{name}.jsonl")} for name in rows},
        "tune": {"epochs": 1, "batch": 2, "optimizer": quick},
        "branches": {
            "strong": {**branch, "schedule": {"epochs": 1, "micro_batch": 2}, "watch": watch},
            "weak": {
                **branch,
                "terms": [{"half": "forget", "loss": "npo"}],
                "schedule": {"kind": "sequential", "requests": 2, "epochs": 1},
            },
        },
        "merges": {"merged": {"method": "ties"}},
        "guards": {"filter": {"kind": "input_filter", "of": "merged"}},
        "evaluate": {"max_new_tokens": 4, "resamples": 20, "partial": True},
    }


def test_the_forget_set_alone_makes_every_model_and_claims_nothing_of_what_is_kept(
    fields, tmp_path
):
    out = tmp_path / "run"
    expunge.run(fields, out)
    for model in json.loads((out / "results.json").read_text())["models"].values():
        scores = model["semeval"]
        assert scores["terms"]["forget/items/sc"] is not None  # control: that half is measured
        assert not any(scores["given"].get(term) for term in scores["terms"] if "retain" in term)
        assert scores["task_aggregate"] is scores["intervals"]["task_aggregate"] is None
        assert model["nll"]["forget"] > 0
        assert model["nll"]["retain"] is None
    assert "partial" not in (out / "report.md").read_text()
    assert (expunge.analyse(out) / "trajectories-snapshots.csv").is_file()
    (watched,) = out.glob("stages/strong-*/evaluations.jsonl")
    assert [set(json.loads(line)["numbers"]) for line in watched.read_text().splitlines()] == 2 * [
        {"nll.forget"}
    ]


def test_a_plan_of_the_forget_set_alone_foretells_every_stage(fields):
    del fields["guards"]
    stages = {stage.stage for stage in plan(load_recipe(fields)).stages}
    assert {"target", "strong", "weak", "merged", "evaluate-merged"} <= stages


@pytest.mark.parametrize(
    ("changes", "reader"),
    [
        (
            {"terms": [ASCENT, {"half": "retain", "loss": "nll"}]},
            r"branches.strong.terms\[1\] \(nll on retain\)",
        ),
        ({"objective": "npo"}, r"branches.strong.terms\[1\] \(nll on retain\)"),
        (
            {"terms": [ASCENT, {"half": "mismatch", "loss": "nll"}]},
            "branches.strong.companions.mismatch.of",
        ),
        (
            {"training": "full", "mask": {"kind": "wagle", "ratio": 0.5}},
            r"branches.strong.mask \(wagle\)",
        ),
        ({"watch": {"every": 1, "until": {}}}, "branches.strong.watch.until.retain_growth"),
        (
            {"watch": {"every": 1, "metric": "nll.retain"}},
            r"branches.strong.watch.metric \(nll.retain\)",
        ),
    ],
)
def test_what_reads_retain_items_in_a_branch_is_named(fields, changes, reader):
    load_recipe(fields)  # control: the forget set suffices
    branch = {**fields["branches"]["strong"], "watch": None, **changes}
    if "objective" in changes:
        del branch["terms"]
    with pytest.raises(RecipeError, match=f"read by {reader}.*; give data.retain.*synthesize"):
        load_recipe({**fields, "branches": {"strong": branch}, "merges": {}, "guards": {}})


@pytest.mark.parametrize(
    ("section", "made", "reader"),
    [
        ("edits", {"method": "sage", "others": []}, r"edits.x \(sage\)"),
        ("guards", {"kind": "icul"}, "guards.x.correct"),
        (
            "guards",
            {"kind": "input_filter", "match": {"by": "both"}},
            r"guards.x.match.by \(both\)",
        ),
        ("calibrate", {}, r"calibrate 'x' \(floors.retain\)"),
    ],
)
def test_what_else_reads_retain_items_is_named(fields, section, made, reader):
    if section == "edits":
        made = {**made, "of": "weak"}
    with pytest.raises(RecipeError, match=f"read by {reader}; give data.retain"):
        load_recipe({**fields, section: {"x": made}})
    fields["data"]["retain"] = fields["data"]["forget"]
    load_recipe({**fields, section: {"x": made}})  # control


@pytest.mark.parametrize("name", [n for n, row in OBJECTIVES.items() if not row.needs])
def test_every_objective_that_needs_no_more_is_read_with_the_forget_set_alone(fields, name):
    recipe: Recipe = load_recipe(
        {**fields, "branches": {"x": {"objective": name}}, "merges": {}, "guards": {}}
    )
    assert recipe.data.retain is None


def test_methods_are_not_compared_without_a_retain_set(fields, tmp_path):
    from expunge.leaderboard.section import Board

    def board(fields: dict) -> Board:
        (tmp_path / "alone.yaml").write_text(json.dumps(fields))
        entry = {"branches": {"x": {"terms": [ASCENT]}}, "model": "x"}
        (tmp_path / "board.yaml").write_text(
            json.dumps({"board": "alone.yaml", "methods": {"ascent": entry}})
        )
        return Board(Path(tmp_path / "board.yaml"))

    with pytest.raises(RecipeError, match=r"alone\.yaml names no retain set"):
        board(fields)
    fields["data"]["retain"] = fields["data"]["forget"]
    board(fields)  # control
