"""Merge files as a user writes them: vocabularies, lint, explain, and one line for each mistake."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from expunge.errors import ExpungeError
from expunge.merge import vocabulary
from expunge.merge.card import merge_card
from expunge.merge.compat import MergeFile, is_merge_file, read_merge_file
from expunge.merge.explain import explain
from expunge.merge.lint import lint
from expunge.merge.methods import METHODS
from expunge.merge.run import merge_models, plan_of
from expunge.models import load_tokenizer


@pytest.fixture
def file(tuned, tmp_path):
    """Write a merge file, its models named base, one and two."""

    def write(**fields):
        base, one, two = map(str, tuned)
        given = {
            "method": "ties",
            "base_model": base,
            "models": [{"model": one}, {"model": two}],
            "parameters": {"density": 0.5},
            **fields,
        }
        if "density" not in METHODS.get(given["method"], METHODS["ties"]).options:
            given["parameters"].pop("density", None)
        path = tmp_path / "merge.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in given.items() if v is not None}))
        return path

    return write


def edited(folder, to, tensors=lambda found: found, **config):
    """A copy of a model folder with other tensors or other fields in its config."""
    shutil.copytree(folder, to)
    found = tensors(load_file(to / "model.safetensors"))
    save_file(found, to / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**fields, **config}))
    return str(to)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "tise"}, "no merge method is called 'tise'. Did you mean 'ties'?"),
        ({"merge_method": "ties"}, "give either merge_method (mergekit's defaults) or method"),
        ({"models": []}, "there is nothing to merge"),
        ({"base_model": None}, "ties needs base_model"),
        ({"parameters": {"densty": 1}}, "ties has no option 'densty'. Did you mean 'density'?"),
        ({"parameters": {"gamma": 0.1}}, "ties has no option 'gamma'."),
        ({"parameters": {"t": 0.1}}, "ties has no option 't'."),
        ({"method": "linear", "parameters": {"select_topk": 0.1}}, "linear has no option 'select"),
        ({"method": "slerp", "parameters": {"normalize": True}}, "slerp has no option 'normalize'"),
        ({"parameters": {"density": True}}, "density is a number, not True"),
        ({"parameters": {"lambda": float("inf")}}, "lambda is a finite number, not inf"),
        (
            {"parameters": {"normalize": "yes, do"}},
            "normalize is true or false, not 'yes, do' (for",
        ),
        ({"parameters": {"weight": "abc"}}, "weight is a number, not 'abc' (for model."),
        ({"parameters": {"weight": [1, "x"]}}, "weight is a number, not 'x' (for model."),
        ({"parameters": {"weight": True}}, "weight is a number, not True (for model."),
        ({"parameters": {"weight": float("nan")}}, "weight is a finite number, not nan (for model"),
        ({"models": ["../m/a"]}, "models.0: each model is written as `- model: NAME` (got '../m/a"),
        ({"models": [{"model": 5}]}, "models.0.model: a model is a name, or {model: NAME, lora: N"),
        (
            {"base_model": 5},
            "base_model: a model is a name, or {model: NAME, lora: NAME} (got '5')",
        ),
        ({"rank": 4}, "merge.yaml: rank and space are for output: adapter"),
        ({"space": "factors"}, "rank and space are for output: adapter"),
        ({"parameters": {"density": 1.5}}, "density is a share from 0 to 1, not 1.5"),
        ({"parameters": {"vote": "loud"}}, "vote is one of unweighted, weighted, not 'loud'"),
        ({"parameters": {"density": "much"}}, "density is a number, not 'much'"),
        ({"parameters": {"density": [{"filter": "x"}]}}, "needs value, and may have filter"),
        ({"method": "slerp"}, "slerp merges 1 model(s) beside its base, and 2 are given"),
        ({"method": "model_stock", "models": []}, "there is nothing to merge"),
        ({"dtype": "float8"}, "dtype: Input should be 'float32', 'bfloat16' or 'float16'"),
        (
            {"modules": {"a": {}, "b": {}}},
            "merge.yaml: modules holds one module, {default: {models",
        ),
        ({"modules": {"a": {"models": []}}}, "merge.yaml: give either models, slices or modules"),
        ({"modules": {"a": {"model": []}}}, "modules.a holds models or slices, and may hold param"),
        ({"tokenizer_source": "union", "tokenizer": {}}, "give either tokenizer or"),
        ({"chat_template": "chatm"}, "is a Jinja template, auto, or one of alpaca, chatml, exa"),
        ({"tokenizer": {"tokens": {"a": 5}}}, "tokenizer.tokens.a: "),
        ({"tokenizer": {"tokens": {"a": {"sorce": "x"}}}}, "Did you mean 'source'?"),
        (
            {"tokenizer": {"tokens": {"a": {"source": {"kind": "model_token", "token": "a"}}}}},
            "tokenizer.tokens.a.source: field model is missing",
        ),
        (
            {"tokenizer": {"tokens": {"a": {"source": {"kind": "one"}}}}},
            "tokenizer.tokens.a.source: kind is zero or model_token, not 'one'",
        ),
        (
            {"tokenizer": {"tokens": {"a": {"source": {"kind": "zero", "token": "a"}}}}},
            "tokenizer.tokens.a.source: unknown field token",
        ),
        ({"method": "della", "parameters": {"density": 0.9}}, "chances outside (0, 1)"),
        ({"modls": []}, "unknown field modls. Did you mean 'models'?"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(file, tmp_path, fields, message):
    if fields.get("method") == "slerp" and "parameters" not in fields:
        fields = {**fields, "parameters": {"t": 0.5}}
    with pytest.raises(ExpungeError, match=re.escape(message)) as error:
        merge_models(file(**fields), tmp_path / "out")
    assert "\n" not in str(error.value) and "recipe" not in str(error.value)
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]


def made(path, out):
    merge_models(path, out)
    return load_file(out / "model.safetensors")


def test_a_file_of_mergekits_may_hold_what_mergekit_leaves_unread(file, tuned, tmp_path):
    fields = {"method": None, "merge_method": "ties"}
    unread = {"name": "mine", "dtype": "torch.float32", "parameters": {"density": 0.5, "foo": 1}}
    one = made(file(**fields), tmp_path / "one")
    two = made(file(**fields, **unread), tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)
    empty = [{"model": str(folder), "parameters": None} for folder in tuned[1:]]
    three = made(file(**fields, models=empty), tmp_path / "three")
    assert all(torch.equal(one[name], three[name]) for name in one)
    with pytest.raises(ExpungeError, match="unknown field name"):
        merge_models(file(name="mine"), tmp_path / "no")


def test_a_file_of_one_module_is_read_as_that_module(file, tuned, tmp_path):
    models = [{"model": str(folder)} for folder in tuned[1:]]
    inner = [{"filter": "mlp", "value": 0.2}]
    module = {"models": models, "parameters": {"density": inner, "lambda": 0.5}}
    nested = file(models=None, modules={"default": module}, parameters={"density": 0.7})
    own = made(nested, tmp_path / "nested")
    flat = {"density": [*inner, {"value": 0.7}], "lambda": 0.5}
    plain = made(file(parameters=flat), tmp_path / "plain")
    assert all(torch.equal(own[name], plain[name]) for name in own)
    other = made(file(parameters={"density": 0.7}), tmp_path / "other")
    assert not all(torch.equal(own[name], other[name]) for name in own)  # control


def test_a_required_option_is_asked_for(file, tmp_path, tuned):
    fields = {"method": "slerp", "models": [{"model": str(tuned[1])}], "parameters": {}}
    with pytest.raises(ExpungeError, match="slerp needs the option 't'"):
        merge_models(file(**fields), tmp_path / "out")


def test_models_that_do_not_fit_are_named(file, tuned, tmp_path):
    _, one, two = tuned
    key = "model.layers.0.mlp.up_proj.weight"

    def without(found):
        return {k: v for k, v in found.items() if k != key}

    cases = {
        "lacks model.layers.0.mlp.up_proj.weight, which": edited(one, tmp_path / "a", without),
        "has extra, which": edited(
            one, tmp_path / "b", lambda found: {**found, "extra": torch.zeros(2)}
        ),
        "up_proj.weight is [2, 2] in": edited(
            one, tmp_path / "c", lambda found: {**found, key: torch.zeros(2, 2)}
        ),
        "embed_tokens.weight is": edited(
            one,
            tmp_path / "d",
            lambda found: {**found, "model.embed_tokens.weight": torch.zeros(300, 32)},
        ),
    }
    for message, folder in cases.items():
        with pytest.raises(ExpungeError, match=re.escape(message)):
            merge_models(file(models=[{"model": folder}, {"model": str(two)}]), tmp_path / "out")
    with pytest.raises(ExpungeError, match="name a tokenizer_source"):
        merge_models(file(models=[{"model": str(tmp_path / "d")}]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_not_a_float_is_carried_over_or_refused(file, tuned, tmp_path):
    def ids(*numbers):
        return lambda found: {**found, "ids": torch.tensor(numbers)}

    base = edited(tuned[0], tmp_path / "base", ids(1, 2))
    same, other = (
        edited(tuned[1], tmp_path / name, ids(1, number)) for name, number in (("s", 2), ("o", 3))
    )
    merge_models(file(base_model=base, models=[{"model": same}]), tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["ids"].tolist() == [1, 2]
    with pytest.raises(ExpungeError, match="ids is I64 and differs between"):
        merge_models(file(base_model=base, models=[{"model": other}]), tmp_path / "no")


def test_a_type_that_cannot_be_merged_is_named_with_its_file(file, tuned, tmp_path):
    key = "model.layers.0.mlp.up_proj.weight"

    def cast(kind, only=None):
        return lambda found: {
            k: v.to(kind) if k in (only or found) else v for k, v in found.items()
        }

    for number, (kind, word, only) in enumerate(
        (
            (torch.float8_e4m3fn, "F8_E4M3", [key]),
            (torch.float64, "F64", [key]),
            (torch.float64, "F64", None),
        )
    ):
        odd = edited(tuned[1], tmp_path / f"odd-{number}", cast(kind, only))
        message = rf"{odd}/model.safetensors: model.* is {word} \[.*, but F32 \[.*only float32, bfl"
        with pytest.raises(ExpungeError, match=message) as error:
            merge_models(file(models=[{"model": odd}]), tmp_path / "out")
        assert "\n" not in str(error.value)
        with pytest.raises(ExpungeError, match=message):
            merge_models(file(base_model=odd, models=[{"model": str(tuned[2])}]), tmp_path / "out")
    whole = [edited(f, tmp_path / f"w-{f.name}", cast(torch.float64)) for f in tuned[:2]]
    with pytest.raises(ExpungeError, match=r"is F64 and differs between .*only float32, bfloat16"):
        merge_models(file(base_model=whole[0], models=[{"model": whole[1]}]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_on_a_type_that_cannot_be_merged_is_refused(file, tuned, branches, tmp_path):
    key = "model.layers.0.mlp.up_proj.weight"
    base = edited(
        tuned[0],
        tmp_path / "base",
        lambda found: {k: v.to(torch.float8_e4m3fn) if k == key else v for k, v in found.items()},
    )
    with pytest.raises(ExpungeError, match=f"changes {key}, which is F8_E4M3 in"):
        merge_models(
            file(base_model=base, models=[{"model": f"{base}+{branches[0]}"}]), tmp_path / "out"
        )


def test_a_base_joins_a_linear_merge_only_with_a_weight(file, tuned, tmp_path):
    base, one, two = (load_file(folder / "model.safetensors") for folder in tuned)
    weighted = [{"model": str(f), "parameters": {"weight": 1.0}} for f in tuned]
    for word in ("method", "merge_method"):
        fields = {"method": None, word: "linear", "parameters": {}}
        with pytest.raises(ExpungeError, match="and it has no weight: list it among the models"):
            merge_models(file(**fields, models=weighted[1:]), tmp_path / "out")
    fields = {"method": None, "merge_method": "linear", "parameters": {}}
    layers = [{**model, "layer_range": [0, 2]} for model in weighted[1:]]
    third, half = (base, one, two), (one, two)
    for number, (given, expected) in enumerate(
        (
            ({"models": weighted}, third),
            ({"models": weighted[1:], "parameters": {"weight": 1.0}}, third),
            ({"models": weighted[1:], "base_model": None}, half),
            ({"models": None, "slices": [{"sources": layers}]}, half),
        )
    ):
        merge_models(file(**{**fields, **given}), tmp_path / f"{number}")
        out = load_file(tmp_path / f"{number}" / "model.safetensors")
        for name, tensor in out.items():
            mean = sum(model[name] for model in expected) / len(expected)
            torch.testing.assert_close(tensor, mean, rtol=1e-4, atol=1e-6)


def extended(folder, to, words):
    """A copy of a model with more words in its vocabulary."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(words)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    torch.manual_seed(len(words))
    model.get_input_embeddings().weight.data[-len(words) :] = torch.randn(len(words), 32)
    model.save_pretrained(to)
    tokenizer.save_pretrained(to)
    return str(to)


@pytest.mark.parametrize("source", ["union", "base", "two"])
def test_vocabularies_are_lined_up_by_word(file, tuned, tmp_path, source):
    one = extended(tuned[1], tmp_path / "one", ["<x>", "<y>"])
    two = extended(tuned[2], tmp_path / "two", ["<y>"])
    path = file(
        method="linear",
        base_model=None,
        models=[{"model": one}, {"model": two}],
        tokenizer_source={"union": "union", "base": "union", "two": two}[source],
    )
    if source == "base":
        path = file(
            method="task_arithmetic",
            models=[{"model": one}, {"model": two}],
            parameters={"weight": 0.5},
            tokenizer_source="base",
        )
    merge_models(path, tmp_path / "out")
    words = load_tokenizer(tmp_path / "out").get_vocab()
    merged = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    assert len(words) == len(merged) == {"union": 259, "base": 257, "two": 258}[source]
    rows = {
        name: load_file(f"{folder}/model.safetensors")["model.embed_tokens.weight"]
        for name, folder in (("one", one), ("two", two))
    }
    vocabularies = {"one": load_tokenizer(one).get_vocab(), "two": load_tokenizer(two).get_vocab()}
    for word, place in words.items():
        having = [rows[n][vocabularies[n][word]] for n in rows if word in vocabularies[n]]
        expected = torch.stack(having).mean(0)
        torch.testing.assert_close(merged[place], expected, rtol=1e-4, atol=1e-6)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == len(merged)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_single_tokens_can_be_taken_from_one_model_and_rows_padded(file, tuned, tmp_path):
    one = extended(tuned[1], tmp_path / "one", ["<x>"])
    two = extended(tuned[2], tmp_path / "two", ["<x>"])
    tokens = {"<x>": {"source": two, "force": True}}
    tokenizer = {"source": one, "tokens": tokens, "pad_to_multiple_of": 64}
    path = file(
        method="linear",
        base_model=None,
        models=[{"model": one}, {"model": two}],
        tokenizer=tokenizer,
    )
    merge_models(path, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    theirs = load_file(f"{two}/model.safetensors")["model.embed_tokens.weight"]
    assert len(merged) == 320
    torch.testing.assert_close(merged[257], theirs[257])


def test_a_token_can_be_taken_by_number_and_only_by_one_that_there_is(file, tuned, tmp_path):
    def taken(**fields):
        source = {"kind": "model_token", "model": str(tuned[2]), **fields}
        return file(
            tokenizer={"source": "base", "tokens": {"a": {"source": source, "force": True}}}
        )

    for number in (100_000, 257):
        with pytest.raises(ExpungeError, match=rf"257 rows .* so there is no token_id {number}"):
            merge_models(taken(token_id=number), tmp_path / "no")
    for wrong, message in (
        ({"token_id": -1}, "token_id"),
        ({"token_id": 1, "token": "b"}, "either"),
    ):
        with pytest.raises(ExpungeError, match=rf"tokens\.a\.source: .*{message}"):
            merge_models(taken(**wrong), tmp_path / "no")
    base, _, two = (load_file(f / "model.safetensors")["model.embed_tokens.weight"] for f in tuned)
    words = load_tokenizer(tuned[0]).get_vocab()
    for number, fields in enumerate(({"token_id": 9}, {"token": "b"}, {})):
        merge_models(taken(**fields), tmp_path / f"out-{number}")
        out = load_file(tmp_path / f"out-{number}" / "model.safetensors")
        row = fields.get("token_id", words[fields.get("token", "a")])
        torch.testing.assert_close(out["model.embed_tokens.weight"][words["a"]], two[row])
        assert not torch.equal(base[words["a"]], two[row])  # control


def test_a_tokenizer_with_more_words_than_its_model_has_rows_is_refused(file, tuned, tmp_path):
    odd = edited(tuned[1], tmp_path / "odd")
    tokenizer = load_tokenizer(odd)
    tokenizer.add_tokens(["<x>"])
    tokenizer.save_pretrained(odd)
    with pytest.raises(ExpungeError, match="odd makes token 257, but the model has 257 rows"):
        merge_models(file(models=[{"model": odd}], tokenizer_source="union"), tmp_path / "out")


def test_chat_templates_can_be_named(file, tmp_path):
    said = [
        {"role": role, "content": text} for role, text in (("user", "hi"), ("assistant", "yes"))
    ]
    start, end, over = "<|im_start|>", "<|im_end|>", "[|endofturn|]\n"
    head = [f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("user", "assistant")]
    expected = {
        "chatml": f"{start}user\nhi{end}\n{start}assistant\nyes{end}\n{start}assistant\n",
        "llama3": f"BOS{head[0]}hi<|eot_id|>{head[1]}yes<|eot_id|>{head[1]}",
        "alpaca": "### Instruction:\nhi\n\n### Response:\nyesEOS\n\n### Response:\n",
        "mistral": "BOS [INST] hi [/INST] yesEOS",
        "exaone": f"[|system|]{over}[|user|]hi\n[|assistant|]yes{over}[|assistant|]",
    }
    for name, text in expected.items():
        merge_models(file(chat_template=name), tmp_path / name)
        tokenizer = load_tokenizer(tmp_path / name)
        made = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        own = {"BOS": tokenizer.bos_token, "EOS": tokenizer.eos_token}
        for word, token in own.items():
            text = text.replace(word, token or "")
        assert made == text


def test_lint_finds_what_is_legal_and_seldom_meant(file, tuned, tmp_path):
    clean = lint(plan_of(file()))
    assert clean == []

    def broken(found):
        found["model.norm.weight"][0] = float("nan")
        return found

    nan = edited(tuned[1], tmp_path / "nan", broken, rope_theta=5.0)
    (tmp_path / "nan" / "chat_template.jinja").write_text("{{ messages }}")
    opposite = tmp_path / "opposite"
    base, one = (load_file(f / "model.safetensors") for f in tuned[:2])
    edited(tuned[1], opposite, lambda _: {n: 2 * base[n] - one[n] for n in base})
    found = lint(plan_of(file(models=[{"model": nan}])))
    assert {"config", "template", "nan"} <= {finding.kind for finding in found}
    found = lint(plan_of(file(models=[{"model": str(tuned[1])}, {"model": str(opposite)}])))
    assert [(f.kind, f.what) for f in found] == [("cancel", "updates have cosine -1.00")]
    copy = edited(tuned[0], tmp_path / "copy")
    (same,) = lint(plan_of(file(models=[{"model": copy}])))
    assert same.kind == "same"


def test_lint_tells_what_the_merge_refuses(file, tuned, tmp_path):
    taken = {"kind": "model_token", "model": str(tuned[1]), "token_id": 999}
    for fields, said in (
        ({"output": "adapter"}, "needs every model as base"),
        ({"tokenizer": {"source": "base", "tokens": {"zz": {"source": taken}}}}, "no token_id 999"),
        ({"chat_template": "{% if %}"}, "no Jinja template"),
    ):
        path = file(**fields)
        (found,) = [f for f in lint(plan_of(path), weights=False) if f.kind == "refused"]
        assert said in found.what
        with pytest.raises(ExpungeError) as refused:
            merge_models(path, tmp_path / "out")
        assert str(refused.value) == found.what


def test_lint_counts_the_signs_of_weights_and_tells_types_apart(file, tuned, tmp_path):
    base, one, _ = tuned
    copy = edited(one, tmp_path / "copy")

    def found(*weights):
        models = [
            {"model": str(folder), "parameters": {"weight": weight}}
            for folder, weight in zip((one, copy), weights, strict=True)
        ]
        return lint(plan_of(file(method="task_arithmetic", models=models, parameters={})))

    (finding,) = found(1.0, -1.0)
    assert finding.kind == "cancel"
    assert finding.what == "updates have cosine -1.00, weights of opposite sign counted"
    assert found(1.0, 0.5) == found(-1.0, -0.5) == []  # control

    def halved(tensors):
        return {name: tensor.bfloat16() for name, tensor in tensors.items()}

    half = edited(one, tmp_path / "half", halved)
    findings = lint(plan_of(file(models=[{"model": half}])), weights=False)
    assert [(f.kind, f.where, f.what) for f in findings] == [
        ("type", half, f"its floats are BF16, in {base} F32")
    ]


def test_explain_without_a_base_says_that_it_needs_one(file, tuned):
    models = [{"model": str(folder)} for folder in tuned[1:]]
    path = file(method="linear", base_model=None, models=models, parameters={})
    with pytest.raises(ExpungeError, match="linear is given none: name a base_model"):
        explain(plan_of(path))


def test_lint_tells_an_adapter_of_another_base_and_mixed_ranks(file, tuned, branches, make_branch):
    odd = make_branch(3, rank=2)
    models = [{"model": f"{tuned[0]}+{folder}"} for folder in (branches[0], odd)]
    (found,) = lint(plan_of(file(models=models)), weights=False)
    assert found.kind == "rank"
    models = [{"model": f"{tuned[1]}+{branches[0]}"}]
    (found,) = lint(plan_of(file(models=models)), weights=False)
    assert found.kind == "base" and "was trained on" in found.what


def test_explain_says_what_stays_where_signs_clash_and_who_wins(file, tuned):
    rows = explain(plan_of(file(parameters={"density": 0.5, "weight": 1.0})))
    base, one, two = (load_file(folder / "model.safetensors") for folder in tuned)
    row = next(r for r in rows if r["name"] == "model.layers.0.mlp.up_proj.weight")
    name = row["name"]
    deltas = torch.stack([one[name] - base[name], two[name] - base[name]])
    clash = (deltas.sign().prod(0) < 0).float().mean()
    assert row["conflicts"] == pytest.approx(float(clash))
    assert row["kept"] == (0.5, 0.5)
    assert all(0.3 < share < 0.6 for share in row["won"])
    assert sum(row["won"]) < 1  # where both are trimmed, nobody wins
    assert all(0.3 < cosine < 0.9 for cosine in row["cosine"])
    assert row["norm"] == pytest.approx(row["relative"] * float(base[name].norm()), rel=1e-3)


def test_a_merge_file_is_told_from_a_recipe(file, tmp_path):
    assert is_merge_file(file())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: r\n")
    assert not is_merge_file(recipe)
    assert read_merge_file(file()).row.source == "arXiv:2306.01708"


def test_regmean_and_fisher_read_statistics_beside_each_model(file, tuned, tmp_path):
    key = "model.layers.0.mlp.up_proj.weight"
    base, one, two = (load_file(folder / "model.safetensors") for folder in tuned)
    models = []
    for number, folder in enumerate(tuned[1:]):
        path = tmp_path / f"{number}.safetensors"
        save_file({key: torch.full((48, 32), 1.0 + 2.0 * number)}, path)
        models.append({"model": str(folder), "statistics": str(path)})
    merge_models(file(method="fisher", models=models, parameters={}), tmp_path / "out")
    out = load_file(tmp_path / "out" / "model.safetensors")
    expected = base[key] + (one[key] - base[key]) / 4 + 3 * (two[key] - base[key]) / 4
    torch.testing.assert_close(out[key], expected, rtol=1e-4, atol=1e-6)
    other = "model.layers.1.mlp.up_proj.weight"  # has none, so it is averaged
    torch.testing.assert_close(out[other], (one[other] + two[other]) / 2, rtol=1e-4, atol=1e-6)
    with pytest.raises(ExpungeError, match="its Gram matrix is"):
        merge_models(file(method="regmean", models=models, parameters={}), tmp_path / "no")
    with pytest.raises(ExpungeError, match="needs statistics of each model"):
        merge_models(file(method="regmean", parameters={}), tmp_path / "no")


def test_a_disk_that_takes_no_more_is_one_line_and_leaves_nothing(file, tmp_path):
    words = [sys.executable, "-m", "expunge", "merge", str(file()), str(tmp_path / "out")]
    done = subprocess.run(
        ["bash", "-c", f"ulimit -f 40; exec {shlex.join(words)}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert "cannot write" in line and "too large" in line
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]


def test_a_model_whose_embeddings_have_another_name_has_room_for_any_token():
    stored = SimpleNamespace(shape=(7, 2))
    other = SimpleNamespace(checkpoint={"backbone.embeddings.weight": stored})
    assert vocabulary._rows_of(other) is None
    usual = SimpleNamespace(checkpoint={"model.embed_tokens.weight": stored})
    assert vocabulary._rows_of(usual) == 7  # control


def deepened(folder, to):
    """A copy with one layer more."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = model.config
    config.num_hidden_layers += 1
    if getattr(config, "layer_types", None):
        config.layer_types = [*config.layer_types, config.layer_types[-1]]
    AutoModelForCausalLM.from_config(config).save_pretrained(to)
    load_tokenizer(folder).save_pretrained(to)
    return str(to)


def test_models_of_unlike_depth_are_named(file, tuned, tmp_path):
    deep = deepened(tuned[2], tmp_path / "deep")
    path = file(
        method="linear", base_model=None, models=[{"model": str(tuned[1])}, {"model": deep}]
    )
    with pytest.raises(ExpungeError) as refused:
        merge_models(path, tmp_path / "out")
    said = str(refused.value)
    assert f"{tuned[1]} has 2" in said and f"{deep} has 3" in said and "take slices" in said
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_can_be_that_of_a_model_outside_the_merge(file, tuned, tmp_path):
    other = str(extended(tuned[2], tmp_path / "other", ["zebra"]))
    models = [{"model": str(tuned[1])}, {"model": str(tuned[0])}]
    path = file(method="linear", base_model=None, models=models, tokenizer_source=other)
    merge_models(path, tmp_path / "out")
    words = load_tokenizer(tmp_path / "out").get_vocab()
    assert words == load_tokenizer(other).get_vocab()
    rows = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    assert len(rows) >= len(words) and "zebra" not in load_tokenizer(tuned[1]).get_vocab()
    with pytest.raises(ExpungeError, match="pad_to_multiple_of"):
        merge_models(file(tokenizer={"pad_to_multiple_of": 10**9}), tmp_path / "wide")


def test_lint_goes_on_behind_what_the_merge_refuses_and_names_unread_parameters(
    file, tuned, tmp_path
):
    longer = edited(
        tuned[1],
        tmp_path / "longer",
        lambda found: {
            n: torch.cat([t, t[:1]]) if t.shape[:1] == (257,) else t for n, t in found.items()
        },
        vocab_size=258,
    )
    models = [{"model": str(tuned[1])}, {"model": longer}]
    kinds = [finding.kind for finding in lint(plan_of(file(models=models)))]
    assert "config" in kinds and "refused" in kinds
    parameters = {"densty": 0.5, "weight": 1.0}
    path = file(method=None, merge_method="ties", parameters=parameters)
    (found,) = lint(plan_of(path), weights=False)
    assert (found.kind, found.what) == (
        "unread", "has no parameter 'densty'. Did you mean 'density'?"
    )  # fmt: skip
    path = file(method=None, merge_method="ties", parameters={"density": 0.5, "normalize": True})
    assert lint(plan_of(path), weights=False) == []  # control


def test_a_merge_has_a_card_that_the_hub_can_read(file, tuned, tmp_path):
    merge_models(file(), tmp_path / "my-merge")
    card = ModelCard((tmp_path / "my-merge" / "README.md").read_text())
    front = {"library_name": "transformers", "tags": ["merge", "expunge"]}
    assert card.data.to_dict() == front  # folders are no repositories, so no base_model
    for said in (
        "# my-merge",
        "by `ties`",
        f"- {tuned[1]}",
        "density: 0.5",
        "Nothing was measured",
    ):
        assert said in card.text
    fields = {
        "method": "linear",
        "output": "adapter",
        "models": [
            {"model": "org/base+org/one@main"},
            {"model": {"model": {"path": "org/base"}, "lora": "here/lora/two"}},
        ],
    }
    card = ModelCard(merge_card(MergeFile.model_validate(fields), "x"))
    front = card.data.to_dict()
    assert front["base_model"] == ["org/base", "org/one"]
    assert front["library_name"] == "peft"
    assert "- here/lora/two" in card.text and "merged into one" in card.text
