"""Rules that keep a part of the forget gradient: which vectors move, which directions are left."""

import pytest
import torch

from expunge.unlearn.steps.selected import _cosines

FORGET = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
RETAIN = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
# -∇L_F against ∇L_R, row by row: cos = -1, 1, 0


@pytest.mark.parametrize("vectors", ["rows", "columns"])
@pytest.mark.parametrize(("share", "rows"), [(0.34, [0]), (0.67, [0, 2]), (1.0, [0, 1, 2])])
def test_only_the_vectors_that_tell_the_halves_apart_move(toy, linear, vectors, share, rows):
    turned = (lambda t: t) if vectors == "rows" else (lambda t: t.T.contiguous())
    made = toy(torch.zeros_like(turned(FORGET)), linear(turned(FORGET)), linear(turned(RETAIN)))
    found, record = made.gradient("pcgu", share=share, vectors=vectors)
    expected = torch.zeros_like(FORGET)
    expected[rows] = FORGET[rows]
    assert torch.equal(turned(found) if vectors == "columns" else found, expected)
    assert record["vectors"] == len(rows)


def test_the_chosen_vectors_are_those_of_a_plain_loop(toy, linear):
    f, r = torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(0))
    found, record = toy(torch.zeros(40, 6), linear(f), linear(r)).gradient("pcgu", share=0.25)
    cosines = [float(torch.cosine_similarity(-a, b, dim=0)) for a, b in zip(f, r, strict=True)]
    lowest = sorted(range(40), key=cosines.__getitem__)[:10]
    assert sorted(lowest) == found.abs().sum(1).nonzero().flatten().tolist()
    assert record["cosine"] == pytest.approx(cosines[lowest[-1]], abs=1e-5)


def test_columns_are_counted_where_the_retain_gradient_is_missing():
    f = torch.ones(3, 2)
    assert [len(_cosines(f, None, vectors)) for vectors in ("rows", "columns")] == [3, 2]
    assert len(_cosines(f[0], None, "columns")) == 1


def test_a_tensor_of_one_dimension_is_one_vector(toy, linear):
    f, r = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0])
    assert torch.equal(toy(torch.zeros(2), linear(f), linear(r)).gradient("pcgu")[0], f)


@pytest.mark.parametrize("shape", [(9, 5), (5, 9)])
@pytest.mark.parametrize("of", ["forget", "retain"])
def test_what_is_left_is_orthogonal_to_the_principal_directions(toy, linear, shape, of):
    f, r = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    made = toy(torch.zeros(shape), linear(f), linear(r))
    found, record = made.gradient("repselect", components=2, of=of)
    left = found - r
    u, _, vt = torch.linalg.svd(f if of == "forget" else r, full_matrices=False)
    assert (u[:, :2].T @ left).abs().max() < 1e-4
    assert (left @ vt[:2].T).abs().max() < 1e-4
    assert (u[:, :2].T @ f).abs().max() > 1  # control: they were there
    assert record["share"] == pytest.approx(float(left.norm() / f.norm()), rel=1e-4)
    if of == "forget":  # the other singular values stay
        kept = torch.linalg.svdvals(left)[:3]
        torch.testing.assert_close(kept, torch.linalg.svdvals(f)[2:5], rtol=1e-4, atol=1e-4)


def test_without_a_direction_to_collapse_it_is_joint(toy, linear):
    f, r = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(2))
    made = toy(torch.zeros(4, 3), linear(f), linear(r))
    joint, _ = made.gradient("joint")
    torch.testing.assert_close(made.gradient("repselect", components=0)[0], joint)
    assert not torch.allclose(made.gradient("repselect", components=1)[0], joint)  # control


def test_what_the_retain_half_shares_is_taken_from_the_forget_gradient(toy, linear):
    shared = torch.outer(torch.tensor([1.0, 2.0, 2.0]), torch.tensor([3.0, 4.0]))
    made = toy(torch.zeros(3, 2), linear(5 * shared), linear(shared))
    found, _ = made.gradient("repselect", components=1, of="retain")
    torch.testing.assert_close(found, shared, rtol=1e-4, atol=1e-4)  # the retain gradient alone
