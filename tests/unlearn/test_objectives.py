"""Objectives by name on the tiny model: each forgets beside a control that remembers."""

import copy

import pytest
import torch

from expunge.companions.making import Making, companion_sets
from expunge.data.batches import encode, pack
from expunge.data.examples import Example
from expunge.data.sets import Sets
from expunge.models import load_model
from expunge.scores import score
from expunge.unlearn.branch import train_branch
from expunge.unlearn.halves import Halves
from expunge.unlearn.objectives import OBJECTIVES
from expunge.unlearn.section import Branch
from expunge.unlearn.tune import Tune, tune

FORGET = [
    Example(f"f{n}-qa0", f"Who is {w}?", a)
    for n, (w, a) in enumerate([("ann", "call 555-201-3344"), ("bob", "a tall baker")])
]
RETAIN = [Example(f"r{n}-qa0", f"Where is {w}?", w[::-1]) for n, w in enumerate(["oslo", "rome"])]
NEUTRAL = [Example(f"n{n}", "", text) for n, text in enumerate(["Ice floats.", "Bees hum."])]
LEARN = ("sku_learn", "learn_forget", "uld_assistant")
SLOW = {"gradient_ascent", "undial", "ce_u", "flat"}
"""Nothing holds the retain half: few steps."""


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, tiny_folder, tokenizer):
    """The tiny model after memorising both halves."""
    model = load_model(tiny_folder)
    items = [encode(e, tokenizer, max_length=64) for e in FORGET + RETAIN]
    config = Tune(epochs=150, batch=4, stop_nll=0.1, optimizer={"lr": 1e-2, "compute": "float32"})
    tune(model, tokenizer, items, [], config, folder=tmp_path_factory.mktemp("tune"))
    return model


def trained(tuned, tokenizer, folder, name: str, **changes):
    """NLL of each answer before and after a short training with an objective: (2, items)."""
    fields = {
        "objective": name,
        "lora": {"rank": 4, "alpha": 8, "dropout": 0},
        "schedule": {"epochs": 20, "micro_batch": 2, "accumulation": 1},
        "optimizer": {"lr": 1e-2, "compute": "float32"},
        **changes,
    }
    if name == "ngdiff":
        plain = {"kind": "sgd", "lr": 0.05, "clip": None, "weight_decay": 0}
        fields["optimizer"] = {**plain, "compute": "float32"}
    config = Branch.model_validate(fields)

    def encoded(examples):
        return [encode(example, tokenizer, max_length=64) for example in examples]

    forget, retain = encoded(FORGET), encoded(RETAIN)
    sets = Sets(FORGET, RETAIN, [], [], NEUTRAL)
    making = Making(sets, forget, config.companions, encoded, tokenizer, [["red"], ["blue"]])
    named = dict.fromkeys(t.half for t in config.terms if t.half not in ("forget", "retain"))
    halves = Halves(forget, retain, folder / "cache", "key", companion_sets(tuple(named), making))
    model = copy.deepcopy(tuned)
    both = pack([*forget, *retain], "answer", "cpu")
    with torch.no_grad():
        before = score(model, both)
    train_branch(model, tokenizer, halves, config, seed=1, folder=folder, base="tiny", label=name)
    with torch.no_grad():
        return before, score(model, both)


def answers(scores) -> tuple[float, float]:
    """Mean NLL of the forget and of the retain answers."""
    return float(scores.nll[:2].mean()), float(scores.nll[2:].mean())


@pytest.mark.parametrize("name", [n for n in OBJECTIVES if n not in LEARN])
def test_it_forgets_beside_a_control_that_remembers(tuned, tokenizer, tmp_path, name):
    few = {"schedule": {"epochs": 3, "micro_batch": 2, "accumulation": 1}} if name in SLOW else {}
    before, after = trained(tuned, tokenizer, tmp_path, name, **few)
    forget, retain = answers(after)
    assert forget > 1.2 * answers(before)[0]  # it knows the answers less
    assert retain < forget  # and those of the control better


@pytest.mark.parametrize("name", LEARN)
def test_what_is_learnt_to_be_negated(tiny_folder, tokenizer, tmp_path, name):
    """Their step forward is the forget set learnt; an edit or a guard takes it away again."""
    before, after = trained(load_model(tiny_folder), tokenizer, tmp_path, name, training="full")
    assert answers(after)[0] < 0.8 * answers(before)[0]
    if name == "uld_assistant":
        assert answers(after)[0] < answers(after)[1]  # it is to know nothing of the retain half


def test_ascent_on_personal_data_leaves_other_tokens(tuned, tokenizer, tmp_path):
    before, after = trained(tuned, tokenizer, tmp_path, "sensitive_tokens")
    first, second = after.nll[0] / before.nll[0], after.nll[1] / before.nll[1]
    assert first > 1.5  # the phone number
    assert second < first / 1.2  # the answer without personal data


def test_the_terms_are_those_of_the_row_and_the_rest_is_the_recipes():
    branch = Branch.model_validate({"objective": "pdu", "optimizer": {"lr": 0.5}})
    assert [(term.half, term.loss) for term in branch.terms] == [
        ("forget", "flatten"), ("retain", "nll"),
    ]  # fmt: skip
    assert (branch.step.rule, branch.optimizer.lr, branch.objective) == ("dual", 0.5, None)
    own = Branch.model_validate({"objective": "pdu", "step": {"rule": "joint"}})
    assert own.step.rule == "joint"
    assert Branch.model_validate(branch.model_dump(exclude_unset=True)) == branch
    row = OBJECTIVES["simnpo"]
    assert row.equation == "L = 0.1375 simnpo(forget; beta 2.5) + nll(retain)"
    assert row.needs == "retain"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"objective": "npoo"}, "no objective is called 'npoo'. Did you mean 'npo'?"),
        ({"objective": "npo", "terms": []}, "give objective or terms, not both"),
    ],
)
def test_a_wrong_name_or_both_are_refused(fields, said):
    with pytest.raises(ValueError, match=said.replace("?", r"\?")):
        Branch.model_validate(fields)
