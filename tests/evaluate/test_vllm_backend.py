"""The backend vllm: what it asks of vLLM's interface (0.30), and on a GPU, vLLM itself."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest
import torch

from expunge import models
from expunge.adapter_files import adapter_config, write_adapter
from expunge.errors import EvaluationError
from expunge.evaluate import vllm_backend
from expunge.evaluate.generate import end_tokens, generate
from expunge.evaluate.reader import open_reader
from expunge.lora import Lora, add_adapter, load_adapter, remove_adapter, save_adapter

PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5], [40] * 9]


@dataclass
class SamplingParams:
    temperature: float = 1.0
    max_tokens: int = 16
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    detokenize: bool = True


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""


class LLM:
    """What the backend uses of vllm.LLM, by the generation tested elsewhere; ends included."""

    started: ClassVar[list["LLM"]] = []

    def __init__(
        self, model, *, dtype, max_model_len, gpu_memory_utilization, load_format,
        trust_remote_code, generation_config, enable_lora=False, max_lora_rank=16,
    ):  # fmt: skip
        assert (load_format, trust_remote_code) == ("safetensors", False)
        assert 0 < gpu_memory_utilization < 1
        self.model, self.longest = models.load_model(model, dtype=dtype), max_model_len
        self.tokenizer = models.load_tokenizer(model)
        self.rank = max_lora_rank if enable_lora else 0
        self.asked = []
        LLM.started.append(self)

    def generate(self, prompts, sampling_params, *, use_tqdm, lora_request):
        assert (sampling_params.temperature, sampling_params.ignore_eos) == (0.0, True)
        ends = set(end_tokens(self.model, self.tokenizer))
        assert set(sampling_params.stop_token_ids) == ends
        tokens = [prompt["prompt_token_ids"] for prompt in prompts]
        assert max(map(len, tokens)) + sampling_params.max_tokens <= self.longest
        self.asked.append(lora_request)
        remove_adapter(self.model)
        if lora_request is not None:
            assert self.rank
            load_adapter(self.model, Path(lora_request.lora_path))
        limit = sampling_params.max_tokens
        found = generate(self.model, self.tokenizer, tokens, max_new_tokens=limit)
        rows = [row + sorted(ends)[:1] if len(row) < limit else row for row in found]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(row))]) for row in rows]


@pytest.fixture
def engine(monkeypatch):
    """A stand-in for the module vllm, and a GPU that is said to be there."""
    vllm, lora, request = (ModuleType(n) for n in ("vllm", "vllm.lora", "vllm.lora.request"))
    vllm.LLM, vllm.SamplingParams, vllm.lora = LLM, SamplingParams, lora
    lora.request, request.LoRARequest = request, LoRARequest
    for module in (vllm, lora, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(vllm_backend, "_has_gpu", lambda: True)
    monkeypatch.setattr(vllm_backend, "_running", [])
    monkeypatch.setattr(LLM, "started", [])
    return LLM


@pytest.fixture
def adapters(tiny, tiny_folder, tmp_path):
    folders = []
    for seed in range(2):
        layers = add_adapter(tiny, Lora(rank=4, alpha=4, dropout=0), seed=seed)
        for layer in layers.values():
            torch.nn.init.normal_(layer.lora_B, std=0.5)
        folders.append(tmp_path / f"adapter-{seed}")
        save_adapter(tiny, Lora(rank=4, alpha=4, dropout=0), folders[-1], base=str(tiny_folder))
        remove_adapter(tiny)
    return folders


def read(folder, adapter, cache, backend, new=12):
    reader = open_reader(folder, adapter, dtype="float32", folder=cache, backend=backend)
    return [row.tokens for row in reader.generations(PROMPTS, max_new_tokens=new)], reader


def test_it_writes_what_torch_writes_and_is_kept_apart(engine, tiny_folder, tmp_path):
    ours, _ = read(tiny_folder, None, tmp_path, "torch")
    found, reader = read(tiny_folder, None, tmp_path, "vllm")
    assert found == ours
    assert reader.forwards == len(PROMPTS)  # not taken from what torch wrote
    _, again = read(tiny_folder, None, tmp_path, "vllm")
    assert again.forwards == 0
    assert len(engine.started) == 1


def test_adapters_are_swapped_in_the_running_engine(engine, tiny_folder, adapters, tmp_path):
    expected = [read(tiny_folder, a, None, "torch")[0] for a in (*adapters, None)]
    found = [read(tiny_folder, a, None, "vllm")[0] for a in (*adapters, None)]
    assert found == expected
    assert expected[0] != expected[1] != expected[2]  # control: each adapter says its own
    (llm,) = engine.started
    first, second, none = llm.asked
    assert first.lora_int_id != second.lora_int_id
    assert none is None
    assert llm.rank == 8  # the least that vLLM can be made for


def test_a_longer_prompt_starts_an_engine_that_holds_it(engine, tiny_folder):
    read(tiny_folder, None, None, "vllm", new=5)
    read(tiny_folder, None, None, "vllm", new=7)  # within the same power of two
    assert [llm.longest for llm in engine.started] == [16]
    read(tiny_folder, None, None, "vllm", new=40)
    assert [llm.longest for llm in engine.started] == [16, 64]


def test_what_vllm_would_scale_wrongly_is_refused(engine, tiny_folder, tmp_path):
    names = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    tensors = {
        f"base_model.model.{name}.{part}.weight": torch.ones(shape)
        for name in names
        for part, shape in (("lora_A", (4, 32)), ("lora_B", (48, 4)))
    }
    config = adapter_config(names, "base", rank=4, alpha=8)
    write_adapter(tensors, {**config, "alpha_pattern": {"1.mlp.up_proj": 16}}, tmp_path / "a")
    with pytest.raises(
        EvaluationError, match=r"scales .*1\.mlp\.up_proj by 4 and other layers by 2"
    ):
        read(tiny_folder, tmp_path / "a", None, "vllm")


def test_what_is_missing_is_said(tiny_folder, monkeypatch, engine):
    with pytest.raises(EvaluationError, match="backend 'tpu' is none of torch, vllm"):
        read(tiny_folder, None, None, "tpu")
    with pytest.raises(EvaluationError, match="longer than the model's context of 512"):
        read(tiny_folder, None, None, "vllm", new=510)
    monkeypatch.setattr(
        LLM, "generate", lambda *a, **o: (_ for _ in ()).throw(RuntimeError("no\nroom"))
    )
    with pytest.raises(EvaluationError, match=r"vLLM cannot serve .*: no room"):
        read(tiny_folder, None, None, "vllm")
    monkeypatch.setattr(vllm_backend, "_has_gpu", lambda: False)
    with pytest.raises(EvaluationError, match="needs a GPU"):
        read(tiny_folder, None, None, "vllm")
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(EvaluationError, match=r"pip install 'expunge\[vllm\]'"):
        read(tiny_folder, None, None, "vllm")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="vLLM needs a GPU")
def test_vllm_itself_writes_what_torch_writes(tiny_folder, adapters):
    pytest.importorskip("vllm")
    for adapter in (None, *adapters):
        assert read(tiny_folder, adapter, None, "vllm") == read(tiny_folder, adapter, None, "torch")
