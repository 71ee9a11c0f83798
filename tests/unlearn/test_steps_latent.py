"""Latent adversarial unlearning on the tiny model: the attacker's ball, the gradient under it."""

import copy

import pytest
import torch

from expunge.data.batches import encode, pack
from expunge.data.examples import Example
from expunge.errors import RecipeError
from expunge.scores import score
from expunge.unlearn.halves import Halves
from expunge.unlearn.preparing import prepared
from expunge.unlearn.section import Branch
from expunge.unlearn.steps import latent

WORDS = ["ann", "bob of the hill", "cy"]


@pytest.fixture(scope="module")
def items(tokenizer):
    return [encode(Example(w, f"Who is {w}?", w[::-1]), tokenizer, max_length=64) for w in WORDS]


@pytest.fixture
def attacks(monkeypatch):
    """Every attack that is made."""
    made = []

    class Seen(latent.Attack):
        def __init__(self, *given):
            super().__init__(*given)
            made.append(self)

    monkeypatch.setattr(latent, "Attack", Seen)
    return made


def found(model, items, folder, *, retain=False, rule="latent_adversarial", **options):
    """The gradient and the record of a step on all items, of every weight."""
    terms = [{"half": "forget", "loss": "gradient_ascent"}]
    terms += [{"half": "retain", "loss": "nll"}] if retain else []
    config = Branch.model_validate(
        {
            "terms": terms,
            "training": "full",
            "step": {"rule": rule, **options},
            "schedule": {"epochs": 1, "accumulation": 3},
            "optimizer": {"compute": "float32"},
        }
    )
    model = copy.deepcopy(model)
    made = prepared(model, Halves(items, items[:1], folder, "key"), config, seed=1)
    record = made.gradient(0)
    return {name: p.grad for name, p in made.parameters.items()}, record


def test_the_attacker_recalls_and_stays_within_its_ball(tiny, items, tmp_path, attacks):
    with torch.no_grad():
        plain = float(score(tiny, pack(items, "answer", "cpu")).nll.mean())
    _, record = found(tiny, items, tmp_path, layer=0, radius=4.0, relative=False, inner_steps=8)
    (attack,) = attacks
    assert set(attack.deltas) == {("forget", n) for n in range(3)}
    for (_, index), delta in attack.deltas.items():
        assert delta.shape == (len(items[index].tokens), 32)
        assert 1.0 < float(delta.detach().norm()) <= 4.0 * (1 + 1e-5)
    assert record["recall.last"] < record["recall.first"]
    assert record["recall.last"] < plain  # it recalls better than the model alone


def test_a_relative_ball_grows_with_the_activations(tiny, items, tmp_path, attacks):
    found(tiny, items, tmp_path, layer=1, radius=0.5)
    (attack,) = attacks
    for index, item in enumerate(items):
        states = []
        handle = tiny.model.layers[1].register_forward_hook(lambda m, i, o, s=states: s.append(o))
        with torch.no_grad():
            tiny(torch.tensor([item.tokens]))
        handle.remove()
        expected = 0.5 * states[0][0].norm(dim=1).median()
        torch.testing.assert_close(attack.radii["forget", index], expected, rtol=1e-4, atol=1e-6)


def test_the_gradient_is_that_under_the_fixed_perturbation(tiny, items, tmp_path, attacks):
    gradients, record = found(tiny, items, tmp_path, layer=0, radius=2.0, relative=False)
    (attack,) = attacks
    model, total = copy.deepcopy(tiny), 0.0
    for index, item in enumerate(items):
        delta = attack.deltas["forget", index].detach()
        handle = model.model.layers[0].register_forward_hook(lambda m, i, o, d=delta: o + d)
        logits = model(torch.tensor([item.tokens])).logits[0].log_softmax(-1)
        handle.remove()
        places = range(item.answer_start, len(item.tokens))
        nll = -sum(logits[place - 1, item.tokens[place]] for place in places) / len(places)
        total = total - nll / len(items)
    total.backward()
    assert record["forget"] == pytest.approx(float(total.detach()), rel=1e-4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_without_room_for_the_attacker_it_is_joint(tiny, items, tmp_path):
    """So the inner loop leaves no gradient behind, and the retain half is not perturbed."""
    options = {"retain": True, "layer": 0, "relative": False}
    joint, _ = found(tiny, items, tmp_path, retain=True, rule="joint")
    nearly, _ = found(tiny, items, tmp_path, radius=1e-9, **options)
    attacked, _ = found(tiny, items, tmp_path, radius=5.0, **options)
    torch.testing.assert_close(nearly, joint, rtol=1e-4, atol=1e-6)
    name = "model.layers.1.mlp.down_proj.weight"
    assert not torch.allclose(attacked[name], joint[name], rtol=1e-2)  # control


def test_a_block_that_is_not_there_is_refused_before_training(tiny, items, tmp_path):
    with pytest.raises(RecipeError, match=r"no block 2; the model has 2, 0 to 1"):
        found(tiny, items, tmp_path, layer=2)
