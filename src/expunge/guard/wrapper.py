"""A guarded model for anyone's own code: generate, and a logits processor for transformers.

Shapes: B rows of a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from expunge.config import parse_section
from expunge.data.batches import prompt_tokens
from expunge.data.chat import ends_of
from expunge.errors import ModelError
from expunge.guard.contrast import Combine, combine_of
from expunge.guard.guard import Guard
from expunge.guard.helpers import open_helpers
from expunge.guard.made import Made, read_guard
from expunge.guard.standin import noisy, rms_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load(
    guard: Path | str | Mapping[str, Any] | Made,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> Guarded:
    """A model behind a guard: a folder that `expunge guard` or a recipe wrote, or its guard.json.

    The model is used as it is, whatever loaded it, and stays unguarded for who calls it directly.
    """
    if isinstance(guard, Path | str):
        return Guarded(Guard(read_guard(Path(guard)), tokenizer, Path(guard)), model)
    made = parse_section(guard, Made, origin="guard") if isinstance(guard, Mapping) else guard
    return Guarded(Guard(made, tokenizer), model)


class Guarded:
    """A model, its tokenizer and the guard before it."""

    def __init__(self, guard: Guard, model: PreTrainedModel) -> None:
        self.guard, self.model, self.tokenizer = guard, model, guard.tokenizer
        self._helpers = open_helpers(guard.made.helpers, guard.folder, model, guard.tokenizer)

    def logits_processor(self, attention_mask: Tensor | None = None) -> LogitsProcessor:
        """For `model.generate(..., logits_processor=[...])`; a new one for each call.

        `attention_mask` (B, T) is that of the prompts where they are padded on the left. Only for
        guards that act on logits; what acts on prompts and answers does so in `generate`.
        """
        contrast = self.guard.made.contrast
        if contrast is None:
            raise ModelError(
                f"a guard of kind {self.guard.made.kind} changes no logits; use its generate"
            )
        return ContrastProcessor(self._helpers, combine_of(contrast), attention_mask)

    @torch.inference_mode()
    def generate(self, prompts: str | Sequence[str], *, batch: int = 16, **options: Any) -> Any:
        """The answer to a prompt, or a list for a list; `options` are those of model.generate.

        Greedy, and 256 new tokens, unless the options say otherwise.
        """
        for name in {"num_return_sequences", "return_dict_in_generate"} & set(options):
            raise ModelError(f"a guard gives one text for each prompt; leave out {name}")
        if isinstance(prompts, str):
            return self.generate([prompts], batch=batch, **options)[0]
        asked = [prompt_tokens(self.tokenizer, prompt) for prompt in prompts]
        for number, prompt in enumerate(asked):
            if not prompt:
                raise ModelError(f"prompt {number} is empty")
        answers: dict[int, str] = {
            i: self.guard.made.refusal for i, p in enumerate(asked) if self.guard.refuses(p)
        }
        left = [i for i in range(len(asked)) if i not in answers]
        left.sort(key=lambda i: len(asked[i]))
        for low in range(0, len(left), batch):
            part = left[low : low + batch]
            made = self._continued([asked[i] for i in part], options)
            for i, new in zip(part, made, strict=True):
                kept = self.guard.answer(asked[i], new)
                answers[i] = str(self.tokenizer.decode(kept, skip_special_tokens=True))
        return [answers[i] for i in range(len(asked))]

    def _continued(
        self, prompts: Sequence[list[int]], options: Mapping[str, Any]
    ) -> list[list[int]]:
        """New tokens of each prompt, up to its end of text."""
        device, guard = next(self.model.parameters()).device, self.guard
        rows = [guard.wrapped(prompt) for prompt in prompts]
        self._check_room(rows, options)
        width, padding = max(map(len, rows)), self.tokenizer.pad_token_id
        padding = self.tokenizer.eos_token_id if padding is None else padding
        settings = getattr(self.model.generation_config, "eos_token_id", None)
        ends = sorted(ends_of(self.tokenizer, options.get("eos_token_id", settings)))
        tokens = torch.tensor([[padding] * (width - len(r)) + r for r in rows], device=device)
        mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
        given: dict[str, Any] = {"max_new_tokens": 256, "do_sample": False, **options}
        given["eos_token_id"] = ends
        if guard.made.contrast is not None:
            mine = [self.logits_processor(mask), *given.pop("logits_processor", ())]
            given["logits_processor"] = LogitsProcessorList(mine)
        if guard.made.corruption is not None:
            asked = {"inputs_embeds": self._embedded(rows, tokens, width)}
        else:
            asked = {"input_ids": tokens}
        made = self.model.generate(  # pyright: ignore[reportCallIssue]
            **asked, attention_mask=mask, pad_token_id=padding, **given
        )
        new = made[:, width if "input_ids" in asked else 0 :].tolist()
        return [
            row[: next((i for i, t in enumerate(row) if t in (*ends, padding)), None)]
            for row in new
        ]

    def _check_room(self, rows: Sequence[list[int]], options: Mapping[str, Any]) -> None:
        context = getattr(self.model.config, "max_position_embeddings", None) or 2**31
        longest = max(map(len, rows)) + options.get("max_new_tokens", 256)
        if longest > context:
            raise ModelError(
                f"a prompt of {max(map(len, rows))} tokens ({self.guard.room} of them the "
                f"guard's) and its answer exceed the model's context of {context}"
            )

    def _embedded(self, rows: Sequence[list[int]], tokens: Tensor, width: int) -> Tensor:
        """Embeddings (B, T, d) with noise on the prompts in scope."""
        corruption = self.guard.made.corruption
        assert corruption is not None
        embedding = self.model.get_input_embeddings()
        found, rms = embedding(tokens), rms_of(embedding.weight)  # pyright: ignore
        for number, row in enumerate(rows):
            if self.guard.corrupts(row, len(row)):
                start = width - len(row)
                found[number, start:] = noisy(found[number, start:], row, rms, corruption)
        return found


class ContrastProcessor(LogitsProcessor):
    """Joins the logits of helper models to those that `generate` has: (B, V).

    Each helper has a cache of its own. Where a call continues the last one by a token, only that
    token is read; where rows were exchanged, as in beam search, all is read anew.
    """

    def __init__(
        self,
        helpers: Sequence[PreTrainedModel | None],
        combine: Combine,
        attention_mask: Tensor | None = None,
    ) -> None:
        """A helper of None is the model itself."""
        self._helpers, self._combine, self._mask = helpers, combine, attention_mask
        self._seen: Tensor | None = None
        self._caches: list[Any] = [None] * len(helpers)

    @torch.inference_mode()
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: Tensor, scores: Tensor
    ) -> Tensor:
        """The joined logits, as log-probabilities; `scores` may be either."""
        goes_on = self._seen is not None and torch.equal(input_ids[:, :-1], self._seen)
        mask = self._whole_mask(input_ids)
        logits = []
        for number, helper in enumerate(self._helpers):
            if helper is None:
                logits.append(scores)
                continue
            if not goes_on:
                self._caches[number] = DynamicCache(config=helper.config)
            logits.append(self._next(helper, input_ids, mask, self._caches[number], goes_on))
        self._seen = input_ids.clone()
        # Beams add up what they are given, so it must be log-probabilities.
        return self._combine(scores, logits, True).log_softmax(-1).to(scores.dtype)

    def _whole_mask(self, input_ids: Tensor) -> Tensor:
        """Which tokens are text: (B, T)."""
        whole = torch.ones_like(input_ids)
        if self._mask is not None:
            copies = len(input_ids) // len(self._mask)  # of a row, as in beam search
            known = self._mask.repeat_interleave(copies, 0)
            whole[:, : known.shape[1]] = known
        return whole

    @staticmethod
    def _next(
        helper: PreTrainedModel, tokens: Tensor, mask: Tensor, cache: Any, goes_on: bool
    ) -> Tensor:
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        if goes_on:
            tokens, positions = tokens[:, -1:], positions[:, -1:]
        last = {"logits_to_keep": 1} if _keeps_logits(helper) else {}
        made = helper(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **last,
        )
        return made.logits[:, -1]


def _keeps_logits(model: PreTrainedModel) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters
