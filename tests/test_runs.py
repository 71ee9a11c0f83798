"""Run folders: whole or not at all, found again, and refused in one sentence."""

import json
import subprocess
import sys

import pytest

from expunge.config import Section
from expunge.errors import RunError
from expunge.progress import PROGRESS
from expunge.runs import (
    PROVENANCE,
    Run,
    hash_folder,
    read_json,
    read_json_lines,
    replacing,
    stage_key,
    write_json,
)


class Dial(Section):
    """A section with one field."""

    value: int = 1
    """The dial."""


def test_a_stage_is_built_once_and_says_what_made_it(tmp_path):
    run = Run(tmp_path, owner="r")
    calls = []

    def build(folder):
        calls.append(folder)
        (folder / "result").write_text("x")

    first = run.stage("s", Dial(), {"data": "abc"}, build)
    assert run.stage("s", Dial(), {"data": "abc"}, build) == first
    assert len(calls) == 1
    said = read_json(first / PROVENANCE)
    assert said["section"] == {"value": 1}
    assert said["inputs"] == {"data": "abc"}
    assert said["peak_rss_bytes"] > 0
    assert said["wall_seconds"] >= 0
    assert run.provenance() == [said]


def test_a_stage_that_broke_off_is_not_taken_for_whole_and_keeps_what_it_had(tmp_path):
    run = Run(tmp_path, owner="r")

    def breaks(folder):
        (folder / "half").write_text("x")
        (folder / ".model.99.tmp").mkdir()
        (folder / "inner" / ".model.99.tmp").mkdir(parents=True)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.stage("s", Dial(), {}, breaks)
    seen = []
    done = run.stage("s", Dial(), {}, lambda folder: seen.extend(p.name for p in folder.rglob("*")))
    # Its checkpoint is found again, its half-written file is gone.
    assert sorted(seen) == ["half", "inner", PROGRESS]
    assert not (done / PROGRESS).exists()
    assert not done.name.endswith(".partial")


def test_two_processes_cannot_build_one_stage_and_a_killed_one_leaves_no_lock(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from expunge.config import Section\n"
        "from expunge.runs import Run\n"
        "def build(folder): print('building', flush=True); time.sleep(600)\n"
        "Run(Path(sys.argv[1]), owner='r').stage('s', Section(), {}, build)"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    with first:
        assert first.stdout.readline() == "building\n"
        run = Run(tmp_path, owner="r")
        with pytest.raises(RunError, match=r"'s' of .* is being built by another process"):
            run.stage("s", Section(), {}, lambda folder: None)
        first.kill()
    done = run.stage("s", Section(), {}, lambda folder: (folder / "a").touch())
    assert sorted(path.name for path in done.iterdir()) == ["a", PROVENANCE]


def test_the_key_changes_with_section_input_and_name_but_not_with_their_order():
    key = stage_key("s", Dial(), {"a": "1", "b": "2"})
    assert key == stage_key("s", Dial(), {"b": "2", "a": "1"})
    others = [
        stage_key("s", Dial(value=2), {"a": "1", "b": "2"}),
        stage_key("s", Dial(), {"a": "1", "b": "3"}),
        stage_key("t", Dial(), {"a": "1", "b": "2"}),
    ]
    assert len({key, *others}) == 4


def test_a_file_is_replaced_whole_or_left_as_it_was(tmp_path):
    path = tmp_path / "f.json"
    write_json(path, {"a": 1})
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert json.loads(path.read_text()) == {"a": 1}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert [p.name for p in tmp_path.iterdir()] == ["f.json"]


def test_a_folders_hash_is_its_content(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("1")
    assert hash_folder(tmp_path / "a") == hash_folder(tmp_path / "b")
    (tmp_path / "b" / "x").write_text("2")
    assert hash_folder(tmp_path / "a") != hash_folder(tmp_path / "b")


@pytest.mark.parametrize(
    ("code", "reason"), [(28, "the disk is full"), (30, "the file system is read-only")]
)
def test_what_the_file_system_refuses_is_one_sentence(tmp_path, code, reason):
    run = Run(tmp_path, owner="r")

    def build(folder):
        raise OSError(code, "as the system says it", str(folder / "model"))

    with pytest.raises(RunError, match=f"cannot write .*model: {reason}"):
        run.stage("s", Dial(), {}, build)


def test_a_record_a_line_may_hold_other_ends_of_lines(tmp_path):
    records = [{"says": "a\u2028b\u2029c\x85d\x1ce"}, {"says": "f"}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    assert read_json_lines(path) == records
    path.write_text('{"says": "a"}\n{"sa')
    with pytest.raises(RunError, match=r"a.jsonl, line 2 is not valid JSON"):
        read_json_lines(path)


def test_a_broken_json_file_is_one_sentence(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunError, match="is not valid JSON"):
        Run(tmp_path, owner="r")
