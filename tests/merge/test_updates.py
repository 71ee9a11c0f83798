"""LoRA into full models: every kind that peft saves gives what peft's own merge gives."""

import json
import re
import tracemalloc

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from expunge.adapter_files import by_pattern, read_adapter
from expunge.errors import MergeError, ModelError
from expunge.merge.lint import lint
from expunge.merge.run import merge_models, plan_of
from expunge.merge.updates import Adapter

# peft reads a name that transformers is about to drop.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model .* `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]
LINEAR = ["q_proj", "up_proj", "down_proj"]
KINDS = {
    "plain": {"target_modules": LINEAR},
    "rslora": {"target_modules": LINEAR, "use_rslora": True},
    "patterns": {
        "target_modules": LINEAR,
        "rank_pattern": {"up_proj": 2},
        "alpha_pattern": {"model.layers.1.mlp.down_proj": 3},
    },
    "dora": {"target_modules": LINEAR, "use_dora": True},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "modules_to_save": {"target_modules": LINEAR, "modules_to_save": ["norm"]},
    "bias": {"target_modules": LINEAR, "bias": "all"},
}


def adapter(base, folder, seed=1, **options):
    """A trained-looking adapter that peft has written."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    tuned = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, **options}))
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    tuned.save_pretrained(folder)
    return folder


def peft_merged(base, folder):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    return {k: v.detach() for k, v in model.merge_and_unload().state_dict().items()}


def written(fields, tmp_path, name="merge"):
    path = tmp_path / f"{name}.yaml"
    path.write_text(json.dumps(fields))
    return path


def ours(tmp_path, name="out", **fields):
    merge_models(written(fields, tmp_path, name), tmp_path / name)
    return load_file(tmp_path / name / "model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_merges_into_its_base_as_peft_merges_it(tiny_folder, tmp_path, kind):
    folder = adapter(tiny_folder, tmp_path / "lora", **KINDS[kind])
    models = [{"model": f"{tiny_folder}+{folder}"}]
    own = ours(tmp_path, method="task_arithmetic", base_model=str(tiny_folder), models=models)
    theirs, base = (
        peft_merged(tiny_folder, folder),
        load_file(tiny_folder / "model.safetensors"),
    )
    for name, tensor in own.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-6)
    changed = {name for name in own if not torch.equal(own[name], base[name])}
    assert any("q_proj" in name for name in changed)  # control
    assert ("model.norm.weight" in changed) == (kind == "modules_to_save")
    assert ("model.embed_tokens.weight" in changed) == (kind == "embeddings")


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"]])
def test_a_head_that_would_part_from_its_embeddings_is_refused(tiny_folder, tmp_path, saved):
    folder = adapter(tiny_folder, tmp_path / "lora", target_modules=LINEAR, modules_to_save=saved)
    models = [{"model": f"{tiny_folder}+{folder}"}]
    fields = {"method": "task_arithmetic", "base_model": str(tiny_folder), "models": models}
    with pytest.raises(ModelError, match=rf"changes .*{saved[0]}.weight alone, .* ties its head"):
        merge_models(written(fields, tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(tmp_path / "untied")
    apart = str(tmp_path / "untied")
    fields |= {"base_model": apart, "models": [{"model": f"{apart}+{folder}"}]}
    merge_models(written(fields, tmp_path), tmp_path / "out")  # control
    found, base = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "untied"))
    changed = {n for n in found if not torch.equal(found[n], base[n])} & {*found}
    names = {"embed_tokens": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}
    assert {n for n in changed if n in names.values()} == {names[saved[0]]}


def test_lint_tells_that_embeddings_are_the_head_too(tiny_folder, tmp_path):
    for name, kind, count in (("one", "embeddings", 1), ("two", "plain", 0)):
        folder = adapter(tiny_folder, tmp_path / name, **KINDS[kind])
        models = [{"model": f"{tiny_folder}+{folder}"}]
        fields = {"method": "task_arithmetic", "base_model": str(tiny_folder), "models": models}
        found = lint(plan_of(written(fields, tmp_path)), weights=False)
        assert sum("is the head of" in finding.what for finding in found) == count


def test_the_factors_of_all_layers_are_never_in_memory_at_once(tiny_folder, tmp_path):
    folder = adapter(tiny_folder, tmp_path / "lora", target_modules=LINEAR, r=256)
    stored = (folder / "adapter_model.safetensors").stat().st_size
    models = [{"model": f"{tiny_folder}+{folder}"}]
    fields = {"merge_method": "ties", "base_model": str(tiny_folder), "models": models}
    path = written(fields, tmp_path)
    tracemalloc.start()
    try:
        jobs = plan_of(path).jobs()
        held, _ = tracemalloc.get_traced_memory()
        whole = [job.operand.held() for job in jobs if job.operand is not None]
        formed, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < stored / 4
    assert len(whole) == 6 and formed > held  # control: it sees what is formed


def test_an_adapter_on_a_tuned_model_counts_its_tuning_too(tuned, tmp_path):
    base, one, _ = tuned
    folder = adapter(one, tmp_path / "lora", **KINDS["plain"])
    models = [{"model": f"{one}+{folder}", "parameters": {"weight": 0.5}}]
    own = ours(tmp_path, method="task_arithmetic", base_model=str(base), models=models)
    theirs, start = peft_merged(one, folder), load_file(base / "model.safetensors")
    for name, tensor in own.items():
        halfway = start[name] + 0.5 * (theirs[name] - start[name])
        torch.testing.assert_close(tensor, halfway, rtol=1e-4, atol=1e-6)


def test_adapters_of_unlike_rank_and_full_models_meet_in_one_merge(tuned, tmp_path):
    base, one, _ = tuned
    folders = [
        adapter(base, tmp_path / f"lora-{r}", seed=r, r=r, target_modules=LINEAR) for r in (2, 8)
    ]
    given = [str(one), *(f"{base}+{folder}" for folder in folders)]
    models = [{"model": name} for name in given]
    fields = {"method": "ties", "base_model": str(base), "parameters": {"density": 0.4}}
    own = ours(tmp_path, **fields, models=models)
    whole = []
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(base)
        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
        model.save_pretrained(tmp_path / f"whole-{folder.name}")
        whole.append({"model": str(tmp_path / f"whole-{folder.name}")})
    slow = ours(tmp_path, "slow", **fields, models=[models[0], *whole])
    for name, tensor in own.items():
        close = torch.isclose(tensor, slow[name], rtol=1e-4, atol=1e-6)
        assert close.float().mean() > 0.998  # an entry at the bound may fall on either side


def test_slerp_and_linear_see_whole_weights_of_an_adapter(tuned, tmp_path):
    base, one, _ = tuned
    folder = adapter(base, tmp_path / "lora", **KINDS["plain"])
    models = [{"model": str(one)}, {"model": f"{base}+{folder}"}]
    own = ours(tmp_path, method="linear", models=models)
    theirs, other = peft_merged(base, folder), load_file(one / "model.safetensors")
    for name, tensor in own.items():
        torch.testing.assert_close(tensor, (theirs[name] + other[name]) / 2, rtol=1e-4, atol=1e-6)


def test_adapters_merge_into_an_adapter(tiny_folder, tmp_path):
    folders = [
        adapter(tiny_folder, tmp_path / f"lora-{seed}", seed=seed, **KINDS["plain"])
        for seed in (1, 2)
    ]
    models = [
        {"model": f"{tiny_folder}+{folder}", "parameters": {"weight": weight}}
        for folder, weight in zip(folders, (1.0, -0.5), strict=True)
    ]
    path = written({"method": "linear", "output": "adapter", "models": models}, tmp_path)
    report = merge_models(path, tmp_path / "out")
    assert report["truncation_error"] is None
    factors, _ = read_adapter(tmp_path / "out")
    parts = [read_adapter(folder)[0] for folder in folders]
    for name, (a, b) in factors.items():
        one, two = (1.5 * part[name][1] @ part[name][0] for part in parts)
        torch.testing.assert_close(b @ a, 2 * one - two, rtol=1e-4, atol=1e-6)  # a mean
    short = {"method": "linear", "output": "adapter", "rank": 3, "models": models}
    report = merge_models(written(short, tmp_path, "short"), tmp_path / "short")
    assert 0 < report["truncation_error"] < 1
    bad = {"method": "linear", "output": "adapter", "models": [{"model": str(tiny_folder)}]}
    with pytest.raises(MergeError, match=r"needs every model as base\+lora"):
        merge_models(written(bad, tmp_path, "bad"), tmp_path / "bad")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 9}, r"lora: .* should have rank 9"),
        ({"peft_type": "IA3"}, "is a IA3 adapter"),
        ({"init_lora_weights": "pissa"}, "which changed its base"),
        ({"layer_replication": [[0, 1]]}, "has layer_replication"),
        ({"rank_pattern": {"(a+)+": 3}}, "repeats groups"),
        ({"rank_pattern": {"[": 3}}, "is not a pattern"),
    ],
)
def test_an_adapter_that_cannot_be_read_is_named(tiny_folder, tmp_path, change, message):
    folder = adapter(tiny_folder, tmp_path / "lora", **KINDS["plain"])
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ModelError, match=message):
        ours(
            tmp_path,
            method="task_arithmetic",
            base_model=str(tiny_folder),
            models=[{"model": f"{tiny_folder}+{folder}"}],
        )
    assert not (tmp_path / "out").exists()


def test_patterns_of_ranks_match_as_in_peft_and_only_repeated_groups_are_refused():
    layer = "model.layers.11.mlp.up_proj"
    for pattern, matches in (
        (r"model\.layers\.\d+\.mlp\.(up|gate)_proj", True),
        (r"layers\.(1[0-9]|2)\..+_proj", True),
        (r"layers\.\d+\.mlp\.(down|gate)_proj", False),
    ):
        assert bool(re.match(rf"(.*\.)?({pattern})$", layer)) is matches  # as peft has it
        assert by_pattern({pattern: 3}, layer, 1) == (3 if matches else 1)
    for pattern in ("(a+)+", r"(\w|\d)*_proj", "(a){2,}", "(a)?", "(?x:(a+) +)", "(a+)(?#c)+"):
        with pytest.raises(ModelError, match="repeats groups"):
            by_pattern({pattern: 3}, layer, 1)
    with pytest.raises(ModelError, match="repeats more than 4 parts"):
        by_pattern({".*" * 25 + "z": 3}, layer, 1)
    assert by_pattern({".*" * 4 + "z": 3}, layer, 1) == 1  # control


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_link_out_of_an_adapter_is_refused(tiny_folder, tmp_path, name):
    folder = adapter(tiny_folder, tmp_path / "lora", **KINDS["plain"])
    assert Adapter(folder).names() and read_adapter(folder)[0]  # control
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    for read in (Adapter, read_adapter):
        with pytest.raises(ModelError, match=f"{name} is a link out of its folder, to"):
            read(folder)
