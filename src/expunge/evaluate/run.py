"""Evaluate one model on disk: read what is missing, measure, and write numbers and items.

A folder of results holds `results.json` (the model, and each suite's numbers and facts) and
`items.jsonl` (one row for each item of each suite).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import expunge
from expunge import models, parallel, provenance, runs
from expunge.config import Section
from expunge.disk import readable_errors
from expunge.errors import EvaluationError
from expunge.evaluate.generate import MAX_BATCH
from expunge.evaluate.numbers import Measured
from expunge.evaluate.reader import open_reader
from expunge.evaluate.semeval_suite import Semeval
from expunge.evaluate.suites import SUITES, measure

RESULTS, ITEMS = "results.json", "items.jsonl"


def evaluate_model(
    model: str,
    sections: Mapping[str, Section],
    *,
    adapter: Path | None = None,
    dtype: str = "float32",
    cache: Path | None = None,
    out: Path | None = None,
    backend: str = "torch",
    guard: Path | None = None,
    max_batch: int = MAX_BATCH,
) -> dict[str, Any]:
    """Measure a model (id, folder or GGUF, and perhaps an adapter on it) by some suites.

    All is asked through `guard`, the folder of one, where it is given.

    What the model said is kept in `cache`, so that another suite or another definition of a metric
    reads no text twice. Returns what results.json holds.
    """
    if not sections:
        raise EvaluationError(f"name a suite to measure: --suite {','.join(SUITES)}")
    if dtype not in models.DTYPES:
        raise EvaluationError(f"dtype {dtype!r} is none of {', '.join(models.DTYPES)}")
    if out is not None:
        _check_free(out)
    folder = cache if cache is not None else models.cache_folder() / "tables"
    reader = open_reader(
        models.resolve(model),
        adapter,
        dtype=cast(models.Dtype, dtype),
        folder=folder,
        backend=backend,
        guard=guard,
        max_batch=min([max_batch, *_batches(sections)]),
    )
    found = measure(reader, sections)
    results = {
        "model": model,
        "adapter": str(adapter) if adapter else None,
        "guard": str(guard) if guard else None,
        "weights": reader.key,
        "version": expunge.__version__,
        "created": provenance.now(),
        "backend": backend,
        "read": round(parallel.total({"read": reader.forwards})["read"]),
        "suites": {
            name: {"settings": sections[name].model_dump(mode="json"), **measured.as_json()}
            for name, measured in found.items()
        },
    }
    if out is not None:
        _write(out, results, found)
    return results


def _batches(sections: Mapping[str, Section]) -> list[int]:
    """What the sections themselves say of how many prompts are continued at once."""
    own = [one.evaluate for one in sections.values() if isinstance(one, Semeval)]
    return [one.max_batch for one in own if "max_batch" in one.model_fields_set]


def numbers_of(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Every number of some results by its full name, as in `semeval.forget.Task1.sc`."""
    return {
        f"{suite}.{name}": number
        for suite, measured in results["suites"].items()
        for name, number in measured["numbers"].items()
    }


def read_run(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The results and the items that were written to a folder."""
    if not (folder / RESULTS).is_file() or not (folder / ITEMS).is_file():
        raise EvaluationError(
            f"{folder} holds no {RESULTS} and {ITEMS}; expunge evaluate MODEL --out writes them"
        )
    return runs.read_json(folder / RESULTS), read_items(folder / ITEMS)


def read_items(path: Path) -> list[dict[str, Any]]:
    """The rows of an items.jsonl; one that is no object is an `EvaluationError`, a broken
    line a `RunError`."""
    rows = runs.read_json_lines(path)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise EvaluationError(f"{path}, line {number} is no item")
    return rows


def _check_free(out: Path) -> None:
    """Refuse to write over the results of a run."""
    held = runs.read_json(out / RESULTS) if (out / RESULTS).is_file() else {}
    if (out / "run.json").exists() or (isinstance(held, dict) and "models" in held):
        raise EvaluationError(f"{out} holds a run and its results; choose another --out")


def _write(out: Path, results: dict[str, Any], found: Mapping[str, Measured]) -> None:
    rows: Sequence[dict[str, Any]] = [
        {"suite": name, **row} for name, measured in found.items() for row in measured.items
    ]
    with readable_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        runs.write_text(out / ITEMS, lines)
        runs.write_json(out / RESULTS, results)
