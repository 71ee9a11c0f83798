"""Attacks that bring forgotten text back: from a model that hides it, not from one without it."""

import copy
import json

import pytest
import torch
from pydantic import ValidationError

from expunge.data.batches import encode, pack
from expunge.data.examples import Example
from expunge.errors import DataError, EvaluationError
from expunge.evaluate.reader import reader_of
from expunge.evaluate.revival import Quantise, quantise, rounded
from expunge.evaluate.robustness_suite import Robustness, robustness_suite
from expunge.lora import Lora, adapters_of, add_adapter, fold_adapter
from expunge.scores import score

WORDS = [
    *("oak", "elm", "fir", "ash", "yew", "bay", "fig", "gum"),
    *("hop", "ivy", "kiwi", "lime", "mint", "nut", "pea", "rye"),
]
FORGET = [(f"f{n}-qa0", f"Who is {w}?", f"{w} of {WORDS[n - 3]}") for n, w in enumerate(WORDS[:8])]
CONTROL = [(f"c{n}-qa0", f"Who is {w}?", f"{w} of {WORDS[n]}") for n, w in enumerate(WORDS[8:])]
HARD = {"optimizer": {"lr": 5e-3, "compute": "float32", "weight_decay": 0.0}, "epochs": 25}


def written(folder, name, rows):
    path = folder / f"{name}.jsonl"
    rows = [{"id": i, "input": p, "output": a} for i, p, a in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def moved(model, tokenizer, rows, *, steps, sign=1.0, lr=1e-2):
    """The model after it has learnt answers, or (sign -1) been driven off them."""
    texts = [encode(Example(*row), tokenizer, max_length=64) for row in rows]
    optimiser = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        (sign * score(model, pack(texts, "answer", "cpu")).nll.mean()).backward()
        optimiser.step()
        optimiser.zero_grad()
    return model


@pytest.fixture
def section(tmp_path):
    def make(**fields):
        return Robustness.model_validate(
            {
                "forget": {"path": written(tmp_path, "forget", FORGET)},
                "control": {"path": written(tmp_path, "control", CONTROL)},
                "relearn": {**HARD, "share": 0.5},
                "max_length": 64,
                **fields,
            }
        )

    return make


def test_what_is_hidden_comes_back_and_what_was_never_known_does_not(tiny, tokenizer, section):
    never = copy.deepcopy(tiny)
    knowing = moved(tiny, tokenizer, FORGET, steps=150)
    hiding = moved(copy.deepcopy(knowing), tokenizer, FORGET, steps=3, sign=-1.0, lr=6e-3)
    found = {}
    for name, model in (("hides", hiding), ("never knew", never)):
        kept = {n: p.clone() for n, p in model.named_parameters()}
        measured = robustness_suite(reader_of(model, tokenizer), section(attacks=["relearn"]))
        found[name] = {n.partition(".")[2]: v.value for n, v in measured.numbers.items()}
        assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters())  # as it was
        assert not adapters_of(model)
        assert measured.facts == {"documents_relearned": 4, "answers_cut": 0}
        assert [row["group"] for row in measured.items] == ["relearn.forget"] * 4 + [
            "relearn.control"
        ] * 8
        assert measured.numbers["relearn.forget.nll_before"].n == 4
    hides, never_knew = found["hides"], found["never knew"]
    assert hides["forget.nll_before"] > 3 and hides["forget.exact_before"] < 0.5
    assert hides["recovered"] > 0.1 and hides["recovered_nll"] > 0.5
    ends = (hides[f"{side}.exact_after"] for side in ("forget", "control"))
    assert hides["left"] == pytest.approx(next(ends) - next(ends)) and hides["left"] > 0.1
    assert hides["forget.nll_after"] < hides["control.nll_after"] - 1
    assert abs(never_knew["recovered"]) < 0.1 and abs(never_knew["recovered_nll"]) < 0.1
    assert never_knew["forget.gain"] > 0.2  # control: it was trained, too


def test_rounding_by_hand():
    """A scale of 7/7 = 1 for the first two inputs, of 1.4/7 = 0.2 for the others."""
    weight = torch.tensor([[7.0, -2.4, 1.4, 0.29], [0.0, 0.0, 0.0, -0.7]])
    found = rounded(weight, Quantise(bits=4, group=2))
    expected = [[7.0, -2.0, 1.4, 0.2], [0.0, 0.0, 0.0, -0.7]]
    torch.testing.assert_close(found, torch.tensor(expected))
    fine = rounded(weight, Quantise(bits=8, group=4))
    assert (fine - weight).abs().max() <= 7 / 127 / 2 + 1e-6


def test_rounding_leaves_the_head_and_takes_back_what_is_smaller_than_a_step(tiny):
    model = copy.deepcopy(tiny)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, torch.nn.Linear) and layer is not model.lm_head:
                layer.weight += 1e-5 * torch.randn_like(layer.weight)
    head = model.lm_head.weight.clone()
    quantise(model, Quantise())
    quantise(tiny, Quantise())
    assert torch.equal(model.lm_head.weight, head)
    both = zip(model.named_parameters(), tiny.named_parameters(), strict=True)
    moved_away = [
        ((one - other).abs() > 1e-3).float().mean().item()
        for (name, one), (_, other) in both
        if name.endswith("proj.weight")
    ]
    assert len(moved_away) == 14 and max(moved_away) < 0.02


def test_an_adapter_is_folded_into_the_copy_that_is_attacked(tiny, tokenizer, section):
    add_adapter(tiny, Lora(rank=2, dropout=0.0), seed=0)
    for layer in adapters_of(tiny).values():
        layer.lora_B.data.normal_(std=0.2)
    whole = copy.deepcopy(tiny)
    fold_adapter(whole)
    assert not adapters_of(whole) and adapters_of(tiny)
    tokens = torch.arange(1, 20)[None]
    torch.testing.assert_close(whole(tokens).logits, tiny(tokens).logits, atol=1e-4, rtol=1e-4)
    one, other = (
        robustness_suite(reader_of(model, tokenizer), section()).numbers for model in (tiny, whole)
    )
    assert one.keys() == other.keys()
    for name, number in one.items():
        assert number.value == pytest.approx(other[name].value, abs=0.06), name


def test_what_cannot_be_attacked_is_said(tiny, tokenizer, section, tmp_path):
    alone = {"path": written(tmp_path, "alone", FORGET[:1])}
    with pytest.raises(EvaluationError, match=r"share 0\.5 of 1 forget documents is 0"):
        robustness_suite(reader_of(tiny, tokenizer), section(forget=alone, control=None))
    found = robustness_suite(reader_of(tiny, tokenizer), section(control=None))
    assert not any("recovered" in name for name in found.numbers)
    rounded_only = section(forget=alone, control=None, attacks=["quantise"])
    assert robustness_suite(reader_of(tiny, tokenizer), rounded_only).numbers  # nothing to part
    with pytest.raises(ValidationError, match="names one twice"):
        section(attacks=["relearn", "relearn"])
    both = {"path": written(tmp_path, "both", FORGET[:3])}
    with pytest.raises(DataError, match="same text"):
        robustness_suite(reader_of(tiny, tokenizer), section(control=both))
