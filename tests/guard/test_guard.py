"""Guards as folders, in recipes and on the command line."""

import copy
import json
from dataclasses import replace

import pytest
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

import expunge
from expunge import lora
from expunge.cli import app
from expunge.errors import ExpungeError, ModelError, RecipeError
from expunge.evaluate.reader import open_reader, reader_of
from expunge.guard.files import guard_of_files
from expunge.guard.guard import open_guard
from expunge.guard.helpers import HelperSource
from expunge.guard.made import FILE, Made, read_guard
from expunge.guard.make import make_guard
from expunge.guard.methods import GUARDS
from expunge.guard.section import AnyContrast, Uld
from expunge.lora import Lora
from expunge.models import load_model
from expunge.recipe import load_recipe
from expunge.runner import cells_of

from .conftest import FORGET, RETAIN, tokens

OPTIONS = {
    "prefix": ["text=Say nothing."],
    "input_filter": ["match.by=both"],
    "output_filter": ["ngram=2"],
    "icul": ["items=1", "correct=1"],
    "eco": ["strength=1.0"],
}
TEXTS = [FORGET[0].prompt, "Where was Mary Stone born?"]


@pytest.fixture
def adapter(tiny, tmp_path):
    """An adapter that changes what the model says."""
    lora.add_adapter(tiny, Lora(rank=2, alpha=40, dropout=0), seed=1)
    for layer in lora.adapters_of(tiny).values():
        layer.lora_B.detach().normal_(generator=None)
    lora.save_adapter(tiny, Lora(rank=2, alpha=40), tmp_path / "adapter", base="")
    return tmp_path / "adapter"


@pytest.fixture
def sets(tmp_path):
    paths = {}
    for name, examples in (("forget", FORGET), ("retain", RETAIN)):
        rows = [
            {"id": e.id, "input": e.prompt, "output": e.answer, "task": e.task} for e in examples
        ]
        paths[name] = tmp_path / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


def options_of(kind, adapter):
    helpers = {
        "uld": ["assistant={}", "blocks=2"],
        "offset": ["new={}", "old={}"],
        "whp": ["reinforced={}"],
        "contrast": ["weights={{{}: -0.5}}"],
    }
    return OPTIONS.get(kind) or [text.format(adapter) for text in helpers[kind]]


@pytest.mark.parametrize("kind", GUARDS)
def test_a_guard_written_and_loaded_again_gives_the_same(
    kind, tiny_folder, tokenizer, adapter, sets, tmp_path
):
    out = tmp_path / "guard"
    made = guard_of_files(kind, str(tiny_folder), out, options=options_of(kind, adapter), **sets)
    assert read_guard(out) == made
    model = load_model(tiny_folder)
    first = expunge.guard.load(out, model, tokenizer).generate(TEXTS, max_new_tokens=12)
    moved = out.rename(tmp_path / "elsewhere")  # it works alone
    for path in adapter.iterdir():
        path.unlink()
    guarded = expunge.guard.load(moved, model, tokenizer)
    assert guarded.generate(TEXTS, max_new_tokens=12) == first
    assert [guarded.generate(text, max_new_tokens=12) for text in TEXTS] == first
    reader = open_reader(tiny_folder, None, dtype="float32", folder=None, guard=moved)
    prompts = [tokens(tokenizer, text) for text in TEXTS]
    said = [reader.text(g.tokens) for g in reader.generations(prompts, max_new_tokens=12)]
    cut = tokenizer.decode(tokens(tokenizer, made.refusal)[:12])
    assert said == [cut if text == made.refusal else text for text in first]


def test_a_helper_beside_an_adapter_brings_its_own_base(making, adapter, tmp_path, tokenizer):
    helpers = {"x": HelperSource(making.base, adapter)}
    section = AnyContrast(kind="contrast", weights={"x": -0.5})
    shared = make_guard(section, replace(making, helpers=helpers), tmp_path / "a")
    apart = make_guard(section, replace(making, helpers=helpers, adapter=adapter), tmp_path / "b")
    assert shared.helpers[0].model is None
    assert apart.helpers[0].model == "helpers/x/base"
    model = load_model(making.base)
    prompts = [tokens(tokenizer, text) for text in TEXTS]
    one, two = (
        reader_of(model, tokenizer, guard=open_guard(tmp_path / name, tokenizer)).generations(
            prompts, max_new_tokens=9
        )
        for name in "ab"
    )
    assert one == two
    uld = Uld(kind="uld", assistant="x", blocks=1)
    assistant = replace(making, adapter=adapter, helpers={"assistant": helpers["x"]})
    with pytest.raises(RecipeError, match="without an adapter"):
        make_guard(uld, assistant, tmp_path / "c")


def test_a_helper_that_could_not_be_opened_is_refused_when_its_guard_is_made(
    making, adapter, tmp_path, tokenizer
):
    config = LlamaConfig(
        **{**json.loads((making.base / "config.json").read_text()), "hidden_size": 64}
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    more = copy.deepcopy(tokenizer)
    more.add_tokens(["<more>"])
    AutoModelForCausalLM.from_pretrained(making.base).save_pretrained(tmp_path / "words")
    more.save_pretrained(tmp_path / "words")
    section = AnyContrast(kind="contrast", weights={"x": -0.5})
    for source, message in (
        (HelperSource(tmp_path / "wide", adapter), "but .*wide as"),
        (HelperSource(tmp_path / "words"), "words has another vocabulary"),
    ):
        with pytest.raises(ModelError, match=message):
            make_guard(section, replace(making, helpers={"x": source}), tmp_path / "g")
        assert not (tmp_path / "g").exists()


GOOD = {"format": 1, "kind": "prefix", "before": {"text": "No."}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "nested too deep"),
        ("[]", "guard.json"),
        ({**GOOD, "format": 2}, "format"),
        ({**GOOD, "extra": 1}, "unknown field extra"),
        ({"format": 1, "kind": "prefix"}, "it does nothing"),
        ({**GOOD, "contrast": {"weights": [1]}}, "1 weights, but 0 helpers"),
        ({**GOOD, "contrast": {"weights": [float("nan")]}}, "finite"),
        ({**GOOD, "corruption": {"strength": float("inf")}}, "strength"),
        ({**GOOD, "scope": {"weights": {"a": float("nan")}}}, "finite"),
        *(
            (
                {**GOOD, "contrast": {"weights": [1]}, "helpers": [{"adapter": path}]},
                "helpers.0.adapter",
            )
            for path in ("/etc", "../../x", "helpers/../adapter", "helpers/x/adapter\n")
        ),
    ],
)
def test_a_hostile_file_is_refused_in_one_line(tmp_path, content, message):
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ExpungeError, match=message) as found:
        read_guard(tmp_path)
    assert "\n" not in str(found.value)


def test_what_is_no_guard_is_refused(tmp_path, tiny, tokenizer):
    with pytest.raises(RecipeError, match=r"holds no guard\.json"):
        expunge.guard.load(tmp_path, tiny, tokenizer)
    with pytest.raises(RecipeError, match="it does nothing"):
        expunge.guard.load({"format": 1, "kind": "x"}, tiny, tokenizer)
    assert expunge.guard.load(GOOD, tiny, tokenizer).guard.made == Made.model_validate(GOOD)
    assert expunge.guard.__all__ == ["load"]
    assert "guard" in expunge.__all__
    with pytest.raises(RecipeError, match=r"no guard is called 'prefx'\. Did you mean 'prefix'"):
        guard_of_files("prefx", "x", tmp_path)
    with pytest.raises(RecipeError, match=r"unknown field .*items.* Known here: kind, of"):
        guard_of_files("prefix", "x", tmp_path, options=["items=3"])
    with pytest.raises(RecipeError, match="takes name=value; 'text' is not that"):
        guard_of_files("prefix", "x", tmp_path, options=["text"])


@pytest.fixture
def fields(tiny_folder):
    branch = {
        "terms": [{"half": "forget", "loss": "npo"}, {"half": "retain", "loss": "nll"}],
        "lora": {"rank": 2, "dropout": 0},
        "schedule": {"epochs": 1, "micro_batch": 4},
        "optimizer": {"lr": 1e-3, "compute": "float32"},
    }
    return {
        "name": "guarded",
        "model": {"path": str(tiny_folder), "max_length": 256, "separator": " "},
        "data": {"synthetic": {"documents": 1, "nonmembers": 1}},
        "branches": {"assistant": {**branch, "blocks": 1}, "weak": branch},
        "guards": {
            "polite": {"kind": "prefix", "text": "Hush."},
            "wall": {"kind": "input_filter", "of": "weak"},
            "difference": {"kind": "uld", "assistant": "assistant"},
            "shifted": {"kind": "offset", "of": "weak", "new": "weak", "old": "target"},
        },
        "evaluate": {"max_new_tokens": 3, "resamples": 10},
        "unscored": ["target", "weak", "assistant", "polite", "wall", "shifted"],
    }


def test_guards_are_models_of_the_results_and_stages_of_their_own(fields, tmp_path):
    folders = expunge.run(fields, tmp_path / "run")
    results = json.loads((folders[42] / "results.json").read_text())
    assert list(results["models"]) == ["target", "assistant", "weak", *fields["guards"]]
    assert results["models"]["difference"]["semeval"]["mia"]["auc"] is not None
    made = {p.name.rpartition("-")[0]: p for p in (tmp_path / "run" / "stages").iterdir()}
    uld = read_guard(made["difference"] / "guard")
    assert uld.helpers[0].model_dump() == {
        "blocks": 1,
        "model": None,
        "adapter": "helpers/assistant/adapter",
    }
    assert (
        json.loads((made["assistant"] / "base" / "config.json").read_text())["num_hidden_layers"]
        == 1
    )
    shifted = read_guard(made["shifted"] / "guard")  # behind an adapter nothing is shared
    assert [spec.model for spec in shifted.helpers] == ["helpers/new/base", "helpers/old/base"]
    before = sorted(made.values())
    expunge.run(fields, tmp_path / "run")
    assert sorted((tmp_path / "run" / "stages").iterdir()) == before  # done once


def test_a_recipe_says_what_a_guard_is_made_from(fields):
    from expunge.pipeline import Pipeline

    recipe = load_recipe(fields)
    assert recipe.made_from("difference") == ("target", "assistant")
    assert recipe.made_from("shifted") == ("weak", "target")
    assert recipe.maker("polite") is recipe.guards["polite"]
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        cells = {c.name.rpartition("-")[0]: c for c in cells_of(Pipeline(recipe, folder))}
    assert any(need.startswith("assistant-") for need in cells["difference"].needs)


def test_guards_are_foretold(fields):
    from expunge.plan.predict import plan

    stages = {stage.stage: stage for stage in plan(load_recipe(fields)).stages}
    assert {"assistant", "weak", *fields["guards"], "evaluate-difference"} <= set(stages)
    assert stages["polite"].seconds > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"guards": {"g": {"kind": "prefx"}}},
            "no guards.g.kind is called 'prefx'. Did you mean 'prefix'",
        ),
        ({"guards": {"g": {"kind": "prefix", "txt": "a"}}}, "Did you mean 'text'"),
        ({"guards": {"g": {"kind": "icul", "item": 2}}}, "Did you mean 'items'"),
        ({"guards": {"g": {"kind": "prefix", "of": "no"}}}, "names no model 'no'. Known: target"),
        ({"guards": {"weak": {"kind": "prefix"}}}, "'weak' names two models"),
        ({"guards": {"g": {"kind": "uld", "assistant": "no"}}}, "names no model 'no'"),
        (
            {"guards": {"g": {"kind": "uld", "assistant": "assistant", "blocks": 1}}},
            "guard 'g': the branch 'assistant' says its blocks itself; leave blocks out",
        ),
        (
            {"guards": {"g": {"kind": "uld", "of": "weak", "assistant": "weak", "blocks": 1}}},
            "of must be target and the assistant an adapter on it",
        ),
        (
            {"guards": {"g": {"kind": "prefix"}, "h": {"kind": "prefix", "of": "g"}}},
            "a guard changes no weights",
        ),
        (
            {"guards": {"g": {"kind": "prefix"}}, "merges": {"m": {"of": ["g"]}}},
            "a guard changes no weights",
        ),
        ({"merges": {"m": {}}}, "branches of the whole target"),
        ({"edits": {"e": {"of": "assistant", "method": "negate"}}}, "'assistant' is blocks"),
    ],
)
def test_what_cannot_be_is_refused_when_the_recipe_is_read(fields, change, message):
    assert load_recipe(fields)  # control
    with pytest.raises(RecipeError, match=message):
        load_recipe({**fields, "unscored": [], **change})


def test_the_commands_make_a_guard_and_measure_through_it(tiny_folder, sets, tmp_path):
    runner, out = CliRunner(), tmp_path / "guard"
    words = ["guard", "input_filter", str(tiny_folder), str(out), "--forget", str(sets["forget"])]
    words += ["--retain", str(sets["retain"]), "-o", "refusal=No.", "--json"]
    done = runner.invoke(app, words, catch_exceptions=False)
    assert json.loads(done.stdout) == {"guard": str(out), "kind": "input_filter"}
    before = (out / FILE).read_bytes()
    with pytest.raises(RecipeError, match="exists and is not empty"):
        runner.invoke(app, ["guard", "prefix", str(tiny_folder), str(out)], catch_exceptions=False)
    assert (out / FILE).read_bytes() == before
    words = ["evaluate", str(tiny_folder), "--suite", "knowledge", "-o", "knowledge.limit=2"]
    words += ["--guard", str(out), "--cache", str(tmp_path / "cache"), "--json"]
    done = runner.invoke(app, words, catch_exceptions=False)
    assert json.loads(done.stdout)["guard"] == str(out)
    assert yaml.safe_load((out / FILE).read_text())["refusal"] == "No."
