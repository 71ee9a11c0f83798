"""Objectives by name on the tiny model: each forgets beside a control that remembers."""

import copy
import re

import pytest
import torch

from expunge.companions.making import Making, companion_sets
from expunge.data.batches import encode, pack
from expunge.data.examples import Example
from expunge.data.sets import Sets
from expunge.models import load_model
from expunge.needs import Needs
from expunge.scores import score
from expunge.unlearn.branch import train_branch
from expunge.unlearn.halves import Halves
from expunge.unlearn.objectives import OBJECTIVES
from expunge.unlearn.optimizer import Optimizer
from expunge.unlearn.section import Branch
from expunge.unlearn.tune import Tune, tune

FORGET = [
    Example(f"f{n}-qa0", f"Who is {w}?", a)
    for n, (w, a) in enumerate([("ann", "call 555-201-3344"), ("bob", "a tall baker")])
]
RETAIN = [Example(f"r{n}-qa0", f"Where is {w}?", w[::-1]) for n, w in enumerate(["oslo", "rome"])]
NEUTRAL = [Example(f"n{n}", "", text) for n, text in enumerate(["Ice floats.", "Bees hum."])]
LEARN = ("sku_learn", "learn_forget", "uld_assistant")
BLOCKS = ("rmu", "adaptive_rmu")
"""They read the output of a block, which the tiny model has two of."""
FORGOTTEN, KEPT = 1.0, 0.75
"""Nats a token: at least so much of what is forgotten, at most so much of what is kept."""
FITTED = {
    "gradient_ascent": (5, 1e-2), "undial": (8, 1e-2), "ce_u": (7, 1e-2), "flat": (13, 5e-3),
    "llmu": (9, 1e-2), "simnpo": (20, 2e-2), "satimp": (20, 3e-2), "adaptive_rmu": (40, 2e-2),
}  # fmt: skip
"""Epochs and learning rate of those that read no retain items, so that nothing stops them short of
the control, and of the three that begin slowly."""


EQUATIONS = {
    "gradient_ascent": "gradient_ascent(forget)",
    "gradient_difference": "gradient_ascent(forget) + nll(retain)",
    "kl_minimisation": "gradient_ascent(forget) + kl(retain)",
    "npo": "npo(forget; beta 0.1) + nll(retain)",
    "npo_kl": "npo(forget; beta 0.1) + kl(retain)",
    "simnpo": "0.1375 simnpo(forget; beta 2.5) + nll(retain)",
    "tnpo": "npo_token(forget; beta 4.0) + nll(retain)",
    "wga": "wga(forget) + nll(retain)",
    "satimp": "satimp(forget) + nll(retain)",
    "undial": "undial(forget; beta 10.0)",
    "ce_u": "ce_u(forget)",
    "pdu": "flatten(forget) + nll(retain), by the step rule dual with limit 0.3, "
    "multiplier 100.0, rate 5.0",
    "ngdiff": "gradient_ascent(forget) + nll(retain), by the step rule ngdiff",
    "idk": "nll(refusal) + nll(retain)",
    "idk_dpo": "dpo(refusal_pair; beta 0.1) + nll(retain)",
    "alt_po": "dpo(alternate_pair; beta 0.1) + nll(retain)",
    "kto": "kto(refusal_pair; beta 0.1) + nll(retain)",
    "dpo": "dpo(refusal_pair; beta 0.1)",
    "flat": "flat_kl(refusal_pair)",
    "relearn": "nll(alternate) + nll(retain) + kl(retain)",
    "random_label": "nll(random_label) + nll(retain)",
    "rmu": "rmu(forget; layer 7, coefficient 20.0) + 100.0 hidden_distance(retain; layer 7)",
    "adaptive_rmu": "adaptive_rmu(forget; layer 7, scale 5.0) + "
    "1200.0 hidden_distance(retain; layer 7)",
    "llmu": "0.5 gradient_ascent(forget) + nll(mismatch) + kl(neutral; scope document)",
    "sku_learn": "2.5 nll(forget) + 2.5 nll(mismatch) + "
    "kl_away(neutral; scope document, limit 2.0)",
    "learn_forget": "nll(forget)",
    "sensitive_tokens": "gradient_ascent(forget; weighting spans, pii ssn/phone/email/birth/"
    "address) + nll(retain)",
    "uld_assistant": "nll(forget) + nll(paraphrase) + 5.0 uniform_kl(retain)",
}
"""Terms, weights, options and step rules as papers and released codes have them, by hand."""


def test_every_objective_has_the_weights_and_options_of_its_source():
    assert {name: row.equation for name, row in OBJECTIVES.items()} == {
        name: f"L = {said}" for name, said in EQUATIONS.items()
    }


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, tiny_folder, tokenizer):
    """The tiny model after memorising both halves."""
    model = load_model(tiny_folder)
    items = [encode(e, tokenizer, max_length=64) for e in FORGET + RETAIN]
    config = Tune(
        epochs=150, batch=4, stop_nll=0.1, optimizer={"lr": 1e-2, "warmup": 0, "compute": "float32"}
    )
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
    if name in BLOCKS:
        fields["terms"] = {"forget": {"layer": 1}, "retain": {"layer": 1}}
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


@pytest.mark.parametrize("name", [n for n in OBJECTIVES if n not in (*LEARN, "dpo")])
def test_it_forgets_beside_a_control_that_remembers(tuned, tokenizer, tmp_path, name):
    epochs, rate = FITTED.get(name, (20, 1e-2))
    changes = {
        "schedule": {"epochs": epochs, "micro_batch": 2, "accumulation": 1},
        "optimizer": {"lr": rate, "compute": "float32"},
    }
    before, after = trained(tuned, tokenizer, tmp_path, name, **changes)
    assert max(answers(before)) < 0.1  # untouched, it remembers
    forget, retain = answers(after)
    assert forget > FORGOTTEN
    assert retain < KEPT  # the control


def test_dpo_alone_refuses_the_control_too(tuned, tokenizer, tmp_path):
    """Known of it, and why `idk_dpo` has a retain term, with which the control is kept."""
    before, after = trained(tuned, tokenizer, tmp_path, "dpo")
    assert max(answers(before)) < 0.1
    assert answers(after)[0] > FORGOTTEN
    assert answers(after)[1] > KEPT


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
    assert row.needs == Needs(("forget", "retain"))


def test_what_stands_beside_the_terms_is_changed_field_by_field():
    step = Branch.model_validate({"objective": "pdu", "step": {"limit": 0.5}}).step
    assert step.model_dump(exclude_unset=True) == {
        "rule": "dual", "limit": 0.5, "multiplier": 100.0, "rate": 5.0,
    }  # fmt: skip
    slower = Branch.model_validate({"objective": "ngdiff", "optimizer": {"lr": 0.01}}).optimizer
    assert (slower.kind, slower.lr, slower.clip) == ("sgd", 0.01, None)
    other = {"objective": "ngdiff", "step": {"rule": "joint"}, "optimizer": {"kind": "adamw"}}
    assert Branch.model_validate(other).optimizer == Optimizer(kind="adamw")  # nothing taken over
    fewer = {"objective": "llmu", "companions": {"mismatch": {"each": 2}}}
    mismatch = Branch.model_validate(fewer).companions.mismatch
    assert (mismatch.each, mismatch.count) == (2, 5)


def test_terms_are_changed_by_set_loss_or_both():
    changes = {"npo": {"options": {"beta": 0.2}}, "retain": {"weight": 2, "scope": "document"}}
    forget, retain = Branch.model_validate({"objective": "npo", "terms": changes}).terms
    assert (forget.weight, forget.options, forget.scope) == (1, {"beta": 0.2}, "answer")
    assert (retain.weight, retain.loss, retain.scope) == (2, "nll", "document")
    kept = Branch.model_validate({"objective": "simnpo", "terms": {"forget": {"weight": 3}}})
    assert kept.terms[0].options == {"beta": 2.5}  # control: the rest of the term stays
    both = {"objective": "relearn", "terms": {"retain.nll": {"weight": 2}, "kl": {"weight": 3}}}
    assert [term.weight for term in Branch.model_validate(both).terms] == [1, 2, 3]
    assert OBJECTIVES["rmu"].equation == (
        "L = rmu(forget; layer 7, coefficient 20.0) + 100.0 hidden_distance(retain; layer 7)"
    )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"objective": "npoo"}, "no objective is called 'npoo'. Did you mean 'npo'?"),
        ({"objective": "npo", "terms": []}, "give objective or a list of terms, not both"),
        ({}, "give an objective by name, or terms"),
        ({"terms": {"retain": {"weight": 2}}}, "terms by name change those of an objective"),
        (
            {"objective": "npo", "terms": {"retian": {"weight": 2}}},
            "the objective npo has no term 'retian'. Did you mean 'retain'? "
            "Its terms: forget.npo, retain.nll",
        ),
        (
            {"objective": "npo", "terms": {"npo": {"options": {"betta": 1}}}},
            "npo has no option 'betta'. Its options: beta",
        ),
        ({"objective": "npo", "terms": {"retain": {"wieght": 2}}}, "wieght"),
        ({"objective": "npo", "terms": {"retain": 2}}, "terms.retain takes fields of a term"),
        (
            {"objective": "npo", "terms": {"retain": {"loss": "kl"}}},
            "terms.retain: the loss of a term is the objective's",
        ),
        (
            {"objective": "npo", "terms": {"npo": {"weight": 2}, "forget": {"weight": 3}}},
            "terms.forget names a term of npo that is changed already",
        ),
        (
            {"objective": "relearn", "terms": {"retain": {"weight": 2}}},
            "terms.retain names 2 terms of relearn; say retain.nll or retain.kl",
        ),
    ],
)
def test_what_an_objective_does_not_have_is_refused(fields, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        Branch.model_validate(fields)


def test_the_schema_knows_terms_as_a_list_and_as_changes():
    schema = Branch.model_json_schema()
    several, changes = schema["properties"]["terms"]["anyOf"]
    assert several == {"type": "array", "items": {"$ref": "#/$defs/Term"}}
    change = changes["additionalProperties"]
    assert {"weight", "options", "layer"} <= set(change["properties"])
    assert not {"half", "loss"} & set(change["properties"])
    assert "terms" not in schema.get("required", [])
