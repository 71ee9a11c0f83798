"""`output: adapter` is the same merge as `output: model`, or is refused in one line."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from expunge.adapter_files import adapter_scales, read_adapter
from expunge.errors import ExpungeError
from expunge.merge.families import Matrix
from expunge.merge.lint import lint
from expunge.merge.methods import METHODS
from expunge.merge.run import merge_models, plan_of

WHOLE = ("slerp", "karcher")  # merge whole weights
TAKEN = [name for name in METHODS if name not in WHOLE]
NEEDED = {"nearswap": {"t": 0.01}, "sce": {"select_topk": 0.5}}
GRADIENT = {"weight": [0.3, 1.0], "density": [0.4, 0.9]}
FILTER = {"weight": [{"filter": "mlp", "value": 0.5}, {"value": [1.0, 0.2]}], "density": 0.6}


@pytest.fixture(scope="session")
def statistics(branches, tiny_folder, tmp_path_factory):
    """What regmean and fisher need: a Gram matrix, Fisher information of every layer."""
    base = load_file(tiny_folder / "model.safetensors")
    adapted = [f"{layer}.weight" for layer in read_adapter(branches[0])[0]]
    rng, paths = torch.Generator().manual_seed(5), {}
    for kind in ("gram", "fisher"):
        paths[kind] = []
        for number in range(2):
            found = {}
            for name in adapted:
                drawn = torch.randn(base[name].shape, generator=rng)
                found[name] = drawn.T @ drawn if kind == "gram" else drawn.square()
            paths[kind].append(str(tmp_path_factory.mktemp(kind) / f"{number}.safetensors"))
            save_file(found, paths[kind][-1])
    return paths


@pytest.fixture
def merged(branches, tiny_folder, tmp_path, statistics):
    """ΔW by layer of the merge of a file's fields, as `output` writes it."""
    count = 0

    def merge(
        output, name, each=({}, {}), adapters=branches, spelled="method", alone=False, **fields
    ):
        nonlocal count
        count += 1
        row = METHODS[name]
        models = [
            {"model": f"{folder}" if alone else f"{tiny_folder}+{folder}", "parameters": parameters}
            for folder, parameters in zip(adapters, each, strict=True)
        ]
        if isinstance(row.how, Matrix) and row.how.statistics:
            kind = "fisher" if name == "fisher" else "gram"
            models = [{**m, "statistics": s} for m, s in zip(models, statistics[kind], strict=True)]
        models = models[: row.models[1]]
        base = {"base_model": str(tiny_folder)} if row.base and not alone else {}
        path, out = tmp_path / f"{count}.yaml", tmp_path / f"{count}"
        whole = {spelled: name, "models": models, "output": output, **base, **fields}
        path.write_text(json.dumps(whole))
        report = merge_models(path, out)
        if output == "adapter":
            factors, config = read_adapter(out)
            scales = adapter_scales(out, factors, config)
            return {n: scales[n] * b @ a for n, (a, b) in factors.items()}, report
        old, new = (load_file(f / "model.safetensors") for f in (tiny_folder, out))
        return {n.removesuffix(".weight"): new[n] - old[n] for n in old}, report

    return merge


def assert_same(merged, name, **fields):
    ours, report = merged("adapter", name, rank=48, **fields)  # no merge of the tiny model's is cut
    theirs, _ = merged("model", name, **fields)
    assert any(delta.abs().max() > 0.01 for delta in theirs.values())  # control
    for layer, expected in theirs.items():
        delta = ours.get(layer, torch.zeros_like(expected))
        torch.testing.assert_close(delta, expected, rtol=1e-3, atol=3e-6)
    return ours, report


def given(name, **parameters):
    """Of some parameters those that a method has, and what it needs."""
    known = METHODS[name].options.keys() | {"weight"}
    return {k: v for k, v in {**NEEDED.get(name, {}), **parameters}.items() if k in known}


@pytest.mark.parametrize("spelled", ["method", "merge_method"])
@pytest.mark.parametrize("name", TAKEN)
def test_an_adapter_is_what_the_merged_model_adds_to_its_base(merged, tiny_folder, name, spelled):
    each = [given(name, weight=1.0, density=0.3), given(name, weight=0.6, density=0.8)]
    fields = {"parameters": given(name, epsilon=0.05), "each": each, "spelled": spelled}
    if name in ("nuslerp", "multislerp"):
        fields["base_model"] = str(tiny_folder)
    assert_same(merged, name, **fields)


@pytest.mark.parametrize("spelled", ["method", "merge_method"])
@pytest.mark.parametrize("name", [name for name in TAKEN if name != "arcee_fusion"])
def test_adapters_alone_merge_as_they_do_with_their_base(merged, tiny_folder, name, spelled):
    each = [given(name, **GRADIENT), given(name, weight=0.6, density=0.8)]
    fields = {"parameters": given(name, epsilon=0.05), "each": each, "spelled": spelled}
    ours, report = merged("adapter", name, alone=True, **fields)
    if name in ("nuslerp", "multislerp"):
        fields["base_model"] = str(tiny_folder)
    theirs, expected = merged("adapter", name, **fields)
    assert ours.keys() == theirs.keys() and any(d.abs().max() > 0.01 for d in ours.values())
    for layer, delta in theirs.items():
        torch.testing.assert_close(ours[layer], delta, rtol=1e-4, atol=1e-6)
    expected = {key: value for key, value in expected.items() if value is not None}
    for key, value in expected.items():
        assert report[key] == pytest.approx(value, rel=1e-3, abs=1e-5)


def test_what_adapters_alone_cannot_be_is_one_line(merged, branches, tiny_folder, tmp_path):
    other = shutil.copytree(branches[0], tmp_path / "other")
    tensors = load_file(other / "adapter_model.safetensors")
    first = next(key for key in tensors if key.endswith("lora_B.weight"))
    wider = torch.ones(40, tensors[first].shape[1])
    save_file({**tensors, first: wider}, other / "adapter_model.safetensors")
    refused = [
        ("adapter", "arcee_fusion", {}, "arcee_fusion looks at the base's weights"),
        ("adapter", "slerp", {"parameters": {"t": 0.5}}, "slerp merges whole weights"),
        ("adapter", "ties", {"base_model": str(tiny_folder)}, f"write MODEL+{branches[0]}"),
        ("adapter", "linear", {"adapters": (branches[0], other)}, "must be of the same base"),
        ("model", "linear", {}, f"{branches[0]} is an adapter: write MODEL+{branches[0]}"),
    ]
    for output, name, fields, message in refused:
        with pytest.raises(ExpungeError, match=re.escape(message)) as error:
            merged(output, name, alone=True, **fields)
        assert "\n" not in str(error.value)
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and path != other]


@pytest.mark.parametrize("space", ["delta", "factors"])
def test_the_merge_of_adapters_alone_names_the_base_that_they_name(
    merged, branches, edited, tmp_path, space
):
    named = [
        edited(shutil.copytree(branch, tmp_path / branch.name), base_model_name_or_path=base)
        for branch, base in zip(branches, ("owner/base", "owner/else"), strict=True)
    ]
    merged("adapter", "linear", adapters=named, alone=True, space=space)
    config = json.loads((tmp_path / "1" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/base"
    (found,) = [one for one in lint(plan_of(tmp_path / "1.yaml")) if one.kind == "base"]
    assert found.where == str(named[1]) and found.what.endswith("owner/else, not on owner/base")


def test_blocks_that_no_adapter_changes_are_left_out(merged, make_branch):
    above = [make_branch(seed, targets=("q_proj",), layers=(1,)) for seed in (7, 8)]
    ours, _ = merged("adapter", "ties", adapters=above, alone=True)
    assert list(ours) == ["model.layers.1.self_attn.q_proj"]
    torch.testing.assert_close(ours, merged("adapter", "ties", adapters=above)[0])


@pytest.mark.parametrize("parameters", [GRADIENT, FILTER], ids=["gradient", "filter"])
@pytest.mark.parametrize("name", ["linear", "task_arithmetic", "ties", "dare_linear", "pcb"])
def test_gradients_and_filters_reach_the_layers_that_they_reach_in_a_model(
    merged, name, parameters
):
    each = (given(name, **parameters), given(name, weight=0.7))
    ours, _ = assert_same(merged, name, each=each)
    plain, _ = merged("adapter", name, each=(given(name), given(name, weight=0.7)), rank=48)
    assert any(not torch.allclose(ours[n], plain[n], atol=1e-4) for n in ours)  # control


def test_the_density_of_each_model_is_its_own(merged):
    thin = [{"weight": 1, "density": d} for d in (0.1, 0.9)]
    ours, _ = assert_same(merged, "ties", each=thin)
    full, _ = merged("adapter", "ties", rank=48)
    assert all(not torch.allclose(ours[n], full[n], atol=1e-4) for n in ours)


@pytest.mark.parametrize("parameters", [{"trim": "model"}, {"rescale": True}, {"lambda": 0.5}])
def test_options_of_a_file_reach_an_adapter(merged, parameters):
    assert_same(merged, "ties", parameters={"density": 0.3, **parameters})
    plain, _ = merged("adapter", "ties", parameters={"density": 0.3}, rank=48)
    ours, _ = merged("adapter", "ties", parameters={"density": 0.3, **parameters}, rank=48)
    assert any(not torch.allclose(ours[n], plain[n], atol=1e-4) for n in ours)


def test_mergekits_defaults_and_ours_differ_in_an_adapter_too(merged):
    each = [{"weight": 1.0}, {"weight": 3.0}]
    ours, theirs = (
        merged("adapter", "ties", each=each, spelled=s)[0] for s in ("method", "merge_method")
    )
    assert any(not torch.allclose(ours[n], theirs[n], atol=1e-4) for n in ours)


@pytest.mark.parametrize("name", ["linear", "task_arithmetic", "ties", "knots", "ram"])
def test_a_layer_that_one_adapter_leaves_alone_counts_as_unchanged(
    merged, make_branch, branches, name
):
    other = make_branch(7, targets=("q_proj",), layers=(1,))
    alone = make_branch(8, targets=("k_proj",))
    adapters = (branches[0], other, alone)
    each = ({}, {"weight": 0.5}, {"weight": 2.0})
    ours, report = assert_same(merged, name, adapters=adapters, each=each)
    assert report["layers"] == len(ours) and len(report["cosine"]) == 3
    assert len(merged("adapter", name, adapters=(other, alone))[0]) < len(ours)


def test_a_sum_over_a_union_of_layers_is_exact(merged, make_branch, branches):
    other = make_branch(7, targets=("q_proj",), layers=(1,))
    ours, report = merged("adapter", "task_arithmetic", adapters=(branches[0], other))
    assert report["truncation_error"] is None
    assert ours["model.layers.1.self_attn.q_proj"].ndim == 2


def test_the_type_of_an_adapter_is_the_files(merged, tmp_path):
    merged("adapter", "linear", dtype="bfloat16")
    found = load_file(tmp_path / "1" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}


def test_factors_are_merged_under_the_files_settings(merged):
    each = [{"weight": 1.0}, {"weight": 3.0}]
    mean, _ = merged("adapter", "linear", each=each, space="factors")
    shares = [{"weight": 0.25}, {"weight": 0.75}]
    total, _ = merged("adapter", "task_arithmetic", each=shares, space="factors")
    for name in mean:
        torch.testing.assert_close(mean[name], total[name])


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        (
            "karcher",
            {},
            "karcher merges whole weights, and an adapter holds only their change; say",
        ),
        ("slerp", {"parameters": {"t": 0.5}}, "slerp merges whole weights"),
        ("nuslerp", {}, "nuslerp merges whole weights where no base_model is given"),
        ("linear", {"parameters": {"normalize": False}}, "of the base by 2, which no adapter can"),
        ("ties", {"parameters": {"density": 1.5}}, "density is a share from 0 to 1, not 1.5"),
        ("ties", {"tokenizer_source": "union"}, "an adapter has no tokenizer: leave tokenizer_s"),
        ("ties", {"space": "factors", "parameters": {"trim": "model"}}, "trim: model is for merge"),
        ("ties", {"space": "factors", "parameters": GRADIENT}, "one setting for all layers; space"),
        ("ties", {"space": "factors", "spelled": "merge_method"}, "cannot divide by weights"),
        ("knots", {"space": "factors"}, "knots needs space: delta"),
    ],
)
def test_what_an_adapter_cannot_be_is_one_line(merged, tmp_path, name, fields, message):
    with pytest.raises(ExpungeError, match=re.escape(message)) as error:
        merged("adapter", name, **fields)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "1").exists()


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("model.embed_tokens.lora_embedding_A", "adapts the embedding model.embed_tokens"),
        ("model.layers.0.mlp.up_proj.lora_magnitude_vector.weight", "scales the rows of"),
        ("model.norm.modules_to_save.weight", "replaces model.norm.weight whole"),
        ("model.embed_tokens.base_layer.weight", "replaces model.embed_tokens.weight whole"),
    ],
)
def test_what_an_adapter_does_beyond_lora_is_named(merged, branches, tmp_path, key, message):
    shapes = {"A": (4, 257), "B": (32, 4)}
    folder = shutil.copytree(branches[0], tmp_path / "beyond")
    tensors = load_file(folder / "adapter_model.safetensors")
    if "embedding" in key:
        for letter, shape in shapes.items():
            tensors[f"base_model.model.{key[:-1]}{letter}"] = torch.ones(shape)
    else:
        shape = (257, 32) if "embed" in key else (48,) if "mlp" in key else (32,)
        tensors[f"base_model.model.{key}"] = torch.ones(shape)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ExpungeError, match=re.escape(message)) as error:
        merged("adapter", "ties", adapters=(folder, branches[1]))
    assert "say output: model" in str(error.value)
    merged("model", "ties", adapters=(folder, branches[1]))  # which takes it
