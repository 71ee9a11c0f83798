"""The model section of a recipe: what it starts from, and how texts are laid before a model."""

from operator import not_
from typing import Any

from pydantic import Field, model_validator

from expunge.config import Section
from expunge.models import EMBEDDED, Dtype
from expunge.quantized import Quantize


class Model(Section):
    """Which model a recipe starts from."""

    path: str = EMBEDDED
    """`smollm2` (embedded), a Hugging Face id, a local folder, or a GGUF file."""

    revision: str | None = None
    """Commit or tag of a Hugging Face id."""

    dtype: Dtype = "float32"
    """Type in which the base weights are held while branches train and models are scored."""

    quantize: Quantize | None = None
    """Hold the target's linear layers, its head left out, in 4 bits (`nf4` or `fp4`, bitsandbytes)
    while LoRA branches train on them, and products in `dtype`. An adapter belongs to the target as
    it is: all else, a branch's evaluation too, reads that, but for a branch's own `watch`."""

    max_length: int = Field(default=256, ge=8)
    """Longest sequence, in tokens; what is cut is said."""

    prompt_tail: int | None = Field(default=204, ge=1)
    """A prompt keeps this many of its last tokens; null keeps all that fit."""

    separator: str = ""
    """Put before the answer; the released system puts nothing, LUME's documents a space."""

    chat: bool = Field(default=False, exclude_if=not_)
    """A prompt is the user's turn in the tokenizer's chat template; plain texts stand as they are.
    `prompt_tail` cuts none, the template says what stands before an answer, and the special token
    that ends its turns ends a generation, as the end of text does."""

    @model_validator(mode="after")
    def _joined_once(self) -> "Model":
        if self.chat and self.separator:
            raise ValueError("a chat template joins prompt and answer; leave out separator")
        return self

    @property
    def reading(self) -> dict[str, Any]:
        """How items are cut and joined."""
        return self.model_dump(include={"max_length", "prompt_tail", "separator", "chat"})

    def told(self, *left_out: str) -> str:
        """How weights and texts are read, as JSON: the section without what only branches see."""
        return self.model_dump_json(exclude={"path", "revision", "quantize", *left_out})
