"""Prompts as a user's turns in a tokenizer's chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jinja2 import TemplateError

from expunge.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def chat_tokens(tokenizer: PreTrainedTokenizerBase, turn: str, begun: str = "") -> list[int]:
    """Tokens of a user's turn in the chat template, which brings its own BOS, up to where the
    answer begins, and of how it begins."""
    text = _rendered(tokenizer, [{"role": "user", "content": turn}], answering=True)
    return _tokens(tokenizer, text + begun)


def turn_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the chat template puts behind an answer, without white space; maybe none."""
    mark = "\N{OBJECT REPLACEMENT CHARACTER}"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
    _, found, end = _rendered(tokenizer, turns).rpartition(mark)
    return _tokens(tokenizer, end.strip()) if found else []


def ends_of(tokenizer: PreTrainedTokenizerBase, listed: object = None) -> frozenset[int]:
    """Tokens that end a text: the tokenizer's, those `listed` by a model's generation settings (one
    or several), and the special one that ends a turn of the chat template, where there is one.

    A base model's end of text is often another than that of its template's turns, with which
    answers end that are trained in turns.
    """
    settings = listed if isinstance(listed, list) else [listed]
    known = {token for token in [*settings, tokenizer.eos_token_id] if token is not None}
    return frozenset(known | _special_end(tokenizer))  # pyright: ignore[reportReturnType]


def _special_end(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The special token that ends a turn; none where there are no turns or words end them."""
    try:
        end = turn_end(tokenizer)[:1] if tokenizer.chat_template else []
    except DataError:  # the template takes no such turns
        return set()
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(token for token in added if added[token].special)}
    return special.intersection(end)


def _rendered(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], *, answering: bool = False
) -> str:
    if not tokenizer.chat_template:
        raise DataError("the model's tokenizer has no chat template; leave out chat")
    try:
        return str(
            tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answering)
        )
    except TemplateError as error:
        raise DataError(f"the model's chat template takes no user's turn: {error}") from None


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []  # pyright: ignore
