"""Merging in factor space equals the installed peft, and peft reads what is written."""

import numpy as np
import peft
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from expunge.adapter_files import WEIGHTS, read_adapter
from expunge.lora import load_adapter
from expunge.merge.adapters import merge_adapters
from expunge.merge.plain import uniform
from expunge.merge.section import Merge
from expunge.merge.trim import Settings

PREFIX = "base_model.model."
# peft reads a name that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def peft_merge(tiny_folder, folders, weights, **options):
    """The factors (A, B) by layer that peft's add_weighted_adapter makes."""
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    names = [f"b{number}" for number in range(len(folders))]
    model = PeftModel.from_pretrained(base, folders[0], adapter_name=names[0])
    for name, folder in zip(names[1:], folders[1:], strict=True):
        model.load_adapter(folder, adapter_name=name)
    model.add_weighted_adapter(names, weights, "merged", **options)
    return {
        name.removeprefix(PREFIX): (module.lora_A["merged"].weight, module.lora_B["merged"].weight)
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and "merged" in module.lora_A
    }


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for layer, pair in ours.items():
        for own, other in zip(pair, theirs[layer], strict=True):
            assert torch.equal(own, other.data)


@pytest.mark.parametrize("method", ["linear", "ties", "magnitude_prune"])
@pytest.mark.parametrize("density", [0.3, 0.8])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -1.6)])
def test_merged_factors_equal_those_of_peft(
    branches, tiny_folder, tmp_path, method, density, weights
):
    config = Merge(method=method, density=density, weights=weights)
    merge_adapters(branches, config, tmp_path / "out")
    ours, fields = read_adapter(tmp_path / "out")
    assert fields["lora_alpha"] == fields["r"]
    options = {"combination_type": method, "density": density}
    assert_same(ours, peft_merge(tiny_folder, branches, list(weights), **options))
    other = peft_merge(tiny_folder, branches, [1.0, 0.5], **options)
    with pytest.raises(AssertionError):  # control
        assert_same(ours, other)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_equals_peft_where_the_same_entries_are_dropped(
    branches, tiny_folder, tmp_path, monkeypatch, method
):
    dropped = []
    read = [load_file(folder / WEIGHTS) for folder in branches]
    for key in read[0]:
        name = key.removeprefix(PREFIX).removesuffix(".weight")
        settings = Settings(name, (), seed=42)
        for number, one in enumerate(read):
            drawn = uniform(settings.key(number), 0, one[key].numel()).cpu() < 0.6
            chosen = one[key] * drawn.view_as(one[key])
            dropped.append((one[key], chosen * torch.tensor(1 / np.float32(0.6))))

    def same_entries(tensor, density, rescale):
        assert density == 0.6 and rescale
        return next(kept for whole, kept in dropped if torch.equal(whole, tensor))

    monkeypatch.setattr(peft.utils.merge_utils, "random_pruning", same_entries)
    theirs = peft_merge(tiny_folder, branches, [1.0, 0.5], combination_type=method, density=0.6)
    merge_adapters(
        branches, Merge(method=method, density=0.6, weights=(1.0, 0.5)), tmp_path / "out"
    )
    assert_same(read_adapter(tmp_path / "out")[0], theirs)


@pytest.mark.parametrize(
    ("method", "combination"),
    [
        ("linear", "svd"),
        ("ties", "ties_svd"),
        ("magnitude_prune", "magnitude_prune_svd"),
        ("linear", "cat"),
    ],
)
def test_merged_deltas_equal_those_of_peft(make_branch, tiny_folder, tmp_path, method, combination):
    # peft weighs a delta by its scale once more, so only a scale of 1 can be compared.
    folders = [make_branch(11, alpha=4.0), make_branch(12, alpha=4.0)]
    rank = None if combination == "cat" else 4
    config = Merge(method=method, density=0.5, weights=(1.0, 0.5), space="delta", rank=rank)
    merge_adapters(folders, config, tmp_path / "out")
    ours = read_adapter(tmp_path / "out")[0]
    options = {} if rank is None else {"svd_rank": rank}
    if method != "linear":
        options["density"] = 0.5
    theirs = peft_merge(tiny_folder, folders, [1.0, 0.5], combination_type=combination, **options)
    assert ours.keys() == theirs.keys()
    for layer, (a, b) in ours.items():
        other = theirs[layer][1].data @ theirs[layer][0].data
        torch.testing.assert_close(b @ a, other, rtol=1e-3, atol=1e-5)
        assert other.abs().max() > 1e-3  # control


@pytest.mark.parametrize(
    "config",
    [
        Merge(),
        Merge(method="linear", space="delta"),
        Merge(space="delta", rank=3),
        Merge(space="delta", rank=30),  # more than the narrowest layer has
    ],
    ids=["factors", "concatenated", "cut", "full_rank"],
)
def test_a_merged_adapter_is_the_same_in_peft_and_here(
    branches, tiny, tiny_folder, tmp_path, tokens, config
):
    merge_adapters(branches, config, tmp_path / "out")
    base = tiny(input_ids=tokens).logits
    load_adapter(tiny, tmp_path / "out")
    ours = tiny(input_ids=tokens).logits
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_folder), tmp_path / "out"
    )(input_ids=tokens).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert (ours - base).abs().max() > 0.01  # control


@pytest.mark.parametrize("change", ["patterns", "rslora"])
def test_scales_by_layer_and_rslora_are_read_as_peft_reads_them(
    make_branch, edited, tiny, tiny_folder, tokens, change
):
    folder = make_branch(5)
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder)
    before = PeftModel.from_pretrained(plain, folder)(input_ids=tokens).logits
    if change == "rslora":
        edited(folder, use_rslora=True)
    else:

        def halve(tensors):
            return {
                k: t[:2].clone()
                if "0.mlp.up_proj.lora_A" in k
                else t[:, :2].clone()
                if "0.mlp.up_proj.lora_B" in k
                else t
                for k, t in tensors.items()
            }

        edited(
            folder,
            halve,
            rank_pattern={"model.layers.0.mlp.up_proj": 2},
            alpha_pattern={"q_proj": 64.0, r"layers\.1\.mlp.up_proj": 1.0},
        )
    load_adapter(tiny, folder)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    theirs = PeftModel.from_pretrained(base, folder)(input_ids=tokens).logits
    torch.testing.assert_close(tiny(input_ids=tokens).logits, theirs, rtol=1e-4, atol=1e-5)
    assert (theirs - before).abs().max() > 1e-3  # control
