"""The commands as a user runs them: real processes, exit codes, one line for a mistake."""

import json
import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest
import yaml
from safetensors.torch import load_file, save_file

from commands import run as expunge


def refused(done: subprocess.CompletedProcess) -> str:
    """The one line that a refused command prints."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("expunge: ")
    return line


@pytest.fixture
def recipe(tmp_path, tiny_folder):
    def write(**changes):
        fields = {
            "name": "r",
            "model": {"path": str(tiny_folder)},
            "data": {"synthetic": {"documents": 1, "nonmembers": 1}},
            "branches": {
                "strong": {
                    "terms": [{"half": "forget", "loss": "npo"}],
                    "schedule": {"epochs": 1},
                    "optimizer": {"compute": "float32"},
                }
            },
            "evaluate": {"max_new_tokens": 2},
        }
        for name, value in changes.items():
            fields[name] = {**fields.get(name, {}), **value} if isinstance(value, dict) else value
        path = tmp_path / "r.yaml"
        path.write_text(yaml.safe_dump(fields))
        return path

    return write


def test_methods_and_schema_are_json_for_scripts():
    rows = json.loads(expunge("methods", "--json").stdout)
    assert {"name", "kind", "source", "fidelity", "needs", "cost", "test"} <= set(rows[0])
    assert {"npo", "kl", "ties", "normalized"} <= {row["name"] for row in rows}
    schema = json.loads(expunge("schema").stdout)
    fields = schema["properties"]
    assert {"model", "data", "tune", "branches", "merges", "evaluate"} <= set(fields)
    assert all("description" in field for field in fields.values())


def test_doctor_says_what_fits(recipe):
    facts = json.loads(expunge("doctor", recipe(), "--json").stdout)
    assert facts["cpus"] >= 1
    assert facts["fits"] is True
    assert facts["model_parameters"] == 257 * 32 + 2 * (32 * 32 * 3 + 32 * 48 * 3 + 64) + 32


def test_synthesize_writes_the_same_files_for_the_same_seed(tmp_path):
    for name in ("a", "b"):
        counts = json.loads(
            expunge("data", "synthesize", tmp_path / name, "--seed", 3, "--json").stdout
        )
    assert counts["forget.jsonl"] > 0
    for file in counts:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_stand_ins_are_made_of_a_file_of_documents(tmp_path):
    expunge("data", "synthesize", tmp_path)
    made = expunge(
        *("data", "standins", tmp_path / "members.jsonl", tmp_path / "s.jsonl"),
        *("--count", 4, "--json"),
    )
    assert json.loads(made.stdout) == {"documents": 60, "left_out": 0, "written": 4}
    assert len((tmp_path / "s.jsonl").read_text().splitlines()) == 4
    none = expunge("data", "standins", tmp_path / "members.jsonl", tmp_path / "t", "--count", 0)
    assert "at least 1 stand-in" in refused(none)


def test_each_stage_has_its_command(recipe, tmp_path):
    path, out = recipe(), tmp_path / "out"
    assert "target" in json.loads(expunge("tune", path, "--out", out, "--json").stdout)
    branches = json.loads(expunge("unlearn", path, "--out", out, "--json").stdout)
    assert branches["strong"].endswith("adapter")
    assert expunge("merge", path, "--out", out).returncode == 0
    done = expunge("evaluate", path, "--out", out, "--json")
    assert set(json.loads(done.stdout)["models"]) == {"target", "strong"}
    assert done.stderr == ""  # quiet where stderr is not a terminal
    again = expunge("report", out, "--json")
    assert json.loads(again.stdout) == json.loads(done.stdout)
    assert "task aggregate" in expunge("report", out).stdout


def test_several_branches_and_merges_are_one_json_object(recipe, tmp_path):
    branch = {
        "terms": [{"half": "forget", "loss": "npo"}],
        "lora": {"rank": 2},
        "schedule": {"epochs": 1},
        "optimizer": {"lr": 1e-3, "compute": "float32"},
    }
    merges = {name: {"method": name} for name in ("linear", "ties")}
    path = recipe(branches={"strong": branch, "weak": branch}, merges=merges)
    for command, names in (("unlearn", {"strong", "weak"}), ("merge", {"linear", "ties"})):
        done = expunge(command, path, "--out", tmp_path / "o", "--json")
        assert json.loads(done.stdout).keys() == names, done.stderr


def test_a_plan_is_kept_and_the_run_says_how_wrong_it_was(recipe, tmp_path):
    path, out, picked = recipe(), tmp_path / "out", tmp_path / "picked.yaml"
    words = ("plan", path, "--out", out, "--budget", "1h", "--write", picked)
    made = json.loads(expunge(*words, "--json").stdout)
    assert [s["stage"] for s in made["stages"]] == ["evaluate-target", "strong", "evaluate-strong"]
    assert json.loads((out / "plan.json").read_text()) == made
    assert yaml.safe_load(picked.read_text())["branches"].keys() == {"strong"}
    done = expunge("run", path, "--out", out, "--budget", "10m")
    assert done.returncode == 0, done.stderr
    assert "s of a budget of 600 s: in time" in done.stderr
    assert "steps" in done.stdout
    assert [r["stage"] for r in json.loads((out / "plan.json").read_text())["outcome"]]


def test_branches_that_were_planned_say_how_wrong_the_plan_was(recipe, tmp_path):
    path, out = recipe(), tmp_path / "out"
    assert "only with --out" not in expunge("plan", path, "--out", out).stdout
    assert "steps" in expunge("unlearn", path, "--out", out).stdout
    (row,) = json.loads((out / "plan.json").read_text())["outcome"]
    assert row["stage"] == "strong"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["reprot"], "No such command 'reprot'. Did you mean 'report'? See "),
        (["report"], "Missing argument 'run'. See "),
        (["report", "run", "--bogus"], "No such option: --bogus"),
        (["leaks", "x", "--top", "0"], "Invalid value for '--top'"),
    ],
)
def test_a_wrong_word_is_one_line_too(words, said):
    line = refused(expunge(*words))
    assert said in line
    assert line.endswith("--help")


@pytest.mark.parametrize("words", [[], ["data"], ["--help"], ["report", "--help"]])
def test_help_is_shown_where_it_is_asked_for_or_nothing_is(words):
    done = expunge(*words)
    assert done.returncode == (0 if "--help" in words else 2)
    assert "Usage: " in done.stdout + done.stderr
    assert "Missing" not in done.stdout + done.stderr


def test_the_version_is_that_of_the_installed_package():
    done = expunge("--version")
    assert (done.returncode, done.stdout) == (0, f"expunge {version('expunge')}\n")


@pytest.mark.parametrize("option", ["--lint", "--explain", "--stochastic"])
def test_what_belongs_to_a_merge_file_is_refused_with_a_recipe(recipe, tmp_path, option):
    line = refused(expunge("merge", recipe(), "--out", tmp_path / "o", option))
    assert "belong to a merge file" in line
    assert not (tmp_path / "o").exists()


def test_a_budget_that_is_no_time_is_one_line(recipe, tmp_path):
    line = refused(expunge("run", recipe(), "--out", tmp_path / "o", "--budget", "soon"))
    assert line.endswith("write 90s, 30m, 1h, 1h30m or a number of seconds")


def test_a_seed_that_is_too_large_is_one_line(recipe, tmp_path):
    line = refused(expunge("unlearn", recipe(), "--out", tmp_path / "o", "--seed", 10**20))
    assert "seeds" in line and "less than 4294967296" in line


def test_a_recipe_that_is_not_there(tmp_path):
    line = refused(expunge("run", tmp_path / "no.yaml", "--out", tmp_path / "o"))
    assert "there is no file" in line
    assert not (tmp_path / "o").exists()


def test_an_unknown_field_names_the_nearest(recipe, tmp_path):
    line = refused(expunge("run", recipe(modle={}), "--out", tmp_path / "o"))
    assert "unknown field modle. Did you mean 'model'?" in line


def test_a_model_without_the_named_targets(recipe, tmp_path):
    branch = {
        "terms": [{"half": "forget", "loss": "npo"}],
        "lora": {"targets": ["q_porj"]},
    }
    line = refused(expunge("run", recipe(branches={"strong": branch}), "--out", tmp_path / "o"))
    assert "no linear layer called 'q_porj'. Did you mean 'q_proj'?" in line


def test_a_pickled_model_is_refused_and_says_how_to_convert(recipe, tmp_path):
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    line = refused(expunge("run", recipe(), "--model", folder, "--out", tmp_path / "o"))
    assert "is a pickle" in line
    assert "save_pretrained" in line


def test_a_tokenizer_that_does_not_match(recipe, tmp_path, tiny_folder):
    from tokenizers import AddedToken

    from expunge.models import load_tokenizer

    folder = tmp_path / "mixed"
    folder.mkdir()
    for file in tiny_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = load_tokenizer(tiny_folder)
    tokenizer.add_tokens([AddedToken(f"<new{n}>") for n in range(5)])
    tokenizer.save_pretrained(folder)
    line = refused(expunge("run", recipe(), "--model", folder, "--out", tmp_path / "o"))
    assert "makes 262 tokens but the model has 257" in line


def test_an_empty_data_set_and_a_missing_file(recipe, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    for name, reason in (("empty", "empty.jsonl"), ("none", "there is no data file at")):
        file = {"path": str(tmp_path / f"{name}.jsonl")}
        path = recipe(data={"synthetic": None, "forget": file, "retain": file})
        assert reason in refused(expunge("run", path, "--out", tmp_path / "o"))


def test_an_output_that_cannot_be_written(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    line = refused(expunge("run", recipe(), "--out", tmp_path / "file" / "o"))
    assert "cannot write" in line


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path, recipe):
    """The model is larger than the file size that the shell allows, as on a full disk."""
    script = f"ulimit -f 40; exec {sys.executable} -m expunge unlearn {recipe()} --out {tmp_path}/o"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "too large" in done.stderr or "full" in done.stderr
    assert not list((tmp_path / "o").rglob("adapter*"))


def test_a_seed_and_a_model_can_be_given_on_the_command_line(recipe, tmp_path, tiny_folder):
    out = tmp_path / "o"
    done = expunge("run", recipe(), "--out", out, "--seed", 7, "--model", tiny_folder, "--json")
    assert json.loads(done.stdout)["seed"] == 7
    both = expunge("run", recipe(seeds=[7, 8]), "--out", out, "--json")
    assert [one["seed"] for one in json.loads(both.stdout)] == [7, 8]


def test_a_merge_file_takes_a_seed_and_refuses_what_it_would_ignore(tmp_path, tiny_folder):
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    tensors = load_file(other / "model.safetensors")
    halved = {name: tensor / 2 for name, tensor in tensors.items()}
    save_file(halved, other / "model.safetensors", metadata={"format": "pt"})
    path = tmp_path / "merge.yaml"
    fields = {"method": "dare_linear", "base_model": str(tiny_folder), "seed": 1}
    models = [{"model": str(other), "parameters": {"density": 0.5}}]
    path.write_text(yaml.safe_dump({**fields, "models": models}))
    made = []
    for name, options in (("own", []), ("same", ["--seed", "1"]), ("three", ["--seed", "3"])):
        assert expunge("merge", path, tmp_path / name, *options).returncode == 0
        made.append((tmp_path / name / "model.safetensors").read_bytes())
    assert made[0] == made[1] != made[2]
    assert yaml.safe_load((tmp_path / "three" / "merge.yaml").read_text())["seed"] == 3
    for options, message in (
        (["--model", "foo"], "--model belongs to a recipe"),
        (["--seed", "-1"], "--seed is a whole number from 0, not -1"),
        *((["--shard-gb", size], f"not {size}") for size in ("0", "-1", "nan", "inf")),
    ):
        assert message in refused(expunge("merge", path, tmp_path / "no", *options))
    assert not (tmp_path / "no").exists()


def test_merge_reads_a_merge_file_and_says_what_it_did(tmp_path, tiny_folder):
    path = tmp_path / "merge.yaml"
    fields = {"merge_method": "linear", "models": [{"model": str(tiny_folder)}]}
    path.write_text(yaml.safe_dump(fields))
    done = expunge("merge", path, tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tensors"] == 20
    assert {"model.safetensors", "config.json", "tokenizer.json", "merge.json", "merge.yaml"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }
    assert "exists and is not empty" in refused(expunge("merge", path, tmp_path / "out"))
    assert "OUT is missing" in refused(expunge("merge", path))
    assert "nothing found" in expunge("merge", path, "--lint").stdout
    assert "name a base_model" in refused(expunge("merge", path, "--explain"))
    path.write_text(yaml.safe_dump({**fields, "merge_method": "linea"}))
    assert "Did you mean 'linear'" in refused(expunge("merge", path, tmp_path / "other"))


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("expunge.cli", ("torch", "numpy", "pydantic")),
        ("expunge.merge.run", ("transformers", "torch.distributed.fsdp")),
        ("expunge.pipeline", ("transformers", "accelerate", "peft", "optuna", "sklearn")),
        ("expunge.methods", ("transformers", "optuna", "sklearn", "rouge_score")),
    ],
)
def test_what_takes_seconds_to_import_is_imported_where_it_is_used(module, absent):
    script = f"import sys, {module}; print([name for name in {absent} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_functions_stay_in_place_of_the_subpackages():
    script = """
import expunge, expunge.analyse.weights, expunge.edit.run, expunge.merge.run
import expunge.report.page, expunge.unlearn.branch
names = [name for name in expunge.__all__ if name not in ('guard', 'semeval')]
print(*(callable(getattr(expunge, name)) for name in names))
print(expunge.__all__, callable(expunge.semeval.unlearn), callable(expunge.guard.load))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    names = ["analyse", "calibrate", "compare", "edit", "evaluate", "guard", "leaks", "merge"]
    names += ["pick", "report", "run", "semeval", "tune", "unlearn"]
    callables = " ".join(["True"] * (len(names) - 2))
    assert done.stdout.split("\n")[:2] == [callables, f"{names} True True"], done.stderr
