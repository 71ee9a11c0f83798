"""Schedules: what each step sees, and what a run of several phases ends with when it is killed."""

import copy
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter

from expunge.config import Section, parse_section
from expunge.data.batches import TokenSequence
from expunge.errors import RecipeError, TrainingError
from expunge.recipe import load_recipe
from expunge.unlearn import trainer
from expunge.unlearn.branch import train_branch
from expunge.unlearn.halves import Halves
from expunge.unlearn.optimizer import Optimizer, Span
from expunge.unlearn.preparing import prepared
from expunge.unlearn.schedule import SCHEDULES, Pairing, Schedule, epoch_ends, phases, steps
from expunge.unlearn.section import Branch
from expunge.unlearn.trainer import train

EXAMPLES = {
    "pairing": {"epochs": 2, "micro_batch": 2, "accumulation": 2},
    "sugd": {"chunk": 4, "epochs": 2, "retain_per_forget": 7},
    "agad": {"chunk": 4, "epochs": 2, "batch": 3, "anneal_share": 0.5},
    "layered": {"epochs": 2, "folds": 3, "micro_batch": 2},
    "alternate": {"epochs": 2, "micro_batch": 2, "accumulation": 2},
    "sequential": {"epochs": 2, "requests": 3},
}


def section(kind: str, **changes) -> Schedule:
    fields = {"kind": kind, **(EXAMPLES[kind] | changes)}
    return TypeAdapter(Schedule).validate_python(fields)


def ids(count: int) -> list[str]:
    return [f"d{n // 2}-qa{n % 2}" for n in range(count)]


def made(kind: str, forget: int = 10, retain: int = 4, seed: int = 1, **changes):
    return phases(section(kind, **changes), ids(forget), retain, seed=seed)


def batches(phase) -> list:
    return [batch for step in phase.steps for batch in step]


def test_the_examples_are_of_the_whole_table():
    assert list(EXAMPLES) == list(SCHEDULES)


@pytest.mark.parametrize("kind", SCHEDULES)
class TestEverySchedule:
    def test_sees_every_forget_item_as_often_as_its_epochs_say(self, kind):
        seen = Counter(i for phase in made(kind) for b in batches(phase) for i in b.forget)
        if kind == "layered":  # an item of fold j is unlearned in stages j to 3
            assert sorted(seen.values()) == 4 * [2] + 3 * [4] + 3 * [6]
        else:
            assert seen == dict.fromkeys(range(10), 2)

    def test_says_where_its_epochs_end(self, kind):
        found = made(kind)
        ends = [0, *epoch_ends(found)]
        assert len(ends) - 1 == sum(phase.epochs for phase in found) > 1
        every = [step for phase in found for step in phase.steps]
        assert ends[-1] == len(every)
        epochs = [every[a:b] for a, b in pairwise(ends)]
        for phase in found:
            of_phase = [epochs.pop(0) for _ in range(phase.epochs)]
            assert [step for epoch in of_phase for step in epoch] == phase.steps
            seen = [sorted(i for s in epoch for b in s for i in b.forget) for epoch in of_phase]
            assert all(one == seen[0] and len(set(one)) == len(one) for one in seen)

    def test_is_a_function_of_the_seed(self, kind):
        assert made(kind) == made(kind)
        assert made(kind) != made(kind, seed=2)

    def test_goes_round_a_retain_set_that_is_too_small(self, kind):
        kept = SCHEDULES[kind].keeps
        seen = {i for phase in made(kind, retain=2) for b in batches(phase) for i in b.retain}
        assert {0, 1} <= seen <= (set(range(12)) if kept else {0, 1})

    def test_reads_no_item_that_is_not_there_and_no_empty_step(self, kind):
        for phase in made(kind, forget=5, retain=3):
            assert all(phase.steps)
            assert all(b.forget or b.retain for b in batches(phase))
            limit = 3 + 5 * SCHEDULES[kind].keeps
            assert all(0 <= i < limit for b in batches(phase) for i in b.retain)

    def test_has_steps_of_one_half_alone_only_where_the_table_says_so(self, kind):
        both = all(
            any(b.forget for b in step) and any(b.retain for b in step)
            for phase in made(kind)
            for step in phase.steps
        )
        assert both != SCHEDULES[kind].apart


def test_an_epoch_is_one_pass_over_forget_with_item_i_beside_retain_item_i_modulo():
    every = steps(Pairing(epochs=2, micro_batch=2, accumulation=2), ids(10), 4, seed=1)
    assert len(every) == 2 * 3  # five micro-batches an epoch, two a step
    assert [len(step) for step in every] == [2, 2, 1] * 2
    for epoch in (every[:3], every[3:]):
        seen = [batch for step in epoch for batch in step]
        assert sorted(i for b in seen for i in b.forget) == list(range(10))
        assert all(b.retain == tuple(i % 4 for i in b.forget) for b in seen)


def test_several_retain_items_a_forget_item_reach_more_of_the_retain_set():
    (phase,) = made("pairing", forget=2, retain=20, epochs=3, retain_per_forget=3, micro_batch=1)
    assert all(len(b.retain) == 3 for b in batches(phase))
    assert len({i for b in batches(phase) for i in b.retain}) > 6


def test_sugd_puts_seven_retain_items_after_each_forget_item():
    found = made("sugd", forget=70, retain=50, chunk=32, epochs=7)
    assert [len(phase.steps) for phase in found] == [7 * 8 * 32, 7 * 8 * 32, 7 * 8 * 6]
    for phase in found:
        kinds = "".join("f" if b.forget else "r" for b in batches(phase))
        assert kinds == "frrrrrrr" * (len(kinds) // 8)
        assert all(
            len(step) == 1 and len(b.forget + b.retain) == 1 for step in phase.steps for b in step
        )
    first, second = (batches(phase)[: 8 * 32] for phase in found[:2])
    drawn = [b.retain[0] for b in first + second if b.retain]
    assert drawn == (drawn[:50] * 9)[: len(drawn)]  # a cycle that goes on from chunk to chunk
    assert batches(found[0])[8 * 32 : 16 * 32] == first  # each epoch has the same order


def test_agad_anneals_after_each_chunk_and_on_all_of_retain_at_the_end():
    options = {"chunk": 4, "epochs": 3, "batch": 3, "anneal_share": 0.25, "anneal_lr": 0.5}
    found = made("agad", forget=6, retain=8, **options)
    halves = ["".join(sorted({"f" if b.forget else "r" for b in batches(p)})) for p in found]
    assert halves == ["f", "r", "f", "r", "r"]
    assert [phase.lr for phase in found] == [1.0, 0.5, 1.0, 0.5, 0.5]
    assert [len(p.steps) for p in found] == [3 * 2, 1, 3 * 1, 1, 3]
    shares = [[i for b in batches(found[n]) for i in b.retain] for n in (1, 3)]
    assert len({*shares[0], *shares[1]}) == 4  # a quarter of 8 each, not the same one
    assert sorted(i for b in batches(found[4]) for i in b.retain) == list(range(8))


def test_layers_unlearn_the_folds_so_far_and_keep_those_to_come():
    found = made("layered", forget=10, retain=4, folds=3)
    unlearned = [{i for b in batches(phase) for i in b.forget} for phase in found]
    kept = [{i - 4 for b in batches(phase) for i in b.retain if i >= 4} for phase in found]
    folds = [unlearned[0], unlearned[1] - unlearned[0], unlearned[2] - unlearned[1]]
    assert sorted(map(len, folds)) == [3, 3, 4]
    assert set().union(*folds) == set(range(10))  # a partition, for each holds the one before
    for forget, keep in zip(unlearned[:2], kept[:2], strict=True):
        assert keep <= set(range(10)) - forget
    assert kept[1] == folds[2]
    assert not kept[2]
    assert all(sum(i < 4 for i in b.retain) == len(b.forget) for p in found for b in batches(p))


def test_alternate_gives_whole_epochs_of_one_half_in_turns():
    (phase,) = made("alternate", forget=3, retain=5, epochs=2)
    halves = ["f" if b.forget else "r" for b in batches(phase)]
    assert "".join(halves) == "rrrff" * 2
    assert [len(step) for step in phase.steps] == [2, 1, 2] * 2


def test_requests_come_one_after_another():
    found = made("sequential", forget=10, requests=3)
    sets = [{i for b in batches(phase) for i in b.forget} for phase in found]
    assert sum(map(len, sets)) == len(set().union(*sets)) == 10
    again = made("sequential", forget=10, requests=3, again=True)
    grown = [{i for b in batches(phase) for i in b.forget} for phase in again]
    assert grown == [sets[0], sets[0] | sets[1], set(range(10))]
    by = made("sequential", forget=6, requests=None, by="^[^-]+")
    assert [{i for b in batches(p) for i in b.forget} for p in by] == [{0, 1}, {2, 3}, {4, 5}]


class Holder(Section):
    """A section that has a schedule."""

    schedule: Schedule
    """One."""


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"kind": "sugdd"}, "sugd"),
        ({"kind": "sugd", "chunks": 3}, "Did you mean 'chunk'"),
        ({"kind": "sequential"}, "needs one of requests"),
        ({"kind": "sequential", "by": "("}, "not a regular expression"),
        (5, "schedule"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_on_one_line(given, says):
    with pytest.raises(RecipeError, match=says) as caught:
        parse_section({"schedule": given}, Holder, origin="r.yaml")
    assert "\n" not in str(caught.value)


def test_parts_that_the_forget_set_does_not_have_are_refused():
    with pytest.raises(TrainingError, match="folds is 9, and there are 4"):
        made("layered", forget=4, folds=9)
    with pytest.raises(TrainingError, match="finds nothing in the id 'd0-qa0'"):
        made("sequential", requests=None, by="x")


TERMS = [{"half": "forget", "loss": "npo"}, {"half": "retain", "loss": "nll"}]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"schedule": {"kind": "agad"}, "terms": TERMS[:1]}, "needs a term with half: retain"),
        ({"schedule": {"kind": "layered"}, "terms": TERMS[:1]}, "needs a term with half: retain"),
        ({"schedule": {"kind": "sugd"}, "step": {"rule": "normalized"}}, "use the rule joint"),
    ],
)
def test_a_schedule_that_its_branch_cannot_follow_is_refused(fields, says):
    with pytest.raises(RecipeError, match=says):
        parse_section({"terms": TERMS, **fields}, Branch, origin="r.yaml")
    fine = {"terms": TERMS, "schedule": {"epochs": 2}}  # control: as old recipes have it
    assert parse_section(fine, Branch, origin="r.yaml").schedule == Pairing(epochs=2)


def items(name: str, count: int) -> list[TokenSequence]:
    return [
        TokenSequence(
            f"{name}{n}-qa0", tuple(b"Who is %d?" % n) + tuple(b"It is %s" % name.encode()), 9
        )
        for n in range(count)
    ]


def branch(kind: str, **changes) -> Branch:
    terms = [{"half": "forget", "loss": "gradient_ascent", "weight": 0.1}, *TERMS[1:]]
    return Branch.model_validate(
        {
            "terms": terms,
            "lora": {"rank": 2, "alpha": 4, "dropout": 0.1},
            "schedule": {"kind": kind, **EXAMPLES[kind]},
            "optimizer": {"lr": 1e-2, "warmup": 0.2, "compute": "float32", "checkpoint_seconds": 0},
            **changes,
        }
    )


def run(tiny, tokenizer, folder, config) -> None:
    folder.mkdir(exist_ok=True)
    train_branch(
        copy.deepcopy(tiny),
        tokenizer,
        Halves(items("f", 4), items("r", 3), folder.parent / "cache", "key"),
        config,
        seed=1,
        folder=folder,
        base="tiny",
        label="b",
    )


SHORT = {
    "sugd": {"chunk": 2, "epochs": 1, "retain_per_forget": 2},
    "agad": {"chunk": 2, "epochs": 1, "batch": 2},
    "sequential": {"requests": 2, "epochs": 2, "accumulation": 1},
    "layered": {"folds": 2, "epochs": 1, "accumulation": 2},
    "alternate": {"epochs": 2, "micro_batch": 2},
    "pairing": {"epochs": 2, "accumulation": 2},
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_run_killed_in_a_phase_or_between_two_ends_with_the_same_bytes(
    tiny, tokenizer, tmp_path, monkeypatch, kind
):
    config = branch(kind, schedule={"kind": kind, **SHORT[kind]})
    run(tiny, tokenizer, tmp_path / "whole", config)
    log = (tmp_path / "whole" / trainer.LOG).read_text()
    records = [json.loads(line) for line in log.splitlines()]
    numbers = [record.get("phase", 1) for record in records]
    first = numbers.count(1)
    stops = {first - 1, first} if len(set(numbers)) > 1 else {1}
    real, calls = trainer._clip, iter(range(100))
    dead = set()

    def stop_at_some(parameters, limit):
        number = next(calls) - len(dead)
        if number in stops - dead:
            dead.add(number)
            raise KeyboardInterrupt
        return real(parameters, limit)

    monkeypatch.setattr(trainer, "_clip", stop_at_some)
    for _ in stops:
        with pytest.raises(KeyboardInterrupt):
            run(tiny, tokenizer, tmp_path / "broken", config)
    run(tiny, tokenizer, tmp_path / "broken", config)
    name = "adapter/adapter_model.safetensors"
    whole, broken = (tmp_path / place for place in ("whole", "broken"))
    assert (whole / name).read_bytes() == (broken / name).read_bytes()
    assert (broken / trainer.LOG).read_text() == log


def test_items_to_be_kept_are_read_by_the_retain_terms_and_counted_in_no_mean(tiny, tmp_path):
    halves = Halves(items("f", 4), items("r", 3), tmp_path, "key")
    terms = [*TERMS, {"half": "retain", "loss": "kl"}]
    config = branch("layered", schedule={"kind": "layered", "folds": 2}, terms=terms)
    found, both = halves.planned(config.schedule, seed=1)
    kept = {i for b in batches(found[0]) for i in b.retain if i >= 3}
    assert {both.retain[i].id for i in kept} <= {f"{s.id} (kept)" for s in halves.forget}
    assert [both.retain[i].tokens for i in sorted(kept)] == [
        halves.forget[i - 3].tokens for i in sorted(kept)
    ]
    other = copy.deepcopy(tiny)
    ready = prepared(tiny, halves, config, seed=1)
    record = ready.gradient(0)
    assert {"forget", "retain", "retain.kl"} <= set(record)
    plain = prepared(other, halves, branch("pairing", terms=terms), seed=1)
    ours, theirs = ready.passes.losses(), plain.passes.losses()
    assert ours["nll.retain"] == pytest.approx(theirs["nll.retain"], rel=1e-5)


def descend(start: float, spans: list[Span], tmp_path, **options) -> tuple[float, list]:
    """Steps on L = x² / 2."""
    x = torch.nn.Parameter(torch.tensor([start]))

    def gradient(number: int) -> dict[str, float]:
        (x.square() / 2).sum().backward()
        return {"loss": float(x.detach()) ** 2 / 2}

    config = Optimizer(**{"lr": 0.1, "weight_decay": 0, "clip": None, **options})
    count = sum(span.steps for span in spans)
    given = {"steps": count, "config": config, "seed": 0, "folder": tmp_path, "label": "x"}
    return float(train({"x": x}, gradient, **given, spans=spans)[-1]["lr"]), [x.item()]


def test_each_phase_has_a_rate_and_moments_of_its_own(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    spans = [Span(4), Span(2, lr=0.5)]
    _, (end,) = descend(3.0, spans, tmp_path / "a")
    log = [json.loads(line) for line in (tmp_path / "a" / trainer.LOG).read_text().splitlines()]
    rates = [0.1, 0.075, 0.05, 0.025, 0.05, 0.025]
    assert [record["lr"] for record in log] == pytest.approx(rates)
    assert [record["phase"] for record in log] == [1] * 4 + [2] * 2
    _, (one,) = descend(3.0, [Span(4)], tmp_path / "b")
    (tmp_path / "b" / trainer.LOG).unlink()
    (tmp_path / "b" / trainer.CHECKPOINT).unlink(missing_ok=True)
    _, (two,) = descend(one, [Span(2)], tmp_path / "b", lr=0.05)
    assert two == end  # two runs, one after the other


def test_plain_descent_follows_the_gradient(tmp_path):
    """x ← x - η x with η = 0.1, 0.05; decay takes η·w of x."""
    _, (end,) = descend(2.0, [Span(2)], tmp_path, kind="sgd")
    assert end == pytest.approx(2.0 * 0.9 * 0.95)
    (tmp_path / trainer.LOG).unlink()
    _, (end,) = descend(2.0, [Span(2)], tmp_path, kind="sgd", weight_decay=0.5)
    assert end == pytest.approx(2.0 * (1 - 0.15) * (1 - 0.075))


@pytest.mark.parametrize(
    ("name", "branches"),
    [
        ("ails-ntua", {"last_blocks": "sugd", "adapter": "sugd"}),
        ("ails-ntua-agad", {"agad": "agad"}),
        ("sha256", {"early_mlps": "pairing"}),
    ],
)
def test_the_recipes_of_other_teams_read(name, branches):
    recipe = load_recipe(Path(__file__).parents[2] / "recipes" / f"{name}.yaml")
    assert {name: one.schedule.kind for name, one in recipe.branches.items()} == branches
    again = load_recipe(load_recipe(recipe.model_dump(mode="json")))
    assert again == recipe
