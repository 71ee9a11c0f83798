"""What weights say: each number beside one worked by hand, or formed the long way."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from expunge.adapter_files import adapter_config, write_adapter
from expunge.analyse.angles import angles, norms, phases
from expunge.analyse.deltas import Dense, LowRank, ModelDeltas, dot, gram, layers_of
from expunge.analyse.signs import conflict_rows, sign_conflicts
from expunge.analyse.spectra import effective_rank, overlap, spectrum
from expunge.analyse.storage import storage
from expunge.analyse.weights import Changed, LookAtWeights, summary, weights_tables
from expunge.edit.task import Weights
from expunge.merge.adapters import merge_adapters
from expunge.merge.branches import read_branches
from expunge.merge.checkpoint import Checkpoint
from expunge.merge.operands import Operand, constant
from expunge.merge.section import Merge

LAYERS = {"model.layers.0.mlp.up_proj": (48, 32), "model.layers.1.self_attn.q_proj": (32, 32)}


def low_rank(seed: int, out: int = 6, wide: int = 5, rank: int = 2) -> LowRank:
    rng = torch.Generator().manual_seed(seed)
    draw = {"generator": rng, "dtype": torch.float64}
    return LowRank(torch.randn(rank, wide, **draw), torch.randn(out, rank, **draw))


def rank_one(row: list[float], column: list[float]) -> LowRank:
    """The outer product of a column and a row."""
    return LowRank(torch.tensor([row]).double(), torch.tensor(column).double()[:, None])


@pytest.fixture
def adapter(tiny_folder, tmp_path):
    """Write an adapter of two layers, drawn from `seed`, times `size`."""

    def write(seed: int, size: float = 0.1):
        rng = torch.Generator().manual_seed(seed)
        tensors = {}
        for layer, (out, wide) in LAYERS.items():
            name = f"base_model.model.{layer}.lora_"
            tensors[f"{name}A.weight"] = torch.randn(4, wide, generator=rng)
            tensors[f"{name}B.weight"] = size * torch.randn(out, 4, generator=rng)
        folder = tmp_path / f"adapter-{seed}-{size}"
        config = adapter_config(list(LAYERS), str(tiny_folder), rank=4, alpha=8)
        write_adapter(tensors, config, folder)
        return folder

    return write


@pytest.mark.parametrize("one", [low_rank(1), Dense(low_rank(1).matrix())])
@pytest.mark.parametrize("two", [low_rank(2), Dense(low_rank(2).matrix())])
def test_an_inner_product_of_factors_is_that_of_the_matrices(one, two):
    expected = float((one.matrix() * two.matrix()).sum())
    assert dot(one, two) == pytest.approx(expected, rel=1e-5)


def test_angles_and_norms_by_hand():
    # In layer 0 the deltas are 3 e and 4 f, orthogonal; in layer 1 both are the same 5 g.
    one, two = rank_one([3, 0], [1, 0]), rank_one([0, 4], [1, 0])
    same = rank_one([0, 5], [0, 1])
    grams = {
        "model.layers.0.mlp.up_proj": gram([one, two]),
        "model.layers.1.mlp.up_proj": gram([same, same]),
    }
    found = {
        (r["scope"], r["place"]): r["degrees"] for r in angles(grams, ["a", "b"], [("a", "b")])
    }
    assert found["block", "0"] == pytest.approx(90)
    assert found["block", "1"] == pytest.approx(0)
    whole = math.degrees(math.acos(25 / math.sqrt(34 * 41)))
    assert found["all", ""] == pytest.approx(whole)
    assert found["module", "up_proj"] == pytest.approx(whole)
    sizes = {(r["model"], r["scope"], r["place"]): r for r in norms(grams, ["a", "b"])}
    assert sizes["a", "all", ""]["norm"] == pytest.approx(math.sqrt(34))
    assert sizes["a", "block", "0"]["share"] == pytest.approx(9 / 34)
    assert sizes["b", "layer", "model.layers.0.mlp.up_proj"]["share"] == pytest.approx(16 / 41)


def test_a_model_that_did_not_move_has_no_angle():
    grams = {"layers.0.q_proj": gram([low_rank(1), None])}
    (row, *_) = angles(grams, ["a", "b"], [("a", "b")])
    assert row["cosine"] is row["degrees"] is None
    assert norms(grams, ["a", "b"])[1]["share"] is None


def test_phases_are_differences_of_snapshots():
    # First 1 to the right, then 2 up, then 3 back to the left.
    path = [rank_one([1, 0], [1]), rank_one([1, 2], [1]), rank_one([-2, 2], [1])]
    sizes, turns = phases({"layers.0.q_proj": gram(path)}, [10, 20, 30])
    whole = [row for row in sizes if row["scope"] == "all"]
    assert [row["norm"] for row in whole] == pytest.approx([1, 2, 3])
    assert [(row["from"], row["to"]) for row in whole] == [(0, 10), (10, 20), (20, 30)]
    between = {(r["from"], r["other_from"]): r["degrees"] for r in turns if r["scope"] == "all"}
    assert between == pytest.approx({(0, 10): 90, (0, 20): 180, (10, 20): 90})


def test_the_effective_rank_of_equal_values_is_their_number():
    assert effective_rank(torch.ones(5)) == pytest.approx(5)
    assert effective_rank(torch.tensor([3.0, 0, 0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0
    # p = 3/4, 1/4: exp(-(3/4 ln 3/4 + 1/4 ln 1/4)) = 4 / 3^(3/4)
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(4 / 3**0.75)


def test_a_spectrum_is_that_of_the_formed_matrix():
    delta = low_rank(3, out=9, wide=7, rank=4)
    found = spectrum(delta)
    expected = torch.linalg.svdvals(delta.b @ delta.a)[:4]
    assert found["singular_values"] == pytest.approx(expected.tolist())
    assert found["first_share"] == pytest.approx(float(expected[0] ** 2 / (expected**2).sum()))
    wide = low_rank(3, out=3, wide=7, rank=4)  # a rank above the dimension
    assert len(spectrum(wide)["singular_values"]) == 3


def test_overlap_is_one_of_the_same_space_and_none_of_an_orthogonal_one():
    one, other = rank_one([1, 0, 0], [1, 0, 0]), rank_one([0, 1, 0], [0, 0, 1])
    same, apart = overlap(one, one, 8), overlap(one, other, 8)
    assert (same["k"], same["columns"], same["rows"]) == (1, pytest.approx(1), pytest.approx(1))
    assert apart["columns"] == apart["rows"] == pytest.approx(0)
    half = rank_one([1, 1, 0], [1, 0, 0])  # its row lies at 45° to the first's
    assert overlap(one, half, 1)["rows"] == pytest.approx(0.5)
    assert apart["chance_columns"] == pytest.approx(1 / 3)


def operand(*rows: list[float]) -> Operand:
    parts = [constant(np.array([row], np.float32)) for row in rows]
    return Operand("layer", (1, len(rows[0])), None, parts)


def counted(config: Merge, *rows: list[float]) -> list[int]:
    settings = config.settings("layer", config.weights or (1.0,) * len(rows))
    return sign_conflicts(operand(*rows), config.row.how, settings).tolist()


def test_sign_conflicts_by_hand():
    rows = [3.0, -1.0, 0.1, 2.0], [-2.0, 4.0, 5.0, -0.1]
    whole = Merge(method="ties", density=1.0, space="delta")
    # Entries 0, 1 and 3 differ in sign; the greater magnitude has the sum on its side.
    assert counted(whole, *rows) == [4, 3, 2, 1]
    # The half that is kept is 3, ., ., 2 and ., 4, 5, .: none is kept by both.
    assert counted(whole.model_copy(update={"density": 0.5}), *rows) == [0, 0, 0, 0]
    weighted = Merge(method="ties", density=1.0, space="delta", vote="weighted", weights=(1, 10))
    assert counted(weighted, *rows) == [4, 3, 1, 2]


def test_conflicts_of_a_merge_of_factors_are_told_of_factors_and_of_deltas(adapter):
    branches = read_branches([adapter(1), adapter(2)])
    config = Merge(method="ties", density=0.8, space="factors")
    rows = conflict_rows(branches, ["strong", "weak"], config, list(LAYERS)[:1])
    assert [row["space"] for row in rows] == ["factors", "delta"]
    assert [row["entries"] for row in rows] == [4 * (48 + 32), 48 * 32]
    for row in rows:
        assert 0.3 < row["conflict"] < 0.7  # drawn apart: half of the signs differ
        assert sum(row["won"].values()) == pytest.approx(1)  # of two, one wins


def test_storage_by_hand(tmp_path, tiny_folder):
    # bfloat16 has 8 bits of precision: next to 1.0 a step is 1/128, and half of it rounds to even.
    layer, weight = "model.layers.0.mlp.up_proj", torch.ones(1, 4, dtype=torch.bfloat16)
    (tmp_path / "config.json").write_text((tiny_folder / "config.json").read_text())
    save_file({f"{layer}.weight": weight}, tmp_path / "model.safetensors")
    delta = rank_one([1 / 128, 1 / 512, 1 / 64, 0], [1])
    found = storage(delta, layer, Checkpoint(tmp_path))
    assert (found["dtype"], found["stored"]) == ("bf16", pytest.approx(2 / 3))
    assert storage(delta, "model.layers.9.mlp.up_proj", Checkpoint(tmp_path)) is None


def test_the_tables_of_two_branches_their_merge_and_a_model(adapter, tiny_folder, tmp_path):
    branches = {"strong": adapter(1), "weak": adapter(2)}
    config = Merge(method="linear", space="delta", weights=(1, 1))
    merge_adapters(list(branches.values()), config, tmp_path / "sum", base=tiny_folder)
    whole = Merge(method="linear", space="delta", output="model")
    merge_adapters(list(branches.values()), whole, tmp_path / "whole", base=tiny_folder)
    run = Changed(
        tiny_folder,
        {name: Weights(tiny_folder, folder) for name, folder in branches.items()},
        {
            "sum": Weights(tiny_folder, tmp_path / "sum"),
            "whole": Weights(tmp_path / "whole"),
        },
        {"sum": ["strong", "weak"], "whole": ["strong", "weak"]},
        {"sum": config, "whole": whole},
        {"strong": {5: adapter(3), 9: branches["strong"]}},
    )
    tables = weights_tables(run, LookAtWeights(directions=2))
    norm = summary(tables)["norm"]
    assert norm["sum"] == pytest.approx(norm["whole"], rel=1e-3)  # the same, as factors and whole
    cosine = {(r["one"], r["two"]): r["cosine"] for r in tables["angles"] if r["scope"] == "all"}
    square = norm["strong"] ** 2 + norm["weak"] ** 2
    square += 2 * cosine["strong", "weak"] * norm["strong"] * norm["weak"]
    assert norm["sum"] == pytest.approx(math.sqrt(square), rel=1e-6)
    assert cosine["strong", "sum"] > 0.5 > abs(cosine["strong", "weak"])
    assert {row["merge"] for row in tables["signs"]} == {"sum", "whole"}
    assert {row["model"] for row in tables["storage"]} == {"strong", "weak", "sum"}
    assert len(tables["overlap"]) == len(LAYERS) * 3
    assert {(r["branch"], r["from"], r["to"]) for r in tables["phases"]} == {
        ("strong", 0, 5),
        ("strong", 5, 9),
    }
    shares = [r["share"] for r in tables["norms"] if (r["model"], r["scope"]) == ("weak", "module")]
    assert sum(shares) == pytest.approx(1)
    json.dumps(tables, allow_nan=False)


def test_a_model_differs_from_its_base_where_it_was_changed(tiny_folder, tmp_path):
    tensors = load_file(tiny_folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name] + 2
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((tiny_folder / "config.json").read_text())
    found = ModelDeltas(tmp_path, tiny_folder)
    moved = {layer for layer in found if dot(found[layer], found[layer]) > 0}
    assert moved == {name.removesuffix(".weight")}
    changed = found[name.removesuffix(".weight")]
    assert dot(changed, changed) == pytest.approx(4 * 32 * 48, rel=1e-4)


def test_layers_come_block_by_block_and_what_lies_outside_last():
    names = ["model.embed_tokens", "model.layers.10.mlp.up_proj", "model.layers.2.mlp.up_proj"]
    assert layers_of([dict.fromkeys(names)]) == [names[2], names[1], names[0]]
