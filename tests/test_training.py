"""How a branch reads its texts: as the model section cuts them, or longer."""

import copy

import pytest

from expunge import models
from expunge.pipeline import Pipeline
from expunge.plan.work import encoded

CUT = {"max_length": 24, "prompt_tail": 8}
WHOLE = {"max_length": 400, "prompt_tail": None}


@pytest.fixture
def fields(tiny_folder) -> dict:
    shared = {
        "terms": [
            {"half": "forget", "loss": "match_profile", "scope": "document"},
            {"half": "retain", "loss": "kl", "scope": "document"},
            {"half": "neutral", "loss": "kl", "scope": "document"},
        ],
        "levels": {"of": "unseen", "every": 2, "apart": 2},
        "lora": {"rank": 2, "alpha": 4, "dropout": 0},
        "schedule": {"epochs": 1, "micro_batch": 2, "accumulation": 1},
        "optimizer": {"lr": 1e-3, "compute": "float32"},
    }
    return {
        "name": "reading",
        "model": {"path": str(tiny_folder), "separator": " ", **CUT},
        "data": {
            "synthetic": {"documents": 1, "members": 2, "kept": 1, "nonmembers": 2, "unseen": 4}
        },
        "branches": {"short": shared, "long": {**shared, "max_length": 400}},
    }


def test_a_branch_with_a_length_of_its_own_is_that_of_a_model_read_so(fields, tmp_path):
    whole = copy.deepcopy(fields)
    whole["model"] |= WHOLE
    cut, uncut = Pipeline(fields, tmp_path / "cut"), Pipeline(whole, tmp_path / "whole")

    def written(pipeline: Pipeline, name: str) -> bytes:
        (found,) = pipeline.branch(name, 42).folder.glob("*.safetensors")
        return found.read_bytes()

    assert written(cut, "long") == written(uncut, "short") == written(uncut, "long")
    assert written(cut, "short") != written(cut, "long")  # control: what is cut makes a difference


def test_what_a_branch_reads_longer_is_foretold(fields, tmp_path):
    pipeline = Pipeline(fields, tmp_path)
    tokenizer = models.load_tokenizer(pipeline.original.base)
    data = encoded(pipeline, tokenizer)
    cut, whole = ([len(text.tokens) for text in data.by(n).forget] for n in ("short", "long"))
    assert max(cut) <= CUT["max_length"] < max(whole)
    assert len(data.halves("long", tmp_path).levels[0]) == whole[0] - 1
    neutral = {name: sets["neutral"].sequences for name, sets in data.companions.items()}
    longest = {name: max(len(text.tokens) for text in of) for name, of in neutral.items()}
    assert longest["short"] <= CUT["max_length"] < longest["long"]
