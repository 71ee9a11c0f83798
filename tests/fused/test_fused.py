"""A block as one function gives what the block's own modules give, values and gradients."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from expunge import fused, packs
from expunge.attention import PACKED_ATTENTION, register_attention
from expunge.fused import modules as fused_modules
from expunge.fused.block import LAYERS, Form, block
from expunge.fused.modules import FusedBlock
from expunge.lora import Lora, adapters_of, add_adapter, remove_adapter

CONFIGS = {
    "llama": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralConfig, {"sliding_window": 64}),
    "qwen2": (Qwen2Config, {}),
}
LENGTHS = (1, 7, 12, 40)


def model_of(family: str, lora: Lora, **changes):
    """A model of two random blocks with a random adapter."""
    register_attention()
    kind, options = CONFIGS[family]
    config = kind(
        **{
            "vocab_size": 50,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.2,
            **options,
            **changes,
        },
        attn_implementation=PACKED_ATTENTION,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.detach().add_(0.3 * torch.randn(parameter.shape))
    add_adapter(model, lora, seed=0)
    for layer in adapters_of(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.2)
    return model


def pack_of(lengths=LENGTHS) -> packs.Pack:
    count = sum(lengths)
    tokens = torch.arange(count) * 7 % 50
    positions = torch.cat([torch.arange(n) for n in lengths])
    return packs.Pack(tokens, positions, lengths, torch.arange(count), tokens, tokens, ())


def run(model, pack) -> list[torch.Tensor]:
    """Final states, and the gradient of each factor."""
    states = packs.hidden_states(model, pack)
    weights = torch.linspace(-1, 1, states.numel()).view_as(states)
    factors = [p for p in model.get_decoder().parameters() if p.requires_grad]
    return [states.detach(), *torch.autograd.grad((states.float() * weights).sum(), factors)]


def error(found: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    """The mean of what they are off, each against its length."""
    off = 0.0
    for one, right in zip(found, truth, strict=True):
        off += float((one.float() - right).norm() / right.norm().clamp_min(1e-6))
    return off / len(found)


def factors_alone_wide(model):
    """The model in bfloat16, its factors in float32."""
    model = model.bfloat16()
    for layer in adapters_of(model).values():
        layer.lora_A.data, layer.lora_B.data = layer.lora_A.float(), layer.lora_B.float()
    return model


def check_both(monkeypatch, model, truth: list[torch.Tensor]) -> None:
    """Run by its modules and then fused, the model is off by as much."""
    modules = run(copy.deepcopy(model), pack_of())
    fused.fuse(model)
    calls = fused_calls(monkeypatch)
    ours = run(model, pack_of())
    assert calls == 2 * [sum(LENGTHS)]
    assert [one.dtype for one in ours] == [one.dtype for one in modules]
    assert error(ours, truth) < 1.5 * error(modules, truth)


def fused_calls(monkeypatch) -> list[int]:
    """The tokens of every block that runs as one function from now on."""
    calls = []

    def counted(x, *given):
        calls.append(len(x))
        return block(x, *given)

    monkeypatch.setattr(fused_modules, "block", counted)
    return calls


@pytest.mark.parametrize("family", fused.FAMILIES)
@pytest.mark.parametrize("targets", [None, ("q_proj", "v_proj", "down_proj"), ("k_proj",)])
def test_values_and_gradients_are_the_blocks_own(family, targets):
    """In float64, but for the norms, which transformers takes in float32."""
    model = model_of(family, Lora(rank=3, dropout=0, targets=targets)).double()
    layer = model.model.layers[0]
    x = torch.randn(1, sum(LENGTHS), 32, dtype=torch.float64, requires_grad=True)
    positions = model.model.rotary_emb(x, pack_of().positions[None])
    own = layer(x, position_embeddings=positions, lengths=LENGTHS)
    attention = layer.self_attn
    rows = [getattr(layer.mlp, name, None) or getattr(attention, name) for name in LAYERS]
    form = Form(
        LENGTHS,
        attention.head_dim,
        attention.scaling,
        (layer.input_layernorm.variance_epsilon, layer.post_attention_layernorm.variance_epsilon),
        tuple(getattr(row, "scale", 1.0) for row in rows),
        (0.0,) * len(rows),
        x.dtype,
    )
    norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
    parts = [fused_modules._parts(row) for row in rows]
    cos, sin = (one[0] for one in positions)
    ours = block(x[0], cos, sin, form, norms, parts)[None]
    torch.testing.assert_close(ours, own, atol=1e-5, rtol=1e-5)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    weights = torch.randn_like(own)
    one, two = (torch.autograd.grad((out * weights).sum(), wanted) for out in (ours, own))
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", fused.FAMILIES)
def test_in_bfloat16_it_is_as_near_to_the_truth_as_the_modules_are(monkeypatch, family):
    model = model_of(family, Lora(rank=4, dropout=0))
    truth = run(model, pack_of())
    check_both(monkeypatch, factors_alone_wide(model), truth)


@pytest.mark.parametrize("family", fused.FAMILIES)
def test_every_weight_is_trained_as_the_modules_train_it(monkeypatch, family):
    model = model_of(family, Lora(rank=4, dropout=0))
    remove_adapter(model)
    model.requires_grad_(True)
    truth = run(model, pack_of())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_both(monkeypatch, model, truth)


def narrow(**changes):
    """A fused model of a frozen base in bfloat16 and factors in float32."""
    model = factors_alone_wide(model_of("llama", Lora(rank=4, dropout=0), **changes))
    fused.fuse(model)
    return model


def untouched(model):
    pass


def trained_norms(model):
    model.model.layers[0].input_layernorm.weight.requires_grad_(True)
    model.model.layers[1].input_layernorm.weight.requires_grad_(True)


def watched(model):
    for layer in adapters_of(model).values():
        layer.register_forward_hook(lambda *given: None)


def frozen(model):
    model.requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "blocks"),
    [(untouched, 2), (trained_norms, 0), (watched, 0), (frozen, 0)],
)
def test_a_block_runs_by_its_modules_where_somebody_needs_them(monkeypatch, change, blocks):
    model, calls = narrow(), fused_calls(monkeypatch)
    change(model)
    packs.hidden_states(model, pack_of())
    assert len(calls) == blocks


def test_it_drops_the_inputs_that_the_modules_drop(monkeypatch):
    model = narrow()
    for layer in adapters_of(model).values():
        layer.dropout = 0.3
    kept = run(model.eval(), pack_of())
    model.train()
    own = copy.deepcopy(model)
    for layer in own.model.layers:
        layer.__class__ = type(layer).__mro__[2]
    calls, found = fused_calls(monkeypatch), []
    for one in (model, own, model):
        torch.manual_seed(len(found) // 2)
        found.append(run(one, pack_of()))
    ours, modules, others = found
    assert len(calls) == 4
    assert error(ours, modules) < 0.15 < 0.25 < min(error(ours, kept), error(ours, others))


def test_a_block_computed_again_is_fused_both_times(monkeypatch):
    model, calls = narrow(), fused_calls(monkeypatch)
    for layer in adapters_of(model).values():
        layer.dropout = 0.3  # of the same inputs, too
    torch.manual_seed(0)
    plain = run(model, pack_of())
    model.activation_checkpointing_enable()
    torch.manual_seed(0)
    again = run(model, pack_of())
    assert len(calls) == 2 + 4
    for one, two in zip(plain, again, strict=True):
        torch.testing.assert_close(one, two)


def test_models_of_other_activations_keep_their_blocks():
    model = model_of("llama", Lora(dropout=0), hidden_act="gelu")
    fused.fuse(model)
    assert not any(isinstance(module, FusedBlock) for module in model.modules())
    model = model_of("llama", Lora(dropout=0))
    fused.fuse(model)
    assert type(model.model.layers[0]).__name__ == "LlamaDecoderLayer"
    assert all(isinstance(layer, FusedBlock) for layer in model.model.layers)
