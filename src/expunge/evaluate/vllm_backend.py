"""Generation by vLLM on a GPU: one engine for a base model, adapters swapped in place."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge import models, runs
from expunge.adapter_files import adapter_scales, read_adapter
from expunge.data.chat import ends_of
from expunge.errors import EvaluationError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

INSTALL = "the backend vllm needs vLLM: pip install 'expunge[vllm]'"

GPU_SHARE = 0.5
"""Of the GPU's memory that the engine takes; the rest is for the model that scores."""

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that an engine can be made for."""

Writer = Callable[[Sequence[Sequence[int]], int], list[list[int]]]
"""(prompts, max_new_tokens) → the greedy continuation of each, without its end of text."""


@dataclass
class _Engine:
    """The engine that is running, and what it was made for."""

    base: Path
    dtype: str
    length: int
    rank: int
    llm: Any

    def serves(self, base: Path, dtype: str, length: int, rank: int) -> bool:
        same = (self.base, self.dtype) == (base, dtype)
        return same and length <= self.length and rank <= self.rank


_running: list[_Engine] = []
_adapters: dict[str, int] = {}
"""The number by which engines know an adapter, by its content."""


def vllm_writer(
    base: Path,
    adapter: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: models.Dtype,
    context: int,
) -> Writer:
    """Greedy continuations by vLLM; the engine starts with the first prompts, and stays.

    An adapter on the same base joins the running engine. Differs: tokens may differ from those of
    the backend torch where two are nearly as likely, for sums are rounded in another order.
    """
    vllm = _vllm()
    if not _has_gpu():
        raise EvaluationError("the backend vllm needs a GPU, and there is none; use torch")
    ends = _end_tokens(base, tokenizer)
    rank = 0 if adapter is None else _rank(adapter)

    def write(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        length = max(len(prompt) for prompt in prompts) + max_new_tokens
        if not all(prompts) or length > context:
            raise EvaluationError(
                f"a prompt is empty, or with {max_new_tokens} new tokens longer than the model's "
                f"context of {context}"
            )
        sampling = vllm.SamplingParams(
            temperature=0.0,
            max_tokens=max_new_tokens,
            stop_token_ids=sorted(ends),
            ignore_eos=True,  # `ends` holds every token that ends a text
            detokenize=False,
        )
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        with _readable_errors(base):
            llm = _engine(vllm, base, dtype, min(context, _rounded(length)), rank)
            found = llm.generate(
                asked, sampling, use_tqdm=False, lora_request=_request(vllm, adapter)
            )
        rows = [list(output.outputs[0].token_ids) for output in found]
        return [row[:-1] if row and row[-1] in ends else row for row in rows]

    return write


def _engine(vllm: Any, base: Path, dtype: str, length: int, rank: int) -> Any:
    """The running engine if it serves; else it ends, for its memory, and another starts."""
    if not (_running and _running[0].serves(base, dtype, length, rank)):
        _running.clear()
        gc.collect()
        llm = vllm.LLM(
            model=str(base),
            dtype=dtype,
            max_model_len=length,
            gpu_memory_utilization=GPU_SHARE,
            load_format="safetensors",
            trust_remote_code=False,
            generation_config="vllm",  # greedy, whatever the model's own settings are
            **({"enable_lora": True, "max_lora_rank": rank} if rank else {}),
        )
        _running.append(_Engine(base, dtype, length, rank, llm))
    return _running[0].llm


def _request(vllm: Any, adapter: Path | None) -> Any:
    if adapter is None:
        return None
    content = runs.hash_folder(adapter)
    number = _adapters.setdefault(content, len(_adapters) + 1)
    return vllm.lora.request.LoRARequest(content, number, str(adapter))


def _rank(adapter: Path) -> int:
    """The rank that an engine needs; refused if vLLM would scale some layer wrongly.

    vLLM passes over rank_pattern and alpha_pattern, and scales every layer alike.
    """
    factors, config = read_adapter(adapter)
    rank, alpha = float(config.get("r") or 1), float(config.get("lora_alpha") or 0)
    common = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    for name, scale in adapter_scales(adapter, factors, config).items():
        if not math.isclose(scale, common):
            raise EvaluationError(
                f"{adapter} scales {name} by {scale:g} and other layers by {common:g}, which vLLM "
                "cannot; use the backend torch, or write the merged model first"
            )
    needed = max(a.shape[0] for a, _ in factors.values())
    fitting = [known for known in RANKS if known >= needed]
    if not fitting:
        raise EvaluationError(f"{adapter} has rank {needed}, and vLLM takes {RANKS[-1]} at most")
    return fitting[0]


def _end_tokens(base: Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end a text, of the tokenizer and the generation settings on disk."""
    path = base / "generation_config.json"
    settings = runs.read_json(path).get("eos_token_id") if path.is_file() else None
    return ends_of(tokenizer, settings)


def _rounded(length: int) -> int:
    """The next power of two, so that slightly longer prompts find the engine running."""
    return 1 << (length - 1).bit_length()


def _has_gpu() -> bool:
    return models.device() == "cuda"


def _vllm() -> Any:
    try:
        import vllm  # pyright: ignore[reportMissingImports]
        import vllm.lora.request  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise EvaluationError(INSTALL) from None
    return vllm


@contextmanager
def _readable_errors(base: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise EvaluationError(f"vLLM cannot serve {base}: {reason}") from None
