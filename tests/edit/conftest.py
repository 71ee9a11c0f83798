"""A tiny model that knows both halves, and adapters on it: drawn ones, and one that learnt."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch

from expunge.data.batches import encode, pack
from expunge.data.examples import Example
from expunge.lora import Lora, adapters_of, add_adapter, load_adapter, save_adapter
from expunge.models import load_model, load_tokenizer, save_model
from expunge.scores import score
from expunge.unlearn.tune import Tune, tune

FORGET = [Example(f"f{n}-qa0", f"Who is {w}?", w[::-1]) for n, w in enumerate(["ann", "bob", "cy"])]
RETAIN = [Example(f"r{n}-qa0", f"Where is {w}?", w[::-1]) for n, w in enumerate(["oslo", "rome"])]
SETS = {"forget": FORGET, "retain": RETAIN}


def encoded(items, tokenizer):
    return [encode(item, tokenizer, max_length=64) for item in items]


def nll(folder, items, adapter=None):
    """Mean answer NLL of items under a model on disk."""
    model = load_model(folder)
    if adapter is not None:
        load_adapter(model, adapter)
    with torch.no_grad():
        sequences = encoded(items, load_tokenizer(folder))
        return float(score(model, pack(sequences, "answer", "cpu")).nll.mean())


@pytest.fixture(scope="session")
def halves():
    """The items of both halves, their tokens, and how well a model on disk knows them."""
    return SimpleNamespace(forget=FORGET, retain=RETAIN, encoded=encoded, nll=nll)


@pytest.fixture(scope="session")
def knowing(tmp_path_factory, tiny_folder):
    """The folder of the tiny model after it has nearly memorised both halves."""
    folder = tmp_path_factory.mktemp("knowing")
    model, tokenizer = load_model(tiny_folder), load_tokenizer(tiny_folder)
    config = Tune(
        epochs=90, batch=5, stop_nll=0.3, optimizer={"lr": 1e-2, "warmup": 0, "compute": "float32"}
    )
    items = encoded(FORGET + RETAIN, tokenizer)
    tune(model, tokenizer, items, [], config, folder=folder)
    save_model(model, tokenizer, folder / "base")
    return folder / "base"


@pytest.fixture(scope="session")
def learnt(knowing, tmp_path_factory):
    """An adapter that has learnt the forget half still better, while the retain half was kept."""
    model, tokenizer = load_model(knowing), load_tokenizer(knowing)
    lora = Lora(rank=4, alpha=8, dropout=0.0)
    add_adapter(model, lora, seed=0)
    given = {half: pack(encoded(items, tokenizer), "answer", "cpu") for half, items in SETS.items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    for _ in range(15):
        score(model, given["forget"]).nll.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("learnt") / "adapter"
    save_adapter(model, lora, folder, base=str(knowing))
    return folder


@pytest.fixture(scope="session")
def drawn(_tiny, tiny_folder, tmp_path_factory):
    """Write an adapter on the tiny model whose A and B are drawn from a seed."""

    def make(seed, *, rank=4, alpha=8.0, size=0.1):
        model = copy.deepcopy(_tiny)
        lora = Lora(rank=rank, alpha=alpha, dropout=0.0)
        add_adapter(model, lora, seed=seed)
        rng = torch.Generator().manual_seed(seed)
        for layer in adapters_of(model).values():
            layer.lora_B.data = size * torch.randn(layer.lora_B.shape, generator=rng)
        folder = tmp_path_factory.mktemp("drawn") / f"adapter-{seed}"
        save_adapter(model, lora, folder, base=str(tiny_folder))
        return folder

    return make


@pytest.fixture(scope="session")
def tuned(_tiny, tiny_folder, tmp_path_factory):
    """Write a full model that looks tuned from the tiny one."""

    def make(seed, *, size=0.01):
        model = copy.deepcopy(_tiny)
        rng = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += size * torch.randn(parameter.shape, generator=rng)
        folder = tmp_path_factory.mktemp("tuned") / f"model-{seed}"
        save_model(model, load_tokenizer(tiny_folder), folder)
        return folder

    return make


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """The halves as files, by name."""
    folder = tmp_path_factory.mktemp("halves")
    for half, items in SETS.items():
        rows = [{"id": i.id, "input": i.prompt, "output": i.answer} for i in items]
        (folder / f"{half}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {half: str(folder / f"{half}.jsonl") for half in SETS}
