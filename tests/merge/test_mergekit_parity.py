"""Merge files give what the installed mergekit makes of them, method by method."""

import re
import warnings
from importlib import resources

import jinja2
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers.utils.chat_template_utils import render_jinja_template

from expunge.merge.chat_templates import template_of
from expunge.merge.families import Elect
from expunge.merge.methods import METHODS
from expunge.merge.plain import uniform
from expunge.merge.run import merge_models
from expunge.merge.trim import Settings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from mergekit import sparsify as mergekit_sparsify
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.merge_methods import generalized_task_arithmetic
    from mergekit.options import MergeOptions

pytestmark = pytest.mark.filterwarnings("ignore")

GIVEN = {
    "linear": {},
    "slerp": {"t": 0.3},
    "nuslerp": {},
    "multislerp": {},
    "karcher": {},
    "task_arithmetic": {"lambda": 0.7},
    "ties": {"density": 0.5},
    "dare_linear": {"density": 0.4},
    "dare_ties": {"density": 0.4},
    "della": {"density": 0.5, "epsilon": 0.2},
    "della_linear": {"density": 0.5, "epsilon": 0.2},
    "breadcrumbs": {"density": 0.5, "gamma": 0.1},
    "breadcrumbs_ties": {"density": 0.5, "gamma": 0.1},
    "sce": {"select_topk": 0.4},
    "ram": {"epsilon": 0.005},
    "ramplus_tl": {"epsilon": 0.005},
    "model_stock": {},
    "nearswap": {"t": 0.005},
    "arcee_fusion": {},
    "passthrough": {"scale": 0.5},
}
ALONE = ("slerp", "nearswap", "arcee_fusion")
"""Methods of one model beside the base."""


def mergekit(fields, out):
    config = MergeConfiguration.model_validate(fields)
    run_merge(config, str(out), MergeOptions(quiet=True, random_seed=0, write_model_card=False))
    return load_rest(out)


def load_rest(out):
    found = {}
    for path in out.glob("*.safetensors"):
        found |= load_file(path)
    return found


def ours(fields, out):
    merge_models(write(fields, out), out)
    return load_rest(out)


def write(fields, out):
    path = out.with_name(f"{out.name}.yaml")
    path.write_text(yaml.safe_dump(fields))
    return path


def described(name, tuned, weights=(0.6, 1.3), **parameters):
    base, *models = map(str, tuned)
    if name in ALONE:
        models = models[:1]
    if name == "passthrough":
        return {
            "merge_method": name,
            "models": [{"model": models[0], "parameters": parameters}],
            "dtype": "float32",
        }
    given = [
        {"model": model, "parameters": {"weight": weight}}
        for model, weight in zip(models, weights, strict=False)
    ]
    baseless = ("linear", "karcher")
    return {
        "merge_method": name,
        "models": given,
        **({} if name in baseless else {"base_model": base}),
        "parameters": parameters,
        "dtype": "float32",
    }


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.fixture
def same_draws(monkeypatch, tuned):
    """Let mergekit drop the entries that we drop."""
    base, *models = [load_rest(folder) for folder in tuned]
    deltas = [
        (name, number, model[name] - base[name])
        for name in base
        for number, model in enumerate(models)
    ]
    plain = generalized_task_arithmetic.sparsify

    def sparsify(delta, **options):
        name, number = next((n, i) for n, i, d in deltas if torch.equal(d, delta))
        key = Settings(name, (), seed=42).key(number)

        def draw(chances):
            drawn = uniform(key, 0, chances.numel()).cpu().view_as(chances)
            return (drawn < chances).to(chances)

        with monkeypatch.context() as patch:
            patch.setattr(mergekit_sparsify.torch, "bernoulli", draw)
            return plain(delta, **options)

    monkeypatch.setattr(generalized_task_arithmetic, "sparsify", sparsify)


@pytest.mark.parametrize("name", GIVEN)
def test_a_merge_file_gives_what_mergekit_makes_of_it(name, tuned, tmp_path, same_draws):
    fields = described(name, tuned, **GIVEN[name])
    theirs, own = mergekit(fields, tmp_path / "theirs"), ours(fields, tmp_path / "ours")
    assert_same(own, theirs)
    base = load_rest(tuned[0])
    moved = sum(float((own[n] - base[n]).abs().sum()) for n in base)
    assert moved > 1.0  # control


@pytest.mark.parametrize(
    "parameters",
    [
        {"density": 0.5, "normalize": False},
        {"density": 0.5, "rescale": True},
        {"density": [0.2, 0.9], "weight": 1.0},
        {"density": [{"filter": "mlp", "value": 0.3}, {"value": 0.8}], "lambda": 0.5},
        {"density": 0.5, "int8_mask": True},
    ],
)
def test_parameters_gradients_and_filters_are_read_as_mergekit_reads_them(
    tuned, tmp_path, parameters
):
    fields = described("ties", tuned, **parameters)
    assert_same(ours(fields, tmp_path / "ours"), mergekit(fields, tmp_path / "theirs"))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("nuslerp", {"nuslerp_flatten": False}),
        ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
        ("model_stock", {"filter_wise": True}),
        ("linear", {"normalize": False}),
        ("multislerp", {"normalize_weights": False}),
    ],
)
def test_other_ways_of_a_method_are_mergekits(tuned, tmp_path, name, parameters):
    fields = described(name, tuned, **parameters)
    assert_same(ours(fields, tmp_path / "ours"), mergekit(fields, tmp_path / "theirs"))


def test_methods_that_take_no_base_take_one_where_mergekit_does(tuned, tmp_path):
    for name in ("nuslerp", "multislerp"):
        fields = described(name, tuned)
        del fields["base_model"]
        one, two = tmp_path / f"{name}-ours", tmp_path / f"{name}-theirs"
        assert_same(ours(fields, one), mergekit(fields, two))


def test_slices_are_stacked_as_mergekit_stacks_them(tuned, tmp_path):
    _, one, two = map(str, tuned)
    fields = {
        "merge_method": "slerp",
        "base_model": one,
        "slices": [
            {
                "sources": [
                    {"model": one, "layer_range": [0, 2]},
                    {"model": two, "layer_range": [0, 2]},
                ]
            },
            {
                "sources": [
                    {"model": one, "layer_range": [1, 2]},
                    {"model": two, "layer_range": [0, 1]},
                ]
            },
        ],
        "parameters": {"t": [{"filter": "self_attn", "value": [0, 0.9]}, {"value": 0.4}]},
        "dtype": "float32",
    }
    own, theirs = ours(fields, tmp_path / "ours"), mergekit(fields, tmp_path / "theirs")
    assert "model.layers.2.mlp.up_proj.weight" in own
    assert_same(own, theirs)
    config = yaml.safe_load((tmp_path / "ours" / "config.json").read_text())
    assert config["num_hidden_layers"] == 3


@pytest.mark.parametrize("name", ["linear", "karcher"])
@pytest.mark.parametrize("sliced", [False, True])
def test_a_base_that_is_no_model_joins_whole_models_and_no_slices(tuned, tmp_path, name, sliced):
    base, *models = map(str, tuned)
    given = [{"model": model} for model in models]
    layers = [{"sources": [{**model, "layer_range": [0, 2]} for model in given]}]
    fields = {
        "merge_method": name,
        "base_model": base,
        "parameters": {"weight": 1.0} if name == "linear" else {},
        "dtype": "float32",
        **({"slices": layers} if sliced else {"models": given}),
    }
    assert_same(ours(fields, tmp_path / "ours"), mergekit(fields, tmp_path / "theirs"))


def test_half_precision_output_is_the_float32_merge_rounded(tuned, tmp_path):
    fields = described("ties", tuned, density=0.5)
    exact = ours(fields, tmp_path / "exact")
    for dtype in ("bfloat16", "float16"):
        stored = ours({**fields, "out_dtype": dtype}, tmp_path / dtype)
        for name, tensor in exact.items():
            assert torch.equal(stored[name], tensor.to(getattr(torch, dtype)))
        theirs = mergekit({**fields, "out_dtype": dtype}, tmp_path / f"{dtype}-theirs")
        for name, tensor in theirs.items():
            torch.testing.assert_close(stored[name], tensor, rtol=0.01, atol=1e-4)


def test_a_negative_weight_subtracts_where_mergekit_undoes_it(tuned, tmp_path):
    base, one, _ = tuned
    fields = described("ties", tuned[:2], weights=(-1.0,), density=1.0)
    start, model = load_rest(base), load_rest(one)
    own, theirs = ours(fields, tmp_path / "ours"), mergekit(fields, tmp_path / "theirs")
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(own[name], 2 * start[name] - model[name])
    torch.testing.assert_close(theirs[name], model[name])


def test_rows_that_name_the_comparison_are_compared():
    named = {name for name, method in METHODS.items() if method.test.endswith("makes_of_it")}
    assert named == set(GIVEN)


def test_every_method_of_mergekit_is_here():
    from mergekit.merge_methods.registry import registered_methods

    theirs = {method.spec.name for method in registered_methods()}
    assert theirs <= METHODS.keys()
    assert theirs == set(GIVEN)
    assert all(isinstance(METHODS[n].how, Elect) for n in theirs if "ties" in n or "dare" in n)


@pytest.mark.parametrize("name", ["chatml", "exaone", "llama3", "mistral"])
@pytest.mark.parametrize("system", [True, False])
def test_chat_templates_lay_out_what_mergekits_do(name, system):
    """But for line breaks and indents of its files, which mergekit's `exaone` and `llama3` lay
    between turns. (Its `alpaca` puts none between a question and what asks for its answer.)"""
    told = [{"role": "system", "content": "Be brief."}] if system else []
    said = ("user", "hi"), ("assistant", "yes"), ("user", "and?")
    told += [{"role": role, "content": text} for role, text in said]
    theirs = resources.files("mergekit").joinpath(f"_data/chat_templates/{name}.jinja").read_text()
    if name in ("exaone", "llama3"):
        theirs = re.sub(r"\n\s*", "", theirs)
    words = {
        "add_generation_prompt": True,
        "bos_token": "<s>",
        "eos_token": "" if name == "alpaca" else "</s>",
    }
    made = [
        render_jinja_template([told], chat_template=template, **words)[0][0]
        for template in (theirs, template_of(name))
    ]
    assert made[0] == made[1]
    assert made[1].count("hi") == 1


def test_mistrals_template_refuses_turns_that_do_not_alternate():
    twice = [{"role": "user", "content": "hi"}] * 2
    with pytest.raises(jinja2.TemplateError, match="in alternation"):
        render_jinja_template([twice], chat_template=template_of("mistral"), bos_token="<s>")
