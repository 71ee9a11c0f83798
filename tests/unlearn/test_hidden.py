"""Losses on hidden states: values by hand, what blocks give, passes that end early, refusals."""

import copy

import pytest
import torch

from expunge.data.batches import encode, pack
from expunge.data.examples import Example
from expunge.errors import RecipeError
from expunge.packs import block_states, decoder_blocks, hidden_states
from expunge.unlearn.halves import Halves
from expunge.unlearn.hidden import adaptive_rmu, direction, hidden_distance, rmu
from expunge.unlearn.losses import Hidden
from expunge.unlearn.objective import Term, check_model
from expunge.unlearn.preparing import prepared
from expunge.unlearn.section import Branch

ITEMS = [Example(f"f{n}", f"Who is {w}?", w[::-1]) for n, w in enumerate(["ann", "bobby", "cy"])]


@pytest.fixture(scope="module")
def items(tokenizer):
    return [encode(e, tokenizer, max_length=64) for e in ITEMS]


def terms(layer: int = 0, **changes) -> list[dict]:
    return [
        {"half": "forget", "loss": "rmu", "layer": layer},
        {"half": "retain", "loss": "hidden_distance", "layer": layer, "weight": 100, **changes},
    ]


def ready(tiny, tokenizer, items, folder, **changes):
    fields = {
        "terms": terms(),
        "lora": {"rank": 2, "dropout": 0.0},
        "optimizer": {"compute": "float32"},
        **changes,
    }
    halves = Halves(items[:2], items[2:], folder / "cache", "key")
    return prepared(tiny, halves, Branch.model_validate(fields), seed=0, tokenizer=tokenizer)


def test_values_worked_by_hand():
    states = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    u = direction(states, 7)
    torch.testing.assert_close(u.norm(), torch.tensor(1.0))
    assert (u >= 0).all()
    wanted = (states - 2 * u).square().sum(-1) / 2
    torch.testing.assert_close(rmu(Hidden(states), coefficient=2.0, seed=7), wanted)
    norm = 0.5  # 4 · 0.5 is the same c
    torch.testing.assert_close(adaptive_rmu(Hidden(states, norm=norm), scale=4.0, seed=7), wanted)
    assert hidden_distance(Hidden(states, torch.ones(2, 2))).tolist() == [6.5, 1.0]


def test_rmu_is_0_at_its_point_and_nowhere_else_and_the_seed_draws_it():
    states = torch.zeros(2, 8)
    point = 20.0 * direction(states, 0)
    assert rmu(Hidden(torch.stack([point, -point]))).tolist() == [0.0, pytest.approx(200.0)]
    torch.testing.assert_close(direction(states, 3), direction(states, 3.0))
    assert not torch.equal(direction(states, 3), direction(states, 4))


@pytest.mark.parametrize("buckets", [False, True])
def test_the_output_of_a_block_is_what_transformers_says(tiny, items, buckets):
    tiny.expunge_in_buckets = buckets
    batch = pack(items, "answer", "cpu")
    final, found = block_states(tiny, batch, [0, 1])
    with torch.no_grad():
        outputs = [
            tiny(input_ids=torch.tensor([item.tokens]), output_hidden_states=True).hidden_states
            for item in items
        ]
    alone = [
        states[1][0, s.answer_start - 1 : -1] for states, s in zip(outputs, items, strict=True)
    ]
    torch.testing.assert_close(found[0], torch.cat(alone), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(final, hidden_states(tiny, batch))
    torch.testing.assert_close(tiny.get_decoder().norm(found[1]), final)


@pytest.mark.parametrize("buckets", [False, True])
def test_a_pass_ends_behind_the_deepest_block_that_is_read(tiny, items, buckets):
    tiny.expunge_in_buckets = buckets
    calls = []
    for number, block in enumerate(decoder_blocks(tiny)):
        block.register_forward_hook(lambda *given, number=number: calls.append(number))
    whole = block_states(tiny, pack(items, "answer", "cpu"), [0])[1]
    assert 1 in calls  # control
    calls.clear()
    final, found = block_states(tiny, pack(items, "answer", "cpu"), [0], stop=True)
    assert final is None
    assert 1 not in calls
    torch.testing.assert_close(found, whole)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("training", ["lora", "full"])
def test_only_what_the_block_depends_on_is_trained(
    tiny, tokenizer, items, tmp_path, training, checkpointing
):
    optimizer = {"compute": "float32", "checkpointing": checkpointing}
    how = {"training": training, "optimizer": optimizer}
    made = ready(tiny, tokenizer, items, tmp_path, **how)
    names = set(made.parameters)
    assert {name for name in names if "layers.0." in name}
    assert not {name for name in names if "layers.1." in name or name.endswith("model.norm.weight")}
    tiny.train()
    made.gradient(0)
    reached = {name for name, p in made.parameters.items() if p.grad is not None and p.grad.any()}
    # B of a fresh adapter is 0, so A has no slope yet.
    assert reached == (
        {name for name in names if "lora_B" in name} if training == "lora" else names
    )


def test_distances_start_at_0_and_adaptive_rmu_reads_the_reference_before_the_first_update(
    tiny, tokenizer, items, tmp_path
):
    both = terms()
    both.append({"half": "forget", "loss": "adaptive_rmu", "layer": 1, "scope": "answer"})
    both.append({"half": "forget", "loss": "adaptive_rmu", "layer": 1, "scope": "document"})
    before = copy.deepcopy(tiny)
    made = ready(tiny, tokenizer, items, tmp_path, terms=both)
    for parameter in made.parameters.values():
        parameter.data += 0.1
    again = ready(copy.deepcopy(before), tokenizer, items, tmp_path, terms=both)  # from the cache
    with torch.no_grad():
        for number, scope in ((2, "answer"), (3, "document")):
            states = block_states(before, pack(items[:2], scope, "cpu"), [1])[1][1]
            wanted = float(states.norm(dim=-1).mean())
            assert made.passes._norms[number] == pytest.approx(wanted, rel=1e-5)
    assert made.passes._norms == again.passes._norms
    record = made.passes.backward([{"forget": (0, 1)}])
    assert {"forget.rmu", "forget.adaptive_rmu", "forget.adaptive_rmu.2"} <= set(record)
    assert again.passes.backward([{"retain": (0,)}])["retain"] < 1e-12
    assert made.passes.backward([{"retain": (0,)}])["retain"] > 1e-4  # control


def test_a_block_that_the_model_lacks_is_refused_before_training(tiny, tokenizer, items, tmp_path):
    fine, beyond = ([Term.model_validate(one) for one in terms(layer)] for layer in (1, 2))
    check_model([*fine, Term(half="forget", loss="npo")], tiny.config)
    says = "forget rmu reads layer 2, but the model has 2 blocks: 0 to 1"
    with pytest.raises(RecipeError, match=says):
        check_model(beyond, tiny.config)
    with pytest.raises(RecipeError, match=says):
        ready(tiny, tokenizer, items, tmp_path, terms=terms(2))
    assert not (tmp_path / "cache").exists()


def test_an_adapter_behind_all_that_is_read_is_refused_when_the_recipe_is_read():
    with pytest.raises(ValueError, match=r"no block behind 0, and lora\.layers begins at 1"):
        Branch.model_validate({"terms": terms(), "lora": {"layers": [1]}})
    Branch.model_validate({"terms": terms(1), "lora": {"layers": [1]}})  # control
