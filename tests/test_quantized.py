"""A base in four bits: what it computes, what trains on it, what is refused."""

import copy
import importlib.util
import json

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from expunge import quantized, sharding
from expunge.data.batches import encode, pack
from expunge.data.examples import Example
from expunge.errors import ModelError, RecipeError
from expunge.evaluate.value_vectors import model_projections
from expunge.lora import Lora, adapters_of, add_adapter, load_adapter, switched_off
from expunge.models import load_model
from expunge.pipeline import Pipeline
from expunge.quantized import BYTES_A_WEIGHT, is_quantized, weight_of
from expunge.recipe import load_recipe
from expunge.scores import score
from expunge.unlearn.branch import train_branch
from expunge.unlearn.footprint import Demand, Shape, lasting, passing, shape_of, weight_bytes
from expunge.unlearn.halves import Halves
from expunge.unlearn.section import Branch
from expunge.unlearn.trainer import Optimizer

from .conftest import byte_tokenizer, tiny_config

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed: pip install 'expunge[qlora]'",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose rows are whole blocks; its head is not its embedding."""
    made = tmp_path_factory.mktemp("wide") / "model"
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "tie_word_embeddings": False}
    LlamaForCausalLM(tiny_config(**sizes)).save_pretrained(made)
    byte_tokenizer().save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def items(tokenizer):
    words = ["ann", "bob", "cy", "oslo", "rome"]
    return [
        encode(Example(f"{n}-qa0", f"Who is {w}?", w[::-1]), tokenizer, max_length=64)
        for n, w in enumerate(words)
    ]


def unpacked(model):
    """The control: the same model in float32, its weights what the four bits stand for."""
    made = copy.deepcopy(model)
    for name, module in list(made.named_modules()):
        if is_quantized(module):
            plain = nn.Linear(module.in_features, module.out_features, bias=False)
            plain.weight = nn.Parameter(weight_of(module), requires_grad=False)
            parent, _, last = name.rpartition(".")
            setattr(made.get_submodule(parent), last, plain)
    return made


def loss_of(model, items):
    return score(model, pack(items, "answer", "cpu")).nll.mean()


def stirred(model):
    """An adapter that changes something, so that both of its factors have gradients."""
    layers = add_adapter(model, Lora(rank=3, alpha=6, dropout=0), seed=1)
    torch.manual_seed(2)
    for layer in layers.values():
        nn.init.normal_(layer.lora_B, std=0.05)
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


@needs_package
@pytest.mark.parametrize(("kind", "error"), [("nf4", 0.12), ("fp4", 0.15)])
def test_layers_but_not_the_head_are_held_in_four_bits(folder, items, kind, error):
    plain, held = load_model(folder), load_model(folder, quantize=kind)
    ids = torch.tensor([items[0].tokens])
    names = {name for name, module in held.named_modules() if is_quantized(module)}
    linear = {name for name, m in plain.named_modules() if isinstance(m, nn.Linear)}
    assert names == linear - {"lm_head"}
    assert held.model.embed_tokens.weight.dtype == held.lm_head.weight.dtype == torch.float32
    for name in names:
        right, found = weight_of(plain.get_submodule(name)), weight_of(held.get_submodule(name))
        assert 0.05 < float((found - right).norm() / right.norm()) < error
    with torch.no_grad():
        right, found, control = (m(ids).logits for m in (plain, held, unpacked(held)))
    assert 0.01 < float((found - right).norm() / right.norm()) < 2 * error
    torch.testing.assert_close(found, control, rtol=1e-4, atol=1e-5)


@needs_package
def test_the_formula_counts_the_bytes_that_are_held(folder):
    model = load_model(folder, dtype="bfloat16", quantize="nf4")
    layers = [m for m in model.modules() if is_quantized(m)]
    held = sum(p.nbytes for p in model.parameters())
    for layer in layers:
        state = layer.weight.quant_state
        held += state.absmax.nbytes + state.state2.absmax.nbytes
    demand = Demand(Optimizer(), "bfloat16", ((64,),), 64, 64, rank=3, quantized=True)
    shape = shape_of(folder)
    assert shape.parameters == model.num_parameters()
    assert held == pytest.approx(weight_bytes(shape, demand), rel=0.01)
    control = Demand(Optimizer(), "bfloat16", ((64,),), 64, 64, rank=3)
    assert weight_bytes(shape, control) == 2 * shape.parameters > 1.5 * held


def test_a_large_model_takes_a_quarter_of_what_bfloat16_takes_and_room_to_unpack():
    big = Shape(32, 4096, 1024, 14336, 32, 128256, 8_030_261_248)
    plain, held = (
        Demand(Optimizer(), "bfloat16", ((256,),), 256, 256, rank=16, quantized=quantized)
        for quantized in (False, True)
    )
    saved = lasting(big, plain) - lasting(big, held)
    assert saved == pytest.approx(big.matrices() * (2 - BYTES_A_WEIGHT), rel=1e-6)
    assert passing(big, held) - passing(big, plain) == 2 * 4096 * 14336


@needs_package
def test_gradients_are_those_of_the_unpacked_model(folder, items):
    held = load_model(folder, quantize="nf4")
    with torch.no_grad():  # a pass in evaluation before, as the reference makes
        loss_of(held.eval(), items)
    control = unpacked(held)
    found = []
    for model in (held, control):
        parameters = stirred(model)
        assert all(name.endswith(("lora_A", "lora_B")) for name in parameters)
        loss_of(model.train(), items).backward()
        found.append({name: p.grad for name, p in parameters.items()})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert float(gradient.norm()) > 1e-6, name
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-3, atol=1e-6)


@needs_package
def test_gradients_are_finite_differences(folder, items):
    model = load_model(folder, quantize="nf4")
    parameters = stirred(model)
    loss_of(model.train(), items).backward()
    step = 3e-3
    for name in ("model.layers.0.self_attn.q_proj.lora_A", "model.layers.1.mlp.down_proj.lora_B"):
        parameter = parameters[name]
        along = parameter.grad / parameter.grad.norm()
        losses = []
        with torch.no_grad():
            for sign in (1, -1):
                parameter += sign * step * along
                losses.append(float(loss_of(model, items)))
                parameter -= sign * step * along
        slope = (losses[0] - losses[1]) / (2 * step)
        assert slope == pytest.approx(float(parameter.grad.norm()), rel=0.02)


@needs_package
@pytest.mark.parametrize(("dtype", "compute"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_narrow_products_reach_every_factor(folder, items, dtype, compute):
    model = load_model(folder, dtype=dtype, quantize="nf4")
    parameters = stirred(model)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=compute == "bfloat16"):
        loss_of(model.train(), items).backward()
    control = unpacked(load_model(folder, quantize="nf4"))
    right = stirred(control)
    loss_of(control.train(), items).backward()
    for name, parameter in parameters.items():
        assert parameter.grad.dtype == torch.float32
        away = parameter.grad - right[name].grad
        assert float(away.norm()) < 0.1 * float(right[name].grad.norm()), name


def branch(**changes) -> Branch:
    return Branch.model_validate(
        {
            "terms": [
                {"half": "forget", "loss": "nll"},
                {"half": "retain", "loss": "nll"},
                {"half": "retain", "loss": "kl", "weight": 0.01},
            ],
            "lora": {"rank": 4, "alpha": 8, "dropout": 0},
            "schedule": {"epochs": 40, "micro_batch": 1, "accumulation": 3},
            "optimizer": {"lr": 1e-2, "compute": "float32"},
            **changes,
        }
    )


@needs_package
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_branch_moves_its_adapter_alone_and_peft_reads_it(folder, items, tokenizer, tmp_path):
    from peft import PeftModel

    model = load_model(folder, quantize="nf4")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    first = float(loss_of(model, items).detach())
    halves = Halves(items[:3], items[3:], tmp_path / "cache", "key")
    (tmp_path / "b").mkdir()
    given = {"seed": 1, "folder": tmp_path / "b", "base": str(folder), "label": "b"}
    train_branch(model, tokenizer, halves, branch(), **given)
    with torch.no_grad():
        last = float(loss_of(model, items))
        with switched_off(model):
            assert float(loss_of(model, items)) == pytest.approx(first)
    assert last < first - 1
    after = {n.replace(".base.", "."): p for n, p in model.named_parameters() if "lora_" not in n}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], old) for name, old in before.items())
    ours = load_model(folder)
    load_adapter(ours, tmp_path / "b" / "adapter")
    theirs = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(folder), tmp_path / "b" / "adapter"
    ).eval()
    ids = torch.tensor([items[0].tokens])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
        assert float(loss_of(ours, items)) < first - 1  # on the base as it is, too


@needs_package
def test_value_vectors_are_read_out_of_the_four_bits(folder):
    held = load_model(folder, quantize="nf4")
    control = model_projections(unpacked(held))
    for layer, project in model_projections(held).items():
        assert torch.equal(project(), control[layer]())
    stirred(held)
    layer = adapters_of(held)["model.layers.0.mlp.down_proj"]
    right = weight_of(layer.base) + layer.scale * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(model_projections(held)[0](), right.detach())


@needs_package
def test_rows_that_end_within_a_block_are_refused_on_a_cpu(tiny_folder):
    with pytest.raises(ModelError, match=r"has rows of 32, and on a CPU .* only multiples of 64"):
        load_model(tiny_folder, quantize="nf4")


def recipe(folder, **changes) -> dict:
    terms = [{"half": "forget", "loss": "npo"}, {"half": "retain", "loss": "nll"}]
    one = {
        "terms": terms,
        "lora": {"rank": 2, "alpha": 4, "dropout": 0},
        "schedule": {"epochs": 1, "micro_batch": 2, "accumulation": 2},
        "optimizer": {"lr": 1e-3, "compute": "float32"},
    }
    return {
        "name": "held",
        "model": {"path": str(folder), "max_length": 400, "separator": " ", "quantize": "nf4"},
        "data": {"synthetic": {"documents": 1, "nonmembers": 2}},
        "branches": {"strong": {**one, **changes}},
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": "full"}, r"'strong' trains every weight .* use training: lora"),
        ({"blocks": 1}, r"'strong' writes the target's first blocks"),
    ],
)
def test_what_needs_the_weights_themselves_is_refused_when_read(folder, changes, message):
    fields = recipe(folder, **changes)
    with pytest.raises(RecipeError, match=message):
        load_recipe(fields)
    fields["model"]["quantize"] = None
    load_recipe(fields)  # control


def test_an_unknown_kind_is_refused(folder):
    fields = recipe(folder)
    fields["model"]["quantize"] = "int8"
    with pytest.raises(RecipeError, match=r"model.quantize: .*'nf4' or 'fp4'"):
        load_recipe(fields)


def test_without_the_package_the_error_says_what_to_install(folder, monkeypatch):
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'expunge\[qlora\]'"):
        load_model(folder, quantize="nf4")


def test_sharded_weights_are_refused(monkeypatch):
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda name: "found")
    monkeypatch.setattr(sharding, "wanted", lambda: True)
    with pytest.raises(ModelError, match="launch without FSDP and ZeRO-3"):
        quantized.check_possible()


@needs_package
def test_a_run_keeps_the_target_and_trains_another_branch(folder, tmp_path):
    """The section is part of a branch's key, and not of what reads the weights as they are."""
    fields = recipe(folder)
    held = Pipeline(fields, tmp_path / "run")
    made = held.branch("strong", 42)
    assert made.base == folder
    config = json.loads((made.adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder)
    del fields["model"]["quantize"]
    plain = Pipeline(fields, tmp_path / "run")
    assert plain._target_key == held._target_key
    assert plain.recipe.model.told() == held.recipe.model.told()
    assert plain.branch("strong", 42).adapter != made.adapter
    caches = {
        p.name.split("-forget")[0] for p in (tmp_path / "run" / "cache").glob("*.safetensors")
    }
    assert {name.endswith("-nf4") for name in caches} == {True, False}
