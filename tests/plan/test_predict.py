"""What a plan counts is what a run does, and a run that is planned says how wrong the plan was."""

import json
from dataclasses import replace

import pytest

import expunge
from expunge.data.batches import encode
from expunge.data.examples import Example
from expunge.lora import Lora, adapters_of
from expunge.models import load_tokenizer
from expunge.pipeline import Pipeline
from expunge.plan import pace, settings
from expunge.plan.folder import Seen
from expunge.plan.outcome import run_as_planned
from expunge.plan.pace import Pace
from expunge.plan.predict import _Foreteller, demands_of, plan, write_plan
from expunge.plan.rates import Rates
from expunge.plan.settings import Settings, with_settings, write_recipe
from expunge.plan.shown import print_plan
from expunge.plan.work import encoded, reading, tuning, unlearning
from expunge.recipe import load_recipe
from expunge.unlearn.fit import SPARE
from expunge.unlearn.footprint import Demand, Shape, shape_of
from expunge.unlearn.optimizer import Optimizer
from expunge.unlearn.passes import Passes
from expunge.unlearn.watch import Watch

LABELS = [
    ("evaluate-original", 42),
    ("target", None),
    ("evaluate-target", 42),
    ("strong", 42),
    ("evaluate-strong", 42),
    ("merged", 42),
    ("evaluate-merged", 42),
]


def test_steps_and_tokens_are_those_that_training_forwards(recipe, tmp_path, monkeypatch):
    forwarded = []
    backward = Passes.backward

    def counted(self, batches, scale=None):
        forwarded.extend(self._tokens(batch) for batch in batches)
        return backward(self, batches, scale)

    monkeypatch.setattr(Passes, "backward", counted)
    pipeline = Pipeline(recipe, tmp_path)
    data = encoded(pipeline, load_tokenizer(pipeline.original.base))
    halves = data.halves("strong", tmp_path)
    work = tuning(recipe.tune, data), unlearning(recipe.branches["strong"], halves, 42)
    for training, make in zip(
        work, (lambda: pipeline.target, lambda: pipeline.branch("strong", 42)), strict=True
    ):
        forwarded.clear()
        done = make().folder.parent
        assert training.tokens == sum(forwarded)
        assert training.steps == len((done / "log.jsonl").read_text().splitlines())
    assert work[0].reference_tokens == 0
    assert work[1].reference_tokens == sum(len(s.tokens) for s in (*data.forget, *data.retain))


def test_a_plan_names_every_stage_and_changes_nothing(recipe, tmp_path, capsys):
    made = plan(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert [stage.label for stage in made.stages] == LABELS
    assert all(stage.seconds > 0 and stage.memory_bytes > 0 for stage in made.stages)
    assert all(stage.least < stage.seconds for stage in made.stages if stage.steps)
    assert made.seconds == pytest.approx(sum(stage.seconds for stage in made.stages))
    assert json.loads(json.dumps(made.as_json()))["least_seconds"] < made.seconds
    for budget, verdict in ((3600, "enough for every step"), (0.1, "too little: the least is")):
        print_plan(replace(made, budget=budget), as_json=False, kept=budget > 1)
        shown = " ".join(capsys.readouterr().out.split())
        assert f"a budget of {budget:.0f} s is {verdict}" in shown
        assert f"total – {made.seconds:.1f}" in shown
        assert ("is stated only with --out DIR" in shown) == (budget < 1)


@pytest.mark.parametrize("until", [None, {}])
@pytest.mark.parametrize("read", ["losses", "evaluation"])
def test_evaluations_during_training_are_foretold(recipe, tmp_path, read, until):
    """Those that no budget leaves out, before the first step and after the last, as fixed."""
    watch = Watch(every=3, at=(1,), read=read, until=until)
    branch = recipe.branches["strong"]
    stages = []
    for one in (branch, branch.model_copy(update={"watch": watch})):
        pipeline = Pipeline(recipe.model_copy(update={"branches": {"strong": one}}), tmp_path)
        tokenizer = load_tokenizer(pipeline.original.base)
        data = encoded(pipeline, tokenizer)
        demands = demands_of(pipeline.recipe, data)
        rates = Rates(shape_of(pipeline.original.base), {"float32": 1.0}, {"strong": 1e-9})
        rates.scale, rates.plain, rates.adapted = {"strong": 1.0}, Pace(read=1.0), Pace(read=2.0)
        seen = Seen("strong", 42, tmp_path / "strong-0", False)
        stages.append(_Foreteller(pipeline, rates, data, demands).stage(seen, tokenizer))
    each = sum(len(text.tokens) for text in (*data.forget, *data.retain))
    if read == "evaluation":
        each += 2 * reading("strong", pipeline, data, tokenizer).read
    steps = stages[0].steps
    ends = 0 if until is None else 2
    looks = len({1, *range(3, steps + 1, 3)}) - (steps % 3 == 0 and ends > 0)
    assert stages[1].fixed - stages[0].fixed == pytest.approx(ends * each)
    assert stages[1].training - stages[0].training == pytest.approx(looks * each)


def test_scoring_an_adapter_is_foretold_by_what_adapters_take(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("expunge.plan.rates.pace_of", lambda *given: Pace(read=1.0))
    monkeypatch.setattr("expunge.plan.rates.adapted_pace", lambda *given: Pace(read=2.0))
    assert recipe.adapters == {"target": False, "strong": True, "merged": True}
    seconds = {stage.stage: stage.seconds for stage in plan(recipe, tmp_path / "run").stages}
    plain = seconds["evaluate-target"]
    assert seconds["evaluate-strong"] == pytest.approx(2 * plain, rel=0.02)
    assert seconds["evaluate-merged"] == pytest.approx(2 * plain, rel=0.02)


def test_the_pace_of_adapters_is_taken_with_one_on_the_model_and_leaves_none(tiny, tokenizer):
    texts = [encode(Example(str(n), "ask", "answer"), tokenizer, max_length=64) for n in range(4)]
    seen, real = [], pace.score_texts

    def noted(model, *given, **options):
        seen.append(len(adapters_of(model)))
        return real(model, *given, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pace, "score_texts", noted)
        found = pace.adapted_pace(tiny, tokenizer, texts, 2, Lora(rank=2))
        plain = pace.pace_of(tiny, tokenizer, texts, 2)
    assert found.read > 0
    assert plain.read > 0
    assert seen == [14, 14, 0, 0]


def test_a_planned_run_says_how_wrong_the_plan_was(recipe, tmp_path):
    out = tmp_path / "run"
    expunge.tune(recipe, out)
    made = plan(recipe, out)
    target = next(stage for stage in made.stages if stage.stage == "target")
    assert (target.seconds, target.how) == (0.0, "finished")
    write_plan(made, out)
    _, rows = run_as_planned(recipe, out, None, 0.0)
    assert [(r["stage"], r["seed"]) for r in rows] == [x for x in LABELS if x[0] != "target"]
    for row in rows:
        assert row["actual s"] > 0
        assert row["actual GB"] > 0.1
        error = 100 * (row["predicted s"] - row["actual s"]) / row["actual s"]
        assert row["error %"] == pytest.approx(error, abs=100 * 0.06 / row["actual s"])
    assert json.loads((out / "plan.json").read_text())["outcome"] == rows


def test_a_plan_of_another_recipe_is_compared_with_nothing(recipe, tmp_path):
    made = plan(recipe, tmp_path)
    write_plan(replace(made, stages=[replace(s, key="0" * 12) for s in made.stages]), tmp_path)
    assert run_as_planned(recipe, tmp_path, None, 0.0)[1] == []


def test_a_run_without_a_plan_has_nothing_to_compare(recipe, tmp_path):
    assert run_as_planned(recipe, tmp_path / "run", None, 0.0)[1] == []


@pytest.mark.parametrize("native", [True, False])
def test_float32_is_advised_where_a_narrow_type_is_emulated(monkeypatch, native):
    monkeypatch.setattr(settings, "product_type", lambda: "bfloat16" if native else "float32")
    shape = Shape(2, 32, 16, 48, 4, 257, 10**6)
    given = {"passes": ((64,) * 8,), "piece": 64, "longest": 64, "rank": 2, "dropout": True}
    held = Demand(Optimizer(max_tokens=64), "bfloat16", **given)
    stages = {"narrow": held, "wide": replace(held, weights="float32")}
    rates = Rates(shape, scale=dict.fromkeys(stages, 1.0))
    narrow, wide = settings.settings_of(stages, rates)
    assert narrow.change == {"max_tokens": 512}
    assert "optimizer.max_tokens: 512 needs" in narrow.sentence
    assert "draws other dropout masks" in narrow.sentence
    assert ("model.dtype: float32 is faster and needs" in narrow.sentence) == (not native)
    assert "model.dtype" not in wide.sentence
    room = int(narrow.change_needs_bytes / (1 - SPARE)) + 1
    monkeypatch.setattr(settings, "room_bytes", lambda: room)
    (full,) = settings.settings_of({"narrow": held}, rates)
    assert full.change == narrow.change
    assert "model.dtype" not in full.sentence  # there is no room for it


def test_the_picked_settings_are_written_into_the_recipe(recipe, tmp_path):
    picked = [
        Settings("target", False, 9, 5, {"max_tokens": 512}, 4),
        Settings("strong", True, 3, 5, {"compute": "bfloat16"}, 2),
    ]
    write_recipe(recipe, picked, tmp_path / "picked.yaml")
    read = load_recipe(tmp_path / "picked.yaml")
    assert read == with_settings(recipe, picked)
    assert read.tune.optimizer.max_tokens == 512
    assert read.branches["strong"].optimizer.compute == "bfloat16"
    kept = read.branches["strong"].optimizer.model_copy(update={"compute": "float32"})
    assert kept == recipe.branches["strong"].optimizer
    assert "does not fit" in picked[0].sentence
    assert "optimizer.max_tokens: 512" in picked[0].sentence
