"""A run of a tiny model, made once: two branches with snapshots, a merge, scores."""

import pytest

import expunge

TERMS = [{"half": "forget", "loss": "npo"}, {"half": "retain", "loss": "nll"}]


@pytest.fixture(scope="session")
def run_fields(tiny_folder) -> dict:
    """A recipe small enough to run in a second or two."""
    branch = {
        "terms": TERMS,
        "lora": {"rank": 2, "alpha": 4, "dropout": 0},
        "schedule": {"epochs": 2, "micro_batch": 4, "accumulation": 2},
        "optimizer": {"lr": 1e-2, "compute": "float32"},
        "keep": {"epochs": True},
    }
    watched = {**branch, "watch": {"every": 1}, "schedule": {"epochs": 1, "micro_batch": 4}}
    return {
        "name": "tiny",
        "model": {"path": str(tiny_folder), "max_length": 400, "separator": " "},
        "data": {"synthetic": {"documents": 1, "nonmembers": 2}},
        "branches": {"strong": branch, "weak": watched},
        "merges": {"merged": {"method": "ties", "density": 0.5}},
        "evaluate": {"max_new_tokens": 4, "resamples": 20},
    }


@pytest.fixture(scope="session")
def finished_run(run_fields, tmp_path_factory):
    """The folder of a finished run; not to be changed."""
    out = tmp_path_factory.mktemp("analysing") / "run"
    expunge.run(run_fields, out)
    return out
