"""Step rules against gradients worked by hand, and the laws of the whole table."""

import copy
import typing
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from expunge import sharding
from expunge.config import parse_section
from expunge.data.batches import encode
from expunge.data.examples import Example
from expunge.errors import RecipeError, TrainingError
from expunge.unlearn import trainer
from expunge.unlearn.branch import train_branch
from expunge.unlearn.footprint import Shape, memory_of
from expunge.unlearn.halves import Halves
from expunge.unlearn.preparing import branch_demand, prepared
from expunge.unlearn.section import Branch
from expunge.unlearn.steps import STEP_RULES, JointStep, Step

TERMS = [{"half": "forget", "loss": "gradient_ascent"}, {"half": "retain", "loss": "nll"}]
PLAIN = {"lr": 1e-2, "compute": "float32", "checkpoint_seconds": 0}
SGD = {**PLAIN, "kind": "sgd", "clip": None, "weight_decay": 0}
OPTIONS = {
    "dual": {"limit": 1.0},
    "raised": {"first": 2},
    "ngdiff": {"every": 2},
    "latent_adversarial": {"layer": 0},
}
WORDS = ["ann", "bob of the hill", "cy", "dora", "eve", "fay"]
every_rule = pytest.mark.parametrize("rule", STEP_RULES)


def branch(rule: str, **changes) -> Branch:
    return Branch.model_validate(
        {
            "terms": TERMS,
            "step": {"rule": rule, **OPTIONS.get(rule, {})},
            "lora": {"rank": 2, "alpha": 4, "dropout": 0.1},
            "schedule": {"epochs": 2, "micro_batch": 1, "accumulation": 2},
            "optimizer": SGD if rule in ("ngdiff", "pcgu") else PLAIN,
            **changes,
        }
    )


@pytest.fixture(scope="module")
def items(tokenizer):
    return [encode(Example(w, f"Who is {w}?", w[::-1]), tokenizer, max_length=64) for w in WORDS]


def halves(items, folder) -> Halves:
    return Halves(items[:4], items[4:], folder / "cache", "key")


def test_joint_sums_the_halves(toy, linear):
    found = toy(torch.zeros(2), linear([6.0, 8.0]), linear([0.0, 2.0])).gradient("joint")
    assert found[0].tolist() == [6.0, 10.0]


def normalized(toy, linear, loss=1.0, **options) -> list[float]:
    def forget(weights):
        return linear([6.0, 8.0])(weights) + loss

    made = toy(torch.zeros(2), forget, linear([0.0, 2.0]))
    return made.gradient("normalized", **options)[0].tolist()


def test_normalized_gives_each_half_length_one(toy, linear):
    assert normalized(toy, linear) == pytest.approx([0.6, 1.8])  # (0,1) + (0.6,0.8)


def test_the_forget_share_fades_as_its_loss_is_met(toy, linear):
    for loss, expected in ((0.5, [0.15, 1.2]), (5.0, [0.6, 1.8]), (0.0, [0.0, 1.0])):
        assert normalized(toy, linear, loss, fade_below=2.0) == pytest.approx(expected)


def test_the_normalized_direction_helps_both_halves_to_first_order(toy, linear):
    """g·∇L_F ≥ 0 and g·∇L_R ≥ 0 at equal shares, whatever the angle between them."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        f, r = torch.randn(2, 5, generator=generator)
        found, _ = toy(torch.zeros(5), linear(f), linear(r)).gradient("normalized")
        assert found @ f >= -1e-5
        assert found @ r >= -1e-5


def descend(toy, quadratic, limit, steps=1500, **options):
    """Minimise ½(w-2)² subject to ½w² ≤ limit; the multiplier and the constraint, step by step."""
    one = torch.ones(1, 1, dtype=torch.float64)
    start = torch.full((1,), 2.0, dtype=torch.float64)
    made = toy(start, quadratic(one, start), quadratic(one, torch.zeros(1)))
    seen = []
    for _ in range(steps):
        found, record = made.gradient("dual", limit=limit, **options)
        seen.append((record["multiplier"], record["retain"] - limit))
        made.go(found, 0.05)
    return float(made.weights.detach()), seen


def test_the_multiplier_settles_where_the_constraint_is_met(toy, quadratic):
    """At the optimum w = √(2ε) and (w - 2) + λ w = 0."""
    weight, seen = descend(toy, quadratic, 0.5, multiplier=0.0)
    assert weight == pytest.approx(1.0, abs=1e-4)
    assert seen[-1][0] == pytest.approx(1.0, abs=1e-3)
    slack, seen = descend(toy, quadratic, 3.0, multiplier=1.0)
    assert slack == pytest.approx(2.0, abs=1e-4)  # control: nothing holds it
    assert seen[-1][0] == 0.0


def test_the_multiplier_rises_while_the_constraint_is_broken_and_falls_while_it_is_not(
    toy, quadratic
):
    _, seen = descend(toy, quadratic, 0.5, steps=200, multiplier=0.5)
    moves = [(after - now, over) for (now, over), (after, _) in pairwise(seen)]
    assert any(over > 0 for _, over in moves) and any(over < 0 for _, over in moves)
    assert all(move * over >= 0 for move, over in moves)


def test_the_retain_weight_follows_what_the_retain_loss_exceeds(toy):
    losses = iter([1.0, 3.0, 2.0, 2.5, 9.0, 0.0, 2.0])  # the mean of the first two is 2

    def retain(weights):
        return weights.sum() * 0 + next(losses)

    made = toy(torch.ones(1), lambda w: w.sum() * 0, retain)
    seen = [made.gradient("raised", first=2)[1]["weight"] for _ in range(7)]
    # Δ = 0: 0.3 + 0.8 < 1.2; Δ = 0.5: 0.3 √6 + 0.8; Δ = 7 and -2 are cut off
    expected = [1.2, 1.2, 1.2, 1.2, 0.3 * 6**0.5 + 0.8, 2.3, 1.2]
    assert seen == pytest.approx(expected)


def test_the_multiplier_waits_and_moves_by_the_mean_of_its_steps(toy, linear):
    made = toy(torch.ones(1), linear([0.0]), linear([3.0]))  # L_R = 3 for good
    options = {"limit": 1.0, "rate": 0.5, "warmup": 2, "every": 2}
    seen = [made.gradient("dual", **options)[1]["multiplier"] for _ in range(7)]
    assert seen == [1, 1, 1, 1, 2, 2, 3]
    assert made.gradient("dual", **options)[0].item() == 9.0  # λ times the retain gradient


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("joint", {}),
        ("normalized", {}),
        ("dual", {"limit": 1.0}),
        ("raised", {"first": 2}),
        ("ngdiff", {}),
        ("sam", {"radius": 0.3}),
        ("ilu", {"scaling": "scalar"}),
        ("ilu", {"scaling": "elementwise"}),
        ("pcgu", {"share": 0.5}),
        ("repselect", {"components": 0}),
    ],
)
def test_a_rule_reads_no_gradient_of_what_a_mask_holds(toy, rule, options):
    """With weight 2 held, weight 1 moves as it would alone."""

    def loss(scale, sign):
        def value(weights):
            factors = torch.tensor(scale, dtype=torch.float64)[: len(weights.flatten())]
            return sign * (factors * (weights.flatten() + 0.5 * weights.flatten() ** 2)).sum()

        return value

    start = torch.tensor([[0.1], [3.0]], dtype=torch.float64)
    halves = loss([5.0, 0.1], -1), loss([1.0, 10.0], 1)
    alone, both, free = toy(start[:1], *halves), toy(start, *halves), toy(start, *halves)
    both.mask = torch.tensor([[True], [False]])
    expected, found, other = (made.gradient(rule, **options)[0][0] for made in (alone, both, free))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    if rule in ("normalized", "ngdiff", "sam"):
        assert not torch.allclose(other, expected, rtol=1e-3)  # control: unmasked it is another


def test_under_a_mask_the_sign_that_ngdiff_guarantees_is_that_of_what_moves(toy, linear):
    """∇M_R = (1, 10), ∇M_F = (5, 0.1): weight 1 alone would be moved against M_R by -0.9."""
    made = toy(torch.zeros(2), linear([-5.0, -0.1]), linear([1.0, 10.0]))
    assert float(made.gradient("ngdiff", every=0)[0][0]) == pytest.approx(-0.9, abs=1e-2)
    made.mask = torch.tensor([True, False])
    found = made.gradient("ngdiff", every=0)[0]
    assert found.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)  # 1/1 - 5/5


def test_noise_does_not_move_what_a_mask_holds(toy, linear):
    made = toy(torch.tensor([1.0, 2.0]), lambda w: w.prod(), linear([0.0, 0.0]))
    assert float(made.gradient("smooth", deviation=1.0)[0][0]) != 2.0  # control
    made.mask = torch.tensor([True, False])
    assert float(made.gradient("smooth", deviation=1.0)[0][0]) == 2.0


@every_rule
def test_a_run_stopped_anywhere_ends_with_the_same_bytes(
    rule, tiny, tokenizer, items, tmp_path, monkeypatch
):
    def run(name):
        (tmp_path / name).mkdir(exist_ok=True)
        train_branch(
            copy.deepcopy(tiny),
            tokenizer,
            halves(items, tmp_path),
            branch(rule),
            seed=1,
            folder=tmp_path / name,
            base="tiny",
            label=rule,
        )

    run("whole")
    steps, original = iter(range(100)), trainer._clip

    def killed(parameters, limit):
        if next(steps) == 2:
            raise KeyboardInterrupt
        return original(parameters, limit)

    monkeypatch.setattr(trainer, "_clip", killed)
    with pytest.raises(KeyboardInterrupt):
        run("broken")
    run("broken")
    for file in ("adapter/adapter_model.safetensors", trainer.LOG):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "broken" / file).read_bytes()
    assert len((tmp_path / "whole" / trainer.LOG).read_text().splitlines()) == 4


@every_rule
@pytest.mark.parametrize("training", ["lora", "full"])
def test_a_rule_leaves_a_gradient_and_nothing_else(rule, training, tiny, items, tmp_path):
    config = branch(rule, training=training)
    made = prepared(tiny, halves(items, tmp_path), config, seed=1)
    tiny.train()
    before = {name: p.detach().clone() for name, p in made.parameters.items()}
    made.gradient(0)
    for name, parameter in made.parameters.items():
        assert torch.equal(parameter, before[name]), name
        assert parameter.requires_grad
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    assert any(p.grad.abs().sum() > 0 for p in made.parameters.values())
    assert tiny.training
    assert not any(block._forward_hooks for block in tiny.model.layers)


@every_rule
def test_how_a_step_is_packed_does_not_change_it(rule, tiny, items, tmp_path):
    """One pack or a pack an item: the same gradient (without dropout)."""
    found = []
    for limit in (10_000, 1):
        optimizer = {**(SGD if rule in ("ngdiff", "pcgu") else PLAIN), "max_tokens": limit}
        config = branch(rule, optimizer=optimizer, lora={"rank": 2, "dropout": 0.0})
        made = prepared(copy.deepcopy(tiny), halves(items, tmp_path), config, seed=1)
        record = made.gradient(0)
        found.append(([p.grad for p in made.parameters.values()], record))
    torch.testing.assert_close(found[0][0], found[1][0], atol=2e-5, rtol=1e-3)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-2, abs=1e-4)


@every_rule
def test_a_row_names_a_test_and_has_a_section(rule):
    file, _, name = STEP_RULES[rule].test.partition("::")
    assert f"def {name}(" in (Path(__file__).parents[2] / file).read_text(encoding="utf-8")
    sections = typing.get_args(typing.get_args(Step)[0])
    assert STEP_RULES[rule].options in sections and len(sections) == len(STEP_RULES)


@every_rule
def test_a_rule_that_needs_a_retain_term_is_refused_without_one(rule):
    if "retain" in STEP_RULES[rule].needs.data:
        with pytest.raises(ValueError, match="needs a term with half: retain"):
            branch(rule, terms=TERMS[:1])
    else:
        branch(rule, terms=TERMS[:1])


TURNS = {
    "sugd": {"kind": "sugd", "chunk": 2, "epochs": 1, "retain_per_forget": 2, "batch": 2},
    "agad": {"kind": "agad", "chunk": 2, "epochs": 1, "batch": 2},
}
COMPARING = [("normalized", {}), ("ngdiff", {}), ("ilu", {}), ("pcgu", {})]
COMPARING = [*COMPARING, ("repselect", {"of": "retain"})]


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize(("rule", "options"), COMPARING, ids=lambda given: str(given))
def test_a_rule_that_compares_the_halves_is_refused_where_they_take_turns(rule, options, turns):
    step = {"rule": rule, **OPTIONS.get(rule, {}), **options}
    branch(rule, step=step)  # control: both halves in each step
    with pytest.raises(ValueError, match=f"the step rule {rule} compares both; use the rule joint"):
        branch(rule, step=step, schedule=TURNS[turns])


TURN_TAKING = [rule for rule in STEP_RULES if (rule, {}) not in COMPARING]


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("rule", TURN_TAKING)
def test_where_the_halves_take_turns_a_step_is_told_of_its_own_alone(
    rule, turns, tiny, items, tmp_path
):
    """Steps of retain items are those of `joint`, and those of forget items come to something."""
    config = branch(rule, schedule=TURNS[turns], lora={"rank": 2, "alpha": 4, "dropout": 0.0})
    given, found = halves(items, tmp_path), {}
    demand = branch_demand(config, given, seed=1, weights="float32")
    assert memory_of(Shape.of(tiny.config.to_dict(), 1), demand) > 0
    for name, used in ((rule, config), ("joint", config.model_copy(update={"step": JointStep()}))):
        made = prepared(copy.deepcopy(tiny), given, used, seed=1)
        for number in range(sum(span.steps for span in made.spans)):
            for parameter in made.parameters.values():
                parameter.grad = None
            record = made.gradient(number)
            grads = [p.grad for p in made.parameters.values() if p.grad is not None]
            assert all(grad.isfinite().all() for grad in grads)
            assert any(grad.any() for grad in grads)
            found.setdefault(name, []).append((record, grads))
    alone = 0
    for (record, grads), (plain, expected) in zip(found[rule], found["joint"], strict=True):
        assert [half in record for half in ("forget", "retain")] == [
            half in plain for half in ("forget", "retain")
        ]
        if "forget" not in plain:
            alone += 1
            factor = record.get("weight", record.get("multiplier", 1.0))  # of raised and of dual
            expected = [factor * grad for grad in expected]
            torch.testing.assert_close(grads, expected, atol=1e-6, rtol=1e-4)
            assert not any(name.startswith(("norm", "recall", "attack")) for name in record)
    assert alone


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("rule", ["sam", "latent_adversarial", "tar"])
def test_a_branch_whose_halves_take_turns_is_trained(rule, turns, tiny, tokenizer, items, tmp_path):
    config = branch(rule, schedule=TURNS[turns])
    given = {"seed": 1, "folder": tmp_path, "base": "tiny", "label": rule}
    train_branch(tiny, tokenizer, halves(items, tmp_path), config, **given)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"step": {"rule": "jiont"}}, "no step.rule is called 'jiont'. Did you mean 'joint'"),
        ({"step": {"radius": 1}}, "field step.rule is missing"),
        ({"step": {"rule": "sam", "radios": 1}}, "Did you mean 'radius'"),
        ({"step": {"rule": "dual"}}, "limit is missing"),
        ({"step": {"rule": "ngdiff"}}, "optimizer.kind: sgd"),
        ({"step": {"rule": "ngdiff"}, "optimizer": {"kind": "sgd"}}, "optimizer.clip: null"),
        (
            {"step": {"rule": "ngdiff"}, "optimizer": {**SGD, "weight_decay": 0.01}},
            "optimizer.weight_decay: 0",
        ),
        (
            {
                "step": {"rule": "ngdiff", "every": 0},
                "terms": [{"half": "forget", "loss": "npo"}, TERMS[1]],
            },
            "gradient_ascent on forget, not npo;",
        ),
        (
            {
                "step": {"rule": "ngdiff", "every": 0},
                "terms": [{"half": "paraphrase", "loss": "gradient_ascent"}, TERMS[1]],
            },
            "gradient_ascent on forget, not gradient_ascent on paraphrase",
        ),
        ({"step": {"rule": "pcgu"}}, "optimizer.kind: sgd and optimizer.weight_decay: 0"),
        ({"step": {"rule": "pcgu"}, "optimizer": {"kind": "sgd"}}, "optimizer.weight_decay: 0"),
        (
            {
                "step": {"rule": "latent_adversarial"},
                "terms": [{"half": "refusal", "loss": "nll"}, TERMS[1]],
            },
            "perturbs items of forget, and no term reads forget",
        ),
        (
            {
                "step": {"rule": "latent_adversarial", "layer": 1},
                "terms": [{"half": "forget", "loss": "rmu", "layer": 1}],
            },
            "the terms on forget read no block behind 1; set step.layer below 1",
        ),
        ({"step": {"rule": "repselect", "components": 32}}, "must be below lora.rank"),
        ({"step": {"rule": "repselect", "of": "retain"}, "terms": TERMS[:1]}, "half: retain"),
        (
            {"step": {"rule": "latent_adversarial"}, "optimizer": {"checkpointing": True}},
            "does not go with optimizer.checkpointing",
        ),
    ],
)
def test_what_cannot_be_is_refused_when_the_recipe_is_read(changes, reason):
    with pytest.raises(RecipeError, match=reason):
        parse_section({"terms": TERMS, **changes}, Branch, origin="recipe")


@every_rule
def test_slices_of_weights_are_refused_where_a_rule_needs_whole_ones(
    rule, tiny, items, tmp_path, monkeypatch
):
    monkeypatch.setattr(sharding, "is_sharded", lambda model: True)
    if STEP_RULES[rule].sharded:
        prepared(tiny, halves(items, tmp_path), branch(rule), seed=1)
    else:
        with pytest.raises(TrainingError, match=f"the step rule {rule} needs whole weights"):
            prepared(tiny, halves(items, tmp_path), branch(rule), seed=1)


def test_an_ascent_that_nothing_stops_is_said_and_logged(tiny, items, tmp_path):
    guarded = {"every": 1, "until": {"retain_growth": 2.0}}
    for watch, unguarded in ((None, True), ({"every": 1}, True), (guarded, False)):
        made = prepared(
            copy.deepcopy(tiny), halves(items, tmp_path), branch("joint", watch=watch), seed=1
        )
        assert ("unguarded" in made.gradient(0)) is unguarded


def test_an_ascent_on_a_companion_set_counts_as_unguarded():
    ascent = {"half": "paraphrase", "loss": "gradient_ascent"}
    assert branch("joint", terms=[{**TERMS[0], "loss": "npo"}, ascent]).unguarded
    assert not branch("joint", terms=[{**TERMS[0], "loss": "npo"}, TERMS[1]]).unguarded  # control
