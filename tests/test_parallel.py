"""Two processes do what one does: losses, weights, rows; what a rank that dies leaves behind."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.nn import Parameter

import expunge
from expunge import parallel, sharding
from expunge.errors import RunError, TrainingError
from expunge.unlearn.trainer import CHECKPOINT, Optimizer, train
from expunge.unlearn.watch import EVALUATIONS

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "configs" / "accelerate"
no_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)


def command(config: str, *words: object) -> list[str]:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    return [*launch, "--config_file", str(CONFIGS / f"{config}.yaml"), *map(str, words)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def worker():
    spec = importlib.util.spec_from_file_location("ranks", HERE / "ranks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def one(tiny_folder, tmp_path_factory):
    """What one process trains and is told."""
    out = tmp_path_factory.mktemp("one")
    worker().train_all(tiny_folder, out)
    worker().read_all(tiny_folder, out)
    return out


@pytest.fixture(scope="module", params=["ddp", "fsdp2", pytest.param("zero3", marks=no_deepspeed)])
def two(request, tiny_folder, tmp_path_factory):
    """The name of a shipped configuration, and what two processes made with it."""
    out = tmp_path_factory.mktemp(request.param)
    done = subprocess.run(
        command(request.param, HERE / "ranks.py", tiny_folder, out),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return request.param, out


def log_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


RUNS = [
    "joint",
    "normalized",
    "lone",
    "pairs",
    "full",
    "last_block",
    "ngdiff",
    "sam",
    "logits",
    "hidden",
    "steered_lora",
    "steered_full",
    "raised",
    "levels",
    "tune",
]


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_what_one_does(one, two, name):
    _, out = two
    mine, theirs = log_of(one / name), log_of(out / name)
    assert len(mine) >= 2
    for expected, found in zip(mine, theirs, strict=True):
        fitted = [record.pop("rate.fitted", 0.0) for record in (expected, found)]
        assert fitted[1] == pytest.approx(fitted[0], rel=1e-2)  # from differences of near losses
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    files = sorted(path.relative_to(one) for path in (one / name).rglob("*.safetensors"))
    assert files
    for file in files:
        expected, found = load_file(one / file), load_file(out / file)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, atol=1e-5, rtol=1e-4)


def test_each_process_holds_its_slice_of_a_sharded_model(two):
    name, out = two
    counts = [json.loads((out / f"held-{rank}.json").read_text()) for rank in range(2)]
    if name == "ddp":
        assert counts[0] == counts[1]  # control: the whole model twice
    else:
        whole = sum(t.numel() for t in load_file(out / "tune/model/model.safetensors").values())
        assert sum(counts) == whole
        assert max(counts) < 0.51 * whole


def test_two_processes_watch_what_one_does(one, two):
    found = []
    for out in (one, two[1]):
        lines = (out / "joint" / EVALUATIONS).read_text().splitlines()
        found.append([json.loads(line)["numbers"] for line in lines])
    assert len(found[0]) == len(found[1]) >= 2
    for expected, numbers in zip(*found, strict=True):
        assert numbers == pytest.approx(expected, rel=1e-5)


def test_an_evaluation_during_training_is_refused_where_the_model_is_sharded(two):
    name, out = two
    said = [(out / f"refused-{rank}.txt").read_text() for rank in range(2)]
    if name == "ddp":
        assert said == ["", ""]  # control: each process holds the whole model
    else:
        assert all("watch.read: evaluation needs the whole model" in one for one in said)
        assert not (out / "watched" / "log.jsonl").exists()


def test_every_row_is_read_by_one_process_and_known_to_both(one, two):
    _, out = two
    expected = json.loads((one / "told-0.json").read_text())
    told = [json.loads((out / f"told-{rank}.json").read_text()) for rank in range(2)]
    assert sum(each["forwards"] for each in told) == expected["forwards"]
    assert min(each["forwards"] for each in told) > 0.3 * expected["forwards"]
    for each in told:
        assert each["generations"] == expected["generations"]
        for (logp, rank), (wanted, wanted_rank) in zip(
            each["scores"], expected["scores"], strict=True
        ):
            np.testing.assert_allclose(logp, wanted, atol=1e-5)
            assert rank == wanted_rank
        np.testing.assert_allclose(each["gradients"], expected["gradients"], rtol=1e-5)
        np.testing.assert_allclose(each["options"], expected["options"], atol=1e-5)
    assert rows(out) == rows(one)
    assert set(rows(out).values()) == {1}


def rows(folder: Path) -> Counter:
    """How often each row of each table was written."""
    return Counter(
        (path.name.split("-")[0], key)
        for path in folder.glob("tables/*/*.parquet")
        for key in pq.read_table(path).column("key").to_pylist()
    )


@pytest.fixture
def recipe(tiny_folder, tmp_path) -> Path:
    """A branch of forty steps, with a checkpoint at each."""
    for half, words in {"forget": ["ann", "bob", "cy"], "retain": ["oslo", "rome"]}.items():
        lines = [
            {"id": f"{half}-{w}", "input": f"Who is {w}?", "output": w[::-1], "task": "Task1"}
            for w in words
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{half}.jsonl").write_text(text)
    branch = {
        "terms": [{"half": "forget", "loss": "npo"}, {"half": "retain", "loss": "nll"}],
        "lora": {"rank": 2, "alpha": 4, "dropout": 0.0},
        "schedule": {"epochs": 40, "accumulation": 3},
        "optimizer": {"lr": 1e-3, "compute": "float32", "checkpoint_seconds": 0},
    }
    fields = {
        "name": "tiny",
        "model": {"path": str(tiny_folder)},
        "data": {half: {"path": str(tmp_path / f"{half}.jsonl")} for half in ("forget", "retain")},
        "branches": {"strong": branch},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def said(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("expunge: ")]


def test_a_killed_rank_ends_all_with_one_message_and_one_process_goes_on(recipe, tmp_path):
    out = tmp_path / "run"
    words = command("fsdp2", "-m", "expunge", "unlearn", recipe, "--out", out)
    launcher = subprocess.Popen(
        words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 100
    while not (logs := list(out.glob("stages/strong-*/log.jsonl"))) or len(log_lines(logs[0])) < 5:
        assert launcher.poll() is None, launcher.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ranks = [p for p in psutil.Process(launcher.pid).children() if p.environ().get("RANK") == "1"]
    ranks[0].send_signal(signal.SIGKILL)
    start = time.monotonic()
    _, stderr = launcher.communicate(timeout=60)
    assert time.monotonic() - start < 45
    assert launcher.returncode != 0
    assert len(said(stderr)) <= 1, stderr
    assert stderr.count("Traceback") == 1  # the launcher's own
    left = list(out.glob(f"stages/strong-*.partial/{CHECKPOINT}"))
    assert left  # control: it was not finished
    adapter = expunge.unlearn(recipe, out)["strong"]
    whole = expunge.unlearn(recipe, tmp_path / "whole")["strong"]
    log = log_of(adapter.parent)
    assert [record["step"] for record in log] == list(range(1, 41))
    expected = load_file(whole / "adapter_model.safetensors")
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=1e-4)


def log_lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_a_mistake_is_said_once(recipe, tmp_path):
    recipe.write_text(recipe.read_text().replace("npo", "tpo"))
    done = subprocess.run(
        command("ddp", "-m", "expunge", "unlearn", recipe, "--out", tmp_path / "run"),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode != 0
    assert len(said(done.stderr)) == 1, done.stderr
    assert "no forget loss is called 'tpo'" in said(done.stderr)[0]


def test_one_process_is_its_own_world():
    assert (parallel.world(), parallel.rank(), parallel.is_main()) == (1, 0, True)
    assert parallel.gather("a") == ["a"]
    assert parallel.total({"loss": 0.1}) == {"loss": 0.1}


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_what_is_dealt_out_is_whole_and_even(parts):
    sizes = [3, 90, 17, 17, 40, 5, 64, 1, 33, 58, 58, 2]
    hands = parallel.deal(sizes, parts)
    assert sorted(number for hand in hands for number in hand) == list(range(len(sizes)))
    held = [sum(sizes[number] for number in hand) for hand in hands]
    assert max(held) - min(held) <= max(sizes)
    assert parallel.deal(sizes[:1], 3)[1:] == [[], []]  # control: more hands than things


def test_what_each_rank_would_do_alone_is_refused(monkeypatch):
    parallel.refuse_several("a merge")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="a merge runs in one process"):
        parallel.refuse_several("a merge")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "set fsdp_version: 2"),
        (
            {
                "ACCELERATE_USE_FSDP": "true",
                "FSDP_VERSION": "2",
                "FSDP_OFFLOAD_PARAMS": "true",
            },
            "fsdp_offload_params is not supported",
        ),
        (
            {
                "ACCELERATE_USE_FSDP": "true",
                "FSDP_VERSION": "2",
                "FSDP_ACTIVATION_CHECKPOINTING": "true",
            },
            "set it to false, and optimizer.checkpointing: true in the recipe",
        ),
        (
            {
                "ACCELERATE_USE_DEEPSPEED": "true",
                "ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json",
            },
            r"deepspeed_config_file \(ds.json\) is not read; .* set zero_stage: 3",
        ),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
            "ZeRO stage 2 is not supported",
        ),
    ],
)
def test_a_way_of_sharding_that_we_lack_is_refused(monkeypatch, asked, said):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not sharding.wanted()
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match=said):
        sharding.wanted()


@pytest.mark.parametrize("seconds", ["soon", "", "0", "nan", "1e300"])
def test_a_wait_that_is_no_time_is_refused(monkeypatch, seconds):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(parallel.TIMEOUT, seconds)
    parallel._distributed.cache_clear()
    with pytest.raises(RunError, match=f"{parallel.TIMEOUT} must be a number of seconds"):
        parallel.gather(1)


def test_a_launch_that_starts_one_process_only_is_refused(monkeypatch):
    parallel.refuse_lone_launch()
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(RunError, match=r"without --cpu, with --config_file .*ddp\.yaml"):
        parallel.refuse_lone_launch()


def one_step(folder: Path, name: str = "w", size: int = 2, steps: int = 2):
    weight = Parameter(torch.ones(size))

    def gradient(number):
        weight.grad = torch.ones(size)
        if number == 1:
            raise TrainingError("stop here")
        return {"loss": 1.0}

    config = Optimizer(lr=0.1, checkpoint_seconds=0)
    return train(
        {name: weight}, gradient, steps=steps, config=config, seed=1, folder=folder, label="b"
    )


@pytest.mark.parametrize("change", [{"name": "v"}, {"size": 3}])
def test_a_checkpoint_of_other_weights_is_refused(tmp_path, change):
    with pytest.raises(TrainingError, match="stop here"):
        one_step(tmp_path)
    with pytest.raises(TrainingError, match=r"is of another model or adapter: [vw]"):
        one_step(tmp_path, **change)
    with pytest.raises(TrainingError, match="step 2 of 2: stop here"):  # control: it goes on
        one_step(tmp_path)


def test_a_checkpoint_without_its_log_and_a_torn_one_are_refused(tmp_path):
    with pytest.raises(TrainingError, match="stop here"):
        one_step(tmp_path)
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(TrainingError, match=r"ends at step 0, but the checkpoint .* of step 1"):
        one_step(tmp_path)
    save_file({}, tmp_path / CHECKPOINT)
    (tmp_path / CHECKPOINT).write_bytes((tmp_path / CHECKPOINT).read_bytes()[:4])
    with pytest.raises(TrainingError, match=r"cannot be read .* delete it to train from the start"):
        one_step(tmp_path)
