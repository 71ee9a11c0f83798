"""Levels in a run: found once, by a model that is gone when training begins, and found again."""

import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer

from expunge.companions.levels import FILE, UnseenLevels, read_levels
from expunge.data.batches import TokenSequence, pack
from expunge.data.examples import Example
from expunge.errors import ExpungeError, RecipeError, TrainingError
from expunge.lora import load_adapter
from expunge.models import load_model, load_tokenizer
from expunge.pipeline import Pipeline
from expunge.plan.predict import plan
from expunge.plan.work import Encoded, levelling, relevelling
from expunge.recipe import load_recipe, recipe_text
from expunge.scores import score
from expunge.unlearn import relevel, trainer
from expunge.unlearn.objective import Term
from expunge.unlearn.relevel import Releveller
from expunge.unlearn.snapshots import Keeper, snapshots

NEUTRAL = Term(half="neutral", loss="nll")


@pytest.fixture
def fields(tiny_folder) -> dict:
    optimizer = {"lr": 1e-3, "compute": "float32", "checkpoint_seconds": 0}
    retain = {"half": "retain", "loss": "nll"}
    shared = {
        "lora": {"rank": 2, "alpha": 4, "dropout": 0},
        "schedule": {"epochs": 1, "micro_batch": 2, "accumulation": 2},
        "optimizer": optimizer,
    }
    hinge = {"half": "forget", "loss": "hinge_level", "scope": "document"}
    tokens = {"half": "forget", "loss": "hinge_level_token"}
    return {
        "name": "levels",
        "model": {"path": str(tiny_folder), "max_length": 400, "separator": " "},
        "data": {"synthetic": {"documents": 1, "nonmembers": 2}},
        "tune": {"epochs": 2, "batch": 4, "optimizer": optimizer},
        "branches": {
            "level": {**shared, "terms": [hinge, tokens, retain], "levels": {"of": "original"}},
            "other": {**shared, "terms": [hinge, retain], "levels": {"of": "original"}},
            "unseen": {**shared, "terms": [hinge, retain], "levels": {"of": "unseen"}},
            "plain": {**shared, "terms": [{"half": "forget", "loss": "npo"}, retain]},
        },
    }


def encoded(pipeline, examples, base):
    return pipeline._encode(examples, load_tokenizer(base))


def document_nll(base, items):
    with torch.no_grad():
        return score(load_model(base), pack(items, "document", "cpu")).nll.tolist()


def inputs_of(weights) -> dict:
    return json.loads((weights.folder.parent / "stage.json").read_text())["inputs"]


def levels_of(pipeline, name):
    return pipeline.levels(pipeline.recipe.branches[name])


def test_they_are_those_of_the_original_and_found_once_for_branches_and_seeds(
    fields, tmp_path, monkeypatch, tiny_folder
):
    pipeline = Pipeline(fields, tmp_path)
    folder = levels_of(pipeline, "level")
    items = encoded(pipeline, pipeline.sets.forget, tiny_folder)
    found = read_levels(folder)
    assert [len(one) for one in found] == [len(item.tokens) - 1 for item in items]
    nll = [-float(one[:, 0].mean()) for one in found]
    assert nll == pytest.approx(document_nll(tiny_folder, items), rel=1e-4)
    assert nll != pytest.approx(document_nll(pipeline.target.base, items), rel=1e-2)  # control
    monkeypatch.setattr("expunge.training.write_levels", None)  # would fail if it were called
    again = Pipeline(fields, tmp_path)
    assert levels_of(again, "other") == folder
    assert inputs_of(again.branch("level", 7))["levels"] == folder.name
    assert "levels" not in inputs_of(again.branch("plain", 42))  # which keeps its key
    fields["branches"]["level"]["levels"] = {
        "of": str(shutil.copytree(tiny_folder, tmp_path / "m"))
    }
    with pytest.raises(TypeError):  # control: another model is asked
        levels_of(Pipeline(fields, tmp_path), "level")


def test_the_level_model_is_not_in_memory_while_a_branch_trains(fields, tmp_path, monkeypatch):
    loaded, pipeline = [], Pipeline(fields, tmp_path)
    target = pipeline.target.base
    real = Pipeline._load

    def counted(self, weights, **how):
        loaded.append(weights.base)
        return real(self, weights, **how)

    monkeypatch.setattr(Pipeline, "_load", counted)
    pipeline.branch("level", 42)
    assert loaded == [pipeline.original.base, target]
    loaded.clear()
    pipeline.branch("other", 42)
    assert loaded == [target]


def test_levels_of_unseen_texts_are_what_the_target_says_of_them(fields, tmp_path):
    pipeline = Pipeline(fields, tmp_path)
    found = read_levels(levels_of(pipeline, "unseen"))
    base = pipeline.target.base
    neutral = document_nll(base, encoded(pipeline, pipeline.sets.neutral, base))
    assert all((one.diff(dim=0) >= 0).all() for one in found)  # sorted, the least likely first
    levels = [-float(one[:, 0].mean()) for one in found]
    assert all(min(abs(level - nll) for nll in neutral) < 1e-3 for level in levels)
    for asked in (True, False):  # questions and texts each have the distribution of the unseen
        given = zip(levels, pipeline.sets.forget, strict=True)
        own = [level for level, example in given if (example.kind == "qa") == asked]
        assert len({round(level, 3) for level in own}) == min(len(own), len(neutral))
    pipeline.branch("unseen", 42)


@pytest.mark.parametrize("where", ["levels", "branch"])
def test_a_killed_run_goes_on_with_the_same_levels_and_ends_with_the_same_bytes(
    fields, tmp_path, monkeypatch, where
):
    expected = Pipeline(fields, tmp_path / "whole").branch("level", 42).folder
    pipeline = Pipeline(fields, tmp_path / "broken")

    def killed(*given, **options):
        raise KeyboardInterrupt

    places = {
        "levels": "expunge.companions.levels.save_file",
        "branch": "expunge.lora.save_adapter",
    }
    with monkeypatch.context() as patch:
        patch.setattr(places[where], killed)
        with pytest.raises(KeyboardInterrupt):
            pipeline.branch("level", 42)
    stages = tmp_path / "broken" / "stages"
    whole = [p for p in stages.rglob(FILE) if not p.parent.name.endswith(".partial")]
    assert len(whole) == (where == "branch")
    before = [p.stat().st_mtime_ns for p in whole]
    made = Pipeline(fields, tmp_path / "broken").branch("level", 42).folder
    assert [p.stat().st_mtime_ns for p in whole] == before
    assert len(list(stages.glob("levels-*"))) == 1
    for path in expected.rglob("*.safetensors"):
        assert (made / path.name).read_bytes() == path.read_bytes()


# --- levels that move ---------------------------------------------------------------------------


def moving(fields, **levels) -> dict:
    """A branch of several steps whose levels are read anew after every second one."""
    branch = fields["branches"]["unseen"]
    branch["schedule"]["epochs"] = 2
    branch["levels"] = {"of": "unseen", "every": 2, **levels}
    branch["keep"] = {"every": 2}
    fields["data"]["synthetic"] |= {"members": 2, "kept": 1, "nonmembers": 2, "unseen": 6}
    return fields


def test_levels_read_anew_are_those_of_the_weights_at_that_step(fields, tmp_path, monkeypatch):
    pipeline, seen = Pipeline(moving(fields), tmp_path), {}
    real = Releveller.take

    def noted(self, step):
        before = [level.clone() for level in self.levels]
        real(self, step)
        seen[step] = before, list(self.levels)

    monkeypatch.setattr(Releveller, "take", noted)
    folder = pipeline.branch("unseen", 42).folder.parent
    kept = snapshots(folder)
    assert list(seen) == list(kept)[:-1] == [2, 4]  # none after the last step, which is kept
    assert not (folder / FILE).exists()  # it was for a killed run
    first = read_levels(levels_of(pipeline, "unseen"))
    assert torch.equal(seen[2][0][0], first[0])
    for step, (before, now) in seen.items():
        model = load_model(pipeline.target.base)
        load_adapter(model, kept[step])
        items = encoded(pipeline, pipeline.sets.forget, pipeline.target.base)
        config = pipeline.recipe.branches["unseen"]
        tokenizer = load_tokenizer(pipeline.target.base)
        expected = pipeline.unseen_levels(config, items, tokenizer).now(model)
        torch.testing.assert_close(now, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(now[0], before[0], rtol=1e-5, atol=1e-5)  # control: it moved


@pytest.mark.parametrize("where", ["take", "reading", "after", "between"])
def test_killed_around_a_reading_of_levels_a_run_ends_with_the_same_bytes(
    fields, tmp_path, monkeypatch, where
):
    expected = Pipeline(moving(fields), tmp_path / "whole").branch("unseen", 42).folder
    places = {
        "take": (Releveller, "take", 0),
        "reading": (relevel, "save_file", 1),
        "after": (Keeper, "take", 1),
        "between": (trainer, "_clip", 3),
    }
    owner, name, calls = places[where]
    real = getattr(owner, name)

    def killed(*given, **options):
        nonlocal calls
        calls -= 1
        if calls < 0:
            raise KeyboardInterrupt
        return real(*given, **options)

    broken = Pipeline(fields, tmp_path / "broken")
    levels_of(broken, "unseen")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(KeyboardInterrupt):
            broken.branch("unseen", 42)
    made = Pipeline(fields, tmp_path / "broken").branch("unseen", 42).folder
    for path in expected.rglob("*.safetensors"):
        assert (made / path.name).read_bytes() == path.read_bytes()


def test_questions_take_levels_of_unseen_questions_where_there_are_some():
    def example(name: str, kind: str) -> Example:
        return Example(f"{name}{kind}0", "", name, "Task1")

    def counterpart(*unseen: Example) -> list[str]:
        forget = [example("a", "qa"), example("b", "sc"), example("c", "qa")]
        tokens = [[TokenSequence(one.id, (1, 2, 3), 0) for one in s] for s in (unseen, forget)]
        made = UnseenLevels.of(tokens[0], tokens[1], unseen, forget)
        return [unseen[place].answer for place in made.counterpart]

    assert counterpart(example("x", "sc"), example("y", "qa"), example("z", "sc")) == [
        "y",
        "z",
        "y",
    ]
    assert counterpart(example("x", "sc"), example("z", "sc")) == ["x", "z", "z"]


def test_texts_set_apart_give_levels_and_are_trained_on_by_no_term(fields, tmp_path):
    pipeline = Pipeline(moving(fields, apart=2), tmp_path)
    branch = pipeline.recipe.branches["unseen"]
    branch = branch.model_copy(update={"terms": (*branch.terms, NEUTRAL)})
    base = pipeline.original.base
    items, tokenizer = encoded(pipeline, pipeline.sets.forget, base), load_tokenizer(base)
    apart = [text.id for text in pipeline.unseen_levels(branch, items, tokenizer).unseen]
    read = pipeline.companions(branch, items, tokenizer, None)["neutral"].sequences
    names = [text.id for text in pipeline.sets.neutral]
    assert apart == [names[0], names[3]]
    assert [text.id for text in read] == [name for name in names if name not in apart]


def test_more_apart_than_there_are_is_refused_before_anything_is_computed(fields, tmp_path):
    with pytest.raises(RecipeError, match=r"levels.apart is 6, and data has 6 neutral texts"):
        _ = Pipeline(moving(fields, apart=6), tmp_path).sets


def test_a_lost_file_of_levels_is_an_error_and_not_other_levels(tmp_path):
    levels = [torch.zeros(3, 2)]
    releveller = Releveller(2, levels, lambda: [torch.ones(3, 2)], tmp_path, steps=8)
    assert [step for step in range(10) if releveller.due(step)] == [2, 4, 6]
    releveller.take(2)
    again = Releveller(2, [torch.zeros(3, 2)], list, tmp_path, steps=8)
    again.start(3)
    assert torch.equal(again.levels[0], torch.ones(3, 2))
    with pytest.raises(TrainingError, match="is of step 2 where 4 is wanted; delete"):
        again.start(5)
    (tmp_path / FILE).write_bytes(b"no tensors")
    with pytest.raises(TrainingError, match="cannot be read"):
        again.start(3)


def test_what_is_read_anew_is_foretold(fields, tmp_path):
    data = Encoded([], [], [TokenSequence(str(n), (1,) * n, 0) for n in (3, 5, 7, 9)], [])
    recipe = load_recipe(moving(fields, apart=2))
    branch = recipe.branches["unseen"]
    assert relevelling(branch, data, steps=7) == 3 * (3 + 7)
    assert relevelling(recipe.branches["other"], data, steps=7) == 0
    assert levelling(recipe.model_copy(update={"branches": {"unseen": branch}}), data) == 3 + 7


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("branch", "change", "says"),
    [
        ("level", {"tune": None}, "without tune that is the target itself; name a model that has"),
        (
            "unseen",
            {"tune": {"neutral_per_item": 1}},
            "takes levels of unseen texts, and tune learn",
        ),
        (
            "unseen",
            {"data": {"forget": {"path": "f.jsonl"}, "retain": {"path": "r.jsonl"}}},
            "takes levels of unseen texts, and data names none; give data.neutral",
        ),
    ],
)
def test_a_recipe_whose_levels_cannot_be_is_refused_when_it_is_read(fields, branch, change, says):
    one = {**fields, "branches": {branch: fields["branches"][branch]}}
    load_recipe(one)  # control
    with pytest.raises(RecipeError, match=says):
        load_recipe({**one, **change})
    held = {"tune": {"neutral_per_item": 1, "neutral_loss": "kl"}}
    load_recipe({**one, **held})


@pytest.mark.parametrize(
    ("made", "says"),
    [(False, "there is no model at"), (True, "has another vocabulary .258 tokens")],
)
def test_a_level_model_that_cannot_be_is_refused_before_anything_is_computed(
    fields, tmp_path, tiny_folder, made, says
):
    other = tmp_path / "other"
    if made:
        shutil.copytree(tiny_folder, other)
        tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
        text = tokenizer.backend_tokenizer.to_str()
        swapped = json.loads(text)
        swapped["model"]["vocab"]["ab"] = len(swapped["model"]["vocab"])
        (other / "tokenizer.json").write_text(json.dumps(swapped))
    fields["branches"]["level"]["levels"] = {"of": str(other)}
    with pytest.raises(ExpungeError, match=says) as error:
        Pipeline(fields, tmp_path / "run").branch("level", 42)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "run" / "stages").glob("[!d]*"))


def test_a_recipe_with_levels_can_be_written_and_read_again(fields, tmp_path):
    recipe = load_recipe(fields)
    path = tmp_path / "levels.yaml"
    path.write_text(recipe_text(recipe))
    assert load_recipe(path) == recipe


def test_a_plan_foretells_the_stage_and_its_cost(fields, tmp_path):
    fields["evaluate"] = {"max_new_tokens": 4, "resamples": 20}
    made = plan(load_recipe(fields), tmp_path / "run")
    stages = [stage.stage for stage in made.stages]
    assert stages.count("levels") == 2  # of the original, and of unseen texts
    assert stages.index("levels") < stages.index("level")
    levels = [stage for stage in made.stages if stage.stage == "levels"]
    assert all(
        stage.seconds > 0 and stage.memory_bytes > 0 and stage.seed is None for stage in levels
    )
