"""A merge whose tokenizer is chosen: padded rows, what ends a text, what a resumed one trusts."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from expunge.merge.compat import read_merge_file
from expunge.merge.plan import Plan
from expunge.merge.run import merge_models
from expunge.models import load_tokenizer

EMBEDDING = "model.embed_tokens.weight"


def padded(folder, to, rows, seed):
    """A copy of a model with so many rows of embeddings, whatever its tokenizer has words."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    had = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(rows, mean_resizing=False)
    torch.manual_seed(seed)
    model.get_input_embeddings().weight.data[had:] = torch.randn(rows - had, 32)
    model.save_pretrained(to)
    load_tokenizer(folder).save_pretrained(to)
    return to


def written(folder, **fields):
    path = folder / "merge.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def embeddings(folder):
    return load_file(folder / "model.safetensors")[EMBEDDING]


@pytest.mark.parametrize("source", ["one", "union"])
def test_padded_rows_are_kept_and_merged_by_number(tuned, tmp_path, source):
    one, two = (padded(tuned[n], tmp_path / f"{n}", 300 - n, n) for n in (1, 2))
    path = written(
        tmp_path,
        method="linear",
        models=[{"model": str(one)}, {"model": str(two)}],
        tokenizer_source={"one": str(one), "union": "union"}[source],
    )
    merge_models(path, tmp_path / "out")
    merged, first, second = map(embeddings, (tmp_path / "out", one, two))
    assert len(merged) == len(first) == 299
    torch.testing.assert_close(merged[:298], (first[:298] + second) / 2, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(merged[298], first[298])  # which only one of them has
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == 299
    fields = yaml.safe_load(path.read_text())
    fields["tokenizer"] = {"source": fields.pop("tokenizer_source"), "pad_to_multiple_of": 2}
    merge_models(written(tmp_path, **fields), tmp_path / "even")
    assert len(embeddings(tmp_path / "even")) == 258  # as asked for: 257 words, rounded up


def renamed_end(folder, to):
    """A copy whose texts end with another token, which its tokenizer and configs say."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), load_tokenizer(folder)
    tokenizer.add_tokens(["<stop>"], special_tokens=True)
    tokenizer.eos_token = tokenizer.pad_token = "<stop>"
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for config in (model.config, model.generation_config):
        config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    model.save_pretrained(to)
    tokenizer.save_pretrained(to)
    return to


def test_the_output_ends_texts_as_the_model_of_its_tokenizer_does(tuned, tmp_path):
    chosen = renamed_end(tuned[1], tmp_path / "chosen")
    base = padded(tuned[0], tmp_path / "base", 257, 0)
    for name in ("vocab.json", "added_tokens.json", "tokenizer.model", "notes.txt"):
        (base / name).write_text("{}")
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(base)
    fields = {
        "method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": str(chosen), "parameters": {"weight": 1.0}}],
    }
    merge_models(written(tmp_path, **fields, tokenizer_source=str(chosen)), tmp_path / "out")
    out, end = tmp_path / "out", load_tokenizer(chosen).eos_token_id
    assert end != 0
    for name in ("config.json", "generation_config.json"):
        said = json.loads((out / name).read_text())
        assert said["eos_token_id"] == said["pad_token_id"] == end
    made = load_tokenizer(out)
    assert (made.eos_token_id, made.chat_template) == (end, None)
    left = {path.name for path in out.iterdir()}
    assert not left & {"vocab.json", "added_tokens.json", "tokenizer.model", "chat_template.jinja"}
    assert "notes.txt" in left
    merge_models(written(tmp_path, **fields, tokenizer_source="base"), tmp_path / "own")
    assert json.loads((tmp_path / "own" / "config.json").read_text())["eos_token_id"] == 0
    assert load_tokenizer(tmp_path / "own").chat_template == "{{ messages }}"


@pytest.mark.parametrize("changed", ["statistics.safetensors", "model/tokenizer.json"])
def test_a_merge_goes_on_only_from_the_same_statistics_and_words(tuned, tmp_path, changed):
    padded(tuned[1], tmp_path / "model", 257, 0)
    (tmp_path / "statistics.safetensors").write_bytes(b"one")
    path = written(
        tmp_path,
        method="fisher",
        base_model=str(tuned[0]),
        models=[
            {
                "model": str(tmp_path / "model"),
                "statistics": str(tmp_path / "statistics.safetensors"),
            }
        ],
    )

    def description():
        return Plan(read_merge_file(path)).description()

    before = description()
    assert description() == before
    found = (tmp_path / changed).read_bytes()
    (tmp_path / changed).write_bytes(found + b" ")
    assert description() != before
