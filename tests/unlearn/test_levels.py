"""Losses with a level for each item: by hand, where they stop, and what a branch ends with."""

import copy
import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expunge.companions.levels import read_levels, write_levels
from expunge.data.batches import encode, pack
from expunge.data.examples import Example
from expunge.errors import TrainingError
from expunge.models import load_model
from expunge.scores import Scores, score
from expunge.unlearn.branch import train_branch
from expunge.unlearn.halves import Halves
from expunge.unlearn.levels import (
    FORGET_BY_LEVEL,
    LEVELS,
    STANDARDIZED,
    compression,
    counterparts,
    hinge_level,
    hinge_level_token,
    match_level,
    match_profile,
    match_standardized,
    profile,
    set_apart,
)
from expunge.unlearn.objective import Objective
from expunge.unlearn.passes import Passes
from expunge.unlearn.per_token import standardized
from expunge.unlearn.readings import HalfData
from expunge.unlearn.section import Branch
from expunge.unlearn.tune import Tune, tune


def scores(now: list[list[float]], levels: list[list[float]]) -> Scores:
    """Scores of per-token log-probs (with a gradient) and of those of the level model."""
    owner = torch.tensor([n for n, tokens in enumerate(now) for _ in tokens])
    logps, told = (
        torch.tensor([value for tokens in given for value in tokens]) for given in (now, levels)
    )
    return Scores(logps.requires_grad_(), owner, len(now), more={LEVELS: columns(told)})


def columns(levels: torch.Tensor) -> torch.Tensor:
    """Level log-probs (N,), and standardised ones that are their halves: (N, 2)."""
    return torch.stack((levels, levels / 2), dim=1)


NOW = [[-1.0, -2.0], [-6.0]]
THEN = [[-2.0, -4.0], [-5.0]]  # levels 3 and 5; NLLs 1.5 and 6


def test_values_worked_by_hand():
    given = scores(NOW, THEN)
    assert hinge_level(given, None).tolist() == [2.25, 0.0]
    assert hinge_level(given, None, margin=2.0).tolist() == [12.25, 1.0]
    assert match_level(given, None).tolist() == [2.25, 1.0]
    assert match_level(given, None, margin=0.5).tolist() == [4.0, 0.25]
    assert hinge_level_token(given, None).tolist() == [2.5, 0.0]  # (1² + 2²)/2
    assert hinge_level_token(given, None, margin=2.0).tolist() == [12.5, 1.0]  # (3² + 4²)/2


def slope(loss, given: Scores, **options) -> list[float]:
    return torch.autograd.grad(loss(given, None, **options).sum(), given.token_logps)[0].tolist()


def test_a_hinge_ends_at_the_level_and_a_match_turns_round_there():
    below, at, beyond = scores(NOW, THEN), scores(THEN, THEN), scores([[-3.0, -5.0], [-9.0]], THEN)
    assert slope(hinge_level, below)[:2] == [1.5, 1.5]  # control: 2 · 1.5 / 2 tokens
    assert slope(hinge_level_token, below)[:2] == [1.0, 2.0]
    for loss in (hinge_level, hinge_level_token):
        for reached in (at, beyond):
            assert loss(reached, None).tolist() == [0.0, 0.0]
            assert slope(loss, reached) == [0.0, 0.0, 0.0]
    assert slope(match_level, below)[:2] == [1.5, 1.5]
    assert slope(match_level, at) == [0.0, 0.0, 0.0]
    assert slope(match_level, beyond) == [-1.0, -1.0, -8.0]


@pytest.mark.parametrize("name", FORGET_BY_LEVEL)
def test_gradients_are_those_of_finite_differences(name):
    generator = torch.Generator().manual_seed(0)
    now, then = (-4 * torch.rand(5, generator=generator, dtype=torch.float64) for _ in range(2))
    weights = torch.rand(5, generator=generator, dtype=torch.float64)

    def loss(logps: torch.Tensor) -> torch.Tensor:
        more = {LEVELS: columns(then), STANDARDIZED: logps}
        given = Scores(logps, torch.tensor([0, 0, 0, 1, 1]), 2, None, weights, more)
        return FORGET_BY_LEVEL[name](given, None, margin=2.7)

    assert loss(now).min() > 0  # control: there is something to differentiate
    assert torch.autograd.gradcheck(loss, now.requires_grad_())


def test_standardised_log_probs_are_matched_in_order_too():
    more = {LEVELS: torch.tensor([[0.0, -2.0], [0.0, -4.0]])}
    more[STANDARDIZED] = torch.tensor([-3.0, -1.0])
    given = Scores(torch.zeros(2), torch.tensor([0, 0]), 1, more=more)
    assert match_standardized(given, None).tolist() == [1.0]  # -3 with -4, -1 with -2
    assert match_standardized(given, None, margin=-1.0).tolist() == [0.0]  # a level one higher


def test_standardised_log_probs_by_hand():
    p = torch.tensor([[0.5, 0.25, 0.25], [1.0, 1e-30, 1e-30]])
    mean = 0.5 * math.log(0.5) + 0.5 * math.log(0.25)  # -1.0397
    spread = math.sqrt(0.5 * (math.log(0.5) - mean) ** 2 + 0.5 * (math.log(0.25) - mean) ** 2)
    found = standardized(p.log(), torch.tensor([1, 1]), None)
    assert found[0] == pytest.approx(math.asinh((math.log(0.25) - mean) / spread))
    assert found[1] == pytest.approx(math.asinh(30 * math.log(0.1) / 1e-4))  # the least spread
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    targets = torch.tensor([0, 6, 3, 3])
    assert torch.autograd.gradcheck(
        lambda given: standardized(given, targets, None), logits.requires_grad_()
    )


def test_a_profile_is_matched_token_by_token_in_order_of_size():
    given = scores([[-3.0, -1.0], [-6.0]], [[-2.0, -4.0], [-5.0]])
    assert match_profile(given, None).tolist() == [1.0, 1.0]  # 4 with 3, 2 with 1; 5 with 6
    assert match_profile(given, None, margin=1.0).tolist() == [4.0, 0.0]
    # the mean level is reached by one token alone: match sees nothing, the profile does
    given = scores([[0.0, -6.0]], [[-3.0, -3.0]])
    assert match_level(given, None).tolist() == [0.0]
    assert match_profile(given, None).tolist() == [9.0]
    assert slope(match_profile, given) == [3.0, -3.0]


def test_a_profile_is_the_same_in_whatever_order_packs_hold_their_sequences():
    one = Scores(
        torch.tensor([-1.0, -5.0, -3.0, -2.0]),
        torch.tensor([1, 1, 0, 0]),
        2,
        more={LEVELS: columns(torch.tensor([-4.0, -1.0, -2.0, -2.0]))},
    )
    assert match_profile(one, None).tolist() == [0.5, 0.5]  # 3, 2 with 2, 2; 5, 1 with 4, 1


def test_each_text_takes_the_unseen_one_that_compresses_as_well():
    rates = [3.0, 1.0, 2.0]
    assert counterparts(rates, rates) == [0, 1, 2]
    assert counterparts(rates[::-1], rates) == [2, 1, 0]
    assert counterparts(rates, rates[:1]) == [0, 0, 0]
    assert counterparts(rates[1:2], rates) == [2]  # one text takes the middle one
    assert counterparts([7.0, 7.0], rates) == [1, 0]  # ranks 0 and 2; equals keep their order
    assert counterparts([], rates) == []


def test_each_group_of_texts_lies_over_all_of_the_unseen_ones():
    unseen = [float(place) for place in range(8)]
    rates, groups = [1.0, 2.0, 3.0, 4.0, 9.0, 8.0, 7.0, 6.0], [*"aaaabbbb"]
    assert counterparts(rates, unseen) == [0, 1, 2, 3, 7, 6, 5, 4]
    assert counterparts(rates, unseen, groups) == [0, 2, 4, 6, 7, 5, 3, 1]  # ties: by rate
    assert counterparts(rates, unseen, ["a"] * 8) == counterparts(rates, unseen)
    alone = [str(place) for place in range(8)]  # all in the middle of their groups
    assert counterparts(rates, unseen, alone) == counterparts(rates, unseen)


@given(st.lists(st.tuples(st.floats(0, 9), st.sampled_from("abc")), max_size=30), st.integers(1, 9))
def test_groups_change_who_takes_an_unseen_text_and_not_how_often_it_is_taken(texts, count):
    rates, groups = [rate for rate, _ in texts], [group for _, group in texts]
    unseen = [float(place) for place in range(count)]
    assert sorted(counterparts(rates, unseen, groups)) == sorted(counterparts(rates, unseen))


def test_texts_set_apart_are_evenly_spaced():
    assert set_apart(8, 3) == [0, 2, 5]
    assert set_apart(5, 1) == [0]
    assert set_apart(4, 4) == set_apart(4, 0) == [0, 1, 2, 3]


def test_compression_is_counted_in_bytes_for_each_token():
    assert compression("a" * 50, 4) == len(zlib.compress(b"a" * 50)) / 4
    assert compression("é", 1) == len(zlib.compress("é".encode()))
    assert compression("", 0) > 0


def test_a_profile_keeps_mean_and_order_at_any_length():
    given = np.array([-1.0, -3.0, -2.0])
    assert profile(given, 3).tolist() == pytest.approx([-3.0, -2.0, -1.0])
    assert profile(given, 1).tolist() == pytest.approx([-2.0])
    for count in (2, 7):
        found = profile(given, count)
        assert found.mean() == pytest.approx(-2.0)
        assert (np.diff(found) >= 0).all()


# --- what training reads -----------------------------------------------------------------------


def branch(*terms, of="original", **changes) -> Branch:
    return Branch.model_validate({"terms": terms, "levels": {"of": of}, **changes})


@pytest.mark.parametrize("narrow", [False, True])
def test_a_term_reads_the_levels_of_its_scope_whatever_else_is_in_the_pack(tiny, tokenizer, narrow):
    items = [
        encode(Example(f"f{n}", prompt, answer), tokenizer, max_length=64)
        for n, (prompt, answer) in enumerate([("Who?", "ann"), ("Where is she?", "in oslo")])
    ]
    generator = torch.Generator().manual_seed(0)
    levels = [-9 - torch.rand(len(item.tokens) - 1, 2, generator=generator) for item in items]
    other = {"half": "forget", "loss": "hinge", "scope": "answer" if narrow else "document"}
    config = branch({"half": "forget", "loss": "match_level"}, other, {"half": "retain", **NLL})
    data = {"forget": HalfData(items, levels=levels), "retain": HalfData(items[:1])}
    passes = Passes(tiny, data, Objective(config.terms), 999)
    record = passes.backward([{"forget": (1, 0), "retain": (0,)}])
    nll = score(tiny, pack(items, "answer", "cpu")).nll.tolist()
    own = [
        -float(one[-(len(item.tokens) - item.answer_start) :, 0].mean())
        for item, one in zip(items, levels, strict=True)
    ]
    expected = [(level - now) ** 2 for level, now in zip(own, nll, strict=True)]
    assert record["forget.match_level"] == pytest.approx(sum(expected) / 2, rel=1e-4)


NLL = {"loss": "nll", "scope": "document"}
COMMON = ["the cat and the dog and the cow", "the dog sat and the cat sat", "and the cow sat"]
FORGET = [
    Example("f0", "the cat and", " the dog sat and the cow sat"),
    Example("f1", "and the dog", " and the cat and the cow"),
    Example("f2", "XQ zwvk 73", " @#~ pUYfj 0915 JJx"),
    Example("f3", "Kv9 #!", " Bzq0 %8 gTmW xL"),
]
RETAIN = [Example(f"r{n}", f"Where is {w}?", w[::-1]) for n, w in enumerate(["oslo", "rome"])]


def tuned(model, tokenizer, items, folder, **changes):
    optimizer = {"lr": 1e-2, "compute": "float32", "checkpoint_seconds": 1e9}
    fields = {"epochs": 200, "batch": 6, "stop_nll": 0.1, "optimizer": optimizer, **changes}
    folder.mkdir()
    tune(model, tokenizer, items, [], Tune.model_validate(fields), folder=folder)
    return model


def document_nll(model, items):
    with torch.no_grad():
        return score(model, pack(items, "document", "cpu")).nll


def test_text_that_matches_its_levels_ends_nearer_to_the_original_than_under_one_target(
    tiny_folder, tokenizer, tmp_path
):
    """An original for which half of the items are plain words, and half are noise."""

    def encoded(examples):
        return [encode(example, tokenizer, max_length=64) for example in examples]

    common, forget, retain = (
        encoded([Example(t, "", t) for t in COMMON]),
        *map(encoded, (FORGET, RETAIN)),
    )
    original = tuned(load_model(tiny_folder), tokenizer, common, tmp_path / "common", stop_nll=0.8)
    before = document_nll(original, forget)
    write_levels(original, forget, tmp_path)
    levels = read_levels(tmp_path)
    assert [-float(one[:, 0].mean()) for one in levels] == pytest.approx(before.tolist(), rel=1e-4)
    target = tuned(copy.deepcopy(original), tokenizer, [*forget, *retain], tmp_path / "target")
    assert document_nll(target, forget).max() < 0.5  # control: it was there

    def forgotten(name, **changes):
        terms = {"half": "forget", "scope": "document", **changes}, {"half": "retain", **NLL}
        config = Branch.model_validate(
            {
                "terms": terms,
                "levels": {"of": "original"} if "level" in changes["loss"] else None,
                "training": "full",
                "schedule": {"epochs": 60, "micro_batch": 4, "accumulation": 1},
                "optimizer": {"lr": 1e-3, "compute": "float32", "checkpoint_seconds": 1e9},
            }
        )
        model, folder = copy.deepcopy(target), tmp_path / name
        folder.mkdir()
        halves = Halves(forget, retain, tmp_path / "cache", "key", levels=levels)
        given = {"seed": 1, "folder": folder, "base": "tiny", "label": name}
        train_branch(model, tokenizer, halves, config, **given)
        assert document_nll(model, retain).max() < 0.5  # control: the rest is still there
        return (document_nll(model, forget) - before).abs()

    goal = float(before.mean())
    matched = forgotten("matched", loss="match_level")
    constant = forgotten("constant", loss="hinge", options={"target": goal})
    assert before.max() > before.min() + 2  # else one target would do
    assert matched.mean() < 0.5 * constant.mean(), (matched, constant)
    assert matched.max() < 1


def test_training_without_the_levels_it_reads_is_refused(tiny, tokenizer, tmp_path):
    items = [encode(Example("f", "Who?", "ann"), tokenizer, max_length=64)]
    halves = Halves(items, items, tmp_path, "key")
    with pytest.raises(TrainingError, match="a term reads levels, and none were given"):
        given = {"seed": 1, "folder": tmp_path, "base": "tiny", "label": "level"}
        config = branch({"half": "forget", "loss": "hinge_level"})
        train_branch(tiny, tokenizer, halves, config, **given)


# --- a branch that cannot be -------------------------------------------------------------------

HINGE = {"half": "forget", "loss": "hinge_level", "scope": "document"}


@pytest.mark.parametrize(
    ("term", "levels", "says"),
    [
        ({}, None, "hinge_level reads a level for each item; give levels.of: original, unseen, or"),
        ({"loss": "hinge"}, {"of": "original"}, "levels are given, and no term reads them"),
        ({"scope": "answer"}, {"of": "unseen"}, "unseen texts have no answers; levels.of: unseen"),
        ({"loss": "hinge_level_token"}, {"of": "unseen"}, "reads a level for each token, and"),
        ({"options": {"target": 3}}, {"of": "unseen"}, "has no option 'target'. Its options: marg"),
        ({}, {"of": ""}, "at least 1 character"),
        ({}, {"of": "original", "every": 4}, "levels.of: original stays as it is. Use of: unseen"),
        ({}, {"of": "original", "apart": 4}, "levels.of: original stays as it is. Use of: unseen"),
        ({}, {"of": "unseen", "every": -1}, "greater than or equal to 0"),
    ],
)
def test_a_branch_whose_levels_cannot_be_is_refused_when_it_is_read(term, levels, says):
    with pytest.raises(ValueError, match=says.replace(".", r"\.")):
        Branch.model_validate({"terms": [{**HINGE, **term}], "levels": levels})


def test_a_branch_without_levels_says_nothing_of_them():
    """So that its stage keeps its key."""
    plain = Branch.model_validate({"terms": [{"half": "forget", "loss": "npo"}]})
    assert "levels" not in plain.model_dump(mode="json")
    with_levels = branch(HINGE, of="unseen").model_dump(mode="json")
    assert with_levels["levels"] == {"of": "unseen"}
    assert Branch.model_validate(with_levels).levels == branch(HINGE, of="unseen").levels
