"""Edits in a recipe: made, scored, planned, taken up again; impossible ones refused at once."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import expunge
from expunge.adapter_files import WEIGHTS
from expunge.cli import app
from expunge.edit.methods import EDITS as EDIT_METHODS
from expunge.errors import EditError, RecipeError
from expunge.inputs import check_parts
from expunge.pipeline import Pipeline
from expunge.plan.predict import plan
from expunge.recipe import load_recipe
from expunge.runner import cells_of

ROOT = Path(__file__).parents[2]
EDITS = {
    "negated": {"of": "branch", "method": "negate", "options": {"scale": 0.5}},
    "repaired": {"of": "merged", "method": "sage", "options": {"items": 2}},
    "again": {"of": "negated", "others": ["repaired"], "method": "add"},
    "full-negated": {"of": "full", "method": "negate"},
    "pruned": {"of": "repaired", "method": "prune", "options": {"attention": 0.02}},
    "blurred": {"method": "needle", "options": {"layer": 1, "column": 2}},
    "back": {"of": "blurred", "method": "revert"},
}


@pytest.fixture
def fields(tiny_folder) -> dict:
    optimizer = {"lr": 1e-3, "compute": "float32", "checkpoint_seconds": 0}
    branch = {
        "terms": [{"half": "forget", "loss": "npo"}],
        "lora": {"rank": 2, "alpha": 4},
        "schedule": {"epochs": 1, "micro_batch": 4, "accumulation": 1},
        "optimizer": optimizer,
    }
    return {
        "name": "tiny",
        "model": {"path": str(tiny_folder), "max_length": 400, "separator": " "},
        "data": {"synthetic": {"documents": 1, "nonmembers": 2}},
        "branches": {"branch": branch, "full": {**branch, "training": "full"}},
        "merges": {"merged": {"of": ["branch"]}},
        "edits": EDITS,
        "evaluate": {"max_new_tokens": 2, "resamples": 20},
        "unscored": ["target", "branch", "full", "merged", *(n for n in EDITS if n != "pruned")],
    }


def test_edits_are_made_scored_and_found_again(fields, tmp_path, tiny_folder):
    expunge.run(fields, tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["models"]) == ["target", "branch", "full", "merged", *EDITS]
    assert results["models"]["pruned"]["semeval"]["mia"]["auc"] is not None
    pipeline = Pipeline(fields, tmp_path)
    made = {name: pipeline.weights(name, 42) for name in pipeline.recipe.models}
    for name in EDITS:
        assert (made[name].adapter is not None) == pipeline.recipe.adapters[name]
        said = json.loads((made[name].folder.parent / "edit.json").read_text())
        assert said["method"] == EDITS[name]["method"]
        assert said["tensors"] and (said["norm"] > 0 or name == "back")
    assert made["again"].adapter is not None
    assert made["pruned"].adapter is None
    one, two = (load_file(made[n].folder / WEIGHTS) for n in ("branch", "negated"))
    for key, tensor in one.items():
        assert torch.equal(two[key], -0.5 * tensor if "lora_A" in key else tensor)
    start = load_file(tiny_folder / "model.safetensors")
    for name, changes in (("blurred", True), ("back", False)):
        held = load_file(made[name].base / "model.safetensors")
        assert changes != all(torch.equal(held[key], start[key]) for key in start)
    whole, tuned = (load_file(made[n].base / "model.safetensors") for n in ("full-negated", "full"))
    for key, tensor in start.items():
        torch.testing.assert_close(whole[key], 2 * tensor - tuned[key], atol=1e-6, rtol=1e-5)


def test_each_edit_is_a_cell_that_waits_for_what_it_is_made_from(fields, tmp_path):
    cells = {cell.name: cell for cell in cells_of(Pipeline(fields, tmp_path))}
    short = {name.rpartition("-")[0]: name for name in cells}
    needs = {n.rpartition("-")[0] for n in cells[short["again"]].needs}
    assert {"negated", "repaired"} <= needs
    other = {**EDITS, "negated": {**EDITS["negated"], "options": {"scale": 0.6}}}
    changed = {c.name for c in cells_of(Pipeline({**fields, "edits": other}, tmp_path))}
    differ = {name.rpartition("-")[0] for name in cells.keys() - changed}
    assert differ == {"negated", "again"}


def test_a_plan_foretells_edits(fields, tmp_path):
    fields = {**fields, "edits": {name: EDITS[name] for name in ("negated", "repaired", "pruned")}}
    made = plan(load_recipe({**fields, "unscored": ["target", "full"]}))
    edits = {stage.stage: stage for stage in made.stages if stage.stage in EDITS}
    assert list(edits) == ["negated", "repaired", "pruned"]
    assert edits["pruned"].seconds > edits["negated"].seconds > 0


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"of": "brnch", "method": "negate"}, "names the model 'brnch'. Did you mean 'branch'"),
        ({"of": "later", "method": "negate"}, "names the model 'later'"),
        ({"of": "target", "method": "negate"}, "takes an update of the target"),
        ({"of": "full", "method": "bias"}, "bias takes adapters; full is a model"),
        ({"of": "branch", "others": ["full"], "method": "pem_add"}, "takes adapters; full"),
        ({"of": "branch", "method": "ia3_negate"}, "no branch is"),
        ({"of": "branch", "method": "revert"}, "keeps nothing that would undo it"),
        ({"of": "branch", "method": "negatte"}, "Did you mean 'negate'"),
        ({"of": "branch", "method": "negate", "options": {"alpha": 1}}, "unknown field alpha"),
        ({"of": "branch", "method": "sage", "options": {"rank": 0}}, "rank: Input should be"),
        ({"method": "prune", "options": {"mlp": 0}}, "nothing would be pruned"),
        ({"method": "revs", "options": {"depth": 0.01}}, "depth must be at least margin"),
        ({"of": "branch", "others": ["merged"], "method": "analogy"}, "takes 2 models in others"),
        (
            {"of": "branch", "others": ["merged"], "method": "add", "options": {"weights": [1]}},
            "weights holds 1",
        ),
        (
            {"of": "branch", "others": ["wide"], "method": "pem_add"},
            r"ranks 2 \(branch\), 3 \(wide\).*add takes several",
        ),
        ({"of": "branch", "others": ["narrow"], "method": "add"}, r"lora\.targets differs"),
    ],
)
def test_an_impossible_edit_is_refused_when_the_recipe_is_read(fields, edit, message):
    branch = fields["branches"]["branch"]
    for name, lora in (("wide", {"rank": 3}), ("narrow", {"rank": 2, "targets": ["q_proj"]})):
        fields["branches"][name] = {**branch, "lora": lora}
    edits = {"edit": edit, "later": {"of": "branch", "method": "negate"}}
    with pytest.raises(RecipeError, match=message):
        load_recipe({**fields, "unscored": [], "edits": edits})


@pytest.mark.parametrize("method", ["needle", "ablate"])
def test_a_place_that_the_model_lacks_is_refused_before_anything_is_made(
    fields, tiny_folder, method
):
    def check(**options):
        edits = {"edit": {"method": method, "options": options}}
        check_parts(load_recipe({**fields, "edits": edits, "unscored": []}), tiny_folder)

    check(layer=1, column=47)  # control
    with pytest.raises(EditError, match="edit 'edit': there is no block 2; the model has 2"):
        check(layer=2, column=0)
    with pytest.raises(EditError, match="no column 48 in the down projection of block 1; it has"):
        check(layer=1, column=48)


def test_a_sum_takes_adapters_of_several_ranks_and_models_any_layers(fields):
    """What the refusals above leave: ranks add up, and weights are summed wherever they moved."""
    branch = fields["branches"]["branch"]
    fields["branches"]["wide"] = {**branch, "lora": {"rank": 3}}
    fields["branches"]["narrow"] = {**branch, "lora": {"rank": 2, "targets": ["q_proj"]}}
    edits = {
        "ranks": {"of": "branch", "others": ["wide"], "method": "add"},
        "layers": {"of": "full", "others": ["narrow"], "method": "add"},
    }
    adapters = load_recipe({**fields, "unscored": [], "edits": edits}).adapters
    assert (adapters["ranks"], adapters["layers"]) == (True, False)


def test_the_command_edits_and_says_what_it_did(tiny_folder, drawn, tmp_path, files):
    from typer.testing import CliRunner

    words = ["edit", "sage", str(tiny_folder), str(tmp_path / "out"), "--adapter", str(drawn(1))]
    words += ["--retain", files["retain"], "--set", "strength=2.5", "--set", "items=1", "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["options"]["strength"] == 2.5
    assert json.loads((tmp_path / "out" / "edit.json").read_text())["items"] == 1


def test_every_edit_names_its_test_and_is_in_the_guide():
    guide = (ROOT / "docs" / "editing.md").read_text(encoding="utf-8")
    for name, row in EDIT_METHODS.items():
        file, _, function = row.test.partition("::")
        assert f"def {function}(" in (ROOT / file).read_text(encoding="utf-8"), name
        assert f"`{name}`" in guide
        assert all(f"`{option}`" in guide for option in row.options.model_fields)
        assert row.cost
        assert row.fidelity in ("exact", "adapted", "inspired", "own", "as-released quirk")
