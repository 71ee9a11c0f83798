"""Leaderboards: equal budgets, the front worked by hand, a tiny one run twice."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from expunge.errors import ExpungeError, RecipeError
from expunge.leaderboard.run import merit, run_leaderboard
from expunge.leaderboard.section import Board
from expunge.report.leaderboard import leaderboard_page, leaderboard_table, pareto_front
from expunge.report.standings import Standing, add_standings, read_standings

NPO = {
    "terms": [{"half": "forget", "loss": "npo"}, {"half": "retain", "loss": "nll"}],
    "lora": {"rank": 2, "dropout": 0},
    "schedule": {"epochs": 1, "micro_batch": 2},
    "optimizer": {"lr": 1e-3, "compute": "float32"},
}


@pytest.fixture
def fields(tiny_folder, tmp_path) -> dict:
    """A leaderboard small enough to run in seconds, beside its board."""
    board = {
        "model": {"path": str(tiny_folder), "max_length": 400, "separator": " "},
        "data": {"synthetic": {"documents": 1, "nonmembers": 2}},
        "branches": {"of_the_board": NPO},
        "evaluate": {"max_new_tokens": 2, "resamples": 20, "generate_limit": 1},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(board))
    return {
        "board": "tiny.yaml",
        "seeds": [1, 2],
        "tuning": {"trials": 2, "generate_limit": 1, "seed": 1},
        "methods": {
            "npo": {
                "branches": {"npo": NPO},
                "settings": {"branches.npo.optimizer.lr": [1e-3, 1e-2]},
            },
            "merge": {
                "model": "both",
                "branches": {"npo": NPO, "weak": NPO},
                "merges": {"both": {"method": "ties"}},
                "note": "as the paper",
            },
        },
    }


def written(fields: dict, folder: Path) -> Path:
    path = folder / "leaderboard.yaml"
    path.write_text(yaml.safe_dump(fields, sort_keys=False))
    return path


def standing(method: str, seed: int = 1, **numbers) -> Standing:
    return Standing(method=method, board="tiny", seed=seed, **numbers)


def test_the_pareto_front_worked_by_hand():
    goals = {
        "best at one": (1.0, 0.0),
        "between": (0.5, 0.5),
        "beaten by between": (0.5, 0.4),
        "best at the other": (0.0, 1.0),
        "not known": None,
    }
    assert pareto_front(goals) == {"best at one", "between", "best at the other"}
    assert pareto_front({"a": (1.0, 1.0), "its equal": (1.0, 1.0)}) == {"a", "its equal"}


def test_the_table_ranks_by_final_score_and_a_destroyed_model_comes_last():
    parts = {"forget_sc": 0.2, "forget_qa": 0.0, "retain_sc": 0.9, "retain_qa": 0.7}
    rows = [
        standing("target", final=0.9, collapsed=False),
        standing("destroyed", final=0.8, collapsed=True, **parts, mia_score=1.0),
        standing("good", 1, final=0.6, collapsed=False, **parts, mia_score=0.5, seconds=120),
        standing("good", 2, final=0.8, collapsed=False, **parts, mia_score=0.5, seconds=240),
        standing("worse", final=0.3, collapsed=False, **parts, mia_score=0.4),
    ]
    header, body = leaderboard_table(rows)
    shown = [dict(zip(header, cells, strict=True)) for cells in body]
    assert [cells["method"] for cells in shown] == ["good", "worse", "destroyed", "target"]
    assert shown[0]["final ↑"] == "0.700 ± 0.141"
    assert shown[0]["minutes"] == "3.0"
    assert [cells["Pareto"] for cells in shown] == ["★", "", "", ""]
    assert shown[2]["final ↑"] == "**COLLAPSED**"
    assert shown[1]["MIA AUC → 0.5"] == "–"  # not measured is not 0
    assert "| good " in leaderboard_page(rows)


def test_a_seed_that_collapses_is_in_no_mean_and_counts_as_0_in_the_order():
    rows = [
        standing("risky", 1, final=0.8, task_aggregate=0.9, collapsed=False),
        standing("risky", 2, final=0.9, task_aggregate=1.0, collapsed=True),
        standing("sound", 1, final=0.5, collapsed=False),
    ]
    header, body = leaderboard_table(rows)
    shown = [dict(zip(header, cells, strict=True)) for cells in body]
    assert [cells["method"] for cells in shown] == ["sound", "risky"]
    assert shown[1]["final ↑"] == "0.800 (**COLLAPSED** in 1 of 2 seeds)"
    assert shown[1]["task aggregate ↑"] == "0.900"


def test_settings_whose_aggregates_are_0_are_told_apart_by_their_terms():
    def model(terms, score, mmlu, collapsed=False):
        return SimpleNamespace(
            semeval=SimpleNamespace(
                terms=terms, task_aggregate=0.0, mia=SimpleNamespace(score=score), final=mmlu / 3
            ),
            collapse=SimpleNamespace(collapsed=collapsed),
        )

    kept = model({"forget-sc": 0.5, "retain-sc": 0.7, "retain-qa": 0.0}, 0.0, mmlu=0.21)
    lost = model({"forget-sc": 0.5, "retain-sc": 0.1, "retain-qa": 0.0}, 0.0, mmlu=0.27)
    destroyed = model({"forget-sc": 0.0, "retain-sc": 0.0, "retain-qa": None}, 0.9, 0.3, True)
    assert merit(kept) == (True, pytest.approx((0 + 0 + 1.2 / 3) / 3))
    assert merit(destroyed) == (False, pytest.approx((0 + 0.9 + 0.5) / 3))
    assert merit(kept) > merit(lost) > merit(destroyed)


def test_rows_are_replaced_by_method_and_seed(tmp_path):
    path = tmp_path / "leaderboard.json"
    add_standings(path, [standing("npo", 1, final=0.1), standing("npo", 2, final=0.2)])
    add_standings(path, [standing("npo", 1, final=0.5)])
    assert {row.seed: row.final for row in read_standings(path)} == {1: 0.5, 2: 0.2}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"tuning": {"trials": 1}},
            "npo tries 2 settings; the budget is tuning.trials: 1",
        ),
        (
            {"methods": {"npo": {"branches": {"other": NPO}}}},
            "npo: no section makes the model 'npo'; name it in `model`. Made: other",
        ),
        (
            {
                "methods": {
                    "npo": {"branches": {"npo": NPO}, "settings": {"branches.npo.lora.rnk": [2]}}
                }
            },
            "unknown field branches.npo.lora.rnk. Did you mean 'rank'?",
        ),
        ({"board": "nowhere.yaml"}, "there is no file"),
        ({"methods": {}}, "methods"),
    ],
)
def test_a_wrong_file_is_refused_before_anything_runs(fields, tmp_path, change, said):
    with pytest.raises(RecipeError) as error:
        Board(written(fields | change, tmp_path))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_the_leaderboard_of_the_project_reads():
    board = Board(Path(__file__).parents[1] / "recipes" / "leaderboard.yaml")
    budgets = {len(entry.trials) for entry in board.config.methods.values()}
    assert len(board.config.methods) >= 19
    assert max(budgets) == board.config.tuning.trials


def test_a_branch_takes_what_is_common_where_it_says_nothing(fields, tmp_path):
    common = {"lora": {"rank": 3}, "optimizer": {"lr": 0.5}}
    own = {"terms": NPO["terms"], "optimizer": {"lr": 0.25}}
    full = {"terms": NPO["terms"], "training": "full"}
    methods = {"own": {"branches": {"own": own}}, "full": {"branches": {"full": full}}}
    board = Board(written(fields | {"branch": common, "methods": methods}, tmp_path))
    branch = board.recipe("own", {}).branches["own"]
    assert (branch.lora.rank, branch.optimizer.lr) == (3, 0.25)
    assert board.recipe("full", {}).branches["full"].optimizer.lr == 0.5


def test_the_methods_of_a_file_go_on_another_recipe(fields, tmp_path):
    mine = yaml.safe_load((tmp_path / "tiny.yaml").read_text())
    mine["data"] = {"forget": "mine.jsonl", "retain": "kept.jsonl"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(mine))
    boards = [Board(written(fields, tmp_path), on) for on in (None, tmp_path / "mine.yaml")]
    assert [board.name for board in boards] == ["tiny", "mine"]
    ours, theirs = (board.recipe("npo", {}) for board in boards)
    assert theirs.data.forget.path == "mine.jsonl"
    assert theirs.branches == ours.branches
    assert theirs.data != ours.data


def test_unknown_methods_and_seeds_are_refused(fields, tmp_path):
    board = Board(written(fields, tmp_path))
    with pytest.raises(RecipeError, match="no method of this leaderboard is called 'nppo'"):
        run_leaderboard(board, tmp_path / "out", only=["nppo"])
    with pytest.raises(RecipeError, match="the leaderboard has no seed 3"):
        run_leaderboard(board, tmp_path / "out", seeds=[3])
    assert not (tmp_path / "out").exists()


def test_a_method_that_the_model_has_no_layer_for_is_refused_before_any_is_run(fields, tmp_path):
    rmu = {"terms": [{"half": "forget", "loss": "rmu", "layer": 10}], "training": "full"}
    branch = {**{k: v for k, v in NPO.items() if k != "lora"}, **rmu}
    fields["methods"]["rmu"] = {"branches": {"rmu": branch}}
    board = Board(written(fields, tmp_path))
    with pytest.raises(ExpungeError, match=r"methods\.rmu: .*layer 10, but the model has 2 blocks"):
        run_leaderboard(board, tmp_path / "out", seeds=[1])
    assert not (tmp_path / "out").exists()


def test_a_run_tunes_each_method_scores_each_seed_and_does_nothing_twice(fields, tmp_path):
    board, out, kept = Board(written(fields, tmp_path)), tmp_path / "out", []
    said: list[str] = []
    first = run_leaderboard(board, out, seeds=[1], say=said.append, keep=kept.extend)
    assert [row.method for row in first] == ["target", "npo", "merge"]
    assert kept == first
    npo, merge = first[1:]
    assert [line.split(":")[0] for line in said] == ["npo-trial-1", "npo-trial-2"]
    assert npo.settings["branches.npo.optimizer.lr"] in (1e-3, 1e-2)
    assert (npo.trials, merge.trials, merge.note) == (2, 1, "as the paper")
    assert npo.seconds is not None
    assert npo.seconds > 0
    assert npo.task_aggregate is not None
    made = sorted(path.name for path in (out / "stages").iterdir())
    times = {name: (out / "stages" / name / "stage.json").read_text() for name in made}
    rows = run_leaderboard(board, out)
    assert [(row.method, row.seed) for row in rows] == [
        ("target", 1), ("npo", 1), ("merge", 1), ("npo", 2), ("merge", 2),
    ]  # fmt: skip
    again = {name: (out / "stages" / name / "stage.json").read_text() for name in made}
    assert again == times
    assert sum(name.startswith("evaluate-both-") for name in made) == 1  # branches go unscored
    assert not any(name.startswith("evaluate-weak-") for name in made)
    results = json.loads((out / "merge-2" / "results.json").read_text())
    assert results["models"]["weak"]["semeval"]["task_aggregate"] is None


def test_settings_can_be_tried_on_a_smaller_board(fields, tmp_path):
    small = yaml.safe_load((tmp_path / "tiny.yaml").read_text())
    small["data"]["synthetic"]["nonmembers"] = 1
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    fields["tuning"]["board"] = "small.yaml"
    board, out = Board(written(fields, tmp_path)), tmp_path / "out"
    (row,) = run_leaderboard(board, out, only=["npo"], seeds=[1])
    assert (row.board, row.trials) == ("tiny", 2)
    read = {
        name: json.loads((out / name / "results.json").read_text())["models"]["npo"]["semeval"]
        for name in ("npo-1", "npo-trial-1", "npo-trial-2")
    }
    counts = [one["mia"]["nonmembers"] for one in read.values()]
    assert counts == [6, 3, 3]  # 2 and 1 of each task
    instead = Board(tmp_path / "leaderboard.yaml", tmp_path / "tiny.yaml")
    assert instead.trying is instead  # what is given in the board's place is tuned on itself
    fields["tuning"]["board"] = "missing.yaml"
    with pytest.raises(RecipeError, match=r"missing\.yaml"):
        Board(written(fields, tmp_path))


def test_a_setting_that_cannot_be_trained_loses_and_the_others_are_compared(fields, tmp_path):
    npo, path = fields["methods"]["npo"], "branches.npo.optimizer.lr"
    fields["methods"] = {"npo": npo}
    npo["settings"] = {path: [1e30, 1e-3]}
    said: list[str] = []
    board = Board(written(fields, tmp_path))
    (_, row) = run_leaderboard(board, tmp_path / "out", seeds=[1], say=said.append)
    assert (row.settings, row.trials) == ({path: 1e-3}, 2)
    assert "npo-trial-1" in said[0]
    assert "merit" not in said[0]
    assert said[1].startswith("npo-trial-2: branches.npo.optimizer.lr=0.001: merit")


def test_a_method_that_cannot_be_trained_has_a_row_and_the_others_go_on(fields, tmp_path):
    npo, path = fields["methods"]["npo"], "branches.npo.optimizer.lr"
    npo["settings"] = {path: [1e30, 1e31]}
    said: list[str] = []
    board = Board(written(fields, tmp_path))
    rows = run_leaderboard(board, tmp_path / "out", seeds=[1], say=said.append)
    _, failed, merge = rows
    assert [(row.method, row.settings) for row in rows[1:]] == [
        ("npo", {path: 1e30}),
        ("merge", {}),
    ]
    assert "merit" not in "".join(said)
    assert failed.failed
    assert failed.final is None
    assert merge.task_aggregate is not None
    assert not merge.failed
    add_standings(tmp_path / "rows.json", rows)
    assert read_standings(tmp_path / "rows.json") == rows


def test_seeds_that_failed_are_told_and_are_in_no_mean():
    rows = [
        standing("half", 1, final=0.9, collapsed=False, note="ours"),
        standing("half", 2, failed="the loss is not finite"),
        standing("none", failed="nothing moved"),
        standing("poor", final=0.1, collapsed=False),
    ]
    header, body = leaderboard_table(rows)
    shown = [dict(zip(header, cells, strict=True)) for cells in body]
    assert [cells["method"] for cells in shown] == ["half", "poor", "none"]
    assert shown[0]["final ↑"] == "0.900 (**FAILED** in 1 of 2 seeds)"
    assert shown[0]["note"] == "ours; the loss is not finite"
    assert [shown[2][name] for name in ("final ↑", "Pareto")] == ["**FAILED**", ""]
