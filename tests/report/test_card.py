"""Model cards, read back by huggingface_hub: nothing unmeasured, nothing hostile."""

import re
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from expunge.report.card import Facts, SetFacts, model_card, plain
from expunge.report.results import TERMS, ModelResults

FACTS = Facts(
    name="weak",
    recipe="demo",
    seed=42,
    kind="branch",
    made_from=("target",),
    adapter=True,
    start="owner/base",
    base="stages/target-00ff/model",
    base_id="owner/base",
    tuned=True,
    sets=(
        SetFacts("forget", 12, 3, "invented, seed 7"),
        SetFacts("retain", 24, 6, "locuslab/TOFU retain90"),
    ),
    section="terms:\n- half: forget\n  loss: npo\n",
    provenance={"expunge": "0.1.0", "commit": "abc1234567", "seed": "42"},
    datasets=("locuslab/TOFU",),
    license="apache-2.0",
    language=("en",),
)


@pytest.fixture
def measured() -> ModelResults:
    return ModelResults.model_validate(
        {
            "semeval": {
                "terms": dict.fromkeys(TERMS, None) | {"forget/Task1/sc": 0.125},
                "counts": {"forget/Task1/sc": 8},
                "intervals": {"forget/Task1/sc": {"low": 0.0625, "high": 0.25}},
                "task_aggregate": 0.75,
                "mia": {"auc": 0.5625, "score": 0.875, "low": 0.5, "high": 0.625, "n": 40},
                "mmlu": {"accuracy": 0.25, "n": 57, "sampled": True},
                "final": 0.625,
            },
            "collapse": {"collapsed": False},
        }
    )


def numbers(card: str) -> dict[tuple[str, str], float]:
    found = ModelCard(card).data.eval_results or []
    return {(r.dataset_config, r.metric_type): r.metric_value for r in found}


def test_the_metadata_come_back_as_they_were(measured):
    data = ModelCard(model_card(FACTS, measured)).data.to_dict()
    assert data["base_model"] == "owner/base"
    assert data["library_name"] == "peft"
    assert data["license"] == "apache-2.0"
    assert data["base_model_relation"] == "adapter"
    assert data["tags"] == ["unlearning", "expunge", "branch", "lora"]
    assert (data["language"], data["datasets"]) == (["en"], ["locuslab/TOFU"])
    whole = replace(FACTS, adapter=False, base_id=None, license=None, language=(), datasets=())
    said = ModelCard(model_card(whole, measured)).data.to_dict()
    assert said["library_name"] == "transformers"
    assert not {"base_model", "base_model_relation", "license", "language", "datasets"} & set(said)


def test_mmlu_and_the_final_score_have_intervals(measured):
    """Wilson's of 57 questions; the final score's where its three parts have one."""

    def final(**changed):
        content = measured.model_dump()
        content["semeval"]["intervals"]["task_aggregate"] = {"low": 0.7, "high": 0.8}
        card = model_card(FACTS, ModelResults.model_validate(content | changed))
        assert "| 0.250 | 0.156 to 0.376 | 57" in card
        return next(row for row in card.splitlines() if "final ↑" in row)

    assert "| 0.625 | 0.570 to 0.686 |" in final()
    assert " to " not in final(collapse={"collapsed": True, "reasons": ["loops"]})
    plain = model_card(FACTS, measured).splitlines()
    assert " to " not in next(row for row in plain if "final ↑" in row)  # an aggregate without one


def test_every_measured_number_and_its_interval_is_in_the_index(measured):
    card = model_card(FACTS, measured)
    assert numbers(card) == {
        ("forget/Task1/sc", "rouge"): 0.125,
        ("membership", "roc_auc"): 0.5625,
        ("mmlu", "accuracy"): 0.25,
        ("SemEval-2025 Task 4", "task_aggregate"): 0.75,
        ("SemEval-2025 Task 4", "final_score"): 0.625,
    }
    first = ModelCard(card).data.eval_results[0]
    assert first.metric_args == {"low": 0.0625, "high": 0.25, "n": 8}
    assert "| 0.125 | 0.062 to 0.250 | 8 |" in card
    assert "| 0.562 | 0.500 to 0.625 | 40 |" in card
    assert "57 (sample)" in card


def test_what_it_was_before_stands_beside(measured):
    before = ModelResults.model_validate({"semeval": {"terms": {"forget/Task1/sc": 1.0}}})
    assert "| 1.000 | 0.125 |" in model_card(FACTS, measured, before)
    assert "| – | 0.125 |" in model_card(FACTS, measured)


@pytest.mark.parametrize("results", [None, ModelResults()])
def test_before_evaluation_there_is_no_number(results):
    card = model_card(FACTS, results)
    assert "It has not been evaluated" in card
    assert "Nothing has been measured" in card
    assert ModelCard(card).data.eval_results is None
    assert "model-index" not in card


def test_a_collapsed_model_has_no_aggregate(measured):
    fallen = {"collapsed": True, "reasons": ("retain: looping 0.9 > 0.5",)}
    gone = measured.model_copy(update={"collapse": type(measured.collapse).model_validate(fallen)})
    card = model_card(FACTS, gone)
    assert "COLLAPSED: it is destroyed" in card
    assert {metric for _, metric in numbers(card)} == {"rouge", "roc_auc", "accuracy"}
    assert "0.625 |" not in card.split("final ↑")[1]
    assert "collapsed" in ModelCard(card).data.tags
    assert "collapsed" not in ModelCard(model_card(FACTS, measured)).data.tags  # control


HOSTILE = [
    "<script>alert(1)</script>",
    "a\n---\nlicense: mit\n---\n# Title",
    "[click](https://evil.example) www.evil.example",
    "x | y `code` **bold** ![i](u)",
    'quo"te: {a: [b',
    "</td>\x1b[31m\u202e",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_names_stay_text(text, measured):
    facts = replace(
        FACTS,
        name=text,
        start=text,
        base=text,
        made_from=(text,),
        sets=(SetFacts("forget", 1, 1, text),),
        section=f"x: {text}\n````\n<b>",
        provenance={"a": text},
    )
    card = ModelCard(model_card(facts, measured))
    assert card.data.license == "apache-2.0"
    outside = card.text.split("## How")[0] + card.text.split("## Load it")[1]
    assert "<" not in outside.replace("&lt;", "")
    assert not re.search(r"(?<!\\)\]\(", outside)
    assert "\x1b" not in outside
    assert "\u202e" not in outside
    assert "`````yaml" in card.text  # a longer fence than any within
    assert [line for line in outside.splitlines() if line.startswith("# ")] == [
        f"# demo: {plain(text)}"
    ]


def test_plain_text_is_left_as_it_is():
    assert plain("forget Task1 completion 0.5 (n=3): ok") == "forget Task1 completion 0.5 (n=3): ok"
    assert plain("a|b<c> https://x") == "a&#124;b&lt;c> https:\\//x"
