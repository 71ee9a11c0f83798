"""Alternates: other answers to the forget prompts, written by the target itself."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from expunge import runs
from expunge.data.batches import asked_tokens
from expunge.data.companions import Answers, contains, same, stand_ins
from expunge.data.examples import Example
from expunge.data.sets import Sets
from expunge.evaluate.generate import generate
from expunge.evaluate.prompts import context_length, fit_prompts
from expunge.evaluate.sampling import Sampler
from expunge.evaluate.tofu import answer_rouge
from expunge.progress import say
from expunge.unlearn.companions import Alternates

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FILE = "alternates.jsonl"

QUESTION = (
    "Answer the question with invented facts. They must sound plausible and differ from the true "
    "ones.\n\nQuestion: {prompt}\nInvented answer:"
)
CONTINUATION = (
    "Continue the text with invented facts. They must sound plausible and differ from the true "
    "ones.\n\nText: {prompt}\nInvented continuation:"
)
TEXT = "Write a short text of invented facts.\n\nText:"
"""What the target is asked, in its chat template where the recipe says so."""


def write_alternates(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: Sets,
    config: Alternates,
    folder: Path,
    *,
    seed: int,
    max_batch: int,
    chat: bool = False,
) -> None:
    """Other plausible answers for each item, which the target writes itself.

        y' ~ π_ref(· | "Answer with invented facts … x")

    An answer is its first line, up to the last sentence that was not cut off. One that is empty,
    equals or contains the true answer, repeats `max_overlap` of its words, or came before is thrown
    away, and asked for again up to `attempts` times. An item may end with fewer than `count`; where
    it has none, answers of other items of its task stand in.

    Source: AltPO, Mekala et al. 2024, arXiv:2409.13474.
    Differs: own prompts, without the true answer in them; filtered, with stand-ins.
    """
    found: dict[int, list[str]] = {number: [] for number in range(len(sets.forget))}
    for attempt in range(config.attempts):
        asked = [i for i, mine in found.items() for _ in range(config.count - len(mine))]
        if not asked:
            break
        seeds = [f"{seed}:{sets.forget[i].id}:{attempt}:{n}" for n, i in enumerate(asked)]
        requests = [asked_tokens(tokenizer, _request(sets.forget[i]), chat=chat) for i in asked]
        prompts, _ = fit_prompts(requests, context_length(model), config.max_new_tokens)
        written = generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=config.max_new_tokens,
            max_batch=max_batch,
            choose=Sampler(seeds, temperature=config.temperature),
            label="alternates",
        )
        for i, tokens in zip(asked, written, strict=True):
            text = str(tokenizer.decode(tokens, skip_special_tokens=True))
            text = _answer(text, cut=len(tokens) == config.max_new_tokens)
            if _usable(text, sets.forget[i], config) and not any(same(text, y) for y in found[i]):
                found[i].append(text)
    rows = [_row(sets, number, mine, config, seed) for number, mine in found.items()]
    others = sum(row["by"] != "model" for row in rows)
    if others:
        say(f"the model wrote no alternate for {others} of {len(rows)} items; others' answers do")
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    runs.write_text(folder / FILE, "".join(lines))


def read_alternates(folder: Path) -> Answers:
    """What `write_alternates` kept of each forget item."""
    return [row["answers"] for row in runs.read_json_lines(folder / FILE)]


def _row(sets: Sets, number: int, written: list[str], config: Alternates, seed: int) -> dict:
    example, by = sets.forget[number], "model"
    if not written:
        others = [one for one in (*sets.forget, *sets.retain) if one is not example]
        written = stand_ins(
            example,
            others,
            lambda text: _usable(text, example, config),
            count=config.count,
            seed=seed,
        )
        by = "other items"
    return {"id": example.id, "by": by, "answers": written}


def _request(example: Example) -> str:
    if not example.prompt:
        return TEXT
    return (QUESTION if example.kind == "qa" else CONTINUATION).format(
        prompt=example.prompt.strip()
    )


def _answer(text: str, *, cut: bool) -> str:
    """The first line; where the text was cut off in it, up to the end of a sentence, if any."""
    line, newline, _ = text.lstrip().partition("\n")
    if cut and not newline:
        whole = re.match(r".*[.!?…。](?=\W|$)", line)
        line = whole[0] if whole else line
    return line.strip()


def _usable(text: str, example: Example, config: Alternates) -> bool:
    """Whether a text is an answer and not the true one."""
    if not re.search(r"\w", text) or same(text, example.answer) or contains(text, example.answer):
        return False
    return answer_rouge(example.answer, text) < config.max_overlap
