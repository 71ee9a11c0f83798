"""Laws over the table of merge methods, and TIES and DARE worked by hand."""

import pytest
import torch

from expunge.merge.methods import (
    METHODS,
    combine,
    drop_at_random,
    keep_largest,
    tensor_rng,
    truncated,
)

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=rng(seed))


def merged(deltas, method, *, density=0.6, weights=None, seed=0, **options):
    weights = weights or [1.0] * len(deltas)
    return combine(deltas, method, rng(seed), weights=weights, density=density, **options)


@every_method
@pytest.mark.parametrize("normalize", [False, True])
def test_one_model_at_full_density_comes_back_unchanged(method, normalize):
    delta = normal(1, 4, 5)
    assert torch.equal(merged(delta, method, density=1.0, normalize=normalize), delta[0])


@every_method
def test_branches_of_equal_weight_may_come_in_any_order(method):
    deltas = normal(3, 6, 7)
    density = 1.0 if method.random else 0.6
    turned = merged(deltas[[2, 0, 1]], method, density=density)
    torch.testing.assert_close(turned, merged(deltas, method, density=density))


@every_method
@pytest.mark.parametrize("vote", ["unweighted", "weighted"])
def test_scaling_deltas_or_weights_scales_the_merge(method, vote):
    deltas, weights = normal(2, 6, 7), [0.5, 2.0]
    once = merged(deltas, method, weights=weights, vote=vote)
    torch.testing.assert_close(merged(3 * deltas, method, weights=weights, vote=vote), 3 * once)
    torch.testing.assert_close(merged(deltas, method, weights=[1.5, 6.0], vote=vote), 3 * once)
    assert once.abs().sum() > 0  # control


@every_method
def test_density_one_trims_nothing(method):
    deltas = normal(2, 6, 7)
    kept = method.sparsify(deltas[0], 1.0, rng())
    assert torch.equal(kept, deltas[0])
    if method.sparsify is not METHODS["linear"].sparsify:
        assert (method.sparsify(deltas[0], 0.5, rng()) == 0).any()  # control


@every_method
def test_zero_deltas_merge_to_zero(method):
    assert torch.equal(merged(torch.zeros(2, 3, 4), method), torch.zeros(3, 4))


@every_method
def test_a_zero_branch_adds_and_dilutes_nothing(method):
    deltas = torch.stack([normal(5), torch.zeros(5)])
    assert torch.equal(merged(deltas, method, density=1.0), deltas[0])


@every_method
def test_normalized_weights_matter_by_their_ratio_alone(method):
    deltas = normal(2, 6, 7)
    small = merged(deltas, method, weights=[0.1, 0.3], normalize=True)
    torch.testing.assert_close(small, merged(deltas, method, weights=[1.0, 3.0], normalize=True))
    same = torch.stack([deltas[0], deltas[0]])
    torch.testing.assert_close(
        merged(same, method, density=1.0, weights=[0.1, 0.3], normalize=True), deltas[0]
    )


def test_ties_by_hand():
    deltas = torch.tensor([[4.0, -1.0, 0.2, 3.0], [2.0, 3.0, -1.0, -3.0]])
    # Half of each is kept: [4, 0, 0, 3] and [0, 3, 0, -3]; 3 and -3 tie, so + is elected.
    result = merged(deltas, METHODS["ties"], density=0.5)
    assert result.tolist() == [4.0, 3.0, 0.0, 3.0]
    # Nothing trimmed: signs +, +, -, +; the means of those that agree.
    result = merged(deltas, METHODS["ties"], density=1.0)
    assert result.tolist() == [3.0, 3.0, -1.0, 3.0]


def test_weights_enter_ties_after_an_unweighted_vote_and_before_a_weighted_one():
    deltas = torch.tensor([[1.0, 2.0], [-3.0, 2.0]])
    weights = [6.0, 1.0]
    ties = METHODS["ties"]
    # Unweighted: 1 - 3 < 0 elects -, so only -3 · 1 counts. Weighted: 6 - 3 > 0 elects +.
    assert merged(deltas, ties, density=1, weights=weights).tolist() == [-3.0, 7.0]
    weighted = merged(deltas, ties, density=1, weights=weights, vote="weighted")
    assert weighted.tolist() == [6.0, 7.0]
    normalized = merged(deltas, ties, density=1, weights=weights, vote="weighted", normalize=True)
    assert normalized.tolist() == [1.0, 2.0]


def test_a_negative_weight_subtracts():
    deltas = normal(2, 8)
    linear = merged(deltas, METHODS["linear"], weights=[1.0, -1.0])
    torch.testing.assert_close(linear, deltas[0] - deltas[1])
    alone = merged(deltas[:1], METHODS["ties"], weights=[-2.0], density=1.0, vote="weighted")
    torch.testing.assert_close(alone, -2 * deltas[0])


def test_exactly_the_asked_number_is_kept_and_ties_go_to_the_lowest_index():
    equal = torch.tensor([1.0, -1.0, 2.0, 1.0, -1.0])
    assert keep_largest(equal, 0.6, rng()).tolist() == [1.0, -1.0, 2.0, 0.0, 0.0]
    assert keep_largest(equal, 0.1, rng()).tolist() == [0.0] * 5
    assert (keep_largest(torch.full((1000,), -3.0), 0.37, rng()) != 0).sum() == 370
    delta = normal(37, 11)
    kept = keep_largest(delta, 0.25, rng())
    assert (kept != 0).sum() == int(0.25 * delta.numel())
    assert kept.abs()[kept != 0].min() > delta[kept == 0].abs().max()


def test_dare_leaves_the_mean_unchanged():
    delta = normal(20)
    generator = rng(1)
    draws = torch.stack([drop_at_random(delta, 0.3, generator) for _ in range(20_000)])
    spread = delta.abs() * (0.7 / 0.3 / 20_000) ** 0.5  # standard error of each mean
    assert ((draws.mean(0) - delta).abs() < 4 * spread).all()
    assert abs((draws != 0).float().mean() - 0.3) < 0.005
    assert not torch.equal(draws[0], delta)  # control


@every_method
def test_a_tensor_merges_alike_whatever_was_merged_before_it(method):
    deltas = {name: normal(2, 6, 7, seed=seed) for seed, name in enumerate("abc")}

    def run(names):
        return {
            n: combine(deltas[n], method, tensor_rng(3, n), weights=[1, 1], density=0.5)
            for n in names
        }

    there, back = run("abc"), run("cba")
    assert all(torch.equal(there[name], back[name]) for name in "abc")


def test_randomness_depends_on_seed_and_name():
    draws = {
        torch.rand(1, generator=tensor_rng(seed, name)).item() for seed in (0, 1) for name in "ab"
    }
    assert len(draws) == 4


@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
def test_truncation_is_the_best_of_its_rank(shape):
    delta = normal(*shape)
    a, b = truncated(delta, 3)
    assert a.shape == (3, shape[1]) and b.shape == (shape[0], 3)
    best = torch.linalg.svdvals(delta)[3:].norm()
    torch.testing.assert_close((delta - b @ a).norm(), best)
    a, b = truncated(delta, 7)
    torch.testing.assert_close(b @ a, delta)


def test_every_row_says_where_it_comes_from():
    for method in METHODS.values():
        assert method.source
        assert method.fidelity in ("exact", "as-released quirk", "adapted", "inspired", "own")
        assert method.differs or method.fidelity != "adapted"
