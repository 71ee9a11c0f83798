"""Arithmetic of updates: laws of the table, adapters and whole models alike, and forgetting."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import expunge
from expunge.adapter_files import CONFIG, WEIGHTS
from expunge.edit import arithmetic
from expunge.edit.methods import EDITS
from expunge.errors import EditError, MergeError, ModelError, RecipeError
from expunge.merge.branches import read_branches
from expunge.merge.methods import METHODS
from expunge.merge.operands import Operand, constant
from expunge.merge.tensor import merged_float32
from expunge.merge.trim import Settings
from expunge.models import load_tokenizer

# peft reads a name that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
NEGATIONS = [n for n, row in EDITS.items() if row.fn is arithmetic.negate]


def deltas(folder):
    (branch,) = read_branches([folder])
    return {layer: branch.delta(layer) for layer in branch.factors}


def tensors(folder):
    return load_file(folder / "model.safetensors")


def test_negating_what_was_learnt_forgets_it_and_keeps_a_control(knowing, learnt, halves, tmp_path):
    forget, retain = (halves.nll(knowing, items) for items in (halves.forget, halves.retain))
    assert halves.nll(knowing, halves.forget, learnt) < forget  # it has learnt
    expunge.edit("negate", str(knowing), tmp_path / "out", adapter=learnt)
    forgotten = halves.nll(knowing, halves.forget, tmp_path / "out") - forget
    assert forgotten > 0.5 * forget
    assert abs(halves.nll(knowing, halves.retain, tmp_path / "out") - retain) < forgotten / 4


@pytest.mark.parametrize("method", NEGATIONS)
def test_negated_twice_is_the_start_bit_for_bit(method, drawn, tiny_folder, tmp_path):
    adapter = drawn(1)
    for name, start in (("once", adapter), ("twice", tmp_path / "once")):
        expunge.edit(method, str(tiny_folder), tmp_path / name, adapter=start)
    once, twice = (load_file(tmp_path / n / WEIGHTS) for n in ("once", "twice"))
    for key, tensor in load_file(adapter / WEIGHTS).items():
        assert torch.equal(twice[key], tensor)
        assert torch.equal(once[key], -tensor if "lora_A" in key else tensor)


def test_negating_both_factors_would_change_nothing():
    a, b = torch.randn(2, 5), torch.randn(3, 2)
    assert torch.equal((-b) @ (-a), b @ a)
    a2, b2 = arithmetic.scaled((a, b), -0.7)
    torch.testing.assert_close(b2 @ a2, -0.7 * (b @ a))


def test_aliases_are_negation(drawn, tiny_folder, tmp_path):
    adapter = drawn(1)
    for method in NEGATIONS:
        expunge.edit(method, str(tiny_folder), tmp_path / method, adapter=adapter)
    first, *others = (load_file(tmp_path / method / WEIGHTS) for method in NEGATIONS)
    assert len(others) == 2
    for other in others:
        assert all(torch.equal(first[key], other[key]) for key in first)


def test_a_whole_model_is_negated_as_its_task_vector(tuned, tiny_folder, tmp_path):
    model = tuned(1)
    options = {"scale": 0.5}
    said = expunge.edit(
        "negate", str(model), tmp_path / "out", base=str(tiny_folder), options=options
    )
    base, ft, out = tensors(tiny_folder), tensors(model), tensors(tmp_path / "out")
    for name in base:
        torch.testing.assert_close(out[name], base[name] - 0.5 * (ft[name] - base[name]))
    assert said["storage_survival"] > 0.99
    square = sum(float((0.5 * (ft[name] - base[name])).square().sum()) for name in base)
    assert said["norm"] == pytest.approx(square**0.5, rel=1e-4)
    assert json.loads((tmp_path / "out" / "edit.json").read_text())["options"] == options


def test_a_sum_is_exact_for_adapters_and_for_models(drawn, tuned, tiny_folder, tmp_path):
    one, two = drawn(1), drawn(2, rank=2, alpha=3.0)
    options = {"weights": [0.5, -2.0]}
    expunge.edit(
        "add", str(tiny_folder), tmp_path / "a", adapter=one, others=[str(two)], options=options
    )
    found, first, second = deltas(tmp_path / "a"), deltas(one), deltas(two)
    for layer in first:
        torch.testing.assert_close(found[layer], 0.5 * first[layer] - 2 * second[layer])
    models = [tuned(1), tuned(2)]
    expunge.edit(
        "add",
        str(models[0]),
        tmp_path / "m",
        base=str(tiny_folder),
        others=[str(models[1])],
        options=options,
    )
    base, parts, out = tensors(tiny_folder), [tensors(m) for m in models], tensors(tmp_path / "m")
    for name in base:
        wanted = (
            base[name] + 0.5 * (parts[0][name] - base[name]) - 2 * (parts[1][name] - base[name])
        )
        torch.testing.assert_close(out[name], wanted, atol=1e-6, rtol=1e-5)


def test_averaging_factors_apart_leaves_cross_terms(drawn, tiny_folder, tmp_path):
    one, two = drawn(1), drawn(2)
    expunge.edit("pem_add", str(tiny_folder), tmp_path / "out", adapter=one, others=[str(two)])
    (x, y), found = read_branches([one, two]), deltas(tmp_path / "out")
    for layer in x.factors:
        (a1, b1), (a2, b2) = x.factors[layer], y.factors[layer]
        wanted = 2 * (b1 + b2) / 2 @ ((a1 + a2) / 2)  # 2 = scale
        torch.testing.assert_close(found[layer], wanted)
        assert not torch.allclose(found[layer], (x.delta(layer) + y.delta(layer)) / 2)


def test_an_analogy_of_equal_terms_is_the_first_model(drawn, tiny_folder, tmp_path):
    one, two, three = drawn(1), drawn(2), drawn(3)
    for name, pair in (("same", (two, two)), ("other", (two, three))):
        others = [str(path) for path in pair]
        expunge.edit("analogy", str(tiny_folder), tmp_path / name, adapter=one, others=others)
    same, other, first = (deltas(f) for f in (tmp_path / "same", tmp_path / "other", one))
    second, third = deltas(two), deltas(three)
    for layer in first:
        torch.testing.assert_close(same[layer], first[layer], atol=1e-5, rtol=1e-4)
        wanted = first[layer] + second[layer] - third[layer]
        torch.testing.assert_close(other[layer], wanted, atol=1e-5, rtol=1e-4)


def ia3(tiny_folder, folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    config = peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    )
    model = peft.get_peft_model(model, config)
    rng = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "ia3_l" in name:
            parameter.data = 1 + 0.3 * torch.randn(parameter.shape, generator=rng)
    model.save_pretrained(folder)
    return folder


def test_ia3_negation_as_peft_reads_it(tiny_folder, tmp_path):
    adapter = ia3(tiny_folder, tmp_path / "ia3")
    expunge.edit(
        "ia3_negate", str(tiny_folder), tmp_path / "out", adapter=adapter, options={"scale": 0.7}
    )
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    start = dict(base.state_dict())
    start = {name: tensor.clone() for name, tensor in start.items()}
    loaded = [
        peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), folder)
        .merge_and_unload()
        .state_dict()
        for folder in (adapter, tmp_path / "out")
    ]
    moved = 0
    for name, tensor in start.items():
        learnt, negated = (model[name] for model in loaded)
        torch.testing.assert_close(negated, tensor - 0.7 * (learnt - tensor), atol=1e-6, rtol=1e-5)
        moved += not torch.equal(learnt, tensor)
    assert moved == 6
    assert torch.equal(arithmetic.ia3_negate(torch.ones(3), scale=5.0), torch.ones(3))


@pytest.mark.parametrize("harm", ["pickle", "nan", "kind", "key", "torn"])
def test_a_hostile_ia3_folder_is_refused(harm, tiny_folder, tmp_path):
    folder = ia3(tiny_folder, tmp_path / "ia3")
    held = {k: v.clone() for k, v in load_file(folder / WEIGHTS).items()}
    if harm == "pickle":
        (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    elif harm == "nan":
        next(iter(held.values()))[0] = float("nan")
        save_file(held, folder / WEIGHTS)
    elif harm == "kind":
        fields = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**fields, "peft_type": "LORA"}))
    elif harm == "key":
        save_file({**held, "base_model.model.lm_head.weight": torch.ones(2)}, folder / WEIGHTS)
    else:
        raw = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(raw[:-4])
    with pytest.raises(ModelError):
        expunge.edit("ia3_negate", str(tiny_folder), tmp_path / "out", adapter=folder)
    assert not (tmp_path / "out").exists()


def test_eul_fusion_is_the_least_squares_map():
    rng = torch.Generator().manual_seed(0)
    inputs = [torch.randn(40, 6, generator=rng) for _ in range(2)]
    maps = [torch.randn(4, 6, generator=rng) for _ in range(2)]
    operand = Operand("w", (4, 6), None, [constant(w.numpy()) for w in maps])
    settings = Settings("w", (1.0, 1.0), METHODS["eul_fusion"].options, 0)
    grams = [x.T @ x for x in inputs]
    found = merged_float32(operand, METHODS["eul_fusion"], settings, statistics=grams)
    stacked = torch.cat(inputs)
    wanted = torch.linalg.lstsq(
        stacked, torch.cat([x @ w.T for x, w in zip(inputs, maps, strict=True)])
    ).solution.T
    torch.testing.assert_close(torch.from_numpy(found), wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"method": "negat"}, "Did you mean 'negate'"),
        ({"method": "negate"}, "give --base"),
        ({"method": "sku"}, "give --adapter"),
        ({"method": "ia3_negate"}, "give --adapter"),
        ({"method": "negate", "options": {"sacle": 2}}, "unknown field sacle"),
        ({"method": "analogy"}, "takes 2 models in others; 0 are given"),
        ({"method": "prune"}, "needs a forget set: give --forget FILE"),
        ({"method": "sage"}, "give --base"),
        ({"method": "revert"}, "only edits of columns can be taken back"),
        ({"method": "ablate", "options": {"layer": 1}}, "give layer and column"),
        (
            {"method": "ablate", "options": {"layer": 9, "column": 0}},
            "there is no block 9; the model has 2",
        ),
        ({"method": "needle"}, "needs a forget set"),
    ],
)
def test_what_cannot_be_is_one_sentence(words, message, tiny_folder, tmp_path):
    with pytest.raises((EditError, RecipeError, MergeError), match=message):
        expunge.edit(**words, model=str(tiny_folder), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["negate", "pem_add", "sage"])
def test_an_adapter_of_another_model_is_refused_before_any_work(
    method, drawn, tiny_folder, files, tmp_path
):
    config = json.loads((tiny_folder / "config.json").read_text())
    config |= {"hidden_size": 64, "intermediate_size": 96}
    wide = AutoModelForCausalLM.from_config(LlamaConfig(**config))
    wide.save_pretrained(tmp_path / "wide")
    load_tokenizer(tiny_folder).save_pretrained(tmp_path / "wide")
    more = {"retain": files["retain"]} if method == "sage" else {}
    more |= {"others": [str(drawn(2))]} if method == "pem_add" else {}
    given = {"adapter": drawn(1), "out": tmp_path / "out", **more}
    with pytest.raises(ModelError, match=r"has model\.layers\.0\S* as \(.* but .*wide as \("):
        expunge.edit(method, str(tmp_path / "wide"), **given)
    assert not (tmp_path / "out").exists()
    expunge.edit(method, str(tiny_folder), **given)  # control: on its own model
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_folder_in_use_is_not_written_over(drawn, tiny_folder, tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(EditError, match="not empty"):
        expunge.edit("negate", str(tiny_folder), tmp_path, adapter=drawn(1))
