"""Reports of runs: finished, killed, and one of several."""

import json
from pathlib import Path

import pytest

import expunge
from expunge.errors import RunError
from expunge.pipeline import Pipeline
from expunge.report.tables import column_names, results_tables
from expunge.reporting import materials, write_reports


@pytest.fixture
def fields(tiny_folder) -> dict:
    branch = {
        "terms": [{"half": "forget", "loss": "npo"}, {"half": "retain", "loss": "nll"}],
        "lora": {"rank": 2, "alpha": 4},
        "schedule": {"epochs": 1},
        "watch": {"at": [0, 1]},
    }
    return {
        "name": "tiny",
        "model": {"path": str(tiny_folder), "max_length": 400, "separator": " "},
        "data": {"synthetic": {"documents": 1, "nonmembers": 2}},
        "branches": {"strong": branch, "weak": branch},
        "merges": {"merged": {"method": "ties"}},
        "evaluate": {"max_new_tokens": 4, "resamples": 5},
    }


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_killed_run_is_reported_as_far_as_it_got(fields, tmp_path):
    pipeline = Pipeline(fields, tmp_path)
    pipeline.evaluate("target", pipeline.target)
    pipeline.branch("strong", 42)
    (tmp_path / "stages" / "evaluate-strong-0123.partial").mkdir()
    before = files(tmp_path / "stages")
    ((material, page),) = write_reports(tmp_path)
    assert list(material.results.models) == ["target", "strong"]
    assert set(material.items) == {"target"}
    assert material.missing == (
        "strong is made, not measured: evaluate-strong was not begun",
        "weak is not made: weak was not begun",
        "merged is not made: weak was not begun",
    )
    assert {stage["stage"] for stage in material.results.stages} >= {"data", "strong"}
    text = page.read_text()
    assert column_names(material.results) == ["before"]  # strong is not measured
    assert "This run is not finished" in text and "weak was not begun" in text
    assert 'data-chart="trajectory-strong-' in text
    assert files(tmp_path / "stages") == before  # nothing was trained or measured
    assert not (tmp_path / "results.json").exists()


def test_a_run_that_has_only_begun_has_a_page(fields, tmp_path):
    Pipeline(fields, tmp_path)
    ((material, page),) = write_reports(tmp_path)
    assert list(material.results.models) == ["target"]  # the original itself
    assert len(material.missing) == 4
    assert "There is no verdict" in page.read_text()
    assert "The twelve terms" not in page.read_text()  # a table of nothing but dashes
    assert "|" not in (page.parent / "report.md").read_text()
    assert results_tables(material.results, 80) == []


def test_a_finished_run_is_reported_from_its_results(fields, tmp_path):
    run = tmp_path / "run"
    expunge.run(fields, run)
    (run / "report.html").unlink()
    ((material, page),) = write_reports(run, tmp_path / "apart")
    assert page == tmp_path / "apart" / "report.html" and not (run / "report.html").exists()
    assert expunge.report(run) == run and (run / "report.html").exists()
    assert material.finished and not material.missing
    assert set(material.items) == {"target", "strong", "weak", "merged"}
    assert all("half" in row for rows in material.items.values() for row in rows)
    assert material.results.model_dump(mode="json") == json.loads(
        (run / "results.json").read_text()
    )
    for path in (run / "stages").glob("evaluate-weak-*/items.jsonl"):
        path.unlink()
    for path in (run / "stages").glob("evaluate-weak-*"):
        path.rename(path.with_name(path.name + ".gone"))
    (again,) = materials(run)
    assert set(again.items) == {"target", "strong", "merged"}
    assert "the items of weak" in again.missing[0]


def test_a_seed_that_is_not_done_stands_beside_one_that_is(fields, tmp_path):
    fields |= {"branches": {"strong": fields["branches"]["strong"]}, "merges": {}, "seeds": [1, 2]}
    Pipeline(fields, tmp_path).report(1)
    first, second = materials(tmp_path)
    assert (first.results.seed, first.finished) == (1, True)
    assert (second.results.seed, second.finished) == (2, False)
    assert second.missing == ("strong is not made: strong was not begun",)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="is no run folder; a recipe needs `out`"):
        expunge.report(tmp_path / "none")
    with pytest.raises(RunError, match="there are no results in"):
        materials(tmp_path)


@pytest.mark.parametrize("name", ["page.html", "page.HTML"])
def test_a_page_named_as_a_file_is_refused_before_anything_is_made(tmp_path, name):
    with pytest.raises(RunError, match="--out takes a folder"):
        write_reports(tmp_path / "run", tmp_path / name)
    assert not (tmp_path / name).exists()
