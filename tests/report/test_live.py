"""What `expunge watch` shows of run folders made by hand, and of a process that is killed."""

import io
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from commands import Command
from commands import run as command
from expunge import progress
from expunge.errors import RunError
from expunge.recipe import load_recipe
from expunge.report import dashboard
from expunge.report.dashboard import drawn, duration, headline, sparkline, watch
from expunge.report.live import Frame, Stage, as_json, frame, losses, seconds_left, tail

RECIPE = """\
name: demo
data: {forget: f.jsonl, retain: r.jsonl}
tune: {epochs: 1}
branches: {strong: {}, weak: {}}
merges: {merged: {}}
unscored: [original]
seeds: [1, 2]
"""


def line(at: float, done: float, **changes) -> dict:
    return {
        "time": at,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "rss_bytes": 2_000_000_000,
        "gpu_bytes": 0,
        "label": "strong (seed 1)",
        "done": done,
        "total": 100,
        "unit": "steps",
        "note": "",
        **changes,
    }


def write_lines(path: Path, lines: list[dict], cut: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in lines) + cut)


@pytest.fixture
def run(tmp_path) -> Path:
    """A target is there, and the first branch is being built."""
    root = tmp_path / "run"
    target = root / "stages" / "target-00ff"
    target.mkdir(parents=True)
    (root / "run.json").write_text('{"recipe": "demo"}')
    (root / "recipe.yaml").write_text(RECIPE)
    said = {"stage": "target", "inputs": {}, "wall_seconds": 65.0, "peak_rss_bytes": 10**9}
    (target / "stage.json").write_text(json.dumps(said))
    partial = root / "stages" / "strong-01ff.partial"
    now = time.time()
    write_lines(partial / progress.PROGRESS, [line(now, 20), line(now + 10, 40)], cut='{"tim')
    log = [{"step": n, "lr": 1.0, "forget": n / 2, "retain": 1.0, "norm": 3.0} for n in (1, 2, 3)]
    write_lines(partial / "log.jsonl", log, cut='{"step": 4, "forg')
    evaluations = [{"step": 2, "numbers": {"nll.forget": 5.0, "nll.retain": 0.25}}]
    write_lines(partial / "evaluations.jsonl", evaluations)
    return root


def text_of(shown) -> str:
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    with console.file:
        console.print(drawn(shown))
    return console.export_text()


@pytest.mark.parametrize("name", ["demo", "board-calibrated", "synthetic-small", "uld"])
def test_every_model_of_a_recipe_is_waited_for(name, tmp_path):
    root = tmp_path / "run"
    root.mkdir()
    (root / "run.json").write_text(json.dumps({"recipe": name}))
    path = Path(__file__).parents[2] / "recipes" / f"{name}.yaml"
    (root / "recipe.yaml").write_text(path.read_text())
    waiting = {stage.name for stage in frame(root).stages}
    recipe = load_recipe(path)
    scored = {f"evaluate-{model}" for model in recipe.models if model not in recipe.unscored}
    assert scored | ({*recipe.models} - {"original"}) <= waiting


def test_a_run_that_goes(run):
    shown = frame(run)
    assert shown.state == "going"
    by_name = {stage.name: stage for stage in reversed(shown.stages)}
    strong = by_name["strong"]
    assert (strong.state, strong.done, strong.total) == ("going", 40, 100)
    assert strong.seconds_left == pytest.approx(30)  # 60 steps at 2 a second
    assert strong.losses == {"forget": (0.5, 1.0, 1.5), "retain": (1.0, 1.0, 1.0)}
    assert strong.evaluated == {"step": 2, "nll.forget": 5.0, "nll.retain": 0.25}
    assert by_name["target"].wall_seconds == 65.0
    states = [(stage.name, stage.state) for stage in shown.stages]
    assert states == [
        ("target", "finished"),
        ("evaluate-target", "waiting"),
        *[("strong", "going"), ("strong", "waiting")],
        *[("evaluate-strong", "waiting")] * 2,
        *[("weak", "waiting")] * 2,
        *[("evaluate-weak", "waiting")] * 2,
        *[("merged", "waiting")] * 2,
        *[("evaluate-merged", "waiting")] * 2,
    ]
    text = text_of(shown)
    assert "40/100 steps" in text
    assert "30 s" in text
    assert "forget 1.5 ▁▅█" in text
    assert "took 1 min 5 s" in text
    assert "after step 2: nll.forget 5, nll.retain 0.25" in text


def test_a_run_whose_process_is_gone(run):
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    path = next(run.glob("stages/*.partial")) / progress.PROGRESS
    write_lines(path, [line(time.time(), 40, pid=child.pid)])
    shown = frame(run, now=time.time() + 125)
    assert shown.state == "stopped"
    assert shown.quiet_seconds == pytest.approx(125, abs=5)
    assert "stopped: nothing has moved for 2 min" in headline(shown)
    assert "nothing moved for 2 min" in text_of(shown)


def test_a_process_of_another_machine_is_judged_by_its_silence(run):
    path = next(run.glob("stages/*.partial")) / progress.PROGRESS
    write_lines(path, [line(time.time(), 40, host="elsewhere", pid=1)])
    assert frame(run).state == "going"
    assert frame(run, now=time.time() + 61).state == "stopped"


def test_a_number_that_was_given_to_another_process_since(run):
    path = next(run.glob("stages/*.partial")) / progress.PROGRESS
    write_lines(path, [line(100.0, 40)])  # written before this process was born
    assert frame(run).state == "stopped"


def test_a_run_that_has_ended(run):
    for partial in run.glob("stages/*.partial"):
        for file in partial.iterdir():
            file.unlink()
        partial.rmdir()
    assert frame(run).state == "idle"
    stages = ("strong", "weak", "merged")
    names = [name for s in stages for name in (s, f"evaluate-{s}")] * 2 + ["evaluate-target"]
    for number, name in enumerate(names):
        folder = run / "stages" / f"{name}-{number:04x}"
        folder.mkdir()
        (folder / "stage.json").write_text(json.dumps({"inputs": {"seed": str(number % 2 + 1)}}))
    for seed in (1, 2):
        assert frame(run).state == "idle"  # there is no report yet
        (run / f"seed-{seed}").mkdir()
        (run / f"seed-{seed}" / "results.json").write_text("{}")
    assert frame(run).state == "ended"
    assert "expunge report" in headline(frame(run))
    for seed in (1, 2):
        os.utime(run / f"seed-{seed}" / "results.json", (5000.0, 5000.0))
    (run / "stages" / "analyse-ffff").mkdir()  # an analysis, later, is not the run's end
    assert frame(run, now=5060.0).quiet_seconds == 60.0


def test_what_is_not_finite_is_null_for_a_script(run):
    path = next(run.glob("stages/*.partial")) / "log.jsonl"
    write_lines(path, [{"step": 1, "loss": math.nan}, {"step": 2, "loss": 2.0}])
    said = json.loads(json.dumps(as_json(frame(run)), allow_nan=False))
    stage = next(stage for stage in said["stages"] if stage["state"] == "going")
    assert stage["losses"] == {"loss": [None, 2.0]}


def test_nothing_is_written_or_locked(run):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    text_of(frame(run))
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_folder_without_a_run_says_what_it_holds(tmp_path, run):
    with pytest.raises(RunError, match="is no run folder"):
        frame(tmp_path / "none")
    with pytest.raises(RunError, match="it holds the runs run: name one"):
        frame(tmp_path)


def test_time_left_is_that_of_this_work_by_this_process():
    lines = [line(0, 90), line(10, 0), line(11, 10), line(12, 20)]  # begun again after a kill
    assert seconds_left(lines) == pytest.approx(8)
    assert seconds_left([line(0, 10), line(1, 20, label="score"), line(2, 30, label="score")]) == 7
    assert seconds_left([line(0, 10, pid=1), line(1, 20)]) is None
    assert seconds_left([line(0, 10)]) is None
    assert seconds_left([{"time": 1, "pid": 2}]) is None
    assert seconds_left([]) is None


def test_losses_without_halves_are_the_first_three():
    record = {"step": 1, "lr": 0.1, "a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0, "norm": 1.0}
    assert losses([record]) == {"a": (1.0,), "b": (2.0,), "c": (3.0,)}


def test_a_log_that_is_cut_within_a_letter(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a": 1}\nnull\n[1]\n{"note": "\xc3')
    assert tail(path) == [{"a": 1}]
    assert tail(tmp_path / "none") == []


def test_sparks_and_durations():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([0.0, math.nan, 7.0]) == "▁ █"
    assert sparkline([math.inf]) == " "
    assert len(sparkline(list(range(100)), width=10)) == 10
    assert [duration(s) for s in (3.2, 125, 3840)] == ["3 s", "2 min 5 s", "1:04:00"]


def test_progress_is_kept_while_a_stage_is_built_and_taken_away_after(tmp_path):
    with progress.kept_in(tmp_path):
        with progress.progress("score", 3, "texts") as bar:
            bar(3, "note")
        kept = tail(tmp_path / progress.PROGRESS)
    assert [one.get("done") for one in kept] == [None, 0.0, 3.0]
    assert kept[-1] | {"label": "score", "total": 3, "unit": "texts", "note": "note"} == kept[-1]
    assert kept[-1]["pid"] == os.getpid()
    assert kept[-1]["rss_bytes"] > 1e6
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyError), progress.kept_in(tmp_path):
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == [progress.PROGRESS]  # of what broke off
    with progress.progress("outside", 3, "texts") as bar:
        bar(3)
    assert len(tail(tmp_path / progress.PROGRESS)) == 1


def test_a_run_that_is_killed_is_seen_going_and_then_stopped(tmp_path, tiny_folder):
    branch = {
        "terms": [{"half": "forget", "loss": "npo"}],
        "schedule": {"epochs": 1000},
        "optimizer": {"compute": "float32"},
    }
    recipe = {
        "name": "long",
        "model": {"path": str(tiny_folder)},
        "data": {"synthetic": {"documents": 1, "nonmembers": 1}},
        "branches": {"strong": branch},
    }
    (tmp_path / "long.yaml").write_text(json.dumps(recipe))
    out = tmp_path / "run"
    child = Command("unlearn", tmp_path / "long.yaml", "--out", out)
    try:
        deadline = time.monotonic() + 100
        while not (logs := list(out.glob("stages/strong-*.partial/log.jsonl"))):
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        shown = frame(out)
    finally:
        child.kill()
        child.wait()
    (strong,) = [stage for stage in shown.stages if stage.name == "strong"]
    assert (shown.state, strong.state, strong.unit) == ("going", "going", "steps")
    assert strong.total and strong.total > 1000
    assert frame(out).state == "stopped"
    assert logs[0].exists()


def test_without_a_terminal_each_stage_of_a_name_is_told_once(monkeypatch):
    done = Stage("evaluate-strong", "finished", wall_seconds=3.0)
    begun = Stage("evaluate-strong", "going", at="generate", done=1.0, total=100.0, unit="prompts")
    shown = [
        Frame("run", "demo", "going", 1.0, (done, begun)),
        Frame("run", "demo", "going", 2.0, (done, replace(begun, done=9.0))),
        Frame("run", "demo", "going", 3.0, (done, replace(begun, done=10.0))),
        Frame("run", "demo", "ended", 1.0, (done, done)),
    ]
    monkeypatch.setattr(dashboard, "frame", lambda root: shown.pop(0))
    monkeypatch.setattr(dashboard.time, "sleep", lambda seconds: None)
    told = io.StringIO()
    watch(Path("run"), once=False, json_=False, out=Console(file=told, width=40))
    assert told.getvalue().splitlines() == [
        "demo in run: going; something moved 1 s ago",
        "evaluate-strong: finished, took 3 s",
        "evaluate-strong: going, generate, 1/100 prompts",
        "evaluate-strong: going, generate, 10/100 prompts",
        "demo in run: ended 1 s ago; expunge report run prints its results",
        "evaluate-strong: finished, took 3 s",
    ]


def test_the_command_prints_one_frame_and_ctrl_c_leaves_quietly(run):
    done = command("watch", run, "--once")
    assert (done.returncode, done.stderr) == (0, "")
    assert "strong" in done.stdout
    done = command("watch", run, "--json")
    assert json.loads(done.stdout)["recipe"] == "demo"
    # A shell's background job ignores Ctrl-C, and so does all that it starts: these tests, too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    words = [sys.executable, "-m", "expunge", "watch", str(run)]
    pipe = subprocess.PIPE
    child = subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True)
    signal.signal(signal.SIGINT, before)
    try:
        # No terminal to draw on: each stage is told in a line, and not again while it stands.
        assert child.stdout
        first = [child.stdout.readline() for _ in range(3)]
        assert child.poll() is None
        child.send_signal(signal.SIGINT)
        further, error = child.communicate(timeout=120)
    finally:
        child.kill()
        child.communicate()
    assert child.returncode in (0, 130)
    assert (further, error) == ("", "")
    assert first[0].startswith(f"demo in {run}: going")
    assert first[1] == "target: finished, took 1 min 5 s\n"
    step = "strong (seed 1), 40/100 steps, after step 2: nll.forget 5, nll.retain 0.25"
    assert first[2].startswith(f"strong: going, {step}")
