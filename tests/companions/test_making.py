"""Sets as training takes them; recipes that ask for a set; a plan that counts it."""

from pathlib import Path

import pytest

from expunge.companions.making import COMPANIONS, Making, companion_sets
from expunge.data.batches import encode
from expunge.data.examples import Example
from expunge.data.sets import Sets
from expunge.errors import RecipeError
from expunge.pipeline import Pipeline
from expunge.plan.predict import plan
from expunge.plan.work import encoded, unlearning
from expunge.recipe import load_recipe
from expunge.unlearn.companions import Companions, with_companions
from expunge.unlearn.passes import Passes
from expunge.unlearn.schedule import MicroBatch
from expunge.unlearn.sets import SETS

METHODS = sorted((Path(__file__).parents[2] / "recipes" / "methods").glob("*.yaml"))
FORGET = [Example(f"f{n}-qa0", f"Who is {w}?", w[::-1]) for n, w in enumerate(["ann", "bob", "cy"])]
RETAIN = [Example(f"r{n}-qa0", f"Where is {w}?", w[::-1]) for n, w in enumerate(["oslo", "rome"])]
NEUTRAL = [Example(f"n{n}", "", text) for n, text in enumerate(["Ice floats.", "Bees hum."])]
ALTERNATES = [["up", "down"], ["left"], ["in", "out"]]


def made(tokenizer, *names, forget=FORGET, **companions):
    def encoded(examples):
        return [encode(example, tokenizer, max_length=200) for example in examples]

    sets = Sets(forget, RETAIN, [], [], NEUTRAL)
    config = Companions.model_validate(companions)
    making = Making(sets, encoded(forget), config, encoded, tokenizer, ALTERNATES)
    return companion_sets(names, making)


def texts(tokenizer, own, item):
    """(prompt, answer) of every sequence of every companion of an item."""
    chosen = [[own.sequences[i] for i in companion] for companion in own.of[item]]
    return [
        [
            (
                tokenizer.decode(s.tokens[: s.answer_start]),
                tokenizer.decode(s.tokens[s.answer_start :]),
            )
            for s in companion
        ]
        for companion in chosen
    ]


def test_every_set_of_the_table_has_a_maker():
    assert set(COMPANIONS) == set(SETS) - {"forget", "retain"}


@pytest.mark.parametrize("half", [half for half in SETS if half not in ("forget", "retain")])
def test_every_set_keeps_the_prompts_and_has_ids_of_its_own(half, tokenizer):
    own = made(tokenizer, half)[half]
    assert len({sequence.id for sequence in own.sequences}) == len(own.sequences)
    if not own.common:
        assert len(own.of) == len(FORGET)
        for item, example in enumerate(FORGET):
            for companion in texts(tokenizer, own, item):
                assert len(companion) == SETS[half].width
                assert {prompt for prompt, _ in companion} == {example.prompt}


def test_companions_of_a_question_are_questions_whatever_their_prompt_ends_in(tokenizer):
    items = [
        Example("f0-qa0", "Tell me who ann is.", "nna"),
        Example("f1-sc0", "Is it? It", "is so."),
        Example("f2-qa0", "Who is cy?", "yc"),
    ]
    for half in ("refusal", "refusal_pair", "alternate_pair", "mismatch", "random_label"):
        own = made(tokenizer, half, forget=items)[half]
        for item, example in enumerate(items):
            for companion in own.of[item]:
                kinds = {own.sequences[i].asks for i in companion}
                assert kinds == {example.kind == "qa"}, (half, example.id)


def test_a_pair_is_a_wanted_answer_and_the_true_one(tokenizer):
    own = made(tokenizer, "alternate_pair")["alternate_pair"]
    for item, example in enumerate(FORGET):
        answers = [[answer for _, answer in pair] for pair in texts(tokenizer, own, item)]
        assert answers == [[f"{y}<end>", f"{example.answer}<end>"] for y in ALTERNATES[item]]


def test_neutral_texts_go_round(tokenizer):
    sets = made(tokenizer, "neutral", neutral={"each": 1})
    steps = [[MicroBatch((0,), (0,)), MicroBatch((1,), (1,))], [MicroBatch((2,), (0,))]]
    found = [[batch["neutral"] for batch in step] for step in with_companions(steps, sets)]
    assert found == [[(0,), (1,)], [(0,)]]


# --- recipes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_a_recipe_of_a_method_reads(path):
    assert load_recipe(path).name == path.stem


def fields(tiny_folder, *terms, **companions) -> dict:
    optimizer = {"lr": 1e-3, "compute": "float32", "checkpoint_seconds": 0}
    return {
        "name": "tiny",
        "model": {"path": str(tiny_folder), "max_length": 400, "separator": " "},
        "data": {"synthetic": {"documents": 1, "nonmembers": 2}},
        "branches": {
            "b": {
                "terms": terms,
                "companions": companions,
                "lora": {"rank": 2, "alpha": 4},
                "schedule": {"epochs": 1, "micro_batch": 2, "accumulation": 2},
                "optimizer": optimizer,
            }
        },
        "evaluate": {"max_new_tokens": 4, "resamples": 20},
    }


NEUTRAL_TERM = {"half": "neutral", "loss": "kl"}


@pytest.mark.parametrize(
    ("terms", "companions", "message"),
    [
        (
            [{"half": "forget", "loss": "npo"}, NEUTRAL_TERM],
            {},
            "'b' reads neutral texts, and data",
        ),
        ([NEUTRAL_TERM], {}, r"at least one half: forget \(or one of forget, refusal"),
        ([{"half": "refusal", "loss": "npo"}], {}, "no refusal loss is called 'npo'"),
        (
            [{"half": "refusal", "loss": "nll"}],
            {"refusal": {"file": "/none.txt"}},
            "companions.refusal.file: there is no data file at /none.txt",
        ),
        (
            [{"half": "refusals", "loss": "nll"}],
            {},
            "Input should be 'forget', 'retain', 'refusal'",
        ),
    ],
)
def test_a_set_that_cannot_be_made_is_refused_when_the_recipe_is_read(
    tiny_folder, terms, companions, message
):
    data = {"forget": "f.jsonl", "retain": "r.jsonl"}
    with pytest.raises(RecipeError, match=message):
        load_recipe({**fields(tiny_folder, *terms, **companions), "data": data})


def test_a_changed_file_of_refusals_is_another_stage(tiny_folder, tmp_path):
    path = tmp_path / "refusals.txt"
    path.write_text("No.\n")
    terms = [{"half": "refusal", "loss": "nll"}]
    recipe = fields(tiny_folder, *terms, refusal={"file": str(path)})
    first = Pipeline(recipe, tmp_path / "run").branch("b", 1).folder
    assert Pipeline(recipe, tmp_path / "run").branch("b", 1).folder == first
    path.write_text("Never.\n")
    assert Pipeline(recipe, tmp_path / "run").branch("b", 1).folder != first


def test_a_plan_counts_the_companions_that_a_run_forwards(tiny_folder, tmp_path, monkeypatch):
    terms = [
        {"half": "alternate_pair", "loss": "dpo"},
        {"half": "mismatch", "loss": "nll"},
        {"half": "neutral", "loss": "kl"},
        {"half": "retain", "loss": "nll"},
    ]
    alternate = {"count": 2, "max_new_tokens": 8, "attempts": 1}
    recipe = load_recipe(fields(tiny_folder, *terms, alternate=alternate))
    made = plan(recipe)
    assert [s.stage for s in made.stages][1:3] == ["alternates", "b"]
    assert all(stage.seconds > 0 and stage.memory_bytes > 0 for stage in made.stages)

    terms[0] = {"half": "refusal_pair", "loss": "dpo"}  # whose lengths are known beforehand
    pipeline = Pipeline(fields(tiny_folder, *terms), tmp_path)
    from expunge.models import load_tokenizer

    data = encoded(pipeline, load_tokenizer(pipeline.original.base))
    halves = data.halves("b", tmp_path)
    work = unlearning(pipeline.recipe.branches["b"], halves, 42)
    forwarded = []
    backward = Passes.backward

    def counted(self, batches, scale):
        forwarded.extend(self._tokens(self.objective.read(batch)) for batch in batches)
        return backward(self, batches, scale)

    monkeypatch.setattr(Passes, "backward", counted)
    pipeline.branch("b", 42)
    assert work.tokens == sum(forwarded)
    read = [s for half in ("refusal_pair", "neutral") for s in halves.of(half)]
    assert work.reference_tokens == sum(len(sequence.tokens) for sequence in read)
