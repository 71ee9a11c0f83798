"""Whole calibrations of a tiny model, in real processes: found again, picked, refused, scored."""

import json
import re
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory

import pytest
import yaml

import expunge
from commands import Command
from commands import run as command
from expunge import choosing, runs
from expunge.analysing.run import analyse_run
from expunge.calibrate.candidate import Candidate
from expunge.calibrate.run import ends_of
from expunge.calibrate.section import Calibrate, Floors, without_passwords
from expunge.cli import calibration
from expunge.data.standins import original_id
from expunge.errors import (
    CalibrationError,
    DataError,
    ExpungeError,
    RecipeError,
    RunError,
    UnfinishedError,
)
from expunge.models import load_tokenizer
from expunge.pipeline import Pipeline
from expunge.report.calibration import calibration_rows
from expunge.report.results import read_results

OPTIMIZER = {"lr": 3e-3, "compute": "float32", "checkpoint_seconds": 0}


def branch(target: float, epochs: int) -> dict:
    return {
        "terms": [
            {"half": "forget", "loss": "hinge", "scope": "document", "options": {"target": target}},
            {"half": "retain", "loss": "nll", "scope": "document"},
        ],
        "lora": {"rank": 4, "alpha": 8, "dropout": 0},
        "schedule": {"epochs": epochs, "micro_batch": 4, "accumulation": 1},
        "optimizer": {**OPTIMIZER, "lr": 1e-2},
        "keep": {"epochs": True},
    }


@pytest.fixture(scope="module")
def fields(tiny_folder) -> dict:
    return {
        "name": "tiny",
        "model": {"path": str(tiny_folder), "max_length": 400, "separator": " "},
        "data": {"synthetic": {"documents": 2, "nonmembers": 16}},
        "tune": {"epochs": 12, "batch": 4, "optimizer": {**OPTIMIZER, "warmup": 0}},
        "branches": {"deep": branch(14.0, 10), "shallow": branch(3.0, 1)},
        "folds": {"least": 2, "cross": 2},
        "evaluate": {"max_new_tokens": 4, "resamples": 20},
    }


SEARCH = (
    *("--trials", "3", "--floors", "retain=0,neutral=9"),
    *("-o", "tolerance=0.08", "-o", "steps=6", "-o", "snapshots=1"),
)


def _partial(run: Path) -> set[Path]:
    return set(run.glob("stages/calibrated-*.partial"))


def calibrate(run: Path, *words: str) -> CompletedProcess[str]:
    return command("calibrate", run, *words)


@pytest.fixture(scope="module")
def run(fields, tmp_path_factory) -> Path:
    """A run with its branches trained."""
    out = tmp_path_factory.mktemp("calibrated") / "run"
    expunge.unlearn(fields, out)
    return out


@pytest.fixture(scope="module")
def found(run) -> dict:
    done = calibrate(run, *SEARCH, "--json")
    assert done.stdout.startswith("{"), done.stderr
    return json.loads(done.stdout)


def test_the_target_knows_the_members_and_the_deep_branch_gives_them_away(found):
    """The control: what is balanced was out of balance on both sides."""
    sides = {p["label"]: p["calibration"]["auc"] for p in found["points"][:3]}
    assert found["points"][0]["role"] == "target"
    assert found["points"][0]["calibration"]["auc"] > 0.6
    assert sides["linear deep–deep t=0.000"] < 0.5


def test_trials_lie_nearer_to_the_balance_than_either_end(found):
    ends = [p for p in found["points"] if p["role"] in ("end", "target")]
    trials = [p for p in found["points"] if p["role"] == "trial"]
    assert len(trials) == 3
    best = min(abs(p["calibration"]["auc"] - 0.5) for p in trials)
    assert best <= min(abs(p["calibration"]["auc"] - 0.5) for p in ends)
    assert all(0 < p["candidate"]["t"] < 1 for p in trials)


def test_the_papers_merge_stands_beside_and_all_are_judged_on_the_other_documents(found):
    judged = [p for p in found["points"] if p["test"] is not None]
    assert {p["role"] for p in judged} >= {"target", "end", "baseline"}
    (baseline,) = (p for p in judged if p["role"] == "baseline")
    assert baseline["candidate"]["weights"] == [1.0, 1.0]
    finalists = [p for p in found["points"] if p["front"] or p["official"]]
    assert {p["role"] for p in finalists} >= {"trial"}
    assert all(p["test"] is not None for p in finalists)
    for point in judged:
        for fold in ("calibration", "test"):
            numbers = point[fold]["membership"]["loss"]
            assert numbers["auc_low"] <= numbers["auc"] <= numbers["auc_high"]
            assert {"two_sided", "ks", "ks_p"} <= numbers.keys()
    assert found["cross"]["folds"]


def test_every_candidate_is_counted_once_and_those_that_were_read_whole_apart(found):
    """The balanced point of a line is read twice: its documents first, then its items."""
    whole = {json.dumps(point["candidate"], sort_keys=True) for point in found["points"]}
    spent = found["screening"]
    assert spent["whole"] == len(whole)
    most = found["settings"]["trials"] * found["settings"]["steps"]
    scaled = sum(point["role"] == "end" for point in found["points"])
    assert spent["whole"] <= spent["candidates"] <= len(whole) + most + scaled


def test_the_same_again_costs_nothing(found, run):
    done = calibrate(run, *SEARCH, "--json")
    assert json.loads(done.stdout) == found


def test_from_python_it_is_the_same_calibration(found, run, tmp_path):
    assert expunge.calibrate(run, settings=found["settings"]) == found
    number = next(p["point"] for p in found["points"] if p["role"] == "trial")
    out = expunge.pick(run, number, tmp_path / "adapter")
    assert (out / "adapter_model.safetensors").exists()
    with pytest.raises(CalibrationError, match="no candidate meets the floors"):
        expunge.calibrate(run, settings=found["settings"] | {"floors": {"neutral": 1}})


def test_another_objective_reads_no_candidate_twice(found, run):
    """What was screened is known, though the search is another."""
    done = calibrate(run, *SEARCH, "--objective", "two_sided", "--json")
    again = json.loads(done.stdout)
    assert again["screening"]["candidates"] < found["screening"]["candidates"]


def test_a_picked_adapter_says_what_its_point_said(found, run, tmp_path):
    number = next(p["point"] for p in found["points"] if p["role"] == "trial")
    words = ("pick", run, "--point", number)
    for form in ("adapter", "model"):
        out = tmp_path / form
        done = command(*words, "--out", out, "--as", form)
        assert done.returncode == 0, done.stderr
        assert (
            out / ("adapter_model.safetensors" if form == "adapter" else "config.json")
        ).exists()
    again = command(*words, "--out", tmp_path / "adapter")
    assert again.returncode == 2
    assert "is not empty" in again.stderr
    from expunge.evaluate.reader import open_reader

    pipeline = Pipeline.of_run(run)
    reader = open_reader(pipeline.target.base, tmp_path / "adapter", dtype="float32", folder=None)
    from expunge.calibrate.reading import material, screen
    from expunge.data.folds import part

    side = part(pipeline.sets, pipeline.judged_by, inside=False)
    how = pipeline.recipe.model.model_dump(include={"max_length", "prompt_tail", "separator"})
    read = material(side, reader.tokenizer, how=how, document_tokens=2048, per_term=12)
    shown = screen(reader, read, ["loss"])
    told = found["points"][number]["calibration"]
    assert shown.membership["loss"]["auc"] == pytest.approx(told["membership"]["loss"]["auc"])
    assert shown.neutral == pytest.approx(told["neutral_nll"], abs=2e-2)


def test_a_search_on_a_sample_ends_with_a_finalist_that_all_documents_balance(found, run):
    """Four non-members place the line; the winner stands within the tolerance for all of them."""
    done = calibrate(run, *SEARCH, "-o", "documents=4", "-o", "finalists=1", "--json")
    sampled = json.loads(done.stdout)
    assert sampled["documents"] == found["documents"]  # which all of them chose by
    assert sampled["documents"]["calibration"]["nonmembers"] > 4
    read = [point["calibration"]["documents"] for point in sampled["points"]]
    drawn = sampled["documents"]["calibration"]["members"] + 4
    whole = sum(sampled["documents"]["calibration"].values())
    assert (read[sampled["chosen"]], read[0]) == (whole, drawn)
    rows = calibration_rows(sampled)
    judged = sum(sampled["documents"]["test"].values())
    assert rows[0]["documents"] == f"{drawn} / {judged}"
    winner = sampled["points"][sampled["chosen"]]
    assert winner["balanced"]
    assert abs(winner["calibration"]["auc"] - 0.5) <= sampled["settings"]["tolerance"]


def test_floors_that_nothing_meets_show_the_nearest_and_end_with_2(run):
    done = calibrate(run, *SEARCH, "--floors", "neutral=1")
    assert done.returncode == 2
    assert "no candidate meets the floors; the nearest is point" in done.stderr
    assert "neutral NLL" in done.stderr
    assert done.stderr.count("\n") == 1
    assert "No candidate meets the floors; the nearest, point" in done.stdout.replace("\n", " ")


def test_branches_that_do_not_bracket_the_balance_say_how_far_they_are(run):
    done = calibrate(run, *SEARCH, "--of", "shallow", "-o", "snapshots=0")
    assert done.returncode == 2
    assert "do not bracket the balance" in done.stderr
    assert re.search(r"shallow 0\.\d\d \(two-sided 0\.\d\d, KS 0\.\d\d\)", done.stderr)
    assert "would help" in done.stderr


def test_tasks_without_documents_on_both_sides_are_refused_with_their_counts(run):
    done = calibrate(run, *SEARCH, "-o", "by_task=true")
    assert done.returncode == 2
    assert "members and 0 nonmembers of task 'Task" in done.stderr
    assert "name the task in their rows, or leave by_task out" in done.stderr


def test_documents_of_no_task_are_not_balanced_by_task(run):
    pipeline, config = Pipeline.of_run(run), Calibrate(by_task=True)
    nameless = replace(
        pipeline.sets,
        members=[replace(member, task="") for member in pipeline.sets.members],
    )
    with pytest.raises(CalibrationError, match=r"of task ''.*name the task in their rows"):
        pipeline._with_tasks(nameless, config, "test")
    pipeline._with_tasks(nameless, Calibrate(), "test")  # control


def test_a_branch_that_is_balanced_as_it_stands_is_an_end(run):
    """The same branch, which is within this tolerance of the balance."""
    words = ("--of", "shallow", "-o", "snapshots=0", "-o", "tolerance=0.45", "--trials", "1")
    done = calibrate(run, *SEARCH, *words, "--json")
    (trial,) = (p for p in json.loads(done.stdout)["points"] if p["role"] == "trial")
    assert trial["balanced"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--objective", "best"), "no calibration objective is called 'best'"),
        (("--floors", "retain"), "--floors takes name=value"),
        (("--of", "deeep"), "did you mean 'deep'"),
        (("-o", "trails=3"), "trails"),
        (("-o", "scale=[1"), "--option scale=[1: the value is not valid YAML"),
        (("--floors", "retain=[0"), "--floors retain=[0: the value is not valid YAML"),
        (("-o", "floors=3"), "calibrate: floors: Input should be"),
        (("--floors", "mmlu=0.01"), "floors.mmlu needs evaluate.mmlu"),
        (("--name", "../../else"), "cannot be the name of a model"),
        (("--name", "deep"), "'deep' is another model of the run"),
        (("--storage", "nonsense"), "calibrate.storage cannot be used: Could not parse"),
        (("--storage", "sqlite:////no/such/a.db"), "calibrate.storage cannot be used: (sqlite3"),
    ],
)
def test_wrong_options_are_refused_in_a_line(run, words, said):
    done = calibrate(run, *words)
    assert done.returncode == 2
    assert said.lower() in done.stderr.lower()
    assert done.stderr.count("\n") == 1


def test_a_killed_search_goes_on_with_what_it_has_read(run):
    """SIGKILL within the search: the same command ends with as many trials, and reads less."""
    words = (*SEARCH, "--trials", "4", "-o", "seed=5", "-o", "per_term=3", "--json")
    before = _partial(run)  # of searches that were refused
    process = Command("calibrate", run, *words)
    while not any((p / "study.db").exists() for p in _partial(run) - before):
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)
    process.kill()
    assert process.wait().returncode == -signal.SIGKILL
    done = calibrate(run, *words)
    found = json.loads(done.stdout)
    assert sum(point["role"] == "trial" for point in found["points"]) == 4
    assert _partial(run) == before


def test_what_other_processes_screened_for_a_search_is_counted(run, tmp_path):
    """Two trials in one process, then a third in another, which finds those in the storage."""
    storage = f"sqlite:///{tmp_path}/study.db"
    words = (*SEARCH, "-o", "seed=60", "-o", "per_term=4", "--storage", storage)
    counts = [
        json.loads(calibrate(run, *words, "--trials", trials, "--json").stdout)["screening"]
        for trials in ("2", "3")
    ]
    assert counts[0]["candidates"] >= 2  # two lines, each at a point or more
    assert counts[1]["candidates"] > counts[0]["candidates"]
    assert counts[1]["seconds"] > counts[0]["seconds"]


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("postgresql://me:se:cr@t@host/name", "postgresql://me:***@host/name"),
        ("postgresql://me:pa/ss@host/name", "postgresql://me:***@host/name"),
        ("postgresql://me:p@s/s@host/name", "postgresql://me:***@host/name"),
        ("postgresql://me@host/name?password=word", "postgresql://me@host/name?password=***"),
        (
            "postgresql://host/name?user=me&password=word",
            "postgresql://host/name?password=***&user=me",
        ),
        (
            "mysql://me:word@host/name?a=b&ssl%70assword=word",
            "mysql://me:***@host/name?a=b&sslpassword=***",
        ),
        ("nonsense://me:wo@rd:x@host?passwd=word&a=b", "nonsense://me:***@host?passwd=***&a=b"),
        ("mysql://me@host:3306/name?at=a%3Ab", "mysql://me@host:3306/name?at=a%3Ab"),
        ("sqlite:////a/study.db", "sqlite:////a/study.db"),
    ],
)
def test_a_password_of_a_storage_is_used_and_not_written(url, kept):
    config = Calibrate(of=("deep", "shallow"), storage=url)
    assert config.storage == url
    assert json.loads(config.model_dump_json())["storage"] == kept
    assert Calibrate.model_validate(config.model_dump()).storage == url


def test_a_password_is_hidden_without_sqlalchemy_too(monkeypatch):
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)
    url = "postgresql://me:pa/s@s@host/name?sslpassword=word"
    assert without_passwords(url) == "postgresql://me:***@host/name?sslpassword=***"


def test_searches_of_one_storage_share_no_trial_where_they_differ(run, tmp_path):
    """Other methods: a search that took the first one's trials would choose what it may not try."""
    storage = f"sqlite:///{tmp_path}/study.db"
    words = (*SEARCH, "--trials", "1", "-o", "per_term=4", "--storage", storage, "--json")
    for method in ("ties", "linear"):
        found = json.loads(calibrate(run, *words, "--methods", method).stdout)
        (trial,) = (point for point in found["points"] if point["role"] == "trial")
        assert trial["candidate"]["method"] == method


def test_json_is_a_line_for_each_seed_and_no_seed_but_the_runs_is_taken(
    fields, tmp_path, monkeypatch, capsys
):
    def found(pipeline, name, config, seed):
        return {"of": seed}, None

    monkeypatch.setattr(choosing, "calibrate_run", found)
    Pipeline({**fields, "seeds": [1, 2]}, tmp_path)
    calibration.calibrate(tmp_path, as_json=True)
    said = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["of"] for line in said] == [1, 2]
    calibration.calibrate(tmp_path, as_json=True, seed=2)
    assert json.loads(capsys.readouterr().out)["of"] == 2
    for choose in (
        lambda: calibration.calibrate(tmp_path, seed=3),
        lambda: calibration.pick(tmp_path, 0, tmp_path / "out", seed=3),
        lambda: expunge.calibrate(tmp_path, seed=3),
        lambda: expunge.pick(tmp_path, 0, tmp_path / "out", seed=3),
    ):
        with pytest.raises(RunError, match=r"has no seed 3\. Its seeds: 1, 2"):
            choose()


def test_a_seed_that_meets_no_floors_does_not_keep_the_next_from_being_calibrated(
    fields, tmp_path, monkeypatch
):
    """Each is told of; the error of the first ends it."""
    asked = []

    def found(pipeline, name, config, seed):
        asked.append(seed)
        return {}, CalibrationError(f"none of {seed}")

    monkeypatch.setattr(choosing, "calibrate_run", found)
    Pipeline({**fields, "seeds": [1, 2]}, tmp_path)
    with pytest.raises(CalibrationError, match="none of 1"):
        calibration.calibrate(tmp_path, as_json=True)
    assert asked == [1, 2]


def test_more_groups_than_blocks_are_refused_of_a_finished_run_before_the_search(run, monkeypatch):
    monkeypatch.setattr(Pipeline, "calibration", lambda *given: pytest.fail("searched"))
    with pytest.raises(RecipeError, match="calibrate 'calibrated': groups is 40, and the branches"):
        expunge.calibrate(run, settings={"groups": 40, "floors": {"retain": 0}})
    with pytest.raises(pytest.fail.Exception, match="searched"):  # control
        expunge.calibrate(run, settings={"groups": 1, "floors": {"retain": 0}})


def test_any_seed_will_do_and_cmaes_says_nothing_of_constraints(run):
    words = (*SEARCH, "--trials", "1", "-o", "seed=-1", "-o", "sampler=cmaes", "-o", "per_term=4")
    done = calibrate(run, *words)
    assert (done.returncode, done.stderr) == (0, "")


def test_stand_ins_take_the_place_of_non_members_while_it_chooses(run):
    """They have the members' form, two for each, and nothing of the documents that only judge."""
    pipeline = Pipeline.of_run(run)
    given, made = (
        pipeline.chosen_by(Calibrate(standins=on, floors=Floors())) for on in (False, True)
    )
    assert made.members == given.members
    assert len(made.nonmembers) == 2 * len(made.members)
    texts = {document.text for document in pipeline.sets.members + pipeline.sets.nonmembers}
    assert not texts & {document.text for document in made.nonmembers}
    assert {document.id for document in given.nonmembers}.isdisjoint(pipeline.judged_by)


def test_a_cross_calibration_reads_stand_ins_where_these_choose(run):
    """No given non-member, and each stand-in in the fold of the document that it was made of."""
    pipeline, config = Pipeline.of_run(run), Calibrate(standins=True)
    side, tokenizer = pipeline.chosen_by(config), load_tokenizer(pipeline.target.base)
    given = pipeline.documents(side, config, tokenizer)
    members, others = (
        [sequence.id for _, sequence in texts]
        for texts in (given.everything.members, given.everything.nonmembers)
    )
    assert len(others) == 2 * len(members) == 2 * len(pipeline.sets.members)
    assert {original_id(other) for other in others} == {*members}
    assert all(given.folds(other) == given.folds(original_id(other)) for other in others)
    real = {document.id for document in pipeline.sets.nonmembers}
    assert {sequence.id for _, sequence in given.test.nonmembers} <= real  # these only judge


def test_a_branch_is_not_watched_on_the_documents_that_only_judge(fields, tmp_path):
    """Which these are is an input of the branch; without folds all documents are read."""
    watched = {**branch(14.0, 10), "watch": {"every": 2, "read": "evaluation"}}
    recipe = {**fields, "branches": {"deep": watched}}
    whole = Pipeline({k: v for k, v in recipe.items() if k != "folds"}, tmp_path / "whole")
    split = Pipeline(recipe, tmp_path / "split")
    test = split.judged_by
    read = split._watched
    assert test and read.members and read.forget
    assert test.isdisjoint(d.id for d in (*read.members, *read.nonmembers))
    assert test.isdisjoint(item.document for item in (*read.forget, *read.retain))
    assert not test.isdisjoint(document.id for document in whole._watched.members)
    config = split.recipe.branches["deep"]
    assert "folds" in split.watch_inputs(config)
    assert "folds" not in whole.watch_inputs(config)


def test_a_landscape_lies_between_the_two_branches(run):
    folder = analyse_run(run, ["landscape"])
    tables = runs.read_json(folder / "landscape.json")["tables"]
    assert len(tables["surface"]) == 5 * (4 + 3)
    ends = {row["t"]: row for row in tables["surface"] if row["method"] == "linear"}
    assert ends[0.0]["neutral_nll"] > ends[1.0]["neutral_nll"]  # the deep branch is damaged more
    assert {row["dial"] for row in tables["balance"]} == {"density", "scale"}
    before = (folder / "landscape.json").read_bytes()
    assert (analyse_run(run, ["landscape"]) / "landscape.json").read_bytes() == before


def test_a_landscape_needs_no_calibration_that_chooses_among_both(run, tmp_path):
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    recipe = yaml.safe_load((copied / "recipe.yaml").read_text())
    recipe["calibrate"] = {"chosen": {"of": ["deep"]}}
    (copied / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    said = runs.read_json(analyse_run(copied, ["landscape"]) / "landscape.json")
    assert said["models"] == ["deep", "shallow"]


def test_a_recipe_chooses_and_scores_both_sides(fields, run):
    """The chosen merge is a model of the results, and each is scored on the test documents too."""
    search = {
        "trials": 2,
        "floors": {"retain": 0, "neutral": 9},
        "tolerance": 0.08,
        "finalists": 1,
        "snapshots": 0,
    }
    recipe = {**fields, "calibrate": {"calibrated": search}, "merges": {"merged": {}}}
    pipeline = Pipeline(recipe, run)
    config = pipeline.recipe.calibrate["calibrated"]
    done = pipeline.calibration("calibrated", config, 42)
    if runs.read_json(done / "calibration.json")["chosen"] is None:
        pytest.fail(str(runs.read_json(done / "calibration.json")["nearest"]))
    results = read_results(pipeline.report(42) / "results.json")
    assert list(results.models) == ["original", "target", "deep", "shallow", "merged", "calibrated"]
    test = results.models["target"].folds["test"]
    assert test.membership["loss"]["auc"] == test.semeval.mia.auc  # pyright: ignore
    both = results.models["target"].folds
    assert (
        sum(fold.semeval.mia.n for fold in both.values()) == results.models["target"].semeval.mia.n
    )  # pyright: ignore
    yaml.safe_load((run / "recipe.yaml").read_text())


def test_the_baseline_is_the_merge_that_the_recipe_makes_as_the_paper_does(fields, run):
    """Its branches need not be among those that are chosen among; it can be picked all the same."""
    search = {"trials": 1, "of": ["deep"], "snapshots": 0, "per_term": 4, "tolerance": 0.3}
    merges = {"other": {"method": "linear"}, "paper": {"of": ["shallow", "deep"]}}
    pipeline = Pipeline({**fields, "calibrate": {"c": search}, "merges": merges}, run)
    config = pipeline.recipe.calibrate["c"]
    found = runs.read_json(pipeline.calibration("c", config, 42) / "calibration.json")
    (baseline,) = (p for p in found["points"] if p["role"] == "baseline")
    assert baseline["label"] == "ties shallow–deep (1.0, 1.0)"
    assert "shallow" not in {p["candidate"]["over"]["branch"] for p in found["points"][1:2]}
    candidate = Candidate.model_validate(baseline["candidate"])
    assert set(found["paper"]) == {"shallow", "deep"}
    (row,) = (row for row in calibration_rows(found) if row["point"] == baseline["point"])
    assert row["merge"] == "TIES 0.8, weights 1, 1: shallow and deep"
    strangers = calibration_rows({**found, "paper": None})
    assert f"{row['merge']} (not the paper's branches)" in [r["merge"] for r in strangers]
    with TemporaryDirectory() as folder:
        pipeline.write_point(config, 42, candidate, Path(folder) / "out", output="adapter")
    unfinished = Pipeline(
        {**fields, "branches": {**fields["branches"], "deep": branch(9.0, 1)}, "merges": merges},
        run,
    )
    assert unfinished._papers_pair(42) is None
    then = found["paper"]
    pipeline.check_paper(candidate, then, config, 42)  # control
    with pytest.raises(CalibrationError, match=r"'shallow' .* it is not finished; expunge merge"):
        unfinished.check_paper(candidate, then, config, 42)
    then = {**then, "shallow": "shallow-0"}
    with pytest.raises(CalibrationError, match=r"'shallow' .*\(shallow-0\), .* it is shallow-\w+;"):
        pipeline.check_paper(candidate, then, config, 42)
    Pipeline(fields, run)


def test_a_target_or_branch_of_other_weights_under_its_name_is_not_taken_for_what_was_read(
    run, tmp_path
):
    """The keys of the tables stand for what the folders hold."""
    pipeline = Pipeline.of_run(run)
    branches = pipeline._chosen_among(Calibrate(), 42)
    copied = {name: Path(shutil.copytree(f, tmp_path / name)) for name, f in branches.items()}
    config = Calibrate(snapshots=1)
    before = ends_of(branches, config).hashes
    assert ends_of(copied, config).hashes == before
    with (copied["deep"] / "adapter" / "adapter_model.safetensors").open("ab") as file:
        file.write(b"1")
    after = ends_of(copied, config).hashes
    assert {label for label in before if before[label] != after[label]} == {"deep"}
    tokenizer = load_tokenizer(pipeline.target.base)
    keys = set()
    for content in ("a", "a", "b"):
        pipeline._target_hash = content
        keys.add(pipeline._resident(tokenizer, ends_of(branches, config)).key)
    assert len(keys) == 2


def test_a_point_is_picked_of_what_a_run_calibrated_and_not_once_the_branches_are_others(
    fields, run, tmp_path
):
    """The error of a run that met no floors names the command that takes the nearest point."""
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    search = {"trials": 1, "floors": {"neutral": 1}, "snapshots": 0, "per_term": 4}
    recipe = {**fields, "calibrate": {"near": search}}
    pipeline = Pipeline(recipe, copied)
    with pytest.raises(CalibrationError, match=r"expunge (pick .* --name near --point \d+) --out"):
        pipeline.calibrated("near", 42)
    done = pipeline.calibration("near", pipeline.recipe.calibrate["near"], 42)
    point = runs.read_json(done / "calibration.json")["nearest"]["point"]
    assert (
        expunge.pick(copied, point, tmp_path / "out", name="near") / "adapter_config.json"
    ).exists()
    expunge.calibrate(copied, "near", {"floors": {"retain": 0, "neutral": 9}})
    recipe["folds"] = {"least": 2, "cross": 2, "seed": 1}
    Pipeline(recipe, copied)
    with pytest.raises(CalibrationError, match="made of other branches, folds or data"):
        expunge.pick(copied, point, tmp_path / "other", name="near")
    recipe["branches"] = {**recipe["branches"], "deep": branch(14.0, 9)}
    Pipeline(recipe, copied)
    with pytest.raises(UnfinishedError, match=r"'deep' of .* is not finished"):
        expunge.pick(copied, point, tmp_path / "other", name="near")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("folds", "search", "said"),
    [
        ({"least": 9}, {}, "documents of members, and needs 9"),
        ({"least": 2, "interval": 0.01}, {}, "of each would do"),
        ({"least": 2}, {"by_task": True}, "nonmembers of task"),
        ({"least": 2}, {"groups": 40}, "calibrate 'calibrated': groups is 40, and the branches"),
    ],
)
def test_too_few_documents_are_refused_before_anything_is_trained(
    fields, tmp_path, folds, search, said
):
    recipe = {**fields, "folds": folds, "calibrate": {"calibrated": search}}
    with pytest.raises(ExpungeError, match=said):
        expunge.tune(recipe, tmp_path / "run")
    assert not list(tmp_path.glob("run/stages/target-*"))


def test_other_ids_that_only_judge_make_another_calibration(fields, run, tmp_path):
    """The file is told by what it holds, not by its name."""
    ids = tmp_path / "ids.txt"
    recipe = {**fields, "folds": {**fields["folds"], "test_ids": str(ids)}}
    made = []
    for text in ("a", "b"):
        ids.write_text(text)
        pipeline = Pipeline(recipe, tmp_path / "run")
        made.append(pipeline.fold_inputs)
    assert made[0] != made[1]
    ids.unlink()
    with pytest.raises(DataError, match="there is no data file"):
        _ = pipeline.fold_inputs
