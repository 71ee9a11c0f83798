"""Branches and tuning on the tiny model: what moves, what is kept, what a killed run ends with."""

import copy
import json

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from expunge.data.batches import pack
from expunge.data.examples import Example
from expunge.errors import TrainingError
from expunge.lora import Lora, adapters_of, add_adapter, load_adapter
from expunge.scores import score
from expunge.unlearn import branch as branching
from expunge.unlearn import trainer
from expunge.unlearn.branch import train_branch
from expunge.unlearn.halves import Halves
from expunge.unlearn.objective import Objective, Term
from expunge.unlearn.passes import HalfData, Passes
from expunge.unlearn.preparing import prepared
from expunge.unlearn.reference import cached_reference
from expunge.unlearn.section import Branch
from memorised import memorised

FORGET = [Example(f"f{n}-qa0", f"Who is {w}?", w[::-1]) for n, w in enumerate(["ann", "bob", "cy"])]
RETAIN = [Example(f"r{n}-qa0", f"Where is {w}?", w[::-1]) for n, w in enumerate(["oslo", "rome"])]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, tiny_folder, tokenizer):
    """The tiny model after memorising both halves, and their tokens."""
    return memorised(tiny_folder, tokenizer, FORGET + RETAIN, tmp_path_factory.mktemp("tune"))


def branch(**changes) -> Branch:
    return Branch.model_validate(
        {
            "terms": [
                {"half": "forget", "loss": "hinge", "options": {"target": 4.0}},
                {"half": "retain", "loss": "nll"},
                {"half": "retain", "loss": "kl", "scope": "document"},
            ],
            "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
            "schedule": {"epochs": 15, "micro_batch": 1, "accumulation": 3},
            "optimizer": {"lr": 2e-2, "compute": "float32", "checkpoint_seconds": 0},
            **changes,
        }
    )


def halves(items, folder) -> Halves:
    return Halves(items[:3], items[3:], folder / "cache", "key")


def answer_nll(model, items):
    with torch.no_grad():
        return score(model, pack(items, "answer", "cpu")).nll


def run(tuned, tokenizer, folder, config=None, items=None):
    model = copy.deepcopy(tuned[0])
    train_branch(
        model,
        tokenizer,
        halves(items or tuned[1], folder.parent),
        config or branch(),
        seed=1,
        folder=folder,
        base="tiny",
        label="strong",
    )
    return model


def test_a_branch_forgets_one_half_and_keeps_the_other(tuned, tokenizer, tmp_path):
    before = answer_nll(*tuned)
    assert before.max() < 0.5  # control: it was there
    folder = tmp_path / "strong"
    folder.mkdir()
    model = run(tuned, tokenizer, folder)
    after = answer_nll(model, tuned[1])
    assert after[:3].min() > 2
    assert after[3:].max() < 1  # control: the other half is still there
    loaded = copy.deepcopy(tuned[0])
    load_adapter(loaded, folder / "adapter")
    torch.testing.assert_close(answer_nll(loaded, tuned[1]), after)
    assert not (folder / trainer.CHECKPOINT).exists()


@pytest.mark.parametrize("rule", ["joint", "normalized"])
@pytest.mark.parametrize("training", ["lora", "full"])
def test_every_matrix_moves(tuned, tokenizer, tmp_path, rule, training):
    terms = [
        {"half": "forget", "loss": "npo"},
        {"half": "retain", "loss": "nll"},
        {"half": "retain", "loss": "kl"},
    ]
    config = branch(
        terms=terms,
        training=training,
        step={"rule": rule},
        schedule={"epochs": 3, "accumulation": 3},
    )
    folder = tmp_path / "b"
    folder.mkdir()
    model = run(tuned, tokenizer, folder, config)
    if training == "lora":
        assert len(adapters_of(model)) == 14  # seven linear layers in each of two blocks
        assert all(layer.lora_B.abs().sum() > 0 for layer in adapters_of(model).values())
    else:
        for (name, new), old in zip(model.named_parameters(), tuned[0].parameters(), strict=True):
            assert not torch.equal(new, old), name


def test_a_run_stopped_anywhere_ends_with_the_same_bytes(tuned, tokenizer, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    whole.mkdir()
    run(tuned, tokenizer, whole)
    broken = tmp_path / "broken"
    broken.mkdir()
    steps = iter(range(100))
    original = trainer._clip

    def stop_at_some(parameters, limit):
        if next(steps) in (2, 7):
            raise KeyboardInterrupt
        return original(parameters, limit)

    monkeypatch.setattr(trainer, "_clip", stop_at_some)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(tuned, tokenizer, broken)
    run(tuned, tokenizer, broken)
    name = "adapter/adapter_model.safetensors"
    assert (whole / name).read_bytes() == (broken / name).read_bytes()
    assert (whole / trainer.LOG).read_text() == (broken / trainer.LOG).read_text()
    assert len((whole / trainer.LOG).read_text().splitlines()) == 15


def test_a_run_stopped_once_its_adapter_was_written_goes_on(
    tuned, tokenizer, tmp_path, monkeypatch
):
    def stop(folder, *more):
        raise KeyboardInterrupt

    config = branch(schedule={"epochs": 2, "accumulation": 3})
    with monkeypatch.context() as patch:
        patch.setattr(branching, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tuned, tokenizer, tmp_path, config)
    before = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    run(tuned, tokenizer, tmp_path, config)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("training", ["lora", "full"])
def test_a_run_killed_before_its_stage_was_sealed_is_not_trained_anew(
    tuned, tokenizer, tmp_path, monkeypatch, training
):
    config = branch(schedule={"epochs": 1, "accumulation": 3}, training=training)
    run(tuned, tokenizer, tmp_path, config)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(branching, "train", None)
    (tmp_path / trainer.CHECKPOINT).touch()  # it may be killed while this is removed
    run(tuned, tokenizer, tmp_path, config)
    assert kept == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}


def test_a_loss_that_is_not_finite_names_step_and_item_and_keeps_the_weights_before(
    tuned, tokenizer, tmp_path, monkeypatch
):
    folder = tmp_path / "b"
    folder.mkdir()
    real = Passes._score
    calls = iter(range(100))

    def poisoned(self, group):
        current, reference, inside = real(self, group)
        if next(calls) == 2:
            current.token_logps.data[current.sequence == 0] = float("nan")
        return current, reference, inside

    monkeypatch.setattr(Passes, "_score", poisoned)
    with pytest.raises(TrainingError, match=r"strong, step 3 of 15: .*nan at item f\d-qa0;"):
        run(tuned, tokenizer, folder)
    kept = load_file(folder / trainer.CHECKPOINT)
    assert all(bool(torch.isfinite(t).all()) for t in kept.values())
    assert len((folder / trainer.LOG).read_text().splitlines()) == 2


@pytest.mark.parametrize("training", ["lora", "full"])
def test_blocks_computed_again_give_the_same_weights_for_less_memory(
    tuned, tokenizer, tmp_path, training
):
    kept = []
    for checkpointing in (False, True):
        optimizer = {"lr": 1e-2, "compute": "float32", "checkpointing": checkpointing}
        schedule = {"epochs": 2, "micro_batch": 1, "accumulation": 3}
        folder = tmp_path / f"{checkpointing}"
        folder.mkdir()
        saved = torch.autograd.graph.saved_tensors_hooks
        sizes = []

        def size(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with saved(size, lambda tensor: tensor):
            config = branch(optimizer=optimizer, schedule=schedule, training=training)
            run(tuned, tokenizer, folder, config)
        (weights,) = folder.rglob("*model.safetensors")
        kept.append((load_file(weights), sum(sizes)))
    torch.testing.assert_close(kept[0][0], kept[1][0])
    assert kept[1][1] < 0.7 * kept[0][1]


def test_a_watched_branch_is_that_of_its_best_step(tuned, tokenizer, tmp_path):
    watch = {"every": 3, "metric": "nll.forget", "best": 2.0}
    folder = tmp_path / "b"
    folder.mkdir()
    run(tuned, tokenizer, folder, branch(watch=watch))
    lines = (folder / "evaluations.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [one["step"] for one in found] == [3, 6, 9, 12, 15]
    near = min((one["numbers"]["nll.forget"] for one in found), key=lambda nll: abs(nll - 2.0))
    loaded = copy.deepcopy(tuned[0])
    load_adapter(loaded, folder / "adapter")
    assert float(answer_nll(loaded, tuned[1])[:3].mean()) == pytest.approx(near, rel=1e-4)
    assert near != found[-1]["numbers"]["nll.forget"]  # control: the last is another


def test_a_matrix_that_nothing_reaches_is_an_error(tuned, tokenizer, tmp_path):
    config = branch(
        terms=[{"half": "forget", "loss": "hinge", "options": {"target": 1e-9}}],
        optimizer={"lr": 1e-3, "weight_decay": 0},
    )
    with pytest.raises(TrainingError, match=r"did not move.* \(it was 0.001 at most"):
        folder = tmp_path / "b"
        folder.mkdir()
        run(tuned, tokenizer, folder, config)


def test_how_micro_batches_are_packed_does_not_change_the_gradient(tuned):
    model, items = copy.deepcopy(tuned[0]), tuned[1]
    model.requires_grad_(True)
    objective = Objective((Term(half="retain", loss="nll"),))
    grads = []
    for limit in (10_000, 1):
        model.zero_grad()
        passes = Passes(model, {"retain": HalfData(items)}, objective, limit)
        passes.backward([{"retain": batch} for batch in ((0, 1), (2,), (3, 4))])
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("training", ["lora", "full"])
def test_both_halves_in_one_pass_give_the_gradient_of_each_item_by_itself(
    tuned, tmp_path, training
):
    """NPO, KL and NLL of lopsided items, packed as one, against one pass an item and half."""
    model = copy.deepcopy(tuned[0])
    items = sorted(tuned[1], key=lambda item: len(item.tokens))
    model.requires_grad_(training == "full")
    objective = Objective(
        (
            Term(half="forget", loss="npo"),
            Term(half="retain", loss="kl", scope="document"),
            Term(half="retain", loss="nll_sequence"),
        )
    )
    data = {}
    for half, kl in (("forget", False), ("retain", True)):
        scope, file = objective.scope(half), tmp_path / half
        made = cached_reference(model, items, scope, kl=kl, file=file, max_tokens=999)
        data[half] = HalfData(items, made)
    if training == "lora":
        add_adapter(model, Lora(rank=2, dropout=0), seed=0)
    generator = torch.Generator().manual_seed(0)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:  # away from the reference, where the KL is 0
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    passes = Passes(model, data, objective, 999)
    batches = [{"forget": (0,), "retain": (1,)}, {"forget": (4,), "retain": (0,)}]
    together = passes.backward(batches)
    packed = [p.grad.clone() for p in trained]
    assert together["retain.kl"] > 1e-4  # control
    model.zero_grad()
    alone: dict[str, float] = {}
    for batch in batches:
        for half, chosen in batch.items():
            for name, value in passes.backward([{half: chosen}]).items():
                alone[name] = alone.get(name, 0.0) + value / len(batches)
    for parameter, expected in zip(trained, packed, strict=True):
        torch.testing.assert_close(parameter.grad / len(batches), expected, atol=1e-5, rtol=1e-5)
    assert together == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("mean_over", ["step", "micro_batch"])
def test_over_a_whole_step_micro_batches_of_one_are_one_of_four(tuned, tmp_path, mean_over):
    """NLL, KL and NPO of items of unequal length; the mean of means is another (the control)."""
    model = copy.deepcopy(tuned[0])
    items = sorted(tuned[1], key=lambda item: len(item.tokens))
    model.requires_grad_(True)
    terms = (
        Term(half="forget", loss="npo"),
        Term(half="retain", loss="nll", skip_first=1),
        Term(half="retain", loss="kl", scope="document"),
    )
    objective, data = Objective(terms), {}
    for half, kl in (("forget", False), ("retain", True)):
        scope, file = objective.scope(half), tmp_path / half
        made = cached_reference(model, items, scope, kl=kl, file=file, max_tokens=999)
        data[half] = HalfData(items, made)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # away from the reference, where the KL is 0
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    alone = [{"forget": (n,), "retain": (n + 1,)} for n in range(4)]
    found = []
    for batches in (alone, [{"forget": (0, 1, 2, 3), "retain": (1, 2, 3, 4)}]):
        model.zero_grad()
        passes = Passes(model, data, objective, 60, mean_over)
        record = passes.backward(batches)
        found.append((record, torch.cat([p.grad.flatten() for p in model.parameters()])))
    (record, gradient), (expected, whole) = found
    assert expected["retain.kl"] > 1e-4
    error = float((gradient - whole).norm() / whole.norm())
    if mean_over == "step":
        assert record == pytest.approx(expected, rel=1e-5)
        assert error < 1e-5
    else:
        assert record["retain.nll"] != pytest.approx(expected["retain.nll"], rel=1e-3)
        assert error > 1e-3


def test_a_schedule_says_of_what_the_means_of_a_step_are_taken(tuned, tmp_path):
    plain = branch()
    assert "mean_over" not in plain.schedule.model_dump()  # so that stages made before are found
    for config, expected in (
        (plain, "micro_batch"),
        (branch(schedule={"kind": "alternate", "mean_over": "step"}), "step"),
        (branch(schedule={"mean_over": "step"}), "step"),
        (branch(schedule={"kind": "sugd"}), "micro_batch"),
    ):
        made = prepared(copy.deepcopy(tuned[0]), halves(tuned[1], tmp_path), config, seed=1)
        assert made.passes.mean_over == expected


@pytest.mark.parametrize(("half", "loss"), [("forget", "npo_batch"), ("alternate_pair", "kto")])
def test_a_loss_of_whole_micro_batches_is_refused_where_means_are_over_a_step(half, loss):
    terms = [{"half": half, "loss": loss}, {"half": "retain", "loss": "nll"}]
    for kind in ("pairing", "alternate"):
        branch(terms=terms, schedule={"kind": kind})  # control
        with pytest.raises(ValidationError, match=f"{loss} reads a micro-batch as one"):
            branch(terms=terms, schedule={"kind": kind, "mean_over": "step"})


def test_terms_over_answers_ignore_prompts_that_another_term_reads(tuned):
    """An answer term beside a document term gives what it gives alone."""
    model, items = tuned
    alone = Objective((Term(half="retain", loss="nll"),))
    beside = Objective(
        (
            Term(half="retain", loss="nll"),
            Term(half="retain", loss="nll_sequence", scope="document"),
        )
    )
    records = []
    for objective in (alone, beside):
        model.requires_grad_(True)
        passes = Passes(model, {"retain": HalfData(items)}, objective, 999)
        records.append(passes.backward([{"retain": (0, 1)}]))
        model.zero_grad()
    assert records[0]["retain.nll"] == pytest.approx(records[1]["retain.nll"], rel=1e-5)
    assert records[1]["retain.nll_sequence"] > records[1]["retain.nll"]


def test_the_log_says_what_each_step_did(tuned, tokenizer, tmp_path):
    folder = tmp_path / "b"
    folder.mkdir()
    run(tuned, tokenizer, folder, branch(step={"rule": "normalized", "fade_below": 1.0}))
    first = json.loads((folder / trainer.LOG).read_text().splitlines()[0])
    assert first["step"] == 1
    assert first["share"] == 1.0
    assert {"forget.hinge", "retain.nll", "retain.kl", "norm.forget", "lr"} <= set(first)
