"""A recipe of the tiny model whose stages take a second or less."""

import pytest

from expunge.recipe import Recipe, load_recipe

OPTIMIZER = {"lr": 1e-3, "compute": "float32", "checkpoint_seconds": 0}


@pytest.fixture
def fields(tiny_folder) -> dict:
    terms = [
        {"half": "forget", "loss": "npo"},
        {"half": "retain", "loss": "nll"},
        {"half": "retain", "loss": "kl"},
    ]
    return {
        "name": "tiny",
        "model": {"path": str(tiny_folder), "max_length": 400, "separator": " "},
        "data": {"synthetic": {"documents": 1, "nonmembers": 2}},
        "tune": {"epochs": 2, "batch": 4, "optimizer": OPTIMIZER},
        "branches": {
            "strong": {
                "terms": terms,
                "lora": {"rank": 2, "alpha": 4},
                "schedule": {"epochs": 2, "micro_batch": 2, "accumulation": 2},
                "optimizer": OPTIMIZER,
            }
        },
        "merges": {"merged": {"method": "ties", "of": ["strong"]}},
        "evaluate": {"max_new_tokens": 4, "resamples": 20},
    }


@pytest.fixture
def recipe(fields) -> Recipe:
    return load_recipe(fields)
