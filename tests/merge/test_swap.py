"""Merged factors in memory are the adapter that would be written, bit for bit."""

import copy

import pytest
import torch

from expunge.adapter_files import read_adapter
from expunge.errors import MergeError, ModelError
from expunge.lora import LoraLinear, adapters_of, load_adapter, swap_factors
from expunge.merge.adapters import merge_adapters, merged_factors
from expunge.merge.section import Merge

CONFIGS = {
    "factors": Merge(weights=(0.8, -0.3)),
    "groups": Merge(groups=(1.0, 0.5)),
    "concatenated": Merge(method="linear", space="delta", weights=(0.5, -2.0), normalize=True),
    "cut": Merge(method="linear", space="delta", rank=3),
    "truncated": Merge(space="delta", rank=5),
    "truncated to the sum": Merge(space="delta"),
}


def read(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).logits


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_merged_factors_are_those_of_the_written_adapter(branches, tmp_path, config):
    merge_adapters(branches, config, tmp_path / "out")
    written, _ = read_adapter(tmp_path / "out")
    ours = {layer: (a, b) for layer, a, b in merged_factors(branches, config)}
    assert ours.keys() == written.keys() and len(ours) == 14
    for layer, pair in ours.items():
        assert all(torch.equal(x, y) for x, y in zip(pair, written[layer], strict=True))
        assert all(x.dtype == torch.float32 and x.is_contiguous() for x in pair)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("before", ["bare", "rank 4", "rank 8"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_after_a_swap_the_model_reads_as_with_the_written_adapter(
    branches, make_branch, tiny, tokens, tmp_path, config, before, dtype
):
    merge_adapters(branches, config, tmp_path / "out")
    loaded = copy.deepcopy(tiny).to(dtype)
    load_adapter(loaded, tmp_path / "out")
    model = tiny.to(dtype)
    bare = read(model, tokens)
    if before != "bare":
        load_adapter(model, make_branch(5, rank=int(before[-1])))
        for layer in adapters_of(model).values():
            layer.dropout, layer.enabled = 0.5, False
        model.train()
    swap_factors(model, merged_factors(branches, config))
    expected = read(loaded, tokens)
    assert torch.equal(read(model, tokens), expected)
    assert not torch.equal(expected, bare)  # control
    assert not any(p.requires_grad for p in model.parameters())


def test_a_swap_after_a_swap_leaves_nothing_of_the_first(branches, tiny, tokens):
    one, two = CONFIGS["truncated"], CONFIGS["factors"]
    fresh = copy.deepcopy(tiny)
    swap_factors(fresh, merged_factors(branches, two))
    swap_factors(tiny, merged_factors(branches, one))
    swap_factors(tiny, merged_factors(branches, two))
    assert torch.equal(read(tiny, tokens), read(fresh, tokens))


def test_factors_of_one_rank_keep_their_place_in_memory(branches, tiny):
    swap_factors(tiny, merged_factors(branches, CONFIGS["factors"]))
    places = [p.data_ptr() for p in tiny.parameters()]
    swap_factors(tiny, merged_factors(branches, CONFIGS["groups"]))
    assert [p.data_ptr() for p in tiny.parameters()] == places


def test_layers_that_are_not_named_lose_their_adapter(branches, make_branch, tiny, tokens):
    bare = read(tiny, tokens)
    load_adapter(tiny, branches[0])
    assert not torch.equal(read(tiny, tokens), bare)  # control
    name = "model.layers.1.self_attn.q_proj"
    few = make_branch(7, targets=("q_proj",), layers=(1,))
    swap_factors(tiny, merged_factors([few], Merge()))
    assert list(adapters_of(tiny)) == [name]
    swap_factors(tiny, [])
    assert not any(isinstance(m, LoraLinear) for m in tiny.modules())
    assert torch.equal(read(tiny, tokens), bare)


def test_factors_that_do_not_fit_leave_the_model_as_it_was(branches, tiny, tokens):
    load_adapter(tiny, branches[0])
    before = read(tiny, tokens)
    good = list(merged_factors(branches, Merge()))
    odd = ("model.layers.0.mlp.up_proj", torch.zeros(2, 33), torch.zeros(48, 2))
    missing = ("model.layers.9.mlp.up_proj", torch.zeros(2, 32), torch.zeros(48, 2))
    block = ("model.layers.0.mlp", torch.zeros(2, 32), torch.zeros(48, 2))
    for bad, message in (
        (odd, "the shape of"),
        (missing, "does not have"),
        (block, "the shape of"),
    ):
        with pytest.raises(ModelError, match=message):
            swap_factors(tiny, [*good, bad])
    with pytest.raises(MergeError, match="3 weights"):
        swap_factors(tiny, merged_factors(branches, Merge(weights=(1, 1, 1))))
    assert torch.equal(read(tiny, tokens), before)
