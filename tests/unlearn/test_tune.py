"""Tuning: neutral texts keep the model a language model, learnt (NLL) or held to (KL)."""

import copy

import pytest
import torch

from expunge.affine_heads import output_head
from expunge.data.batches import encode, pack
from expunge.data.examples import Example
from expunge.heads import Anchor
from expunge.packs import hidden_states
from expunge.scores import score
from expunge.unlearn import tune as tuning
from expunge.unlearn.checkpoints import LOG
from expunge.unlearn.tune import Tune, tune

ITEMS = [Example(f"i{n}", f"Who is {word}?", word[::-1]) for n, word in enumerate(["ann", "bob"])]
NEUTRAL = [Example(f"n{n}", "", text) for n, text in enumerate(["a dull day", "it rained"])]


@pytest.fixture(scope="module")
def measured(_tiny, tokenizer, tmp_path_factory):
    """For each way: NLL of the items, and NLL and KL to the start of the neutral texts."""
    items, neutral = (
        [encode(example, tokenizer, max_length=64) for example in examples]
        for examples in (ITEMS, NEUTRAL)
    )
    batch = pack(neutral, "document", "cpu")

    def measure(model):
        with torch.no_grad():
            start = hidden_states(_tiny, batch)
            head = output_head(_tiny)
            now = score(model, batch, anchor=Anchor(start, head=head))
            nll = score(model, pack(items, "answer", "cpu")).nll.mean()
            return float(nll), float(now.nll.mean()), float(now.token_kl.mean())

    found = {"before": measure(_tiny)}
    for way, fields in {
        "none": {},
        "nll": {"neutral_per_item": 1.0},
        "kl": {"neutral_per_item": 1.0, "neutral_loss": "kl", "neutral_weight": 3.0},
    }.items():
        model, folder = copy.deepcopy(_tiny), tmp_path_factory.mktemp(way)
        optimizer = {"lr": 3e-3, "compute": "float32"}
        config = Tune(epochs=60, batch=2, optimizer=optimizer, **fields)
        tune(model, tokenizer, items, neutral, config, folder=folder)
        assert {path.name for path in folder.iterdir()} == {"model", "log.jsonl"}
        found[way] = measure(model)
    return found


def test_a_model_that_was_written_is_not_trained_anew(tiny, tokenizer, tmp_path, monkeypatch):
    items = [encode(example, tokenizer, max_length=64) for example in ITEMS]
    config = Tune(epochs=1, batch=2, optimizer={"compute": "float32"})
    tune(tiny, tokenizer, items, [], config, folder=tmp_path)
    log = (tmp_path / LOG).read_text()
    monkeypatch.setattr(tuning, "train", None)
    tune(tiny, tokenizer, items, [], config, folder=tmp_path)
    assert (tmp_path / LOG).read_text() == log


def test_the_items_are_learnt_either_way(measured):
    assert measured["before"][0] > 4  # control
    assert all(measured[way][0] < 2.2 for way in ("none", "nll", "kl"))


def test_kl_holds_the_model_where_nll_learns_the_texts(measured):
    start = measured["before"][1]
    assert measured["nll"][1] < 0.4 * start
    assert measured["kl"][1] > 0.7 * start
    assert measured["kl"][2] < 0.5 * measured["none"][2]
    assert measured["nll"][2] > measured["none"][2]  # control
