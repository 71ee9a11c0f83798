"""Every step rule, mask and schedule on the tiny model: it forgets beside what it keeps."""

import copy

import pytest
import torch

from expunge.data.batches import pack
from expunge.data.examples import Example
from expunge.scores import score
from expunge.unlearn.branch import train_branch
from expunge.unlearn.halves import Halves
from expunge.unlearn.masks import MASKS
from expunge.unlearn.schedule import SCHEDULES
from expunge.unlearn.section import Branch
from expunge.unlearn.steps import STEP_RULES
from memorised import memorised

FORGET = [Example(f"f{n}-qa0", f"Who is {w}?", w[::-1]) for n, w in enumerate(["ann", "bob", "cy"])]
RETAIN = [Example(f"r{n}-qa0", f"Where is {w}?", w[::-1]) for n, w in enumerate(["oslo", "rome"])]
SGD = {"kind": "sgd", "lr": 0.1, "weight_decay": 0, "clip": None}
ASCENT = [{"half": "forget", "loss": "gradient_ascent"}, {"half": "retain", "loss": "nll"}]
LONGER = {"epochs": 40, "micro_batch": 3, "accumulation": 1}
"""For what moves few weights."""
FORGOTTEN, KEPT = 1.0, 0.5
"""Nats a token: at least so much of what is forgotten, at most so much of what is kept."""
STEPS = {
    "dual": {"step": {"limit": 0.3}},
    "raised": {"step": {"first": 2}},
    "ngdiff": {"terms": ASCENT, "optimizer": SGD},
    "latent_adversarial": {"step": {"layer": 0}},
    "ilu": {"step": {"penalty": 0.01}},
    "pcgu": {
        "step": {"share": 0.3},
        "terms": ASCENT,
        "optimizer": {**SGD, "lr": 0.3, "clip": 0.3},  # its retain terms choose and hold nothing
        "schedule": {**LONGER, "epochs": 30},
    },
}
CHOSEN = {
    **{kind: {"mask": {"ratio": 0.3}} for kind, row in MASKS.items() if row.scores},
    "magnitude": {"mask": {"ratio": 0.3}, "schedule": LONGER},
    "last_blocks": {"mask": {"count": 1}, "schedule": LONGER},
    "layers": {"mask": {"blocks": [0], "modules": ["mlp"]}},
    "column": {"mask": {"block": 0, "index": 5}, "optimizer": {"lr": 0.1}, "schedule": LONGER},
}
TURNS = {
    "sugd": {"schedule": {"chunk": 2, "epochs": 5}},
    "agad": {"schedule": {"chunk": 2, "epochs": 5, "batch": 2}},
    "layered": {"schedule": {"epochs": 5, "folds": 2}},
    "alternate": {"schedule": {"epochs": 10}},
    "sequential": {"schedule": {"epochs": 10, "requests": 2}},
}
ROWS = [
    *(("step", "rule", name, STEPS.get(name, {})) for name in STEP_RULES),
    *(("mask", "kind", name, CHOSEN[name]) for name in MASKS),
    *(("schedule", "kind", name, TURNS.get(name, {})) for name in SCHEDULES),
]


def branch(section: str, field: str, name: str, changes: dict) -> Branch:
    fields = {
        "terms": [{"half": "forget", "loss": "npo"}, {"half": "retain", "loss": "nll"}],
        "training": "full",
        "schedule": {"epochs": 12, "micro_batch": 3, "accumulation": 1},
        "optimizer": {"lr": 3e-3},
        **{name: value for name, value in changes.items() if name != section},
    }
    own = {field: name, **changes.get(section, {})}
    if (section, name) == ("schedule", "pairing"):
        own = fields["schedule"] | own
    fields["optimizer"] = {"compute": "float32", **fields["optimizer"]}
    return Branch.model_validate({**fields, section: own})


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, tiny_folder, tokenizer):
    """The tiny model after memorising both halves, and their tokens."""
    return memorised(tiny_folder, tokenizer, FORGET + RETAIN, tmp_path_factory.mktemp("tune"))


def answers(model, items) -> tuple[float, float]:
    """Mean NLL of the forget and of the retain answers."""
    with torch.no_grad():
        found = score(model, pack(items, "answer", "cpu")).nll
    return float(found[:3].mean()), float(found[3:].mean())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}-{row[2]}")
def test_it_forgets_beside_what_it_keeps(tuned, tokenizer, tmp_path, row):
    model, items = copy.deepcopy(tuned[0]), tuned[1]
    halves = Halves(items[:3], items[3:], tmp_path / "cache", "key")
    given = {"seed": 1, "folder": tmp_path, "base": "tiny", "label": row[2]}
    train_branch(model, tokenizer, halves, branch(*row), **given)
    forget, retain = answers(model, items)
    assert max(answers(tuned[0], items)) < 0.1  # untouched, it remembers
    assert forget > FORGOTTEN
    assert retain < KEPT  # the control
