"""Graphs of cells: in order here, and the same on a Ray cluster of two nodes, killed or not."""

import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import torch
import yaml

import expunge
from commands import run as command
from expunge import on_ray
from expunge.cells import Cell, Workers, do_here, side_by_side
from expunge.cli import app
from expunge.errors import DataError, ExpungeError, RecipeError, RunError
from expunge.merge.run import merge_models
from expunge.models import load_model, load_tokenizer, save_model
from expunge.on_ray import do_on_ray
from expunge.pipeline import Pipeline
from expunge.recipe import load_recipe
from expunge.runner import cells_of, do_stage, parse_sweep, run_recipes, swept

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
MARK = '{"step": 0}\n'


@pytest.fixture
def fields(tiny_folder) -> dict:
    """A recipe of two branches and a merge, a second or two in all."""
    branch = {
        "terms": [{"half": "forget", "loss": "npo"}, {"half": "retain", "loss": "nll"}],
        "lora": {"rank": 2, "alpha": 4},
        "schedule": {"epochs": 2, "micro_batch": 2, "accumulation": 1},
        "optimizer": {"lr": 1e-3, "compute": "float32", "checkpoint_seconds": 0},
    }
    return {
        "name": "tiny",
        "model": {"path": str(tiny_folder), "max_length": 400, "separator": " "},
        "data": {"synthetic": {"documents": 1, "nonmembers": 2}},
        "branches": {"strong": branch, "weak": {**branch, "schedule": {"epochs": 1}}},
        "merges": {"merged": {"method": "ties", "space": "delta", "output": "model"}},
        "evaluate": {"max_new_tokens": 2, "resamples": 20},
        "unscored": ["target", "weak"],
    }


def graph(*cells: tuple[str, str]) -> list[Cell[str]]:
    """Cells by name and what each needs, a space between; the work is the name."""
    return [Cell(name, tuple(needs.split()), name) for name, needs in cells]


def stages(folder: Path) -> dict[str, bytes]:
    """Every safetensors file of the finished stages, by name."""
    root = folder / "stages"
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*.safetensors")}


def test_cells_are_done_in_order_and_the_first_error_ends_them():
    done = []
    do_here(graph(("a", ""), ("b", "a"), ("c", "a b")), done.append)
    assert done == ["a", "b", "c"]

    def fails(name):
        done.append(name)
        if name == "b":
            raise DataError("no")

    done.clear()
    with pytest.raises(DataError):
        do_here(graph(("a", ""), ("b", "a"), ("c", "")), fails)
    assert done == ["a", "b"]


def test_a_graph_out_of_order_is_a_bug():
    with pytest.raises(AssertionError, match="needs"):
        do_here(graph(("b", "a"), ("a", "")), print)


def test_cells_as_deep_as_one_another_can_run_at_once():
    cells = graph(("data", ""), ("one", "data"), ("two", "data"), ("merged", "one two"))
    assert side_by_side(cells) == {"data": 1, "one": 2, "two": 2, "merged": 1}


def test_the_cells_of_a_recipe_wait_for_what_they_are_made_of(fields, tmp_path):
    tune = {"epochs": 1}
    recipe = {**fields, "tune": tune, "seeds": [1, 2], "unscored": ["weak"]}
    cells = list(cells_of(Pipeline(recipe, tmp_path)))
    short = {cell.name: cell.name.rpartition("-")[0] for cell in cells}
    needs = [(short[cell.name], [short[need] for need in cell.needs]) for cell in cells]
    first = [
        ("data", []),
        ("evaluate-original", ["data"]),
        ("target", ["data"]),
        ("evaluate-target", ["data", "target"]),
    ]
    each = [
        ("strong", ["data", "target"]),
        ("evaluate-strong", ["data", "target", "strong"]),
        ("weak", ["data", "target"]),
        ("merged", ["data", "strong", "weak"]),
        ("evaluate-merged", ["data", "strong", "weak", "merged"]),
    ]
    assert needs == [*first, *each, *each]
    assert len({cell.name for cell in cells}) == len(cells)


def test_cells_that_are_judged_otherwise_have_names_of_their_own(fields, tmp_path):
    """So that of two recipes that differ there, each is done."""
    watched = {**fields["branches"]["weak"], "watch": {"every": 1, "read": "evaluation"}}
    given = {
        **fields,
        "branches": {**fields["branches"], "weak": watched},
        "calibrate": {"calibrated": {}},
        "data": {"synthetic": {"documents": 8, "nonmembers": 8}},
        "unscored": [],
    }

    def names(**changes) -> dict[str, str]:
        out = tmp_path / changes.get("name", "tiny")
        cells = cells_of(Pipeline({**given, **changes}, out))
        return {cell.name.rpartition("-")[0]: cell.name for cell in cells}

    def differ(**changes) -> set[str]:
        return {name for name, full in names(**changes).items() if full != names()[name]}

    scored = {f"evaluate-{n}" for n in ("target", "strong", "weak", "merged", "calibrated")}
    assert differ(folds={"seed": 7}) == {"calibrated", *scored}
    assert differ(evaluate={"max_new_tokens": 3}) == {"weak", "merged", "calibrated", *scored}
    assert not differ(name="other")  # control


def test_several_recipes_share_what_they_have_in_common(fields, tmp_path):
    other = {**fields, "name": "other", "merges": {"merged": {"method": "linear"}}}
    made = run_recipes([fields, other], tmp_path)
    assert made == {"tiny": {42: tmp_path / "tiny"}, "other": {42: tmp_path / "other"}}
    for name, count in (("strong", 1), ("weak", 1), ("merged", 2), ("evaluate-strong", 1)):
        assert len(list(tmp_path.glob(f"stages/{name}-*"))) == count
    for name in made:
        results = json.loads((tmp_path / name / "results.json").read_text())
        assert [stage["stage"] for stage in results["stages"]].count("merged") == 1
    assert run_recipes([other], tmp_path) == {"other": made["other"]}  # finds its place again
    alone = expunge.run(other, tmp_path / "alone")[42]
    assert stages(alone).items() <= stages(tmp_path).items()


def test_a_folder_of_one_recipe_and_recipes_of_one_name_are_refused(fields, tmp_path):
    with pytest.raises(RecipeError, match="two recipes are called 'tiny'"):
        run_recipes([fields, fields], tmp_path)
    Pipeline(fields, tmp_path)
    with pytest.raises(RunError, match="belongs to one recipe"):
        run_recipes([fields, {**fields, "name": "other"}], tmp_path)


def test_a_sweep_is_a_recipe_for_every_combination(fields):
    changes = parse_sweep(
        ["branches.weak.optimizer.lr=1e-4,3e-4", "branches.weak.terms.0.weight=2"]
    )
    said = []
    recipes = swept(load_recipe(fields), changes, say=said.append)
    assert said[1] == "tiny-2: branches.weak.optimizer.lr=3e-4, branches.weak.terms.0.weight=2"
    assert [recipe.name for recipe in recipes] == ["tiny-1", "tiny-2"]
    assert [recipe.branches["weak"].optimizer.lr for recipe in recipes] == [1e-4, 3e-4]
    assert recipes[0].branches["weak"].terms[0].weight == 2
    assert recipes[0].branches["strong"] == load_recipe(fields).branches["strong"]


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("branches.weak", "takes path=value,value"),
        ("branches.weak.optimizer.rl=1", r"--sweep .*rl=1: .*Did you mean 'lr'"),
        ("branches.weak.optimizer.lr=[1,", r"--sweep .*lr: '\[1,' are no values as in YAML"),
        (
            "branches.weak.terms.7.weight=1",
            "--sweep branches.weak.terms.7.weight: there is no '7' there",
        ),
        ("name.first=1", "there is no 'first' there"),
        ("branches.weak.optimizer.lr= ", "takes path=value,value"),
        ("branches.weak.optimizer.lr=,", "takes path=value,value"),
    ],
)
def test_a_sweep_of_nothing_is_refused(fields, sweep, message):
    with pytest.raises(RecipeError, match=message):
        swept(load_recipe(fields), parse_sweep([sweep]))


def test_a_field_is_swept_once():
    with pytest.raises(RecipeError, match=r"--sweep names a\.lr twice; give all its values"):
        parse_sweep(["a.lr=1,2", "a.lr=3"])
    assert parse_sweep(["a.lr=1,2", "b.lr=3"]) == {"a.lr": [1, 2], "b.lr": [3]}  # control


def test_ray_is_refused_to_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="--ray runs in one process"):
        do_on_ray(graph(("a", "")), print, Workers())


def test_where_data_lies_is_passed_on_and_no_secret(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"EXPUNGE_DATA": "data", "HF_ENDPOINT": "http://hub.example", "HF_TOKEN": "secret"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    passed = on_ray._environment()
    assert passed["EXPUNGE_DATA"] == str(tmp_path / "data")
    assert passed["HF_ENDPOINT"] == "http://hub.example"
    assert "secret" not in passed.values()
    monkeypatch.delenv("EXPUNGE_DATA")
    assert "EXPUNGE_DATA" not in on_ray._environment()


def test_without_ray_the_command_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RunError, match=r"pip install 'expunge\[ray\]'"):
        do_on_ray(graph(("a", "")), print, Workers())


# --- a cluster of two nodes -------------------------------------------------------------------


@pytest.fixture(scope="module")
def workers():
    """Two nodes of one CPU on this machine."""
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    # Workers are at nice 15 by default, and starve where other work is on all cores.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 (Ray's spelling)
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    cluster.wait_for_nodes()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums of one process are those of a worker
    yield Workers(cluster.address)
    torch.set_num_threads(threads)
    cluster.shutdown()


@needs_ray
def test_a_cluster_makes_what_one_process_makes(fields, tmp_path, workers):
    here = expunge.run(fields, tmp_path / "here")[42]
    there = expunge.run(fields, tmp_path / "there", workers=workers)[42]
    assert stages(there) == stages(here)
    assert len(stages(here)) == 3
    results = [json.loads((folder / "results.json").read_text()) for folder in (here, there)]
    assert results[0]["models"] == results[1]["models"]
    assert not list(there.glob("stages/*.partial"))


@needs_ray
def test_a_killed_workers_cell_goes_on_from_its_checkpoint(fields, tmp_path, workers):
    fields = {**fields, "merges": {}, "unscored": ["target", "strong", "weak"]}
    fields["branches"]["strong"]["schedule"] = {"epochs": 8, "micro_batch": 2}
    here = expunge.run(fields, tmp_path / "here")[42]
    with ThreadPoolExecutor(1) as thread:
        killed = thread.submit(kill_in_the_middle, tmp_path / "there", "strong")
        there = expunge.run(fields, tmp_path / "there", workers=workers)[42]
        assert killed.result() > 0
    assert stages(there) == stages(here)
    (log,) = there.glob("stages/strong-*/log.jsonl")
    assert log.read_text().startswith(MARK)  # the steps before are not done again


def kill_in_the_middle(run: Path, name: str) -> int:
    """SIGKILL the worker that builds a stage once it has a checkpoint, and mark its log."""
    deadline = time.monotonic() + 600
    while not (found := list(run.glob(f"stages/{name}-*.partial/checkpoint.safetensors"))):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    partial = found[0].parent
    lock = partial.with_name(f".{partial.name.removesuffix('.partial')}.lock")
    mine = psutil.Process().children(recursive=True)
    (worker,) = [p for p in mine if str(lock) in {file.path for file in p.open_files()}]
    worker.send_signal(signal.SIGKILL)
    worker.wait(10)
    assert partial.exists()  # it was killed before the end
    log = partial / "log.jsonl"
    log.write_text(MARK + log.read_text())
    return worker.pid


@needs_ray
@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "from expunge.errors import DataError; raise DataError('no\\nsuch item')",
            r"no\\nsuch item",  # shown, not sent
        ),
        ("import signal; signal.raise_signal(9)", "the workers of last died, 2 of them"),
        ("assert False, 'a bug'", "AssertionError: a bug"),
    ],
)
def test_what_ends_a_cell_ends_the_graph(workers, tmp_path, monkeypatch, code, message):
    monkeypatch.setattr("expunge.on_ray.TRIES_AGAIN", 1)
    touched = tmp_path / "touched"
    cells = [
        Cell("first", (), "import torch, numba; assert torch.get_num_threads() == 1"),
        Cell("last", ("first",), code),
        Cell("never", ("last",), f"import pathlib; pathlib.Path('{touched}').touch()"),
    ]
    kind = Exception if "bug" in message else ExpungeError
    with pytest.raises(kind, match=message):
        do_on_ray(cells, exec, workers)
    assert not touched.exists()
    do_on_ray([replace(cells[2], needs=())], exec, workers)
    assert touched.exists()  # control


@needs_ray
def test_what_a_cell_says_reaches_the_user(workers, capsys):
    code = "import sys; from expunge.progress import say; say('3 items are cut'); print('noise')"
    do_on_ray([Cell("says", (), code)], exec, workers)
    assert capsys.readouterr().err == "expunge: 3 items are cut\n"


@needs_ray
def test_a_worker_reads_data_where_the_driver_does(workers, tmp_path, monkeypatch):
    (tmp_path / "items.jsonl").touch()
    code = "from expunge.data.sources import locate; assert locate('data:items.jsonl').is_file()"
    monkeypatch.delenv("EXPUNGE_DATA", raising=False)
    with pytest.raises(DataError, match=r"items\.jsonl"):  # control
        do_on_ray([Cell("reads", (), code)], exec, workers)
    monkeypatch.setenv("EXPUNGE_DATA", str(tmp_path))
    do_on_ray([Cell("reads", (), code)], exec, workers)


@needs_ray
def test_a_cell_that_no_node_has_room_for_is_refused(workers):
    with pytest.raises(RunError, match="no node has 2 CPUs for a cell; the largest has 1"):
        do_on_ray(graph(("a", "")), print, Workers(workers.address, cpus_per_cell=2))


@needs_ray
def test_a_mistake_that_a_worker_finds_is_one_line_and_exit_code_2(fields, tmp_path, workers):
    weak = {**fields["branches"]["weak"], "lora": {"targets": ["q_porj"]}}
    fields = {**fields, "branches": {"weak": weak}, "merges": {}, "unscored": ["target", "weak"]}
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(fields))
    done = command("run", recipe, "--out", tmp_path / "run", "--ray", workers.address)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "no linear layer called 'q_porj'. Did you mean 'q_proj'?" in line


@needs_ray
def test_a_cluster_that_is_not_there_is_one_line():
    with pytest.raises(RunError, match=r"no Ray cluster answers at 127\.0\.0\.1:1$"):
        do_on_ray(graph(("a", "")), print, Workers("127.0.0.1:1"))
    with pytest.raises(RunError, match=r"no Ray cluster answers at 127\.0\.0\.1:65536$"):
        do_on_ray(graph(("a", "")), print, Workers("127.0.0.1:65536"))
    with pytest.raises(RecipeError, match="--ray takes auto, local or HOST:PORT, not 'head'"):
        do_on_ray(graph(("a", "")), print, Workers("head"))


def test_a_worker_that_cannot_see_the_run_folder_says_so(fields, tmp_path):
    *_, cell = cells_of(Pipeline(fields, tmp_path / "run"))
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(RunError, match=r"cannot see the run folder .* every node shares"):
        do_stage(cell.work)


@needs_ray
@pytest.mark.parametrize("trim", ["tensor", "model"])
def test_shards_that_workers_write_are_those_of_one_process(
    tiny_folder, tmp_path, workers, trim, monkeypatch
):
    for seed in (1, 2):
        model = load_model(tiny_folder)
        rng = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=rng)
        save_model(model, load_tokenizer(tiny_folder), tmp_path / f"model-{seed}")
    fields = {
        "method": "ties",
        "base_model": str(tiny_folder),
        "models": [{"model": str(tmp_path / f"model-{seed}")} for seed in (1, 2)],
        "parameters": {"density": 0.5, "trim": trim},
    }
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(fields))
    made = {}
    for name, where in (("here", None), ("there", workers)):
        if where is not None:  # this process can write nothing any more
            monkeypatch.setattr(sys.modules["expunge.merge.engine"], "_merge_job", None)
        out, file = tmp_path / name, tmp_path / "merge.yaml"
        made[name] = merge_models(file, out, shard_bytes=40_000, workers=where)
    own = ("merge.json", "README.md")  # one has times, the other begins with its folder's name
    files = [
        {p.name: p.read_bytes() for p in (tmp_path / name).iterdir() if p.name not in own}
        for name in made
    ]
    assert len([name for name in files[0] if name.startswith("model-")]) > 2
    assert files[0] == files[1]
    cards = [(tmp_path / name / "README.md").read_text() for name in made]
    assert cards[0].replace("# here\n", "# there\n") == cards[1]
    for fact in ("tensors", "merged", "parameters", "resumed", "storage_survival"):
        assert made["here"][fact] == made["there"][fact]


def test_a_recipes_merges_are_not_given_to_workers_by_themselves(fields, tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(fields))
    words = ["merge", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path), "--ray", "local"]
    with pytest.raises(RecipeError, match="expunge run RECIPE --ray"):
        app(words)
    with pytest.raises(RecipeError, match="--cpus-per-cell goes with --ray"):
        app([*words[:-2], "--cpus-per-cell", "1"])
