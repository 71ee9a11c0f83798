"""A branch after another: it goes on from that one's adapter, with levels of what that one left."""

import copy
import json

import pytest
import torch

from expunge.adapter_files import read_adapter
from expunge.companions.levels import read_levels
from expunge.data.batches import encode_all
from expunge.errors import ModelError, RecipeError
from expunge.lora import Lora, add_adapter, load_adapter, remove_adapter, save_adapter, start_from
from expunge.models import load_model, load_tokenizer
from expunge.pipeline import Pipeline
from expunge.plan.predict import plan
from expunge.recipe import load_recipe
from expunge.runner import cells_of
from expunge.unlearn import trainer

LORA = {"rank": 2, "alpha": 4, "dropout": 0}


@pytest.fixture
def fields(tiny_folder) -> dict:
    optimizer = {"lr": 1e-3, "compute": "float32", "checkpoint_seconds": 0}
    shared = {
        "terms": [
            {"half": "forget", "loss": "hinge_level", "scope": "document"},
            {"half": "retain", "loss": "nll"},
        ],
        "levels": {"of": "unseen"},
        "lora": LORA,
        "schedule": {"epochs": 1, "micro_batch": 2, "accumulation": 2},
        "optimizer": optimizer,
    }
    synthetic = {"documents": 1, "members": 2, "kept": 1, "nonmembers": 2, "unseen": 6}
    return {
        "name": "after",
        "model": {"path": str(tiny_folder), "max_length": 400, "separator": " "},
        "data": {"synthetic": synthetic},
        "branches": {"level": shared, "beyond": {**shared, "after": "level"}},
    }


def told(weights) -> dict:
    return json.loads((weights.folder.parent / "stage.json").read_text())


def apart(one, other) -> float:
    """The greatest difference of two adapters' factors."""
    first, second = (read_adapter(weights.adapter)[0] for weights in (one, other))
    assert first.keys() == second.keys()
    pairs = zip(first.values(), second.values(), strict=True)
    return max(float((a - b).abs().max()) for p in pairs for a, b in zip(*p, strict=True))


def test_it_begins_where_the_other_ended(fields, tmp_path):
    fields["branches"]["beyond"]["optimizer"] = {"lr": 1e-6, "compute": "float32"}
    fields["branches"]["fresh"] = {**fields["branches"]["beyond"], "after": None}
    pipeline = Pipeline(fields, tmp_path)
    level, beyond = pipeline.branch("level", 42), pipeline.branch("beyond", 42)
    assert 0 < apart(beyond, level) < 1e-5
    assert apart(pipeline.branch("fresh", 42), level) > 1e-3  # control: it begins with B = 0
    assert told(beyond)["inputs"]["after"] == level.folder.parent.name
    assert "after" not in told(level)["inputs"] | told(level)["section"]  # keys from before stand


def test_its_levels_are_those_of_the_model_it_begins_with(fields, tmp_path):
    pipeline = Pipeline(fields, tmp_path)
    config = pipeline.recipe.branches["beyond"]
    level = pipeline.branch("level", 42)
    found, before = (read_levels(pipeline.levels(config, begun)) for begun in (level, None))
    model, tokenizer = load_model(pipeline.target.base), load_tokenizer(pipeline.target.base)
    load_adapter(model, level.adapter)
    items = encode_all(pipeline.sets.forget, tokenizer, **pipeline.recipe.model.reading)
    expected = pipeline.unseen_levels(config, items, tokenizer).now(model)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before[0], expected[0], rtol=1e-5, atol=1e-5)  # control
    beyond = told(pipeline.branch("beyond", 42))
    assert beyond["inputs"]["levels"] == pipeline.levels(config, level).name


def test_a_killed_one_goes_on_and_ends_with_the_same_bytes(fields, tmp_path, monkeypatch):
    fields["branches"]["beyond"]["schedule"] = {"epochs": 3, "micro_batch": 2, "accumulation": 1}
    expected = Pipeline(fields, tmp_path / "whole").branch("beyond", 42).adapter
    real, left = trainer._clip, 3

    def killed(*given, **options):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return real(*given, **options)

    Pipeline(fields, tmp_path / "broken").branch("level", 42)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_clip", killed)
        with pytest.raises(KeyboardInterrupt):
            Pipeline(fields, tmp_path / "broken").branch("beyond", 42)
    made = Pipeline(fields, tmp_path / "broken").branch("beyond", 42).adapter
    for path in expected.rglob("*.safetensors"):
        assert (made / path.name).read_bytes() == path.read_bytes()


def test_a_run_makes_it_after_the_other_and_a_plan_counts_both(fields, tmp_path):
    recipe = load_recipe(fields)
    assert recipe.made_from("beyond") == ("level",)
    assert recipe.made_from("level") == ("target",)
    cells = {cell.name: cell.needs for cell in cells_of(Pipeline(recipe, tmp_path / "run"))}
    (needs,) = [needs for name, needs in cells.items() if name.startswith("beyond-")]
    assert [need.split("-")[0] for need in needs] == ["data", "level"]
    stages = {stage.label[0] for stage in plan(recipe, tmp_path / "plan").stages}
    assert {"level", "beyond"} <= stages


def test_what_cannot_be_gone_on_from_is_refused_when_the_recipe_is_read(fields):
    def refused(match: str, **changes) -> None:
        branch = {**fields["branches"]["beyond"], **changes}
        branches = {**fields["branches"], "beyond": branch}
        with pytest.raises(RecipeError, match=match):
            load_recipe({**fields, "branches": branches})

    refused(r"comes after 'lvel', which is no branch above it. Above it: level", after="lvel")
    refused("comes after 'beyond', which is no branch above it", after="beyond")
    refused("give both the same lora.rank, alpha, targets and layers", lora={**LORA, "rank": 3})
    refused("after needs training: lora, on the whole target", training="full")
    load_recipe({**fields, "branches": {**fields["branches"]}})  # control
    other = {**fields["branches"]["level"], "training": "full"}
    with pytest.raises(RecipeError, match="is no adapter on the whole target"):
        load_recipe({**fields, "branches": {**fields["branches"], "level": other}})


def test_an_adapter_of_another_shape_is_refused_by_name(tiny, tmp_path):
    small = Lora(rank=2, alpha=4, targets=("q_proj",))
    add_adapter(tiny, small, seed=0)
    save_adapter(tiny, small, tmp_path / "a", base="tiny")
    start_from(tiny, tmp_path / "a")  # its own
    remove_adapter(tiny)
    for lora, match in (
        (Lora(rank=4, alpha=8, targets=("q_proj",)), "has rank 2 and scale 2, where .* 4 and 2"),
        (Lora(rank=2, alpha=2, targets=("q_proj",)), "has rank 2 and scale 2, where .* 2 and 1"),
        (Lora(rank=2, alpha=4, targets=("q_proj", "k_proj")), "do not both adapt .*k_proj"),
    ):
        model = copy.deepcopy(tiny)
        add_adapter(model, lora, seed=0)
        with pytest.raises(ModelError, match=match):
            start_from(model, tmp_path / "a")
