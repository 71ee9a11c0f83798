"""Branches in, one adapter or one model out: exact where it can be, honest where it cannot."""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from expunge.adapter_files import adapter_config, adapter_scales, read_adapter, write_adapter
from expunge.config import parse_section
from expunge.errors import MergeError, ModelError, RecipeError
from expunge.lora import LoraLinear, load_adapter
from expunge.merge.adapters import apply_deltas, merge_adapters, merged_deltas
from expunge.merge.families import Elect, Matrix
from expunge.merge.methods import METHODS
from expunge.merge.section import Merge

every_method = pytest.mark.parametrize(
    "method", [n for n, m in METHODS.items() if isinstance(m.how, Elect) and n != "sce"]
)


PLACES = [("factors", "adapter"), ("factors", "model"), ("delta", "adapter"), ("delta", "model")]
NEEDY = [n for n, m in METHODS.items() if isinstance(m.how, Matrix) and m.how.statistics]


def delta_of(folder):
    factors, config = read_adapter(folder)
    scales = adapter_scales(folder, factors, config)
    return {name: scales[name] * b @ a for name, (a, b) in factors.items()}


def assert_close(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)


@every_method
@pytest.mark.parametrize("space", ["factors", "delta"])
def test_one_branch_at_full_density_comes_back_unchanged(branches, method, space):
    config = Merge(method=method, density=1.0, space=space)
    assert_close(dict(merged_deltas(branches[:1], config)), delta_of(branches[0]))


def test_the_delta_space_merge_is_the_method_on_whole_deltas(branches):
    ours = dict(merged_deltas(branches, Merge(method="ties", density=0.5, space="delta")))
    one, two = map(delta_of, branches)
    for name in one:
        trimmed = []
        for delta in (one[name], two[name]):
            bound = delta.abs().flatten().sort(descending=True).values[delta.numel() // 2 - 1]
            trimmed.append(torch.where(delta.abs() >= bound, delta, 0))
        stack = torch.stack(trimmed)
        agrees = stack * torch.where(stack.sum(0) >= 0, 1.0, -1.0) > 0
        expected = (stack * agrees).sum(0) / agrees.sum(0).clamp_min(1)
        torch.testing.assert_close(ours[name], expected)


def test_merging_factors_is_not_merging_deltas(branches):
    factors = dict(merged_deltas(branches, Merge(space="factors")))
    deltas = dict(merged_deltas(branches, Merge(space="delta")))
    one = torch.cat([factors[name].flatten() for name in factors])
    two = torch.cat([deltas[name].flatten() for name in factors])
    assert torch.cosine_similarity(one, two, dim=0) < 0.9
    assert (one - two).norm() > 0.3 * two.norm()


def test_an_adapter_of_a_sum_is_exact_by_concatenation(branches, tmp_path):
    config = Merge(method="linear", weights=(0.5, -2.0), space="delta", normalize=True)
    report = merge_adapters(branches, config, tmp_path / "out")
    assert report["truncation_error"] is None
    one, two = map(delta_of, branches)
    expected = {name: (0.5 * one[name] - 2.0 * two[name]) / 2.5 for name in one}
    assert_close(delta_of(tmp_path / "out"), expected)


@pytest.mark.parametrize("options", [{"lambda": 0.5}, {"divide": "count"}, {"divide": "weights"}])
def test_a_sum_written_as_factors_is_divided_and_scaled_as_the_merge_is(
    branches, tmp_path, options
):
    config = Merge(method="task_arithmetic", weights=(1.0, 2.0), space="delta", options=options)
    merge_adapters(branches, config, tmp_path / "out")
    assert_close(delta_of(tmp_path / "out"), dict(merged_deltas(branches, config)))
    plain = Merge(method="task_arithmetic", weights=(1.0, 2.0), space="delta")
    name, delta = next(iter(merged_deltas(branches, plain)))
    assert not torch.allclose(delta_of(tmp_path / "out")[name], delta)  # control


def test_truncation_is_reported_as_it_is(branches, tmp_path):
    config = Merge(space="delta", rank=3)
    report = merge_adapters(branches, config, tmp_path / "out")
    exact, kept = dict(merged_deltas(branches, config)), delta_of(tmp_path / "out")
    lost = sum((exact[name] - kept[name]).square().sum() for name in exact) ** 0.5
    norm = sum(delta.square().sum() for delta in exact.values()) ** 0.5
    assert report["truncation_error"] == pytest.approx(float(lost / norm), rel=1e-4)
    assert 0.1 < report["truncation_error"] < 1
    wider = merge_adapters(branches, Merge(space="delta"), tmp_path / "wider")
    assert 0 < wider["truncation_error"] < report["truncation_error"]


def test_the_report_gives_size_and_direction(branches, tmp_path):
    config = Merge(method="linear", weights=(1.0, 0.0), space="delta")
    report = merge_adapters(branches, config, tmp_path / "out")
    one, two = (torch.cat([d.flatten() for d in delta_of(b).values()]) for b in branches)
    assert report["layers"] == 14
    assert report["norm"] == pytest.approx(float(one.norm()), rel=1e-4)
    cosine = float(torch.cosine_similarity(one, two, dim=0))
    assert report["cosine"] == pytest.approx([1.0, cosine], abs=1e-5)
    assert report["storage_survival"] is None


@pytest.mark.parametrize("space", ["factors", "delta"])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_merged_model_is_base_plus_delta(
    branches, tiny, tiny_folder, tmp_path, tokens, space, sharded
):
    base = tiny_folder
    if sharded:
        base = tmp_path / "sharded"
        tiny_model = AutoModelForCausalLM.from_pretrained(tiny_folder)
        tiny_model.save_pretrained(base, max_shard_size="40KB")
        assert len(list(base.glob("*.safetensors"))) > 1
    config = Merge(space=space, output="model")
    out = tmp_path / "out"
    report = merge_adapters(branches, config, out, base=base)
    shards = "model*.safetensors*"
    others = {p.name for p in base.iterdir()} - {p.name for p in base.glob(shards)}
    assert {p.name for p in out.iterdir()} == others | {"model.safetensors"}
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(out)(input_ids=tokens).logits
        before = tiny(input_ids=tokens).logits
        with apply_deltas(tiny, merged_deltas(branches, config)):
            ours = tiny(input_ids=tokens).logits
        after = tiny(input_ids=tokens).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert (ours - before).abs().max() > 0.01  # control
    assert torch.equal(after, before)
    assert report["storage_survival"] > 0.99


def test_tensors_that_no_branch_adapts_keep_their_bytes(make_branch, tiny_folder, tmp_path):
    branch = make_branch(7, targets=("q_proj",), layers=(1,))
    out = tmp_path / "out"
    merge_adapters([branch], Merge(output="model"), out, base=tiny_folder)
    old, new = (load_file(folder / "model.safetensors") for folder in (tiny_folder, out))
    assert old.keys() == new.keys()
    changed = [name for name in old if not torch.equal(old[name], new[name])]
    assert changed == ["model.layers.1.self_attn.q_proj.weight"]


def test_storage_survival_counts_what_bfloat16_keeps(branches, tiny_folder, tmp_path):
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_folder).bfloat16().save_pretrained(base)
    survival = {}
    for weight in (1.0, 1e-4):
        config = Merge(method="linear", weights=(weight, 0.0), output="model", space="delta")
        out = tmp_path / f"out-{weight}"
        survival[weight] = merge_adapters(branches, config, out, base=base)["storage_survival"]
        old, new = (load_file(f / "model.safetensors") for f in (base, out))
        deltas = dict(merged_deltas(branches, config))
        changed = sum(int((old[f"{n}.weight"] != new[f"{n}.weight"]).sum()) for n in deltas)
        nonzero = sum(int((d != 0).sum()) for d in deltas.values())
        assert survival[weight] == pytest.approx(changed / nonzero)
        assert all(t.dtype == torch.bfloat16 for t in new.values())
    assert survival[1.0] > 0.9
    assert survival[1e-4] < 0.2


def test_deltas_reach_beneath_an_adapter_and_leave_when_interrupted(branches, tiny):
    config = Merge()
    load_adapter(tiny, branches[0])
    layer = tiny.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(layer, LoraLinear)
    before = layer.base.weight.clone()
    with pytest.raises(KeyboardInterrupt), apply_deltas(tiny, merged_deltas(branches, config)):
        assert not torch.equal(layer.base.weight, before)
        raise KeyboardInterrupt
    assert torch.equal(layer.base.weight, before)


@every_method
def test_the_order_of_tensors_in_a_file_changes_nothing(branches, edited, tmp_path, method):
    turned = [shutil.copytree(b, tmp_path / b.name) for b in branches]
    for folder in turned:
        tensors = load_file(folder / "adapter_model.safetensors")
        kept = {k: tensors[k].clone() for k in reversed(tensors)}
        save_file(kept, folder / "adapter_model.safetensors")
    config = Merge(method=method, space="delta")
    one, two = (dict(merged_deltas(b, config)) for b in (branches, turned))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_branches_of_unlike_rank_merge_in_delta_space_alone(branches, make_branch, tmp_path):
    mixed = [branches[0], make_branch(3, rank=2)]
    with pytest.raises(MergeError, match=r"ranks 4, 2 at .* say space: delta"):
        merge_adapters(mixed, Merge(), tmp_path / "out")
    merge_adapters(mixed, Merge(space="delta", method="linear"), tmp_path / "out")
    one, two = map(delta_of, mixed)
    assert_close(delta_of(tmp_path / "out"), {name: one[name] + two[name] for name in one})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "tise"}, "no merge method is called 'tise'. Did you mean 'ties'?"),
        ({"density": 0}, "density: Input should be greater than 0"),
        ({"density": 1.2}, "density: Input should be less than or equal to 1"),
        ({"weights": [0, 0]}, "weights must not all be zero"),
        ({"weights": [1, float("nan")]}, "weights.1: Input should be a finite number"),
        ({"groups": []}, "groups: Tuple should have at least 1 item"),
        ({"groups": [0, 0]}, "groups must not all be zero"),
        ({"groups": [1, float("inf")]}, "groups.1: Input should be a finite number"),
        ({"groups": [1, 2], "method": "sce"}, "groups is not for sce"),
        ({"groups": [1, 2], "method": "model_stock", "space": "delta"}, "groups is not for model"),
        ({"groups": [1, 2], "options": {"divide": "weights"}}, "groups cannot be normalized"),
        ({"options": {"trim": "model"}}, "branches are trimmed by themselves; trim: model is for"),
        ({"groups": [1], "normalize": True, "space": "delta"}, "groups cannot be normalized"),
        ({"normalize": True}, "normalize needs space: delta"),
        ({"rank": 8}, "rank needs space: delta and output: adapter"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(fields, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        parse_section(fields, Merge, origin="recipe.yaml")


SUMMED = [
    n for n, m in METHODS.items() if isinstance(m.how, Elect | Matrix) and n not in (*NEEDY, "sce")
]


def by_hand(folder, a, b, *, scale=1.0, layers=("layers.0.q", "layers.1.q", "score")):
    """An adapter of one A and B at every layer."""
    tensors = {}
    for layer in layers:
        tensors[f"base_model.model.{layer}.lora_A.weight"] = torch.tensor(a)
        tensors[f"base_model.model.{layer}.lora_B.weight"] = torch.tensor(b)
    write_adapter(tensors, adapter_config(list(layers), "x", rank=1, alpha=scale), folder)
    return folder


@pytest.fixture
def pair_by_hand(tmp_path):
    """Rank 1, ΔW = [[2, 4]] and [[3, -1]] (the second of scale 4 in A = [¾, -¼])."""
    one = by_hand(tmp_path / "one", [[1.0, 2.0]], [[2.0]])
    return [one, by_hand(tmp_path / "two", [[0.75, -0.25]], [[1.0]], scale=4.0)]


def test_groups_multiply_the_weights_of_their_blocks_in_delta_space(pair_by_hand, tmp_path):
    config = Merge(method="linear", space="delta", weights=(1.0, 2.0), groups=(0.5, -3.0))
    whole = torch.tensor([[2.0 + 2 * 3.0, 4.0 - 2 * 1.0]])
    expected = {"layers.0.q": 0.5 * whole, "layers.1.q": -3 * whole, "score": whole}
    assert_close(dict(merged_deltas(pair_by_hand, config)), expected)
    merge_adapters(pair_by_hand, config, tmp_path / "out")
    assert_close(delta_of(tmp_path / "out"), expected)


def test_groups_multiply_the_weights_of_their_blocks_in_factor_space(pair_by_hand, tmp_path):
    # roots: √(1·1) and √(1·4) at factor 1; at factor 4 twice those; at -1 those of A turn
    config = Merge(method="linear", groups=(4.0, -1.0))
    merge_adapters(pair_by_hand, config, tmp_path / "out")
    factors, _ = read_adapter(tmp_path / "out")
    a, b = torch.tensor([[1 + 2 * 0.75, 2 - 2 * 0.25]]), torch.tensor([[2.0 + 2 * 1.0]])
    for layer, (left, right) in {
        "layers.0.q": (2, 2),
        "layers.1.q": (-1, 1),
        "score": (1, 1),
    }.items():
        torch.testing.assert_close(factors[layer][0], left * a)
        torch.testing.assert_close(factors[layer][1], right * b)
    assert_close(
        dict(merged_deltas(pair_by_hand, config)),
        {"layers.0.q": 4 * b @ a, "layers.1.q": -b @ a, "score": b @ a},
    )


def test_blocks_are_shared_out_equally_from_the_first_to_the_last(tmp_path):
    layers = [f"layers.{n}.q" for n in range(5)]
    branch = by_hand(tmp_path / "b", [[1.0]], [[1.0]], layers=layers)

    def found(*groups):
        return [float(d) for _, d in merged_deltas([branch], Merge(method="linear", groups=groups))]

    assert found(4.0) == [4.0] * 5
    assert found(1.0, 4.0) == [1.0, 1.0, 1.0, 4.0, 4.0]
    assert found(1.0, 4.0, 9.0) == [1.0, 1.0, 4.0, 4.0, 9.0]
    assert found(1.0, 4.0, 9.0, 16.0, 25.0) == [1.0, 4.0, 9.0, 16.0, 25.0]
    with pytest.raises(MergeError, match="6 groups were given, and the branches adapt 5 blocks"):
        found(1.0, 1.0, 1.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize(("space", "output"), PLACES)
def test_groups_of_one_change_no_byte(branches, tiny_folder, tmp_path, space, output):
    written = []
    for groups in (None, (1.0, 1.0), (1.0, 2.0)):
        out = tmp_path / f"{groups}"
        config = Merge(space=space, output=output, weights=(0.7, -0.4), groups=groups)
        merge_adapters(branches, config, out, base=tiny_folder)
        (weights,) = out.glob("*model.safetensors")
        written.append(weights.read_bytes())
    assert written[0] == written[1] != written[2]


@pytest.mark.parametrize(("space", "output"), PLACES)
def test_what_is_written_by_groups_is_what_was_merged(
    branches, tiny_folder, tmp_path, space, output
):
    plain = Merge(method="linear", space=space, output=output)
    config = plain.model_copy(update={"groups": (1.0, 0.25)})
    merge_adapters(branches, config, tmp_path / "out", base=tiny_folder)
    whole = dict(merged_deltas(branches, plain))
    expected = {n: d * (0.25 if "layers.1" in n else 1) for n, d in whole.items()}
    assert_close(dict(merged_deltas(branches, config)), expected)
    if output == "adapter":
        assert_close(delta_of(tmp_path / "out"), expected)
        return
    old, new = (load_file(f / "model.safetensors") for f in (tiny_folder, tmp_path / "out"))
    for name, delta in expected.items():
        change = new[f"{name}.weight"] - old[f"{name}.weight"]
        torch.testing.assert_close(change, delta, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", SUMMED)
@pytest.mark.parametrize("factor", [0.0, 0.25, -2.0])
def test_a_group_multiplies_what_its_blocks_get_by_every_method(branches, method, factor):
    plain = Merge(method=method, density=0.6, space="delta", weights=(1.0, 0.7))
    config = plain.model_copy(update={"groups": (1.0, factor)})
    whole, ours = (dict(merged_deltas(branches, c)) for c in (plain, config))
    for name in whole:
        if "layers.0" in name:
            assert torch.equal(ours[name], whole[name])
        else:
            torch.testing.assert_close(ours[name], factor * whole[name], rtol=1e-3, atol=1e-5)


def one_name(tensors):
    return next(iter(tensors))


def with_embedding(tensors):
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    return {**tensors, key: torch.zeros(257, 32)}


def with_magnitude(tensors):
    return {**tensors, "base_model.model.x.lora_magnitude_vector": torch.zeros(3)}


def without_a_layer(tensors):
    return {k: t for k, t in tensors.items() if "layers.1.mlp.up_proj" not in k}


def with_nan(tensors):
    tensors[one_name(tensors)][0, 0] = float("nan")
    return tensors


def wider(tensors):
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    return {**tensors, key: torch.zeros(4, 33)}


@pytest.mark.parametrize(
    ("change", "config", "error", "message"),
    [
        (without_a_layer, {}, MergeError, r"branch-9 does not adapt model\.layers\.1\.mlp\.up_pr"),
        (with_embedding, {}, ModelError, r"embed_tokens\S+ adapts an embedding, .* output: model"),
        (with_magnitude, {}, ModelError, r"x.lora_magnitude_vector is not a plain LoRA factor"),
        (with_nan, {}, MergeError, r"branch-9: model\.layers\.\S+\.lora_A holds NaN"),
        (wider, {}, MergeError, r"up_proj is \(48, 32\) in .* but \(48, 33\) in .*branch-9"),
        (None, {"use_dora": True}, ModelError, "branch-9 has use_dora: True"),
        (None, {"bias": "lora_only"}, ModelError, "branch-9 has bias: lora_only"),
        (None, {"modules_to_save": ["lm_head"]}, ModelError, "branch-9 has modules_to_save"),
        (None, {"init_lora_weights": "pissa"}, ModelError, "initialised by pissa"),
        (None, {"r": 5}, ModelError, "branch-9: .* should have rank 5"),
        (None, {"lora_alpha": None}, ModelError, "branch-9: lora_alpha must be a positive number"),
        (None, {"peft_type": "IA3"}, ModelError, "branch-9 is a IA3 adapter"),
    ],
)
def test_a_branch_that_cannot_be_merged_is_named(
    branches, make_branch, edited, tmp_path, change, config, error, message
):
    bad = edited(make_branch(9), change, **config)
    with pytest.raises(error, match=message):
        merge_adapters([branches[0], bad], Merge(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_was_asked_for_must_fit_what_was_given(branches, tiny, tiny_folder, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(MergeError, match="at least one branch"):
        merge_adapters([], Merge(), out)
    with pytest.raises(MergeError, match="3 weights were given for 2 branches"):
        merge_adapters(branches, Merge(weights=(1, 1, 1)), out)
    with pytest.raises(MergeError, match="needs the base model"):
        merge_adapters(branches, Merge(output="model"), out)
    with pytest.raises(ModelError, match=r"holds no adapter_config\.json"):
        merge_adapters([tiny_folder], Merge(), out)
    with (
        pytest.raises(MergeError, match="which the model does not have"),
        apply_deltas(tiny, [("model.layers.7.mlp", torch.zeros(1))]),
    ):
        pass
    with (
        pytest.raises(MergeError, match=r"does not have the shape \(1,\)"),
        apply_deltas(tiny, [("model.layers.1.mlp.up_proj", torch.zeros(1))]),
    ):
        pass
    with (
        pytest.raises(MergeError, match="shares its weight"),
        apply_deltas(tiny, [("lm_head", torch.zeros(257, 32))]),
    ):
        pass
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(MergeError, match="exists and is not empty"):
        merge_adapters(branches, Merge(), out)


def test_a_base_that_does_not_fit_is_named(branches, tiny_folder, tmp_path):
    def broken(name, change):
        base = shutil.copytree(tiny_folder, tmp_path / name)
        tensors = load_file(base / "model.safetensors")
        change(tensors)
        save_file(tensors, base / "model.safetensors")
        return base

    key = "model.layers.0.mlp.up_proj.weight"
    config, out = Merge(output="model"), tmp_path / "out"
    cases = {
        rf"lacks {key}": lambda tensors: tensors.pop(key),
        r"up_proj is \(48, 32\) in the branches but \(2, 2\)": lambda tensors: tensors.update(
            {key: torch.zeros(2, 2)}
        ),
        r"stores \S+up_proj.weight as I8": lambda tensors: tensors.update(
            {key: torch.zeros(48, 32, dtype=torch.int8)}
        ),
    }
    for number, (message, change) in enumerate(cases.items()):
        with pytest.raises(MergeError, match=message):
            merge_adapters(branches, config, out, base=broken(f"base-{number}", change))
    damaged = broken("damaged", lambda tensors: None)
    whole = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ModelError, match="is damaged: its tensors end at byte"):
        merge_adapters(branches, config, out, base=damaged)
    (damaged / "model.safetensors").write_bytes(whole[:100])
    with pytest.raises(ModelError, match="is damaged: its header claims"):
        merge_adapters(branches, config, out, base=damaged)
    (damaged / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds no model\.safetensors"):
        merge_adapters(branches, config, out, base=damaged)
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        merge_adapters(branches, config, out, base=tmp_path)
    assert not out.exists()
