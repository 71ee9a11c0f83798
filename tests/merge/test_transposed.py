"""Adapters on GPT-2, whose weights lie as (in, out): saved, loaded, merged and edited as others."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, GPT2Model

import expunge
from expunge.adapter_files import read_adapter
from expunge.errors import MergeError
from expunge.lora import Lora, adapters_of, add_adapter, fold_adapter, load_adapter, save_adapter
from expunge.merge.adapters import apply_deltas, merge_adapters, merged_deltas
from expunge.merge.run import merge_models
from expunge.merge.section import Merge
from expunge.models import load_model

# peft reads a name that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
TOKENS = torch.arange(1, 30)[None]
LORA = Lora(rank=3, alpha=6.0, dropout=0.0)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory, tokenizer):
    """A tiny GPT-2, its square layers included, as its head's class saves it."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=257)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    folder = tmp_path_factory.mktemp("gpt2") / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def branch(base, folder, seed):
    model = load_model(base)
    add_adapter(model, LORA, seed=seed)
    torch.manual_seed(seed)
    for layer in adapters_of(model).values():
        layer.lora_B.data.normal_(std=0.2)
    save_adapter(model, LORA, folder, base=str(base))
    return folder, logits(model)


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS).logits


@pytest.fixture(scope="module")
def made(gpt2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("branches")
    return [branch(gpt2, folder / f"{n}", n) for n in (1, 2)]


def close(one, other):
    torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-4)


def test_an_adapter_is_what_peft_reads(gpt2, made):
    folder, expected = made[0]
    factors, config = read_adapter(folder)
    assert config["fan_in_fan_out"] is True
    assert {name.rpartition(".")[2] for name in factors} == {"c_attn", "c_proj", "c_fc"}
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(gpt2).eval(), folder)
    close(logits(theirs), expected)
    ours = load_model(gpt2)
    plain = logits(ours)
    load_adapter(ours, folder)
    close(logits(ours), expected)
    assert (plain - expected).abs().max() > 0.1  # control: it does something
    fold_adapter(ours)
    assert not adapters_of(ours)
    close(logits(ours), expected)
    merged = theirs.merge_and_unload()  # pyright: ignore
    close(logits(merged), expected)


@pytest.mark.parametrize("space", ["delta", "factors"])
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_merges_into_a_model_and_an_adapter_are_one(gpt2, made, tmp_path, method, space):
    if (method, space) == ("ties", "delta"):  # whose adapter of rank 6 is not exact
        config = Merge(method=method, space=space, rank=32)
    else:
        config = Merge(method=method, space=space)
    folders = [folder for folder, _ in made]
    merge_adapters(folders, config, tmp_path / "adapter", base=gpt2)
    whole = config.model_copy(update={"output": "model"})
    merge_adapters(folders, whole, tmp_path / "model", base=gpt2)
    adapted, model = load_model(gpt2), load_model(tmp_path / "model")
    load_adapter(adapted, tmp_path / "adapter")
    close(logits(model), logits(adapted))
    resident = load_model(gpt2)
    before = logits(resident)
    with apply_deltas(resident, merged_deltas(folders, config)):
        close(logits(resident), logits(model))
    assert torch.equal(logits(resident), before)


def test_a_merge_file_takes_it_onto_a_base_from_the_hub(gpt2, made, tmp_path, tokenizer):
    """Whose names lack `transformer.`, as GPT-2's own do."""
    bare = GPT2Model.from_pretrained(gpt2)
    bare.save_pretrained(tmp_path / "hub")
    tokenizer.save_pretrained(tmp_path / "hub")
    assert "h.0.attn.c_attn.weight" in load_file(tmp_path / "hub" / "model.safetensors")
    folder, expected = made[0]
    fields = {"method": "task_arithmetic", "base_model": str(tmp_path / "hub")}
    fields["models"] = [{"model": f"{tmp_path / 'hub'}+{folder}"}]
    (tmp_path / "merge.yaml").write_text(json.dumps(fields))
    merge_models(tmp_path / "merge.yaml", tmp_path / "out")
    close(logits(load_model(tmp_path / "out")), expected)
    merge_adapters([folder], Merge(method="linear"), tmp_path / "one", base=tmp_path / "hub")


def test_edits_of_an_adapter_keep_how_its_weights_lie(gpt2, made, tmp_path):
    folders = [str(folder) for folder, _ in made]
    expunge.edit("negate", str(gpt2), tmp_path / "negated", adapter=folders[0])
    expunge.edit("pem_add", str(gpt2), tmp_path / "sum", adapter=folders[0], others=folders[1:])
    for name in ("negated", "sum"):
        assert read_adapter(tmp_path / name)[1]["fan_in_fan_out"] is True
    there, back = load_model(gpt2), load_model(gpt2)
    plain = {n: p.clone() for n, p in there.named_parameters()}
    for model, folder in ((there, made[0][0]), (back, tmp_path / "negated")):
        load_adapter(model, folder)
        fold_adapter(model)
    for (name, one), other in zip(there.named_parameters(), back.parameters(), strict=True):
        close((one + other) / 2, plain[name])


def test_adapters_whose_weights_lie_otherwise_are_not_merged(made, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    for path in made[1][0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "fan_in_fan_out": False}))
    with pytest.raises(MergeError, match="differ in fan_in_fan_out"):
        merge_adapters([made[0][0], folder], Merge(method="linear"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
