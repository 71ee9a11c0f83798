"""Pruned units and single value vectors: what goes first, what is exactly zero, what comes back."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import expunge
from expunge.data.batches import pack
from expunge.edit.observe import down_projections, output_projections
from expunge.edit.pruning import EPSILON, Activity, highest, prune, silenced_values
from expunge.edit.units import _silence_attention, _silence_mlp
from expunge.lora import adapters_of, load_adapter
from expunge.models import load_model, load_tokenizer, save_model
from expunge.packs import hidden_states


def tensors(folder):
    return load_file(folder / "model.safetensors")


def test_importance_by_hand():
    activity = Activity()
    activity.add(torch.tensor([[1.0, -3.0], [3.0, 0.0]]))
    activity.add(torch.tensor([[-2.0, 0.0]]))
    for kind, wanted in {
        "mean": [2.0, 1.0],
        "freq": [2 / 3, 0.0],
        "rms": [(14 / 3) ** 0.5, 3**0.5],
        "std": [(14 / 3 - 4 / 9) ** 0.5, 2**0.5],
    }.items():
        assert activity.importance(kind).tolist() == pytest.approx(wanted)
    assert {kind for kind, epsilon in EPSILON.items() if epsilon != 1e-5} == {"freq"}
    scores = prune(torch.tensor([2.0, 1.0]), torch.tensor([4.0, 0.0]), epsilon=0.5)
    assert scores.tolist() == pytest.approx([2 / 4.5, 1 / 0.5])


def test_the_highest_of_all_layers_go_and_none_goes_twice():
    scores = {0: torch.tensor([1.0, 9.0]), 1: torch.tensor([5.0, 7.0])}
    assert highest(scores, {}, 0.5) == {0: [1], 1: [1]}
    assert highest(scores, {0: {1}}, 0.5) == {1: [1, 0]}


def test_a_value_row_goes_when_every_head_of_its_group_has_lost_it():
    """4 heads of size 2 in 2 groups: units 0 and 2 both read row 0; units 4 and 6 row 2."""
    assert silenced_values({0, 4, 6}, heads=4, groups=2, size=2) == [2]
    assert silenced_values({0, 2}, heads=4, groups=2, size=2) == [0]
    assert silenced_values({0, 3}, heads=2, groups=2, size=2) == [0, 3]


@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_a_pruned_unit_contributes_exactly_nothing(kind, tiny):
    find, silence = {
        "mlp": (down_projections, _silence_mlp),
        "attention": (output_projections, _silence_attention),
    }[kind]
    name, layer = find(tiny)[1]
    given = []
    hook = layer.register_forward_hook(lambda _, x, y: given.append((x[0][0], y[0])))
    tokens = torch.arange(1, 20)[None]
    with torch.no_grad():
        tiny(input_ids=tokens)
        units = {0, 8, 5} if kind == "attention" else {0, 5}  # 0 and 8 read one row: two heads
        touched = silence(tiny, name, units)
        tiny(input_ids=tokens)
    hook.remove()
    (x, y), (after, z) = given
    lost = x[:, sorted(units)] @ layer.weight.new_zeros(len(units), 32)
    assert torch.equal(layer.weight[:, sorted(units)], torch.zeros(32, len(units)))
    assert not torch.allclose(y, z)
    kept = [u for u in range(x.shape[1]) if u not in units]
    torch.testing.assert_close(z, x[:, kept] @ layer.weight[:, kept].T + lost)
    silent = sorted(units) if kind == "mlp" else [0, 8]
    assert not after[:, silent].any()  # nothing goes in either
    assert len(touched) == (3 if kind == "mlp" else 2)


def test_a_unit_that_fires_only_for_forget_goes_first(tiny_folder, halves, files, tmp_path):
    """Unit 7 of block 1 is made to see the direction that sets the halves apart."""
    model, tokenizer = load_model(tiny_folder), load_tokenizer(tiny_folder)
    mlp = model.model.layers[1].mlp
    seen = []
    hook = mlp.register_forward_pre_hook(lambda _, given: seen.append(given[0][0]))
    for items in (halves.forget, halves.retain):
        for text in halves.encoded(items, tokenizer):
            with torch.no_grad():
                hidden_states(model, pack([text], "document", "cpu"))
    hook.remove()
    retain = torch.cat(seen[len(halves.forget) :])
    basis = torch.linalg.svd(retain, full_matrices=False)[2][:28]
    forget = torch.cat(seen[: len(halves.forget)])
    away = forget - forget @ basis.T @ basis
    direction = torch.linalg.svd(away, full_matrices=False)[2][0]
    with torch.no_grad():
        mlp.up_proj.weight[7] = 20 * direction
    save_model(model, tokenizer, tmp_path / "planted")
    options = {"mlp": 0.011, "steps": 2}  # one of 96 units a step
    said = expunge.edit(
        "prune", str(tmp_path / "planted"), tmp_path / "out", options=options, **files
    )
    assert 7 in said["mlp_units"]["1"]
    assert sum(map(len, said["mlp_units"].values())) == 2
    before, after = tensors(tmp_path / "planted"), tensors(tmp_path / "out")
    for last in ("gate_proj", "up_proj"):
        assert not after[f"model.layers.1.mlp.{last}.weight"][7].any()
    assert not after["model.layers.1.mlp.down_proj.weight"][:, 7].any()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert sorted(changed) == said["tensors"]
    assert said["storage_survival"] == 1.0


def planted(tiny_folder, folder, tokenizer, answer, column=(1, 5)):
    """A model in which one value vector writes the words of an answer."""
    model = load_model(tiny_folder)
    head = model.get_output_embeddings().weight
    tokens = tokenizer(answer, add_special_tokens=False)["input_ids"]
    layer, place = column
    with torch.no_grad():
        direction = head[tokens].mean(0) - head.mean(0)
        model.model.layers[layer].mlp.down_proj.weight[:, place] = direction / direction.norm()
    save_model(model, tokenizer, folder)
    return folder


@pytest.mark.parametrize("method", ["needle", "ablate"])
def test_a_planted_concept_is_found_and_blurred(method, tiny_folder, tokenizer, files, tmp_path):
    start = planted(tiny_folder, tmp_path / "start", tokenizer, "bob")
    said = expunge.edit(method, str(start), tmp_path / "out", **files)
    assert [1, 5] in said["vectors"]["f1-"]
    before, after = tensors(start), tensors(tmp_path / "out")
    edited = {tuple(place) for own in said["vectors"].values() for place in own}
    for name, tensor in before.items():
        moved = (tensor != after[name]).reshape(len(tensor), -1).any(0).nonzero().flatten().tolist()
        layer = next((n for n in (0, 1) if f"layers.{n}.mlp.down_proj" in name), None)
        assert moved == sorted(c for one, c in edited if one == layer)
    column = after["model.layers.1.mlp.down_proj.weight"][:, 5]
    if method == "ablate":
        assert not column.any()
    else:
        noise = column - before["model.layers.1.mlp.down_proj.weight"][:, 5]
        assert 0.05 < float(noise.std()) < 0.2


def test_reverting_gives_the_weights_back_bit_for_bit(tiny_folder, tmp_path):
    """Stored in bfloat16, where what is added cannot be taken off again by subtracting."""
    model = LlamaForCausalLM.from_pretrained(tiny_folder).to(torch.bfloat16)
    save_model(model, load_tokenizer(tiny_folder), tmp_path / "start")
    for seed in (1, 2):
        name, options = f"needle-{seed}", {"layer": 0, "column": 3}
        expunge.edit("needle", str(tmp_path / "start"), tmp_path / name, options=options, seed=seed)
    expunge.edit("revert", str(tmp_path / "needle-1"), tmp_path / "back")
    start, one, two, back = (
        tensors(tmp_path / n) for n in ("start", "needle-1", "needle-2", "back")
    )
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(start[name], one[name])
    assert not torch.equal(one[name], two[name])
    for key, tensor in start.items():
        assert back[key].dtype == tensor.dtype
        assert torch.equal(back[key], tensor)


def test_an_adapted_model_is_edited_with_its_adapter(tiny_folder, drawn, tmp_path, tiny):
    adapter = drawn(1)
    options = {"layer": 0, "column": 3}
    expunge.edit("ablate", str(tiny_folder), tmp_path / "out", adapter=adapter, options=options)
    wanted = copy.deepcopy(tiny)
    load_adapter(wanted, adapter)
    after = tensors(tmp_path / "out")
    for name, layer in adapters_of(wanted).items():
        weight = layer.base.weight + layer.scale * layer.lora_B @ layer.lora_A
        weight = weight.detach().clone()
        if name == "model.layers.0.mlp.down_proj":
            weight[:, 3] = 0
        torch.testing.assert_close(after[f"{name}.weight"], weight, atol=1e-6, rtol=1e-5)
