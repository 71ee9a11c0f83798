"""What a user gets wrong: one line, exit code 2, and nothing of theirs is lost."""

import json
import shutil
import subprocess

import pytest

from commands import run as expunge

TEXT = {"id": "d", "document": "Khan Ttone was born on 1/2/1990 in Rome, and lives there."}


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps(TEXT) + "\n")
    return path


def refused(done: subprocess.CompletedProcess) -> str:
    """The one line that a refused command prints."""
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("expunge: ")
    return line


def test_what_is_read_is_not_written_over(texts, tiny_folder):
    before = texts.read_bytes()
    for words in (
        ("data", "standins", texts, texts, "--count", 5),
        ("statistics", tiny_folder, texts, texts, "--max-length", 8),
    ):
        assert "is the file that is read; name another to write" in refused(expunge(*words))
        assert texts.read_bytes() == before
    done = expunge("data", "standins", texts, texts.with_name("other"), "--count", 5)
    assert done.returncode == 0, done.stderr  # control


def test_a_run_is_not_written_over_by_an_evaluation(tiny_folder, tmp_path):
    held = json.dumps({"format": 1, "models": {}})
    for name, content in (("run.json", "{}"), ("results.json", held)):
        run = tmp_path / name.removesuffix(".json")
        run.mkdir()
        (run / name).write_text(content)
        line = refused(expunge("evaluate", tiny_folder, "--suite", "collapse", "--out", run))
        assert line.endswith("holds a run and its results; choose another --out")
        assert (run / name).read_text() == content
        assert len(list(run.iterdir())) == 1


def test_synthetic_sets_take_no_other_file_s_place(texts, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    shutil.copy(texts, folder / "forget.jsonl")
    line = refused(expunge("data", "synthesize", folder))
    assert "forget.jsonl is there with other content; choose another folder" in line
    assert [path.name for path in folder.iterdir()] == ["forget.jsonl"]
    assert "a file of that name is in the way" in refused(expunge("data", "synthesize", texts))
    assert expunge("data", "synthesize", tmp_path / "new", "--seed", -1).returncode == 2
    for _ in range(2):  # the same seed writes the same files, so again is no harm
        assert expunge("data", "synthesize", tmp_path / "new").returncode == 0


def test_a_folder_in_the_way_is_said(texts, tmp_path):
    (tmp_path / "folder").mkdir()
    done = expunge("data", "standins", texts, tmp_path / "folder", "--count", 5)
    assert refused(done).endswith("folder: a folder of that name is in the way")


@pytest.mark.parametrize("mark", [None, "[]"])
@pytest.mark.parametrize(
    "words", [("report",), ("card", "merged"), ("pick", "--point", "1", "--out", "p"), ("watch",)]
)
def test_a_folder_that_is_no_run_is_said(tmp_path, words, mark):
    recipe = {"name": "r", "model": {"path": "m"}, "data": {"synthetic": {}}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    if mark:
        (tmp_path / "run.json").write_text(mark)
    line = refused(expunge(words[0], tmp_path, *words[1:], cwd=tmp_path))
    assert "run.json" in line


@pytest.mark.parametrize(
    "text", ["seed: 2024-99-99", "? [a, b]\n: 1", "? {a: b}\n: 1", "a: " + "[" * 5000]
)
def test_yaml_that_cannot_be_read_is_said(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert "recipe.yaml is not valid YAML" in refused(expunge("run", path, "--out", tmp_path / "o"))
    path.write_text("model: {path: m}\ndata: {synthetic: {}}\n")
    swept = expunge("run", path, "--out", tmp_path / "o", "--sweep", "seeds=2024-13-45,1")
    assert "are no values as in YAML" in refused(swept)


def test_mistakes_of_a_merge_file_are_said(tiny_folder, tmp_path):
    path, model = tmp_path / "merge.yaml", {"model": str(tiny_folder)}
    for fields, said in (
        ({"models": [model]}, "give either merge_method"),
        ({"modules": {}, "metod": "ties"}, "metod"),
        ({"method": "linear", "chat_template": "{% if %}"}, "chat_template is no Jinja template"),
        ({"method": "linear", "parameters": {"weight": 10**400}}, "a parameter is a number"),
        (
            {"method": "linear", "parameters": {"weight": [{"filter": 3, "value": 1}]}},
            "filter is a part of a tensor's name, not 3",
        ),
    ):
        path.write_text(json.dumps({"models": [model], **fields}))
        assert said in refused(expunge("merge", path, tmp_path / "out"))
        assert not (tmp_path / "out").exists()
    generation = "{% generation %}{{ messages }}{% endgeneration %}"
    path.write_text(
        json.dumps({"models": [model], "method": "linear", "chat_template": generation})
    )
    assert expunge("merge", path, tmp_path / "out").returncode == 0  # control


def test_words_that_a_merge_does_not_read_are_refused(tiny_folder, tmp_path):
    file, recipe = tmp_path / "merge.yaml", tmp_path / "recipe.yaml"
    file.write_text(json.dumps({"method": "linear", "models": [{"model": str(tiny_folder)}]}))
    recipe.write_text("model: {path: m}\ndata: {synthetic: {}}\n")
    out = tmp_path / "out"
    for words, said in (
        ((file, out, "--out", tmp_path / "other"), "give the folder to write once"),
        ((recipe, out, "--out", tmp_path / "run"), "OUT belongs to a merge file"),
        ((file, "--lint", "--explain"), "give either --lint or --explain"),
    ):
        assert said in refused(expunge("merge", *words))
    assert not out.exists()


def test_a_name_that_is_not_known_is_said_with_its_file(tmp_path):
    fields = {
        "model": {"path": "m"},
        "data": {"synthetic": {}},
        "branches": {"a": {"terms": [{"half": "forget", "loss": "npo"}]}},
        "merges": {"m": {"method": "tise"}},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(fields))
    line = refused(expunge("run", path, "--out", tmp_path / "o"))
    assert line.startswith(f"expunge: {path}: no merge method is called 'tise'")


def test_an_edit_against_the_model_itself_is_refused(tiny_folder, tmp_path):
    done = expunge("edit", "negate", tiny_folder, tmp_path / "e", "--base", tiny_folder)
    assert "MODEL and --base are one model" in refused(done)
    assert not (tmp_path / "e").exists()


def test_guards_of_what_is_not_there_are_not_written(tiny_folder, tmp_path):
    line = refused(
        expunge("guard", "prefix", tiny_folder, tmp_path / "g", "--adapter", tmp_path / "nope")
    )
    assert "nope holds no adapter_config.json" in line
    assert not (tmp_path / "g").exists()


@pytest.mark.parametrize("path", ["hub:", "data:", ""])
def test_a_path_that_names_nothing_is_said(tmp_path, path):
    line = refused(expunge("data", "standins", path, tmp_path / "out.jsonl", "--count", 5))
    assert "FILE: path" in line
