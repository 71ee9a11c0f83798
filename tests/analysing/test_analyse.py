"""Whole analyses of a tiny run: what is written, what is found again, what is refused."""

import csv
import json
import shutil
from pathlib import Path

import pytest

import expunge
from commands import run as command
from expunge.errors import RecipeError, RunError, UnfinishedError


def table(folder, name):
    with (folder / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_weights_of_a_run(finished_run):
    folder = expunge.analyse(finished_run, ["weights"])
    assert folder == finished_run / "analysis"
    found = json.loads((folder / "weights.json").read_text())
    assert found["models"] == ["strong", "weak", "merged"]
    assert found["unfinished"] == []
    merge = json.loads(next(finished_run.glob("stages/merged-*/merge.json")).read_text())
    cosine = {
        (row["one"], row["two"]): float(row["cosine"])
        for row in table(folder, "weights-angles")
        if row["scope"] == "all"
    }
    own = [cosine["strong", "merged"], cosine["weak", "merged"]]
    assert own == pytest.approx(merge["cosine"], rel=1e-3)
    assert found["summary"]["norm"]["merged"] == pytest.approx(merge["norm"], rel=1e-3)
    phases = [
        (row["branch"], row["from"], row["to"])
        for row in table(folder, "weights-phases")
        if row["scope"] == "all"
    ]
    log = next(finished_run.glob("stages/strong-*/log.jsonl")).read_text().splitlines()
    half, last = str(len(log) // 2), str(len(log))
    assert phases[:2] == [("strong", "0", half), ("strong", half, last)]
    stages = sorted(path.name for path in (finished_run / "stages").iterdir())
    expunge.analyse(finished_run, ["weights"])
    assert sorted(path.name for path in (finished_run / "stages").iterdir()) == stages


@pytest.fixture
def run_copy(finished_run, tmp_path):
    """A run that may be changed, and was never analysed."""
    ours = shutil.ignore_patterns("analysis", "analyse-*", "trajectory-*")
    return shutil.copytree(finished_run, tmp_path / "run", ignore=ours)


def test_a_run_that_is_not_done_is_analysed_as_far_as_it_got(run_copy):
    shutil.rmtree(next(run_copy.glob("stages/merged-*")))
    weak = next(run_copy.glob("stages/weak-*"))
    shutil.rmtree(weak / "adapter")
    weak.rename(weak.with_name(weak.name + ".partial"))
    folder = expunge.analyse(run_copy, ["weights"])
    found = json.loads((folder / "weights.json").read_text())
    assert (found["models"], found["unfinished"]) == (["strong"], ["weak", "merged"])
    assert {row["branch"] for row in table(folder, "weights-phases")} == {"strong", "weak"}
    assert not list(run_copy.glob("stages/merged-*"))  # nothing was built
    shutil.rmtree(next(run_copy.glob("stages/strong-*")))
    shutil.rmtree(next(run_copy.glob("stages/weak-*")))
    with pytest.raises(UnfinishedError, match="no branch has kept weights"):
        expunge.analyse(run_copy, ["weights"])


def test_bad_input_is_refused(finished_run, tmp_path):
    with pytest.raises(RunError, match="is no run folder"):
        expunge.analyse(tmp_path)
    with pytest.raises(RecipeError, match="Did you mean 'weights'"):
        expunge.analyse(finished_run, ["weihgts"])
    with pytest.raises(RunError, match=r"has no seed 7\. Its seeds: 42"):
        expunge.analyse(finished_run, seed=7)


def test_the_trajectories_of_a_run(finished_run):
    folder = expunge.analyse(finished_run, ["trajectories"])
    found = json.loads((folder / "trajectories.json").read_text())
    assert found["models"] == ["strong", "weak"]
    rows = table(folder, "trajectories-objectives")
    strong = [row for row in rows if row["branch"] == "strong"]
    assert [(row["epoch"], row["source"]) for row in strong] == [
        ("0.0", "snapshot"),
        ("1.0", "snapshot"),
        ("2.0", "snapshot"),
    ]
    results = json.loads((finished_run / "results.json").read_text())["models"]
    assert float(strong[0]["forget_nll"]) == results["target"]["nll"]["forget"]
    assert float(strong[2]["forget_nll"]) == results["strong"]["nll"]["forget"]
    assert float(strong[0]["kl"]) == 0 < float(strong[1]["kl"])
    sources = {(row["branch"], row["source"]) for row in rows}
    assert sources == {("strong", "snapshot"), ("weak", "snapshot"), ("weak", "watch")}
    log = next(finished_run.glob("stages/weak-*/log.jsonl")).read_text().splitlines()
    training = [r for r in table(folder, "trajectories-training") if r["branch"] == "weak"]
    assert len(training) == len(log)
    assert {row["regurgitation"] for row in table(folder, "trajectories-epochs")} == {""}


def test_snapshots_write_where_it_is_asked_for(finished_run):
    folder = expunge.analyse(finished_run, ["trajectories"], generations=True, generate_limit=1)
    last = [
        row
        for row in table(folder, "trajectories-epochs")
        if (row["branch"], row["half"], row["epoch"]) == ("strong", "retain", "2.0")
    ]
    assert {row["task"] for row in last} == {"all", "Task1", "Task2", "Task3"}
    assert all(0 <= float(row["regurgitation"]) <= 1 for row in last)
    assert {
        row["semeval.counts.retain/Task1/qa"] for row in table(folder, "trajectories-snapshots")
    } == {"1.0"}


def test_the_failures_of_a_run(finished_run):
    folder = expunge.analyse(finished_run, ["failures"])
    found = json.loads((folder / "failures.json").read_text())
    assert found["models"] == ["target", "strong", "weak", "merged"]
    # A model that was trained on nothing writes no language: some outputs count as collapsed.
    assert found["tables"]["clusters"]
    groups = {(row["model"], row["group"]) for row in table(folder, "failures-collateral")}
    assert {("merged", "neighbour"), ("merged", "same task"), ("merged", "neutral text")} <= groups


def test_each_analysis_that_can_be_made_is_made(run_copy):
    for path in run_copy.glob("stages/evaluate-*"):
        shutil.rmtree(path)
    folder = expunge.analyse(run_copy)
    assert {path.name for path in folder.glob("*.json")} == {"weights.json", "trajectories.json"}
    with pytest.raises(UnfinishedError, match="no model has been scored"):
        expunge.analyse(run_copy, ["failures"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "weihgts"], "no analysis is called 'weihgts'. Did you mean 'weights'?"),
        (["--seed", "7"], "has no seed 7. Its seeds: 42"),
        ([], "is no run folder: it holds no recipe.yaml; expunge run writes it"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(finished_run, tmp_path, words, message):
    place = finished_run if words else tmp_path
    done = command("analyse", place, *words)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert message in line


def test_the_command_says_what_it_wrote(finished_run):
    done = command("analyse", finished_run, "--only", "failures,weights", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {row["analysis"] for row in rows} == {"weights", "failures"}
    for row in rows:
        with Path(row["file"]).open() as file:
            assert len(list(csv.DictReader(file))) == row["rows"]
