"""Models of many families, tiny and random: scored, continued and trained as transformers has them.

`PACKED` are forwarded end to end, `ALONE` in buckets of like length: by layers that keep a state,
or attention that ours is not.
"""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from expunge import runs
from expunge.affine_heads import output_head
from expunge.data.batches import TokenSequence, pack
from expunge.errors import ModelError
from expunge.evaluate.generate import generate
from expunge.heads import Anchor, token_kl
from expunge.lora import Lora, adapters_of, add_adapter
from expunge.models import load_model, load_tokenizer, outline
from expunge.packs import beyond_window, hidden_states, in_buckets
from expunge.scores import score
from expunge.unlearn.footprint import Shape
from expunge.unlearn.preparing import check_fit
from expunge.unlearn.reference import trains_head
from expunge.unlearn.section import Branch

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
OLDER = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
PACKED = {
    "gpt2": OLDER,
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": {},
    "phi3": {},
    "gemma": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 32},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, **EXPERTS},
    "mistral": {"sliding_window": 32},
    "mixtral": {"num_local_experts": 4, **EXPERTS},
    "olmo": {},
    "olmo2": {},
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.25},
    "deepseek_v2": {
        "num_key_value_heads": 4, "n_routed_experts": 4, "kv_lora_rank": 8, "q_lora_rank": 8,
        "qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 4, "n_group": 1,
        "topk_group": 1, "n_shared_experts": 1, **EXPERTS,
    },
}  # fmt: skip
ALONE = {
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {},
    "gptj": OLDER,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "stablelm": {},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, **EXPERTS},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": None},
}
ROWS = [tuple(range(1, 1 + n)) for n in (40, 3, 36, 11, 12, 2)]


def written(kind, fields, folder, tokenizer):
    """A model with logits that differ from token to token, in a folder."""
    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, **{**SIZES, "vocab_size": 257, **ends, **fields})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
            elif name == "lm_head.bias":
                parameter.normal_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[*PACKED, *ALONE])
def family(request, tmp_path_factory, tokenizer):
    """Its folder, and the model as transformers loads it."""
    kind = request.param
    fields = PACKED.get(kind, ALONE.get(kind))
    folder = written(kind, fields, tmp_path_factory.mktemp(kind) / "model", tokenizer)
    return kind, folder, AutoModelForCausalLM.from_pretrained(folder).eval()


def sequences():
    return [TokenSequence(str(n), row, 1) for n, row in enumerate(ROWS)]


def losses(model):
    """The NLL of each row, by the model's own forward pass."""
    found = []
    for row in ROWS:
        tokens = torch.tensor([row])
        found.append(model(input_ids=tokens, labels=tokens, use_cache=False).loss)
    return torch.stack(found)


def test_scores_and_gradients_are_those_of_one_text_at_a_time(family):
    kind, folder, theirs = family
    model, theirs = load_model(folder), copy.deepcopy(theirs)
    assert in_buckets(model) == (kind in ALONE)
    model.requires_grad_(True)
    ours = score(model, pack(sequences(), "document", "cpu")).nll
    expected = losses(theirs)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    ours.sum().backward()
    expected.sum().backward()
    by_name = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert by_name[name].grad is None or not by_name[name].grad.any(), name
            continue
        torch.testing.assert_close(
            parameter.grad, by_name[name].grad, atol=2e-4, rtol=1e-3, msg=lambda m, n=name: n + m
        )


def test_what_is_written_is_what_transformers_writes(family):
    kind, folder, theirs = family
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    prompts = [row[:n] for row, n in zip(ROWS, (24, 3, 9, 1, 12, 2), strict=True)]
    found = generate(model, tokenizer, prompts, max_new_tokens=12)
    for prompt, new in zip(prompts, found, strict=True):
        tokens = torch.tensor([prompt])
        made = theirs.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, do_sample=False,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()  # fmt: skip
        assert list(new) == (made[: made.index(0)] if 0 in made else made)
    assert beyond_window(model, 36) == (kind in ("gemma3_text", "mistral"))  # as the longest was


def test_an_adapter_is_trained_by_kl_and_nll(family):
    _, folder, theirs = family
    model = load_model(folder)
    layers = add_adapter(model, Lora(rank=2, dropout=0), seed=0)
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_B.normal_(std=0.05)
    batch = pack(sequences(), "document", "cpu")
    with torch.no_grad():
        before = hidden_states(load_model(folder), batch)
        logits = torch.cat([theirs(input_ids=torch.tensor([row])).logits[0, :-1] for row in ROWS])
        now = torch.cat([model(input_ids=torch.tensor([row])).logits[0, :-1] for row in ROWS])
    assert not trains_head(model)
    head = output_head(model)
    kl = token_kl(hidden_states(model, batch), head, Anchor(before, head=head))
    p, q = now.log_softmax(-1), logits.log_softmax(-1)
    torch.testing.assert_close(kl, (q.exp() * (q - p)).sum(-1), atol=1e-5, rtol=1e-3)
    assert kl.mean() > 1e-4  # control: the adapter does something
    kl.sum().backward()
    assert all(layer.lora_A.grad.any() and layer.lora_B.grad.any() for layer in layers.values())


def test_plans_read_its_shape_whatever_its_config_calls_it(family):
    _, folder, _ = family
    shape = Shape.of(runs.read_json(folder / "config.json"), 1)
    assert (shape.layers, shape.width, shape.heads, shape.vocabulary) == (2, 32, 4, 257)


def test_a_config_without_a_width_is_named():
    with pytest.raises(ModelError, match="names no num_attention_heads"):
        Shape.of({"model_type": "mamba", "hidden_size": 32}, 1)


def test_an_adapter_that_a_model_would_leave_out_is_refused(tmp_path, tokenizer):
    folder = written("mamba", {"state_size": 4}, tmp_path / "mamba", tokenizer)
    model, batch = load_model(folder), pack(sequences(), "document", "cpu")
    add_adapter(model, Lora(rank=2), seed=0)
    with pytest.raises(ModelError, match="reads the weight of an adapted layer itself"):
        hidden_states(model, batch)
    branch = Branch.model_validate({"terms": [{"half": "forget", "loss": "npo"}]})
    with pytest.raises(ModelError, match="the adapter would be left out"):
        check_fit(branch, outline(folder))  # before anything is trained
    fewer = branch.model_copy(update={"lora": Lora(targets=("in_proj",))})
    check_fit(fewer, outline(folder))
    assert not any(hasattr(layer, "weight") for layer in adapters_of(model).values())
    model = load_model(folder)
    add_adapter(model, Lora(rank=2, targets=("in_proj",)), seed=0)
    assert hidden_states(model.train(), batch).isfinite().all()


def test_a_cap_on_logits_is_refused_by_its_name(tmp_path, tokenizer):
    folder = written("gemma2", {"head_dim": 8}, tmp_path / "capped", tokenizer)
    with pytest.raises(ModelError, match="Gemma2ForCausalLM caps its logits"):
        load_model(folder)
