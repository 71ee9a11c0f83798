"""SAGE: the closed form, what it keeps, and what it buys back of a merged adapter."""

import pytest
import torch
from safetensors.torch import load_file

import expunge
from expunge.adapter_files import WEIGHTS
from expunge.edit.observe import sketches
from expunge.edit.repair import Sketch, Space, condensed, response, sage
from expunge.merge.adapters import merge_adapters
from expunge.merge.section import Merge
from expunge.merge.statistics import gram


def space_of(inputs, rank=64):
    sketch = Sketch(rank)
    for rows in inputs.split(7):
        sketch.add(rows)
    return sketch


def rng():
    return torch.Generator().manual_seed(0)


def test_a_two_by_two_case_by_hand():
    """C = diag(3, 0): the first column is divided by 1 + 2 · 3, the second stays."""
    space = Space(torch.tensor([[1.0, 0.0]]), torch.tensor([3.0]), mean=1.5)
    found = sage(torch.tensor([[7.0, 5.0]]), space, strength=2.0, relative=False)
    torch.testing.assert_close(found, torch.tensor([[1.0, 5.0]]))
    found = sage(torch.tensor([[7.0, 5.0]]), space, strength=0.5, relative=True)  # 3 / 1.5 · 0.5
    torch.testing.assert_close(found, torch.tensor([[3.5, 5.0]]))


def test_it_is_the_numerical_minimiser():
    x = torch.randn(50, 6, generator=rng())
    update = torch.randn(4, 6, generator=rng())
    found = sage(update, space_of(x).space, strength=0.7, relative=False).double()
    moment = (x.T @ x).double() / len(x)
    guess = update.double().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [guess], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        value = (guess - update).square().sum() + 0.7 * (guess @ moment @ guess.T).trace()
        value.backward()
        return value

    optimizer.step(loss)
    torch.testing.assert_close(found, guess.detach(), atol=1e-4, rtol=1e-4)
    inverse = update.double() @ torch.linalg.inv(torch.eye(6) + 0.7 * moment)
    torch.testing.assert_close(found, inverse, atol=1e-5, rtol=1e-5)


def test_without_strength_it_changes_nothing():
    x, update = torch.randn(9, 6, generator=rng()), torch.randn(4, 6, generator=rng())
    assert torch.equal(sage(update, space_of(x).space, strength=0.0, relative=True), update)


def test_outputs_on_retain_inputs_change_less_the_greater_the_strength():
    x = torch.randn(50, 6, generator=rng()) * torch.tensor([5.0, 3, 1, 0.5, 0.1, 0.0])
    update = torch.randn(4, 6, generator=rng())
    sketch = space_of(x)
    changes, kept = [], []
    for strength in (0.0, 0.1, 1.0, 10.0, 1000.0):
        found = sage(update, sketch.space, strength=strength, relative=True)
        changes.append(response(found, sketch))
        kept.append(float(found[:, 5].norm()))
    assert changes == sorted(changes, reverse=True)
    assert changes[-1] < 1e-3 * changes[0]
    assert kept == pytest.approx([kept[0]] * 5)  # where the retain set never goes, all stays
    assert response(update, sketch) == pytest.approx(float((x @ update.T).square().sum()) / 50)


def test_on_the_low_rank_factor_it_is_what_it_is_on_the_product():
    a, b = torch.randn(2, 6, generator=rng()), torch.randn(4, 2, generator=rng())
    space = space_of(torch.randn(30, 6, generator=rng())).space
    options = {"strength": 0.7, "relative": True}
    torch.testing.assert_close(b @ sage(a, space, **options), sage(b @ a, space, **options))


def test_a_sketch_keeps_the_leading_directions():
    x = torch.randn(200, 8, generator=rng()) * torch.tensor([9.0, 6, 3, 0.1, 0.1, 0.1, 0.1, 0.1])
    exact, cut = space_of(x, 64).space, space_of(x, 3).space
    torch.testing.assert_close(
        exact.directions.T @ torch.diag(exact.values) @ exact.directions, x.T @ x / 200
    )
    torch.testing.assert_close(cut.values[:3], exact.values[:3], rtol=1e-2, atol=0)
    assert len(cut.values) == 3
    assert cut.mean == pytest.approx(exact.mean)
    wide = torch.randn(120, 90, generator=rng()) * 0.8 ** torch.arange(90)
    rows = condensed(wide, 20)  # by a random subspace: as good as the best 20 rows
    best = torch.linalg.svdvals(wide)
    assert rows.shape[0] < 40
    left = torch.linalg.matrix_norm(wide.T @ wide - rows.T @ rows, 2)
    assert float(left) < 1.2 * float(best[20]) ** 2


def test_sketches_are_the_second_moments_of_real_inputs(tiny, tokenizer, halves):
    texts = halves.encoded(halves.retain, tokenizer)
    grams = gram(tiny, texts)
    names = [name.removesuffix(".weight") for name in grams]
    found = sketches(tiny, texts, names, 10_000)
    for name in names:
        rows = found[name].rows
        torch.testing.assert_close(
            rows.T @ rows / found[name].tokens, grams[f"{name}.weight"], atol=1e-5, rtol=1e-4
        )
    assert len({id(sketch) for sketch in found.values()}) == 2 * 4  # q k v share, gate and up too


def test_a_merged_adapter_loses_less_of_the_retain_set_and_still_forgets(
    knowing, learnt, halves, files, tmp_path
):
    """Merge, negate, repair: forget stays forgotten, retain comes nearer to where it was."""
    merge_adapters(
        [learnt, learnt],
        Merge(method="linear", weights=(0.5, 0.5)),
        tmp_path / "merged",
        base=knowing,
    )
    negated = tmp_path / "negated"
    expunge.edit(
        "negate", str(knowing), negated, adapter=tmp_path / "merged", options={"scale": 1.5}
    )
    said = expunge.edit(
        "sage",
        str(knowing),
        tmp_path / "out",
        adapter=negated,
        retain=files["retain"],
    )
    assert said["retain_change_kept"] < 0.9
    assert said["norm_kept"] > said["retain_change_kept"]
    before, after = load_file(negated / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    for key, tensor in before.items():
        assert after[key].shape == tensor.shape  # the rank is kept
        assert torch.equal(after[key], tensor) == ("lora_B" in key)
    known = {half: halves.nll(knowing, getattr(halves, half)) for half in ("forget", "retain")}
    assert halves.nll(knowing, halves.forget, tmp_path / "out") > 1.2 * known["forget"]
    lost = [
        abs(halves.nll(knowing, halves.retain, adapter) - known["retain"])
        for adapter in (negated, tmp_path / "out")
    ]
    assert lost[1] < lost[0]


def test_a_whole_model_is_repaired_as_its_adapter_is(tiny, tiny_folder, drawn, tmp_path, files):
    """The same update as an adapter and as a model, repaired both ways, is the same model."""
    adapter = drawn(1)
    merge = Merge(method="linear", space="delta", output="model")
    merge_adapters([adapter], merge, tmp_path / "model", base=tiny_folder)
    told = {"retain": files["retain"], "options": {"strength": 3.0}}
    one = expunge.edit("sage", str(tiny_folder), tmp_path / "a", adapter=adapter, **told)
    two = expunge.edit(
        "sage", str(tmp_path / "model"), tmp_path / "m", base=str(tiny_folder), **told
    )
    assert two["retain_change_kept"] == pytest.approx(one["retain_change_kept"], rel=1e-3)
    merge_adapters([tmp_path / "a"], merge, tmp_path / "b", base=tiny_folder)
    left, right = (load_file(tmp_path / name / "model.safetensors") for name in ("b", "m"))
    for name, tensor in left.items():
        torch.testing.assert_close(right[name], tensor, atol=1e-5, rtol=1e-4)
    assert two["storage_survival"] > 0.9
