"""Masks: what is chosen, and that what is not chosen stays as it is, bit for bit."""

import copy
import json

import pytest
import torch
from pydantic import TypeAdapter
from torch.nn import Parameter

from expunge.config import parse_section
from expunge.data.batches import TokenSequence, pack
from expunge.errors import RecipeError, TrainingError
from expunge.scores import score
from expunge.unlearn import masks, trainer
from expunge.unlearn.branch import train_branch
from expunge.unlearn.halves import Halves
from expunge.unlearn.masks import MASKS, Mask, check_mask, mask
from expunge.unlearn.masks.evidence import input_norms, summed_gradient
from expunge.unlearn.masks.scored import Evidence, highest
from expunge.unlearn.optimizer import Optimizer, Span, Stepper
from expunge.unlearn.preparing import prepared
from expunge.unlearn.section import Branch

SCORED = [kind for kind, row in MASKS.items() if row.scores]
EXAMPLES = {
    **{kind: {"ratio": 0.3} for kind in SCORED},
    "last_blocks": {"count": 1},
    "layers": {"blocks": [0], "modules": ["mlp"]},
    "column": {"block": 1, "index": 5},
}
PLAIN = Optimizer(compute="float32")


def text(name: str) -> TokenSequence:
    prompt, answer = b"Who is " + name.encode(), b"It is " + name[::-1].encode()
    return TokenSequence(name, tuple(prompt + answer), len(prompt))


FORGET, RETAIN = [text(n) for n in ("ann", "bob", "cy")], [text(n) for n in ("oslo", "rome")]


def section(kind: str, **changes) -> Mask:
    return TypeAdapter(Mask).validate_python({"kind": kind, **(EXAMPLES[kind] | changes)})


def chosen_of(model, kind: str, folder=None, seed: int = 1, **changes) -> dict:
    """For each parameter the entries that may move."""
    config = section(kind, **changes)
    held = mask(model, config, FORGET, RETAIN, PLAIN, seed=seed, folder=folder)
    return {
        name: held.get(name, torch.full(p.shape, p.requires_grad))
        for name, p in model.named_parameters()
    }


def branch(**changes) -> Branch:
    return Branch.model_validate(
        {
            "terms": [
                {"half": "forget", "loss": "npo"},
                {"half": "retain", "loss": "nll"},
                {"half": "retain", "loss": "kl"},
            ],
            "training": "full",
            "schedule": {"epochs": 4, "accumulation": 1},
            "optimizer": {
                "lr": 1e-2,
                "weight_decay": 0.1,
                "warmup": 0.2,
                "compute": "float32",
                "checkpoint_seconds": 0,
            },
            **changes,
        }
    )


def run(model, tokenizer, folder, config):
    folder.mkdir(exist_ok=True)
    trained = copy.deepcopy(model)
    train_branch(
        trained,
        tokenizer,
        Halves(FORGET, RETAIN, folder.parent / "cache", "key"),
        config,
        seed=1,
        folder=folder,
        base="tiny",
        label="b",
    )
    return trained


def test_the_examples_are_of_the_whole_table():
    assert set(EXAMPLES) == set(MASKS)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_what_is_masked_stays_bit_for_bit_and_the_rest_moves(
    tiny, tokenizer, tmp_path, kind, optimizer
):
    plain = branch().optimizer.model_copy(update={"kind": optimizer})
    config = branch(mask=section(kind), optimizer=plain.model_dump())
    trained = run(tiny, tokenizer, tmp_path / "b", config)
    may = chosen_of(copy.deepcopy(tiny), kind)
    moved = total = 0
    for (name, new), old in zip(trained.named_parameters(), tiny.parameters(), strict=True):
        held = ~may[name]
        assert torch.equal(
            new.detach()[held].view(torch.int32), old.detach()[held].view(torch.int32)
        ), name
        moved += int((new != old).sum())
        total += int(may[name].sum())
    assert 0.9 * total < moved <= total
    facts = json.loads((tmp_path / "b" / "mask.json").read_text())
    weights = sum(p.numel() for p in tiny.parameters())
    assert facts["may_move"] == total
    assert facts["share"] == pytest.approx(total / weights)
    assert facts["mask"]["kind"] == kind


@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_chooses_among_what_the_deepest_block_that_is_read_depends_on(
    tiny, tokenizer, tmp_path, kind
):
    terms = [
        {"half": "forget", "loss": "rmu", "layer": 0},
        {"half": "retain", "loss": "hidden_distance", "layer": 0},
    ]
    changes = {"last_blocks": {"count": 2}, "column": {"block": 0}}.get(kind, {})
    config = branch(terms=terms, mask=section(kind, **changes))
    trained = run(tiny, tokenizer, tmp_path / "b", config)
    facts = json.loads((tmp_path / "b" / "mask.json").read_text())
    moved = {
        name
        for (name, new), old in zip(trained.named_parameters(), tiny.parameters(), strict=True)
        if not torch.equal(new, old)
    }
    assert moved and moved <= set(facts["tensors"])
    assert all("layers.0." in name or "embed_tokens" in name for name in facts["tensors"])


def test_a_mask_behind_all_that_is_read_is_refused_before_training(tiny):
    for kind, changes in (("last_blocks", {}), ("layers", {"blocks": [1]}), ("column", {})):
        check_mask(tiny, section(kind, **changes), 1)  # control
        with pytest.raises(TrainingError, match=f"the mask {kind} lets move what lies behind"):
            check_mask(tiny, section(kind, **changes), 0)


@pytest.mark.parametrize("kind", SCORED)
@pytest.mark.parametrize("ratio", [0.05, 0.5, 1.0])
def test_the_share_that_may_move_is_the_ratio(tiny, kind, ratio):
    may = chosen_of(tiny, kind, ratio=ratio)
    of = [entries for name, entries in may.items() if kind != "wanda" or "_proj" in name]
    total = sum(entries.numel() for entries in of)
    assert sum(int(entries.sum()) for entries in of) == round(ratio * total)
    assert sum(int(entries.sum()) for entries in may.values()) == round(ratio * total)


def test_the_highest_scores_are_those_of_a_sort():
    draw = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(7, 11, generator=draw).abs(),
        "b": torch.randn(13, generator=draw).abs() * 1e-9,
        "c": torch.randint(0, 3, (50,), generator=draw).float(),  # ties, zeros
        "d": torch.full((5,), -0.0),
    }
    flat = torch.cat([t.flatten() for t in tensors.values()])
    order = flat.sort(descending=True, stable=True).indices  # of equals the first
    for count in (1, 20, 60, 100, len(flat) - 3, len(flat)):
        expected = torch.zeros(len(flat), dtype=torch.bool)
        expected[order[:count]] = True
        found = highest(tensors, count / len(flat))
        assert torch.equal(torch.cat([t.flatten() for t in found.values()]), expected)
        assert [t.shape for t in found.values()] == [t.shape for t in tensors.values()]


def test_wagle_worked_by_hand():
    """θ - g_r/μ = [[1-4, 2-0], [-1+2, 0-2]] at μ = 0.5, times g_f."""
    seen = Evidence(
        weight=torch.tensor([[1.0, 2.0], [-1.0, 0.0]]),
        forget=torch.tensor([[1.0, -1.0], [3.0, 2.0]]),
        retain=torch.tensor([[2.0, 0.0], [-1.0, 1.0]]),
    )
    found = MASKS["wagle"].fn(seen, mu=0.5)
    assert found.tolist() == [[3.0, 2.0], [3.0, 4.0]]


def test_as_mu_grows_wagle_is_weight_times_gradient():
    draw = torch.Generator().manual_seed(0)
    weight, forget, retain = torch.randn(3, 4, 5, generator=draw)
    seen = Evidence(weight, forget, retain)
    wagle = MASKS["wagle"].fn
    torch.testing.assert_close(wagle(seen, mu=1e12), MASKS["magnitude"].fn(seen) * forget.abs())
    torch.testing.assert_close(wagle(seen, mu=1e12), weight.abs() * MASKS["gradient"].fn(seen))
    small = wagle(seen, mu=1e-6) * 1e-6  # of the released configurations: no word of the weight
    torch.testing.assert_close(small, (retain * forget).abs(), atol=1e-5, rtol=1e-4)


def test_gradients_are_those_of_the_summed_nll_whatever_the_packs(tiny):
    tiny.requires_grad_(True)
    found = summed_gradient(tiny, FORGET, PLAIN)
    apart = summed_gradient(tiny, FORGET, PLAIN.model_copy(update={"max_tokens": 1}))
    assert all(p.grad is None for p in tiny.parameters())
    score(tiny, pack(FORGET, "answer", "cpu")).nll.sum().backward()
    for name, parameter in tiny.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(apart[name], parameter.grad, atol=1e-5, rtol=1e-4)


def test_wanda_reads_the_inputs_of_linear_layers(tiny):
    norms = input_norms(tiny, FORGET, PLAIN)
    assert len(norms) == 14  # seven linear layers in each of two blocks, not the head
    squares = torch.zeros(32)
    for one in FORGET:
        embedded = tiny.model.embed_tokens(torch.tensor(one.tokens))
        squares += tiny.model.layers[0].input_layernorm(embedded).detach().square().sum(0)
    found = norms["model.layers.0.self_attn.q_proj.weight"]
    torch.testing.assert_close(found, squares.sqrt())
    seen = Evidence(torch.tensor([[1.0, -2.0]]), inputs=torch.tensor([3.0, 0.5]))
    assert MASKS["wanda"].fn(seen).tolist() == [[3.0, 1.0]]


def test_baselines_are_the_largest_weights_and_chance():
    weight = torch.tensor([[-3.0, 0.5], [2.0, -0.0]])
    assert MASKS["magnitude"].fn(Evidence(weight)).tolist() == [[3.0, 0.5], [2.0, 0.0]]

    def drawn(seed):
        rng = torch.Generator().manual_seed(seed)
        return MASKS["random"].fn(Evidence(torch.zeros(50, 40), random=rng))

    found = drawn(0)
    assert found.min() >= 0 and found.max() < 1 and len(found.unique()) > 1900
    assert abs(found.mean() - 0.5) < 0.03
    assert torch.equal(found, drawn(0)) and not torch.equal(found, drawn(1))


@pytest.mark.parametrize(
    ("kind", "fields", "of", "count"),
    [
        ("last_blocks", {"count": 1}, "layers.1.", 9),
        ("last_blocks", {"count": 2}, "layers.", 18),
        ("layers", {"blocks": [0], "modules": None}, "layers.0.", 9),
        ("layers", {"blocks": [1], "modules": ["mlp"]}, "layers.1.mlp.", 3),
        ("layers", {"blocks": None, "modules": ["down_proj"]}, "down_proj", 2),
        ("layers", {"blocks": None, "modules": ["*norm"]}, "layernorm", 4),
    ],
)
def test_a_place_names_the_tensors_that_may_move(tiny, kind, fields, of, count):
    may = chosen_of(tiny, kind, **fields)
    names = [name for name, parameter in tiny.named_parameters() if parameter.requires_grad]
    assert len(names) == count
    assert all(of in name for name in names)
    assert all(bool(may[name].all()) for name in names)


def test_a_column_is_what_one_neuron_writes(tiny):
    may = chosen_of(tiny, "column", block=1, index=5)
    name = "model.layers.1.mlp.down_proj.weight"
    assert [n for n, p in tiny.named_parameters() if p.requires_grad] == [name]
    assert may[name].nonzero()[:, 1].tolist() == [5] * 32


@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_is_a_function_of_weights_data_and_seed(tiny, tmp_path, kind):
    first, second = (chosen_of(copy.deepcopy(tiny), kind) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = chosen_of(copy.deepcopy(tiny), kind, seed=2)
    same = all(torch.equal(first[name], other[name]) for name in first)
    assert same == (kind != "random")


@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_that_was_kept_is_read_and_not_computed_again(tiny, tmp_path, monkeypatch, kind):
    made = chosen_of(copy.deepcopy(tiny), kind, tmp_path)

    def unwanted(*given):
        raise AssertionError("computed again")

    monkeypatch.setattr(masks, "_chosen", unwanted)
    again = chosen_of(copy.deepcopy(tiny), kind, tmp_path)
    assert all(torch.equal(made[name], again[name]) for name in made)


def test_a_masked_run_that_was_killed_ends_with_the_same_bytes(
    tiny, tokenizer, tmp_path, monkeypatch
):
    config = branch(mask=section("wagle"))
    run(tiny, tokenizer, tmp_path / "whole", config)
    real, calls = trainer._clip, iter(range(100))

    def stop_at_some(parameters, limit):
        if next(calls) in (2, 7):
            raise KeyboardInterrupt
        return real(parameters, limit)

    monkeypatch.setattr(trainer, "_clip", stop_at_some)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(tiny, tokenizer, tmp_path / "broken", config)
    run(tiny, tokenizer, tmp_path / "broken", config)
    for name in ("model/model.safetensors", trainer.LOG, "mask.safetensors"):
        whole, broken = (tmp_path / place / name for place in ("whole", "broken"))
        assert whole.read_bytes() == broken.read_bytes()


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_mask_of_ones_is_no_mask(kind):
    """To 1e-6: torch's own decay is θ - ηwθ in one pass, ours θ(1 - ηw)."""
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(200, generator=draw)
    config = Optimizer(kind=kind, lr=1e-2, weight_decay=0.3)
    ends = []
    for ones in (None, {"x": torch.ones(200, dtype=torch.bool)}):
        x = Parameter(start.clone())
        stepper = Stepper({"x": x}, config, [Span(20)], ones)
        for number in range(20):
            stepper.begin(number, 20)
            x.grad = torch.sin(7 * x.detach() + number)
            stepper.hold()
            stepper.step()
        ends.append(x.detach())
    torch.testing.assert_close(*ends, atol=1e-6, rtol=1e-6)
    assert not torch.equal(ends[0], start)  # control


def test_a_ratio_of_one_trains_as_no_mask_does(tiny, tokenizer, tmp_path):
    """Bit for bit: a tensor that may move whole has no mask."""
    ends = [
        run(tiny, tokenizer, tmp_path / f"{n}", branch(mask=given)).state_dict()
        for n, given in enumerate((None, section("random", ratio=1.0)))
    ]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_runs_backward_before_the_first_block_that_moves(tiny, tmp_path, checkpointing):
    optimizer = {"compute": "float32", "checkpointing": checkpointing}
    config = branch(mask=section("last_blocks"), optimizer=optimizer)
    ready = prepared(tiny, Halves(FORGET, RETAIN, tmp_path, "key"), config, seed=1)
    seen = []
    for layer in tiny.model.layers:
        layer.mlp.down_proj.register_full_backward_hook(lambda m, *given: seen.append(m))
    tiny.train()
    ready.gradient(0)
    assert {id(m) for m in seen} == {id(tiny.model.layers[1].mlp.down_proj)}
    assert len(ready.parameters) == 9


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"kind": "wagel", "ratio": 0.5}, "wagle"),
        ({"kind": "wagle"}, "ratio is missing"),
        ({"kind": "wagle", "ratio": 1.5}, "less than or equal to 1"),
        ({"kind": "random", "ratio": 0.5, "mu": 1}, "unknown field mask.random.mu"),
        ({"kind": "layers"}, "needs blocks, modules or both"),
    ],
)
def test_a_mask_that_cannot_be_is_refused_when_the_recipe_is_read(given, says):
    fields = branch().model_dump() | {"mask": given}
    with pytest.raises(RecipeError, match=says) as caught:
        parse_section(fields, Branch, origin="r.yaml")
    assert "\n" not in str(caught.value)


def test_a_mask_over_an_adapter_is_refused():
    fields = branch().model_dump() | {"mask": {"kind": "last_blocks", "count": 1}}
    assert parse_section(fields, Branch, origin="r.yaml")  # control
    with pytest.raises(RecipeError, match=r"training: full; .* lora.layers and lora.targets"):
        parse_section(fields | {"training": "lora"}, Branch, origin="r.yaml")


@pytest.mark.parametrize(
    ("kind", "fields", "says"),
    [
        ("last_blocks", {"count": 3}, "mask.count names 3, but the model has 2 blocks"),
        ("layers", {"blocks": [2]}, "mask.blocks names 2, but the model has 2 blocks"),
        ("layers", {"modules": ["down_prj"]}, "Did you mean 'down_proj'"),
        ("column", {"block": 7}, "mask.block names 7, but"),
        ("column", {"index": 48}, "mask.index is 48, but .* has 48 columns"),
        ("column", {"module": "mlp"}, "no module of a block is called 'mlp'"),
        ("random", {"ratio": 1e-9}, "leaves no weight"),
        ("wagle", {"mu": 1e-45}, "not finite"),
    ],
)
def test_a_mask_that_the_model_does_not_have_is_refused(tiny, kind, fields, says):
    with pytest.raises(TrainingError, match=says):
        chosen_of(tiny, kind, **fields)


def test_single_weights_of_slices_are_refused(tiny, monkeypatch):
    monkeypatch.setattr(masks.sharding, "is_sharded", lambda model: True)
    for kind in [*SCORED, "column"]:
        with pytest.raises(TrainingError, match="chooses single weights"):
            chosen_of(tiny, kind)
    assert chosen_of(tiny, "last_blocks")  # control
