"""Which code a row says it was made by."""

from expunge.report.board import rows_of
from expunge.report.commits import joined, made_by
from expunge.report.standings import standing_of

STAGE = {"wall_seconds": 1.0, "peak_rss_bytes": 1, "accelerator": None, "machine": "m", "cpus": 2}


def stage(name, commit, **inputs):
    return {"stage": name, "commit": commit, "inputs": inputs, **STAGE}


def test_a_row_names_the_code_of_its_stages_not_of_the_day_it_was_written(results):
    assert made_by(results) == "abc1234567"  # these stages name none
    stages = [
        stage("target", "old"),
        stage("strong", "new", seed="42"),
        stage("weak", "new", seed="42"),
        stage("strong", "other", seed="43"),
    ]
    found = results.model_copy(update={"stages": stages})
    assert made_by(found) == "old, new"
    assert {row["commit"] for row in rows_of(found)} == {"old, new"}
    row = standing_of(found, "merged", method="merged", board="b", seed=42)
    assert row.commit == "old, new"


def test_each_commit_is_named_once():
    assert joined(["a, b", "b", "a, c"]) == "a, b, c"
    assert joined([]) == ""
