"""docs/scaling.md is true: its examples parse, its commands exist, its arithmetic adds up."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import typer
import yaml

from expunge.cli import app
from expunge.unlearn.footprint import Demand, Shape, memory_of
from expunge.unlearn.trainer import Optimizer

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
UNITS = {"GB": 1e9, "s": 1.0}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def rows(pattern: str) -> list[tuple[str, ...]]:
    return re.findall(pattern, TEXT, re.MULTILINE)


def commands() -> list[list[str]]:
    """Every `expunge` command of the examples, as words."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    lines += [document["spec"]["entrypoint"] for document in map(yaml.safe_load, blocks("yaml"))]
    return [shlex.split(line)[1:] for line in lines if line.startswith("expunge ")]


@pytest.mark.parametrize("script", blocks("bash"))
def test_a_script_is_valid_bash(script):
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert subprocess.run(["bash", "-n"], input=b"if", capture_output=True).returncode  # control


def test_every_group_of_the_ray_job_mounts_what_the_command_writes_to():
    (job,) = map(yaml.safe_load, blocks("yaml"))
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        spec = group["template"]["spec"]
        (container,) = spec["containers"]
        (mount,) = container["volumeMounts"]
        assert mount["name"] in {volume["name"] for volume in spec["volumes"]}
        assert mount["mountPath"] in job["spec"]["entrypoint"]


@pytest.mark.parametrize("words", commands(), ids=lambda words: words[0])
def test_a_command_of_the_examples_exists(words):
    group = typer.main.get_command(app)
    command = group.commands[words[0]]  # pyright: ignore
    context = command.make_context(words[0], list(words[1:]), resilient_parsing=False)
    assert context.params["ray"]
    for recipe in context.params.get("recipes", []):
        assert (ROOT / "recipes" / Path(recipe).name).is_file()


def test_there_are_examples():
    assert len(commands()) == 6
    assert len(rows(FORMULA)) > 20


SYMBOL = r"^\| `(\w)` \| ([\d.e]+) \|"
FORMULA = r"^\| .* \| `([^`|]+)` \| ([\d.]+) (GB|s) \|$"


def memory(shards: float, rank: int | None) -> int:
    """What the code foretells of a branch of the section's model, on one of `shards` GPUs."""
    sizes = {name: int(float(value)) for name, value in rows(SYMBOL)}
    shape = Shape(*(sizes[name] for name in "LdkfHVN"))
    demand = Demand(
        optimizer=Optimizer(max_tokens=sizes["T"], checkpointing=True),
        weights="float32" if rank is None else "bfloat16",
        passes=((sizes["n"],) * (sizes["S"] // sizes["n"]),),
        piece=sizes["n"],
        longest=sizes["n"],
        rank=rank,
        kl=True,
        shards=int(shards),
        buffers=1,
    )
    return memory_of(shape, demand)


def value_of(formula: str) -> float:
    symbols = {name: float(value) for name, value in rows(SYMBOL)}
    rank = int(symbols["r"])
    code = {
        "lora": lambda shards: memory(shards, rank),
        "full": lambda shards: memory(shards, None),
    }
    return eval(formula, {"__builtins__": {}}, {**symbols, **code})


@pytest.mark.parametrize(("formula", "said", "unit"), rows(FORMULA))
def test_a_number_follows_from_its_formula(formula, said, unit):
    value = value_of(formula) / UNITS[unit]
    assert f"{value:.3g}" == f"{float(said):.3g}"
    assert float(said) == float(f"{value:.3g}")


def test_the_parts_of_a_lora_branch_add_up_to_what_the_code_foretells():
    formulas = [formula for formula, _, _ in rows(FORMULA)]
    parts = formulas[: formulas.index("lora(G)")]
    assert len(parts) == 8
    assert sum(map(value_of, parts)) == pytest.approx(value_of("lora(G)"), rel=1e-6)
