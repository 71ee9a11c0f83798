"""Laws over the table of merge methods, and some of them worked by hand."""

import math

import numpy as np
import pytest
import torch

from expunge.errors import MergeError
from expunge.merge.families import REQUIRED, Elect, Matrix, Span
from expunge.merge.methods import METHODS
from expunge.merge.operands import Operand, constant, low_rank
from expunge.merge.options import resolved
from expunge.merge.spectral import truncated, truncated_product
from expunge.merge.tensor import merged_float32
from expunge.merge.trim import Settings

every_method = pytest.mark.parametrize("name", METHODS)
GIVEN = {"t": 0.4, "trim": "tensor"}
ON_DELTAS = [
    name for name, method in METHODS.items() if isinstance(method.how, Elect) or (name == "linear")
]
every_sum = pytest.mark.parametrize("name", ON_DELTAS)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=rng(seed))


def merged(deltas, name, *, weights=None, seed=0, base=None, tensor="w", **options):
    """Merge deltas (M, *S) of a base, or of nothing."""
    method = METHODS[name]
    known = {k: GIVEN.get(k) for k, v in method.options.items() if v is REQUIRED}
    known |= {k: v for k, v in options.items() if k in method.options}
    weights = tuple(weights or [1.0] * len(deltas))
    settings = Settings(
        tensor, weights, resolved(name, method, known, len(deltas), where=tensor), seed
    )
    if name == "slerp":  # its first vector is the base itself
        deltas = torch.stack([torch.zeros_like(deltas[0]), *deltas])
    parts = [constant(delta.contiguous().numpy()) for delta in deltas]
    held = None if base is None else constant(base.contiguous().numpy())
    operand = Operand(tensor, tuple(deltas[0].shape), held, parts)
    return torch.from_numpy(merged_float32(operand, method, settings))


def count(name):
    """How many models a law is tried with."""
    return min(3, METHODS[name].models[1])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", [n for n in METHODS if METHODS[n].models[0] == 1])
def test_one_model_at_full_density_comes_back_unchanged(name, normalize):
    if name in ("slerp", "consensus", "arcee_fusion", "nearswap"):
        pytest.skip("leans to the base by its parameters")
    delta = normal(1, 4, 5)
    options = {"normalize": normalize, "divide": "weights" if normalize else "none"}
    result = merged(delta, name, density=1.0, agree=1, mask_scale=0.0, **options)
    if name == "pcb":  # its least entry weighs nothing
        result, delta = result[result != 0], delta[0][result != 0][None]
    torch.testing.assert_close(result, delta[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("linear", "karcher", "regmean")])
def test_what_is_made_of_one_update_grows_with_its_weight_where_the_table_says_so(name):
    row = METHODS[name]
    if row.models[0] > 1 or row.models[1] == 1:
        pytest.skip("takes no single update, or no more than one")
    delta = normal(1, 6, 7)
    less, more = (merged(delta, name, weights=[weight]) for weight in (0.3, 0.6))
    torch.testing.assert_close(more, 2 * less if row.grows else less, rtol=1e-4, atol=1e-5)


@every_method
def test_models_of_equal_weight_may_come_in_any_order(name):
    if count(name) < 2:
        pytest.skip("merges one model with its base")
    deltas = 0.1 * normal(count(name), 6, 7)
    density = 1.0 if METHODS[name].random else 0.6
    order = [2, 0, 1] if len(deltas) == 3 else [1, 0]
    turned = merged(deltas[order], name, density=density)
    torch.testing.assert_close(turned, merged(deltas, name, density=density), rtol=1e-4, atol=1e-6)


@every_sum
@pytest.mark.parametrize("vote", ["unweighted", "weighted"])
def test_scaling_deltas_or_weights_scales_the_merge(name, vote):
    deltas, weights = normal(2, 6, 7), [0.5, 2.0]
    options = {"vote": vote, "density": 0.6, "normalize": False, "select_topk": 0.6}
    once = merged(deltas, name, weights=weights, **options)
    torch.testing.assert_close(merged(3 * deltas, name, weights=weights, **options), 3 * once)
    if name != "sce":  # weighs by energy
        torch.testing.assert_close(merged(deltas, name, weights=[1.5, 6.0], **options), 3 * once)
    assert once.abs().sum() > 0  # control


@every_method
def test_zero_deltas_merge_to_zero(name):
    if name == "slerp":
        pytest.skip("has no direction to turn to")
    zeros = torch.zeros(count(name), 3, 4)
    assert torch.equal(merged(zeros, name, density=0.5, epsilon=0.1), torch.zeros(3, 4))


@every_sum
def test_a_zero_model_adds_and_dilutes_nothing(name):
    deltas = torch.stack([normal(4, 5), torch.zeros(4, 5)])
    once = merged(deltas, name, density=1.0, normalize=False)
    torch.testing.assert_close(once, deltas[0])


@every_sum
def test_divided_weights_matter_by_their_ratio_alone(name):
    deltas = normal(2, 6, 7)
    options = {"divide": "weights", "normalize": True, "density": 1.0}
    small = merged(deltas, name, weights=[0.1, 0.3], **options)
    torch.testing.assert_close(small, merged(deltas, name, weights=[1.0, 3.0], **options))
    same = torch.stack([deltas[0], deltas[0]])
    torch.testing.assert_close(merged(same, name, weights=[0.1, 0.3], **options), deltas[0])


@every_method
def test_a_tensor_merges_alike_whatever_was_merged_before_it(name):
    deltas = {n: 0.1 * normal(count(name), 6, 7, seed=seed) for seed, n in enumerate("abc")}

    def run(names):
        return {n: merged(deltas[n], name, density=0.5, tensor=n, seed=3) for n in names}

    there, back = run("abc"), run("cba")
    assert all(torch.equal(there[n], back[n]) for n in "abc")


def test_ties_by_hand():
    deltas = torch.tensor([[4.0, -1.0, 0.2, 3.0], [2.0, 3.0, -1.0, -3.0]])
    # Half of each is kept: [4, 0, 0, 3] and [0, 3, 0, -3]; 3 and -3 tie, so + is elected.
    assert merged(deltas, "ties", density=0.5).tolist() == [4.0, 3.0, 0.0, 3.0]
    # Nothing trimmed: signs +, +, -, +; the means of those that agree.
    assert merged(deltas, "ties", density=1.0).tolist() == [3.0, 3.0, -1.0, 3.0]


def test_weights_enter_ties_after_an_unweighted_vote_and_before_a_weighted_one():
    deltas = torch.tensor([[1.0, 2.0], [-3.0, 2.0]])
    weights = [6.0, 1.0]
    # Unweighted: 1 - 3 < 0 elects -, so only -3 · 1 counts. Weighted: 6 - 3 > 0 elects +.
    assert merged(deltas, "ties", weights=weights).tolist() == [-3.0, 7.0]
    assert merged(deltas, "ties", weights=weights, vote="weighted").tolist() == [6.0, 7.0]
    divided = merged(deltas, "ties", weights=weights, vote="weighted", divide="weights")
    assert divided.tolist() == [1.0, 2.0]


def test_a_negative_weight_subtracts():
    deltas = normal(2, 8)
    difference = merged(deltas, "task_arithmetic", weights=[1.0, -1.0])
    torch.testing.assert_close(difference, deltas[0] - deltas[1])
    for divide in ("count", "weights"):
        alone = merged(deltas[:1], "ties", weights=[-2.0], vote="weighted", divide=divide)
        torch.testing.assert_close(alone, -deltas[0] * (2 if divide == "count" else 1))


def kept(delta, density, name="magnitude_prune", **options):
    return merged(delta[None], name, density=density, **options)


def test_exactly_the_asked_number_is_kept_and_ties_go_to_the_lowest_index():
    equal = torch.tensor([1.0, -1.0, 2.0, 1.0, -1.0])
    assert kept(equal, 0.6).tolist() == [1.0, -1.0, 2.0, 0.0, 0.0]
    assert kept(equal, 0.1).tolist() == [0.0, 0.0, 2.0, 0.0, 0.0]  # at least one stays
    assert (kept(torch.full((100_000,), -3.0), 0.37) != 0).sum() == 37_000
    assert (kept(torch.full((100_000,), -3.0), 0.37)[:37_000] != 0).all()
    delta = normal(37, 11)
    largest = kept(delta, 0.25)
    assert (largest != 0).sum() == int(0.25 * delta.numel())
    assert largest.abs()[largest != 0].min() > delta[largest == 0].abs().max()


def test_breadcrumbs_drop_the_greatest_and_the_least():
    delta = torch.tensor([5.0, -1.0, 4.0, 2.0, -3.0, 0.5, 0.1, 0.2, 0.3, 0.4])
    # gamma 0.2 drops 5 and 4; density 0.3 keeps the three next.
    result = kept(delta, 0.3, "breadcrumbs", gamma=0.2)
    assert result.tolist() == [0.0, -1.0, 0.0, 2.0, -3.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    # No outliers dropped: the greatest of all.
    assert kept(delta, 0.2, "breadcrumbs", gamma=0.0)[[0, 2]].tolist() == [5.0, 4.0]


@pytest.mark.parametrize(("name", "epsilon"), [("dare_linear", 0.0), ("della_linear", 0.1)])
def test_dropping_at_random_leaves_the_mean_unchanged(name, epsilon):
    delta = normal(4, 20)
    draws = torch.stack(
        [kept(delta, 0.3, name, epsilon=epsilon, seed=seed) for seed in range(4_000)]
    )
    spread = delta.abs() * (0.8 / 0.2 / 4_000) ** 0.5  # at most the standard error of each mean
    assert ((draws.mean(0) - delta).abs() < 4.5 * spread).all()
    assert abs((draws != 0).float().mean() - 0.3) < 0.005
    assert not torch.equal(draws[0], delta)  # control


def test_della_keeps_great_entries_more_often():
    delta = torch.arange(1.0, 101.0)
    draws = torch.stack(
        [kept(delta, 0.5, "della_linear", epsilon=0.3, seed=seed) for seed in range(2_000)]
    )
    chance = (draws != 0).float().mean(0)
    expected = 0.2 + 0.6 * torch.arange(100) / 99
    assert (chance - expected).abs().max() < 0.06
    with pytest.raises(MergeError, match="chances outside"):
        kept(delta, 0.5, "della_linear", epsilon=0.6)


def test_what_is_drawn_depends_on_seed_name_and_model():
    delta = normal(50)
    masks = {
        tuple((kept(delta, 0.5, "dare_linear", seed=s, tensor=t) != 0).tolist())
        for s in (0, 1)
        for t in "ab"
    }
    assert len(masks) == 4
    both = merged(torch.stack([delta, delta]), "dare_linear", density=0.5)
    once = kept(delta, 0.5, "dare_linear")
    assert not torch.equal(both, 2 * once)


def test_rescaling_by_the_l1_norm_keeps_it():
    delta = normal(40, 30)
    for name in ("ties", "dare_linear", "della_linear", "breadcrumbs"):
        result = kept(delta, 0.4, name, rescale="l1", epsilon=0.1)
        torch.testing.assert_close(result.abs().sum(), delta.abs().sum(), rtol=1e-5, atol=0)
        plain = kept(delta, 0.4, name, rescale="none", epsilon=0.1)
        assert plain.abs().sum() < 0.9 * delta.abs().sum()  # control


def test_slerp_turns_by_a_share_of_the_angle():
    base, model = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    halfway = merged(torch.stack([base, model]), "nuslerp")
    torch.testing.assert_close(halfway, torch.tensor([0.5**0.5, 0.5**0.5]))
    third = merged(torch.stack([base, model]), "nuslerp", weights=[2.0, 1.0])
    torch.testing.assert_close(third, torch.tensor([np.cos(np.pi / 6), np.sin(np.pi / 6)]).float())


def test_karcher_mean_of_three_axes_is_their_middle():
    axes = torch.eye(3) * torch.tensor([[1.0], [2.0], [3.0]])
    torch.testing.assert_close(merged(axes, "karcher"), torch.full((3,), 2 / 3**0.5))


def test_model_stock_stays_at_the_base_where_models_disagree():
    orthogonal, same = torch.eye(2), torch.ones(2, 2)
    assert merged(orthogonal, "model_stock").tolist() == [0.0, 0.0]
    torch.testing.assert_close(merged(same, "model_stock"), torch.ones(2))


def test_ram_keeps_what_one_model_changes_and_averages_what_several_do():
    deltas = torch.tensor([[2.0, 4.0, 0.0], [0.0, 2.0, 0.0]])
    assert merged(deltas, "ram").tolist() == [2.0, 3.0, 0.0]
    # Model 0 shares 1 of its changes and makes 1 alone: λ = 1 + 0.1 · min(1, 0.2).
    torch.testing.assert_close(merged(deltas, "ramplus_tl"), torch.tensor([2.04, 3.0, 0.0]))


def test_nearswap_takes_the_model_only_where_it_is_near():
    base, delta = torch.tensor([1.0, 1.0]), torch.tensor([0.2, 2.0])
    result = merged(delta[None], "nearswap", base=base, t=0.4)
    torch.testing.assert_close(result, torch.tensor([1.2, 1.4]))


def test_consensus_drops_what_serves_one_model_alone():
    deltas = torch.tensor([[1.0, 1.0, 0.0], [1.0, -0.9, 2.0]])
    assert merged(deltas, "consensus").tolist() == [2.0, pytest.approx(0.1), 0.0]
    assert merged(deltas, "consensus", agree=1).tolist()[2] == 2.0  # control


def test_pcb_weighs_entries_by_how_they_compete():
    """With |δ| of each model from 0 to 1 and M = 2: s = exp(2 δ²) tanh(δ Σδ), of which the upper
    half, from its bound to its greatest, is weighed from 0 to 1."""
    deltas = torch.tensor([[1.0, 0.5, 0.0, 0.2], [0.0, 0.5, 1.0, -0.2]])
    # the second entry is the bound of both models, and weighs 0
    assert merged(deltas, "pcb", density=0.5).tolist() == pytest.approx([1, 0, 1, 0])
    # from the least on it weighs something, for both the same
    found = merged(deltas, "pcb", weights=[1.0, 3.0], density=1.0).tolist()
    assert found == pytest.approx([1, (0.5 + 3 * 0.5) / 2, 3, 0])
    # each model's scores by its own greatest: the second entry is the greatest of model 2
    share = math.exp(0.5) * math.tanh(0.375) / (math.exp(2) * math.tanh(1))
    uneven = torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.25, 0.0]])
    expected = (share * 0.5 + 1 * 0.25) / (share + 1)
    assert merged(uneven, "pcb", density=1.0).tolist() == pytest.approx([1, expected, 0])


def test_knots_and_tsv_give_back_what_does_not_overlap():
    one, two = torch.zeros(6, 6), torch.zeros(6, 6)
    one[0, 0], two[1, 1] = 3.0, 2.0
    for name in ("knots", "tsv"):
        torch.testing.assert_close(merged(torch.stack([one, two]), name), one + two)


@pytest.mark.parametrize("name", ["knots", "tsv"])
def test_shared_bases_of_loras_are_found_from_their_factors(name):
    a, b = normal(2, 3, 20), normal(2, 30, 3, seed=1)
    given = {"density": 0.6} if name == "knots" else {}
    options = resolved(name, METHODS[name], given, 2, where="w")
    settings = Settings("w", (1.0, 0.5), options)
    factored = [low_rank(x.numpy(), y.numpy(), 1.0) for x, y in zip(a, b, strict=True)]
    dense = [constant((y @ x).numpy()) for x, y in zip(a, b, strict=True)]
    one, two = (
        merged_float32(Operand("w", (30, 20), None, parts), METHODS[name], settings)
        for parts in (factored, dense)
    )
    np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-3)
    assert np.abs(one).sum() > 1


def test_regmean_fits_each_model_on_its_own_inputs():
    deltas = normal(2, 4, 3)
    inputs = [torch.tensor([[1.0, 0, 0], [0, 1, 0]]), torch.tensor([[0.0, 0, 1]])]
    grams = [x.T @ x for x in inputs]
    settings = Settings("w", (1.0, 1.0), {"shrink": 1.0})
    parts = [constant(delta.numpy()) for delta in deltas]
    operand = Operand("w", (4, 3), None, parts)
    result = torch.from_numpy(
        merged_float32(operand, METHODS["regmean"], settings, statistics=grams)
    )
    for x, delta in zip(inputs, deltas, strict=True):
        torch.testing.assert_close(x @ result.T, x @ delta.T, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
def test_truncation_is_the_best_of_its_rank(shape):
    delta = normal(*shape)
    a, b = truncated(delta, 3)
    assert a.shape == (3, shape[1]) and b.shape == (shape[0], 3)
    best = torch.linalg.svdvals(delta)[3:].norm()
    torch.testing.assert_close((delta - b @ a).norm(), best)
    a, b = truncated(delta, 7)
    torch.testing.assert_close(b @ a, delta)


def test_truncation_from_factors_equals_truncation_of_their_product():
    a, b = normal(5, 20), normal(30, 5, seed=1)
    short_a, short_b = truncated_product(a, b, 3)
    assert short_a.shape == (3, 20) and short_b.shape == (30, 3)
    whole_a, whole_b = truncated(b @ a, 3)
    torch.testing.assert_close(short_b @ short_a, whole_b @ whole_a, rtol=1e-4, atol=1e-5)


def test_every_row_says_where_it_comes_from():
    for method in METHODS.values():
        assert method.source
        assert method.fidelity in ("exact", "as-released quirk", "adapted", "inspired", "own")
        assert method.differs or method.fidelity != "adapted"
        assert isinstance(method.how, Span | Elect | Matrix) or method.how.fn.__doc__
