"""A two-layer model with a byte vocabulary, built in memory, and the folder it is saved to."""

import copy
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from expunge.models import load_model, load_tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; `<end>` is both padding and end of text, as in SmolLM2."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0, **{piece: number + 1 for number, piece in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", model_max_length=512
    )


def tiny_config(**changes) -> LlamaConfig:
    return LlamaConfig(
        **{
            "vocab_size": 257,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": 0,
            "pad_token_id": 0,
            **changes,
        }
    )


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """The tiny model, saved as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config())
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def _tiny(tiny_folder):
    return load_model(tiny_folder)


@pytest.fixture
def tiny(_tiny):
    """A fresh copy of the tiny model, which a test may change."""
    return copy.deepcopy(_tiny)


@pytest.fixture(scope="session")
def tokenizer(tiny_folder):
    return load_tokenizer(tiny_folder)
