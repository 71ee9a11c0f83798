"""Rank editing: the closed form of the shift, what falls, what stays, what can be taken back."""

import pytest
import torch
from safetensors.torch import load_file

import expunge
from expunge.edit.observe import down_projections
from expunge.edit.options import Ranks
from expunge.edit.ranks import Lens, lens_of, leverage_shift, rarest, revs
from expunge.edit.vocabulary import check_norms, lens_to, move_down, rank_of
from expunge.errors import EditError
from expunge.models import load_model, outline

LIMITS = {"margin": 60, "depth": 150, "candidates": 20, "rounds": 100}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def lens() -> Lens:
    head = torch.randn(200, 16, generator=rng())
    return lens_of(head, 1 + 0.1 * torch.randn(16, generator=rng(1)), 1e-6)


def test_the_shift_moves_the_logit_by_what_is_wanted(lens):
    h = torch.randn(3, 16, generator=rng(2))
    wanted = torch.tensor([-10.0, 0.5, 3.0])
    shift = leverage_shift(lens, h, 7, wanted)
    fixed = (lens.gain * (h + shift) / lens.rms(h)) @ lens.head.T
    torch.testing.assert_close(fixed[:, 7] - lens.logits(h)[:, 7], wanted, atol=1e-4, rtol=1e-4)


def test_the_shift_is_the_pseudo_inverse_of_the_head(lens):
    """By the definition: solve E z = wanted/leverage · e_y in least squares, leave the norm."""
    h = torch.randn(16, generator=rng(2))
    pinv = torch.linalg.pinv(lens.head.double())
    leverage = (lens.head.double() @ pinv)[7, 7]
    assert 0 < leverage < 1
    wanted = (-4.0 / leverage) * pinv[:, 7] * lens.rms(h) / lens.gain
    found = leverage_shift(lens, h, 7, torch.tensor(-4.0))
    torch.testing.assert_close(found, wanted.float(), atol=1e-5, rtol=1e-4)


def test_the_target_falls_beyond_the_margin_and_control_tokens_hardly_move():
    lens = lens_of(torch.randn(1000, 512, generator=rng()), torch.ones(512), 1e-6)
    columns = torch.randn(512, 40, generator=rng(3))
    activations = torch.randn(40, generator=rng(4))
    written = columns @ activations
    token = int(lens.logits(written).argmax())
    residual = written + torch.randn(512, generator=rng(5))
    limits = {**LIMITS, "margin": 80, "depth": 700}
    places, values = revs(columns, activations, written, residual, token, lens, **limits)
    change = (values - columns[:, places]) @ activations[places]
    for state in (written, residual):
        before, after = (
            lens.logits(s).argsort(descending=True).argsort() for s in (state, state + change)
        )
        assert before[token] < 80 <= after[token]
        moved = (after - before).abs()[torch.arange(1000) != token].float()
        assert moved.median() < 50
    assert set((activations[places] > 0).tolist()) == {True, False}  # both signs were moved


def test_a_token_already_beyond_the_margin_in_the_columns_is_left_there(lens):
    """Every column ranks it low, so the first shift is nothing; then depth grows until it falls."""
    columns = torch.randn(16, 4, generator=rng(3))
    residual = lens.head[9] / lens.gain * 3
    places, values = revs(columns, torch.ones(4), columns.sum(1), residual, 9, lens, **LIMITS)
    after = residual + (values - columns[:, places]).sum(1)
    assert int(lens.rank(residual, 9)) < 60 <= int(lens.rank(after, 9))


def test_the_rarest_tokens_are_those_of_highest_id_each_once():
    tokens = (9, 200, 5, 90, 7, 90, 30, 0)
    assert rarest(tokens, 2, 2, end=0) == [3, 6]
    assert rarest(tokens, 6, 5, end=0) == [6]
    assert rarest(tokens, 7, 5, end=0) == []


def test_a_whole_model_ranks_the_target_low_after_the_edit(knowing, halves, tokenizer):
    model = load_model(knowing)
    model.requires_grad_(False)
    lens, layers = lens_to(model), down_projections(model)
    (text, *_), (kept, *_) = (halves.encoded(i, tokenizer) for i in (halves.forget, halves.retain))
    prompt, token = text.tokens[: text.answer_start], text.tokens[text.answer_start]
    control = kept.tokens[: kept.answer_start], kept.tokens[kept.answer_start]
    before = rank_of(model, lens, prompt, token), rank_of(model, lens, *control)
    assert before[0] < 5  # it knows
    limits = {**LIMITS, "margin": 40, "candidates": 48}
    edited = move_down(model, layers, lens, prompt, token, limits)
    assert edited
    assert rank_of(model, lens, prompt, token) >= 40
    assert rank_of(model, lens, *control) <= before[1] + 10


def test_the_edit_is_stored_sparsely_and_can_be_taken_back(knowing, files, tmp_path):
    options = {"targets": 1, "items": 1, "margin": 0.1}
    said = expunge.edit(
        "revs", str(knowing), tmp_path / "out", forget=files["forget"], options=options
    )
    assert said["beyond_margin_before"] == 0.0
    assert said["beyond_margin_after"] == 1.0
    kept = load_file(tmp_path / "out" / "undo" / "edit.safetensors")
    assert len(kept) == sum(map(len, said["columns"].values()))
    expunge.edit("revert", str(tmp_path / "out"), tmp_path / "back")
    start, back = (load_file(f / "model.safetensors") for f in (knowing, tmp_path / "back"))
    assert all(torch.equal(start[name], back[name]) for name in start)


def test_a_norm_that_is_not_rmsnorm_is_refused(tiny):
    tiny.model.norm = torch.nn.LayerNorm(32)
    with pytest.raises(EditError, match="last norm is RMSNorm"):
        lens_to(tiny)
    with pytest.raises(EditError, match="last norm is RMSNorm"):
        check_norms(tiny, Ranks())


def test_a_model_that_fits_is_told_by_its_outline(tiny_folder):
    made = outline(tiny_folder)
    check_norms(made, Ranks())
    assert made.model.norm.weight.is_meta
