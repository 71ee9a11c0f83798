"""Random models shaped like OLMo-1B, and LoRAs on a smaller one, for merge.py."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch

HIDDEN, INTERMEDIATE, VOCABULARY, LAYERS = 2048, 8192, 50304, 16


def tuned_models(folder: Path, layers: int, dtype: str = "BF16") -> list[str]:
    """A base and two models near it, as folders; written once."""
    from expunge.merge.shards import SHARD_BYTES, Planned, ShardWriter

    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{at}.self_attn.{name}.weight"] = (HIDDEN, HIDDEN)
        for name in ("gate_proj", "up_proj"):
            shapes[f"{at}.mlp.{name}.weight"] = (INTERMEDIATE, HIDDEN)
        shapes[f"{at}.mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{at}.{name}.weight"] = (HIDDEN,)
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    folders = [folder / name for name in ("base", "one", "two")]
    kind = torch.bfloat16 if dtype == "BF16" else torch.float32
    if not all((f / "config.json").is_file() for f in folders):
        writers = []
        for f in folders:
            shutil.rmtree(f, ignore_errors=True)
            f.mkdir(parents=True)
            planned = [Planned(name, dtype, shape) for name, shape in shapes.items()]
            writers.append(ShardWriter(f, planned, SHARD_BYTES))
        rng = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            base = (0.02 * torch.randn(shape, generator=rng)).to(kind)
            for number, writer in enumerate(writers):
                near = base
                if number:
                    near = (base.float() + 1e-3 * torch.randn(shape, generator=rng)).to(kind)
                writer.write(name, 0, near.view(torch.uint8).numpy().reshape(-1).view(np.uint8))
                writer.finished(name, [])
        for writer, f in zip(writers, folders, strict=True):
            writer.close()
            (f / "journal.jsonl").unlink()
            _companions(
                f, HIDDEN, INTERMEDIATE, layers, VOCABULARY, 16, str(kind).removeprefix("torch.")
            )
    return [str(f) for f in folders]


def loras(folder: Path, layers: int = 12, dtype: str = "bfloat16") -> list[str]:
    """A model (of 191 M parameters) and two adapters of rank 32 on its linear layers."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    base = folder / "base"
    if not (base / "config.json").is_file():
        shape = LlamaConfig(
            vocab_size=49152,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=layers,
            num_attention_heads=12,
            tie_word_embeddings=False,
        )
        torch.manual_seed(0)
        model = LlamaForCausalLM(shape).to(getattr(torch, dtype))
        model.save_pretrained(base)
        _companions(base, 768, 3072, layers, 49152, 12, dtype)
        model = LlamaForCausalLM.from_pretrained(base)
        for number in (1, 2):
            torch.manual_seed(number)
            lora = LoraConfig(r=32, lora_alpha=32, target_modules="all-linear")
            tuned = get_peft_model(model, lora)
            for name, parameter in tuned.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.01)
            tuned.save_pretrained(str(folder / f"lora-{number}"))
            model = tuned.unload()
    return [str(base), *(f"{base}+{folder}/lora-{number}" for number in (1, 2))]


def _companions(
    folder: Path,
    hidden: int,
    intermediate: int,
    layers: int,
    vocabulary: int,
    heads: int,
    dtype: str = "bfloat16",
) -> None:
    from expunge import models

    source = models.resolve(models.EMBEDDED)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "dtype": dtype,
    }
    (folder / "config.json").write_text(json.dumps(config))
