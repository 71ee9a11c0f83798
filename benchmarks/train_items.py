"""What both sides of train.py train on: items, steps of them, first factors."""

import random
from pathlib import Path
from typing import Any

from expunge import lora, models
from expunge.data.batches import TokenSequence, encode
from expunge.data.examples import Example
from expunge.data.sets import read_sets
from expunge.lora import Lora
from expunge.recipe import load_recipe

ROOT = Path(__file__).parents[1]


def laid_down(name: str, count: int, folder: Path, *, exact: bool) -> dict[str, Any]:
    """What both do: items, steps, first factors."""
    folder.mkdir()
    recipe = load_recipe(ROOT / "recipes" / "board.yaml")
    place = models.resolve(recipe.model.path, recipe.model.revision)
    tokenizer = models.load_tokenizer(place)
    how = recipe.model.model_dump(include={"max_length", "prompt_tail", "separator"})

    def rows(examples: list[Example]) -> list[dict[str, Any]]:
        found = [encode(example, tokenizer, **how) for example in examples]
        return [{"id": s.id, "tokens": s.tokens, "answer_start": s.answer_start} for s in found]

    sets = read_sets(recipe.data)
    spec: dict[str, Any] = {
        "case": name,
        "folder": str(folder),
        "model": str(place),
        "max_length": recipe.model.max_length,
        "dtype": "float32" if exact else "bfloat16",
        "compute": "float32" if exact else "bfloat16",
        "lr": 3e-4,
        "weight_decay": 0.0 if name == "full" else 0.01,
        "clip": 1.0,
        "warm": max(1, count // 5),
    }
    if name == "full":
        items = rows([*sets.forget, *sets.retain])
        steps = _grouped([len(row["tokens"]) for row in items], 8, count)
        sizes = [sum(len(items[i]["tokens"]) for i in step) for step in steps]
        return spec | {
            "items": items, "steps": steps, "step_tokens": sizes, "tokens": sum(sizes)
        }  # fmt: skip
    forget, retain = rows(sets.forget), rows(sets.retain)
    lengths = [len(row["tokens"]) for row in forget]
    size = 1 if name == "released" else 4
    groups = _shuffled(lengths, 4, count) if name == "released" else _grouped(lengths, size, count)
    partner = _partners(lengths, [len(row["tokens"]) for row in retain])
    steps = [
        [[micro, [partner[i] for i in micro]] for micro in _cut(group, size)] for group in groups
    ]
    sizes = [
        sum(len(forget[i]["tokens"]) + len(retain[partner[i]]["tokens"]) for i in group)
        for group in groups
    ]
    model = models.load_model(place, dtype="float32")
    adapter = Lora(dropout=0)
    lora.add_adapter(model, adapter, seed=0)
    lora.save_adapter(model, adapter, folder / "factors", base=str(place))
    every = sum(len(row["tokens"]) for row in [*forget, *retain])
    return spec | {
        "forget": forget, "retain": retain, "steps": steps, "step_tokens": sizes,
        "tokens": sum(sizes), "reference_tokens": every, "factors": str(folder / "factors"),
    }  # fmt: skip


def sequences(rows: list[dict[str, Any]]) -> list[TokenSequence]:
    """The rows of a spec as ours takes them."""
    return [TokenSequence(r["id"], tuple(r["tokens"]), r["answer_start"]) for r in rows]


def _grouped(lengths: list[int], size: int, count: int) -> list[list[int]]:
    """`count` batches of items of like length, in a shuffled order."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    batches = [batch for batch in _cut(order, size) if len(batch) == size]
    random.Random(0).shuffle(batches)
    return [batches[number % len(batches)] for number in range(count)]


def _shuffled(lengths: list[int], size: int, count: int) -> list[list[int]]:
    order = list(range(len(lengths)))
    random.Random(0).shuffle(order)
    batches = _cut(order, size)
    return [batches[number % (len(batches) - 1)] for number in range(count)]


def _partners(forget: list[int], retain: list[int]) -> list[int]:
    """For each forget item a retain item of like length, so that padding is least."""
    by_length = sorted(range(len(retain)), key=lambda i: retain[i])
    ranks = {i: n for n, i in enumerate(sorted(range(len(forget)), key=lambda i: forget[i]))}
    return [by_length[ranks[i] * len(retain) // len(forget)] for i in range(len(forget))]


def _cut(items: list[int], size: int) -> list[list[int]]:
    return [items[low : low + size] for low in range(0, len(items), size)]
