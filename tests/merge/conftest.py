"""Two trained-looking adapters on the tiny model, and ways to vary them."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from expunge.adapter_files import CONFIG, WEIGHTS
from expunge.lora import Lora, adapters_of, add_adapter, save_adapter
from expunge.models import load_tokenizer


@pytest.fixture(scope="session")
def make_branch(_tiny, tiny_folder, tmp_path_factory):
    """Write an adapter whose A and B are drawn from `seed`, as a peft folder."""

    def make(seed, *, rank=4, alpha=8.0, **options):
        model = copy.deepcopy(_tiny)
        lora = Lora(rank=rank, alpha=alpha, dropout=0.0, **options)
        layers = add_adapter(model, lora, seed=seed)
        rng = torch.Generator().manual_seed(seed)
        for layer in adapters_of(model).values():
            layer.lora_B.data = 0.1 * torch.randn(layer.lora_B.shape, generator=rng)
        assert layers
        folder = tmp_path_factory.mktemp("branch") / f"branch-{seed}"
        save_adapter(model, lora, folder, base=str(tiny_folder))
        return folder

    return make


@pytest.fixture(scope="session")
def branches(make_branch):
    """A strong and a weak branch of unlike scale."""
    return [make_branch(1), make_branch(2, alpha=2.0)]


@pytest.fixture
def edited():
    """Change an adapter folder's config or tensors in place."""

    def edit(folder, tensors=None, **config):
        fields = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**fields, **config}))
        if tensors:
            kept = {k: v.clone() for k, v in load_file(folder / WEIGHTS).items()}
            save_file(tensors(kept), folder / WEIGHTS)
        return folder

    return edit


@pytest.fixture
def tokens():
    return torch.arange(1, 40)[None]


@pytest.fixture(scope="session")
def tuned(tmp_path_factory, tiny_folder):
    """A base and two models that look tuned from it: folders, float32."""
    folders = [tiny_folder]
    for seed in (1, 2):
        model = AutoModelForCausalLM.from_pretrained(tiny_folder)
        rng = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=rng)
        folder = tmp_path_factory.mktemp("tuned") / f"model-{seed}"
        model.save_pretrained(folder)
        load_tokenizer(tiny_folder).save_pretrained(folder)
        folders.append(folder)
    return folders
