"""Statistics for regmean and fisher: sums over texts, as a command writes them and merges read."""

import json

import pytest
import torch
from safetensors import safe_open

from expunge import models
from expunge.data.batches import encode_document
from expunge.data.examples import Document
from expunge.errors import MergeError, ModelError, RecipeError, RunError
from expunge.merge import spectral
from expunge.merge.run import merge_models
from expunge.merge.statistics import KINDS, fisher, gather, gram, write_statistics
from expunge.merge.trim import Settings

TEXTS = ["A short text.", "Another one, somewhat longer than the first.", "The third."]


@pytest.fixture
def texts(tokenizer):
    documents = [Document(str(i), text) for i, text in enumerate(TEXTS)]
    return [encode_document(d, tokenizer, max_length=64) for d in documents]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "texts.jsonl"
    rows = [{"id": str(i), "document": text} for i, text in enumerate(TEXTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@torch.no_grad()
def test_gram_is_the_mean_product_of_the_inputs(tiny, texts):
    name = "model.layers.1.mlp.down_proj"
    seen = []
    hook = tiny.get_submodule(name).register_forward_pre_hook(lambda _, x: seen.append(x[0][0]))
    for text in texts:
        tiny(input_ids=torch.tensor([text.tokens]))
    hook.remove()
    inputs = torch.cat(seen).double()
    found = gram(tiny, texts)
    expected = inputs.T @ inputs / len(inputs)
    torch.testing.assert_close(found[f"{name}.weight"].double(), expected, rtol=1e-4, atol=1e-6)
    assert len(found) == 14  # seven layers in each of two blocks, and no head


def test_fisher_is_the_mean_square_of_each_texts_gradient(tiny, texts):
    tiny.requires_grad_(False)  # as after an adapter was put on it
    found = fisher(tiny, texts)
    assert not any(p.requires_grad for p in tiny.parameters())
    tiny.requires_grad_(True)
    squares = {name: torch.zeros_like(p) for name, p in tiny.named_parameters()}
    for text in texts:
        tokens = torch.tensor([text.tokens])
        tiny.zero_grad()
        tiny(input_ids=tokens, labels=tokens).loss.backward()
        for name, parameter in tiny.named_parameters():
            squares[name] += parameter.grad.square() / len(texts)
    assert found.keys() == squares.keys()
    for name, expected in squares.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize(("kind", "method"), [("gram", "regmean"), ("fisher", "fisher")])
def test_a_merge_reads_what_the_command_writes(tiny, tiny_folder, file, tmp_path, kind, method):
    """A model merged with itself is itself, whatever the statistics say."""
    with torch.no_grad():
        for number, parameter in enumerate(tiny.parameters()):
            torch.manual_seed(number)
            parameter.add_(0.01 * torch.randn_like(parameter))
    tuned, out = tmp_path / "tuned", tmp_path / f"{kind}.safetensors"
    models.save_model(tiny, models.load_tokenizer(tiny_folder), tuned)
    facts = gather(str(tuned), str(file), out, kind=kind, max_length=64)
    assert facts["texts"] == 3
    with safe_open(out, "pt") as stored:
        assert stored.metadata() == {"kind": kind, "texts": "3"}
    model = {"model": str(tuned), "statistics": str(out), "parameters": {"weight": 1.0}}
    merge = {"merge_method": method, "base_model": str(tiny_folder), "models": [model, model]}
    config = tmp_path / "merge.yaml"
    config.write_text(json.dumps({**merge, "dtype": "float32"}))
    merge_models(config, tmp_path / "merged")
    merged, before = (models.load_model(folder) for folder in (tmp_path / "merged", tiny_folder))
    for name, weight in tiny.named_parameters():
        torch.testing.assert_close(merged.get_parameter(name), weight, rtol=1e-3, atol=1e-3)
        assert not torch.equal(merged.get_parameter(name), before.get_parameter(name))  # control


def test_fisher_information_counts_by_its_ratios_however_small_and_none_is_equal():
    deltas = torch.tensor([[1.0, 1.0, 1.0], [3.0, 3.0, 3.0]])
    information = [torch.tensor([3e-20, 0.0, 1.0]), torch.tensor([1e-20, 0.0, 0.0])]
    found = spectral.fisher(deltas, Settings("x", (1.0, 1.0)), information)
    torch.testing.assert_close(found, torch.tensor([1.5, 2.0, 1.0]))
    with pytest.raises(MergeError, match="weights sum to 0"):
        spectral.fisher(deltas, Settings("x", (1.0, -1.0)), information)


def test_what_cannot_be_gathered_is_said(tiny, tiny_folder, file, tmp_path):
    with pytest.raises(RecipeError, match=r"no kind of statistics is called 'grams'.*'gram'"):
        gather(str(tiny_folder), str(file), tmp_path / "x", kind="grams", max_length=64)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="a file of that name is in the way"):
        gather(str(tiny_folder), str(file), tmp_path / "file" / "x", kind="gram", max_length=64)
    kept = (tiny_folder / "model.safetensors").read_bytes()
    with pytest.raises(ModelError, match=r"model\.safetensors exists; choose another name"):
        weights = tiny_folder / "model.safetensors"
        gather(str(tiny_folder), str(file), weights, kind="gram", max_length=64)
    assert (tiny_folder / "model.safetensors").read_bytes() == kept
    for fn in KINDS.values():
        with pytest.raises(ModelError, match="at least one text"):
            fn(tiny, [])
    broken = {"layer.weight": torch.tensor([1.0, torch.nan])}
    with pytest.raises(ModelError, match=r"the gram statistics of layer.weight are not finite"):
        write_statistics(broken, tmp_path / "broken", kind="gram", texts=1)
    assert not (tmp_path / "broken").exists()
