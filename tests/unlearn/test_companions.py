"""Companions in training: what a visit reads, pairs that stay pairs, a branch that refuses."""

import copy
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from expunge.companions.making import Making, companion_sets
from expunge.data.batches import encode, pack
from expunge.data.examples import Example
from expunge.data.sets import Sets
from expunge.errors import RecipeError, TrainingError
from expunge.lora import Lora, add_adapter
from expunge.models import load_model
from expunge.scores import score
from expunge.unlearn import reference
from expunge.unlearn.branch import Branch, branch_demand, train_branch
from expunge.unlearn.companions import Companions, CompanionSet, on_sides, with_companions
from expunge.unlearn.halves import Halves
from expunge.unlearn.objective import Objective, Term
from expunge.unlearn.passes import HalfData, Passes
from expunge.unlearn.reference import cached_reference
from expunge.unlearn.schedule import MicroBatch, Pairing
from expunge.unlearn.sets import SETS
from expunge.unlearn.tune import Tune, tune

FORGET = [Example(f"f{n}-qa0", f"Who is {w}?", w[::-1]) for n, w in enumerate(["ann", "bob", "cy"])]
RETAIN = [Example(f"r{n}-qa0", f"Where is {w}?", w[::-1]) for n, w in enumerate(["oslo", "rome"])]
NEUTRAL = [Example(f"n{n}", "", text) for n, text in enumerate(["Ice floats.", "Bees hum."])]
SETS_HERE = Sets(FORGET, RETAIN, [], [], NEUTRAL)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, tiny_folder, tokenizer):
    """The tiny model after memorising both halves, and their tokens."""
    model = load_model(tiny_folder)
    items = [encode(e, tokenizer, max_length=64) for e in FORGET + RETAIN]
    config = Tune(
        epochs=150, batch=5, stop_nll=0.2, optimizer={"lr": 1e-2, "warmup": 0, "compute": "float32"}
    )
    tune(model, tokenizer, items, [], config, folder=tmp_path_factory.mktemp("tune"))
    return model, items


def made(tokenizer, *names, **companions) -> dict:
    def encoded(examples):
        return [encode(example, tokenizer, max_length=64) for example in examples]

    config = Companions.model_validate(companions)
    alternates = [["up", "down"], ["left"], ["in", "out"]]
    making = Making(SETS_HERE, encoded(FORGET), config, encoded, tokenizer, alternates)
    return companion_sets(names, making)


def branch(*terms, **changes) -> Branch:
    return Branch.model_validate(
        {
            "terms": terms,
            "lora": {"rank": 4, "alpha": 8, "dropout": 0},
            "schedule": {"epochs": 15, "micro_batch": 1, "accumulation": 3},
            "optimizer": {"lr": 1e-2, "compute": "float32", "checkpoint_seconds": 0},
            **changes,
        }
    )


def answer_nll(model, items):
    with torch.no_grad():
        return score(model, pack(items, "answer", "cpu")).nll


# --- what is read ------------------------------------------------------------------------------


def test_visits_rotate_through_the_companions_of_an_item():
    of = [[(0,), (1,), (2,)], [(3,), (4,)]]
    own = CompanionSet([], of, each=2)
    common = CompanionSet([], [[(0,), (1,), (2,)]], each=1, common=True)
    steps = [
        [MicroBatch((0,), (5, 6)), MicroBatch((1,), (7, 8))],
        [MicroBatch((0, 1), ()), MicroBatch((), (9,))],
        [MicroBatch((0, 0), (5,))],
    ]
    found = with_companions(steps, {"refusal": own, "neutral": common})
    read = [[(b["refusal"], b["neutral"]) for b in step] for step in found]
    assert read == [
        [((0, 1), (0, 1)), ((3, 4), (2, 0))],
        [((2, 0, 3, 4), (1, 2)), ((), (0,))],
        [((1, 2, 0, 1), (1,))],
    ]
    assert found == with_companions(steps, {"refusal": own, "neutral": common})


def test_a_step_rule_that_asks_for_a_side_gets_all_its_sets():
    batch = dict.fromkeys(SETS, (0,))
    assert set(on_sides(batch, ["retain"])) == {"retain", "neutral"}
    assert set(on_sides(batch, ["forget"])) == set(SETS) - {"retain", "neutral"}
    assert on_sides(batch, ["forget", "retain"]) == batch


def test_a_set_of_some_items_alone_holds_the_same_texts(tokenizer):
    for half, own in made(tokenizer, *SETS).items():
        part = own.only([2, 0, 2], turns=2)
        rows = [0] if own.common else [2, 0, 2]
        for row, item in enumerate(rows):
            tokens = [[own.sequences[i].tokens for i in one] for one in own.of[item]]
            there = [[part.sequences[i].tokens for i in one] for one in part.of[row]]
            assert there == tokens, half
        assert len({sequence.id for sequence in part.sequences}) == len(part.sequences)


# --- the table of sets -------------------------------------------------------------------------


@pytest.mark.parametrize("half", SETS)
def test_every_set_can_be_trained_with_every_loss_it_allows(half, tuned, tokenizer, tmp_path):
    levels = [torch.full((len(item.tokens) - 1, 2), -3.0) for item in tuned[1][:3]]
    sets = made(tokenizer, *SETS, seed=1)
    halves = Halves(tuned[1][:3], tuned[1][3:], tmp_path / "cache", "key", sets, levels)
    for loss, row in SETS[half].losses.items():
        place = {"layer": 0} if row.reads == "hidden" else {}
        terms = [{"half": "forget", "loss": "npo"}, {"half": half, "loss": loss, **place}]
        given = {"levels": {"of": "original"}} if row.needs_level else {}
        short = {"epochs": 1, "micro_batch": 2, "accumulation": 1}
        config = branch(*terms, schedule=short, **given)
        model = copy.deepcopy(tuned[0])
        folder = tmp_path / loss
        folder.mkdir()
        train_branch(
            model, tokenizer, halves, config, seed=1, folder=folder, base="tiny", label=loss
        )
        assert f'"{half}.{loss}"' in (folder / "log.jsonl").read_text()


@pytest.mark.parametrize(
    ("half", "loss"),
    [
        ("retain", "npo"),
        ("refusal", "gradient_ascent"),
        ("forget", "dpo"),
        ("refusal_pair", "nll"),
        ("paraphrase", "hinge_level"),
    ],
)
def test_a_loss_that_makes_no_sense_on_a_set_is_refused(half, loss):
    with pytest.raises(ValueError, match=f"no {half} loss is called '{loss}'.*Known: "):
        Term(half=half, loss=loss)


def test_a_branch_without_the_set_it_reads_is_refused(tuned, tokenizer, tmp_path):
    halves = Halves(tuned[1][:3], tuned[1][3:], tmp_path, "key")
    with pytest.raises(TrainingError, match="a term reads refusal, and no such items were given"):
        train_branch(
            copy.deepcopy(tuned[0]),
            tokenizer,
            halves,
            branch({"half": "refusal", "loss": "nll"}),
            seed=1,
            folder=tmp_path,
            base="tiny",
            label="idk",
        )


def test_the_contest_entry_point_refuses_other_sets(tmp_path):
    import expunge.semeval

    branches = {"idk": branch({"half": "refusal", "loss": "nll"})}
    with pytest.raises(RecipeError, match="branch 'idk' reads refusal, and the contest's"):
        expunge.semeval.unlearn("m", tmp_path / "o", "f", "r", branches=branches)
    levels = {"of": "original"}
    branches = {"level": branch({"half": "forget", "loss": "match_level"}, levels=levels)}
    with pytest.raises(RecipeError, match="branch 'level' reads levels, and the contest's"):
        expunge.semeval.unlearn("m", tmp_path / "o", "f", "r", branches=branches)


def test_a_reference_whose_file_is_cut_short_is_refused_in_a_line(tuned, tmp_path):
    model, items = tuned
    file = tmp_path / "reference.safetensors"
    whole = cached_reference(model, items, "answer", file=file, max_tokens=999)
    assert len(whole.logps) == len(items)  # control
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(TrainingError, match=r"reference.safetensors cannot be read .*; delete it"):
        cached_reference(model, items, "answer", file=file, max_tokens=999)


def test_a_reference_that_two_ask_for_at_once_is_computed_once(tuned, tmp_path, monkeypatch):
    model, items = tuned
    computed, forward = [], reference._forward

    def slow(*given):
        computed.append(given)
        time.sleep(0.5)
        return forward(*given)

    monkeypatch.setattr(reference, "_forward", slow)
    file = tmp_path / "cache" / "reference.safetensors"
    with ThreadPoolExecutor(2) as threads:
        asked = [
            threads.submit(cached_reference, model, items, "answer", file=file, max_tokens=999)
            for _ in range(2)
        ]
    one, two = [done.result().logps for done in asked]
    assert len(computed) == 1
    assert all(map(torch.equal, one, two))
    assert list(file.parent.iterdir()) == [file]


# --- pairs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [999, 60, 1])
def test_pairs_in_packs_give_the_gradient_of_each_pair_by_itself(tuned, tokenizer, tmp_path, limit):
    """DPO beside NLL and KL, whatever is forwarded together; a pair is never parted."""
    model, items = copy.deepcopy(tuned[0]), tuned[1]
    model.requires_grad_(False)
    sets = made(tokenizer, "alternate_pair", alternate={"count": 2, "each": 2})
    objective = Objective(
        (
            Term(half="alternate_pair", loss="dpo"),
            Term(half="retain", loss="nll_sequence"),
            Term(half="retain", loss="kl"),
        )
    )
    data = {}
    for half, sequences in (
        ("retain", items[3:]),
        ("alternate_pair", sets["alternate_pair"].sequences),
    ):
        kept = cached_reference(
            model, sequences, "answer", kl=half == "retain", file=tmp_path / half, max_tokens=999
        )
        data[half] = HalfData(sequences, kept)
    add_adapter(model, Lora(rank=2, dropout=0), seed=0)
    generator = torch.Generator().manual_seed(0)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:  # away from the reference
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    steps = [[MicroBatch((0, 1), (0,)), MicroBatch((2,), (1,))]]
    (batches,) = with_companions(steps, sets)
    assert [len(batch["alternate_pair"]) for batch in batches] == [6, 4]
    passes = Passes(model, data, objective, limit)
    forwarded = []
    real = passes._score
    passes._score = lambda group: forwarded.append(group) or real(group)  # pyright: ignore
    together = passes.backward([{h: i for h, i in b.items() if h in data} for b in batches])
    assert len(forwarded) == {999: 1, 60: 4, 1: 7}[limit]
    packed = [p.grad.clone() for p in trained]
    model.zero_grad()
    expected = dict.fromkeys(together, 0.0)
    wide = Passes(model, data, objective, 999)
    for batch in batches:
        pairs = list(pairwise(batch["alternate_pair"]))[::2]
        share = 1 / len(pairs) / len(batches)
        for pair in pairs:
            for name, value in wide.backward([{"alternate_pair": pair}]).items():
                expected[name] += share * value
            for parameter in trained:
                kept = parameter.__dict__.setdefault("kept", torch.zeros_like(parameter))
                kept += share * parameter.grad
                parameter.grad = None
        for name, value in wide.backward([{"retain": batch["retain"]}]).items():
            expected[name] += value / len(batches)
        for parameter in trained:
            parameter.__dict__["kept"] += parameter.grad / len(batches)
            parameter.grad = None
    for parameter, grad in zip(trained, packed, strict=True):
        torch.testing.assert_close(parameter.__dict__["kept"], grad, atol=1e-5, rtol=1e-4)
    assert together == pytest.approx(expected, rel=1e-5)
    assert {"forget", "alternate_pair.dpo", "retain", "retain.kl"} <= set(together)


def test_memory_counts_the_companions_of_a_step(tuned, tokenizer, tmp_path):
    plain = Halves(tuned[1][:3], tuned[1][3:], tmp_path, "key")
    halves = replace(plain, companions=made(tokenizer, "mismatch", "refusal_pair"))

    def demand(*terms, of=halves):
        return branch_demand(branch(*terms), of, seed=1, weights="float32")

    forget, pair = {"half": "forget", "loss": "npo"}, {"half": "refusal_pair", "loss": "dpo"}
    alone = demand(forget, of=plain)
    assert demand(forget).passes == alone.passes  # what no term reads is not forwarded
    assert demand(forget, {"half": "mismatch", "loss": "nll"}).tokens() > 2 * alone.tokens()
    own = halves.companions["refusal_pair"]
    longest = max(sum(len(own.sequences[i].tokens) for i in p) for mine in own.of for p in mine)
    read = max(
        sum(len(own.sequences[i].tokens) for i in b["refusal_pair"])
        for step in halves.steps(halves.planned(Pairing(epochs=15, accumulation=3), seed=1)[0])
        for b in step
    )
    assert demand(pair).piece == read <= longest


# --- a branch ----------------------------------------------------------------------------------


def test_idkdpo_makes_the_answer_unlikely_and_the_refusal_likely(tuned, tokenizer, tmp_path):
    path = tmp_path / "refusals.txt"
    path.write_text("No idea.\nI can't say.\n")
    sets = made(tokenizer, "refusal_pair", "refusal", refusal={"file": str(path), "count": 2})
    forget, retain = tuned[1][:3], tuned[1][3:]
    config = branch(
        {"half": "refusal_pair", "loss": "dpo", "options": {"beta": 0.1}},
        {"half": "retain", "loss": "nll"},
    )
    folder = tmp_path / "idkdpo"
    folder.mkdir()
    model = copy.deepcopy(tuned[0])
    halves = Halves(forget, retain, tmp_path / "cache", "key", sets)
    train_branch(
        model, tokenizer, halves, config, seed=1, folder=folder, base="tiny", label="idkdpo"
    )
    refusals = sets["refusal"].sequences
    before = [answer_nll(tuned[0], items) for items in (forget, refusals, retain)]
    after = [answer_nll(model, items) for items in (forget, refusals, retain)]
    assert before[0].max() < 0.5  # control: it was there
    assert after[0].min() > 2
    assert (after[1] < before[1] - 1).all()
    assert after[2].max() < 0.5  # control: the other half is still there
