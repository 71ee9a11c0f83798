"""Several results side by side on one page."""

import json

import pytest

from expunge.errors import EvaluationError
from expunge.evaluate.compare import compare
from expunge.evaluate.readings import read_place
from expunge.report.compared_page import comparison_page, headline, numbers_table, verdicts_of

TERM = "forget.Task1.sc"


@pytest.fixture
def places(tmp_path):
    """Two models on the same eight items, of which the second says half as much."""
    found = []
    for name, score in (("first", 0.8), ("second", 0.4)):
        folder = tmp_path / name
        folder.mkdir()
        rows = [
            {
                "suite": "semeval",
                "group": TERM,
                "id": f"d{n}sc1",
                "prompt": "Once",
                "truth": "there was a queen of the town",
                "generation": "<b>there was a queen of</b>",
                "score": score + n / 100,
            }
            for n in range(8)
        ]
        mean = sum(row["score"] for row in rows) / 8
        number = {"value": mean, "n": 8, "low": mean - 0.025, "high": mean + 0.025}
        suites = {"semeval": {"settings": {}, "numbers": {TERM: number}, "facts": {}}}
        (folder / "results.json").write_text(json.dumps({"model": name, "suites": suites}))
        (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found.append(str(folder))
    return found


def test_the_page_has_numbers_differences_and_items(places):
    readings = [one for place in places for one in read_place(place)]
    found = compare(*readings)
    assert headline(found).endswith(
        "1 of 1 numbers differ by more than noise; of as many that are the same, about 0 would."
    )
    (row,) = numbers_table(readings).rows
    assert row == (f"semeval.{TERM}", "0.835 (0.81 to 0.86)", "0.435 (0.41 to 0.46)")
    page = comparison_page(readings, [found], verdicts_of(places))
    assert "<td>-0.400</td>" in page and "differs" in page
    assert "\\u003cb\\u003ethere was a queen of" in page and "<b>there" not in page
    assert 'data-chart="differences-1-plot"' in page


def test_what_is_the_same_is_only_noise(places):
    readings = [one for place in (places[0], places[0]) for one in read_place(place)]
    assert "0 of 1 numbers differ" in headline(compare(*readings))


def test_a_run_says_its_verdict(results, places, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "results.json").write_text(results.model_dump_json())
    told = verdicts_of([f"{run}:merged", *places])
    assert list(told) == [str(run)]
    assert told[str(run)][0] == "The merged model forgot what it should, and kept the rest."


def test_the_command_writes_the_page_beside_its_table(places, tmp_path, capsys):
    from expunge.cli import app

    page = tmp_path / "page.html"
    with pytest.raises(SystemExit) as ended:
        app(["compare", *places, "--out", str(page)])
    assert ended.value.code == 0
    assert TERM in capsys.readouterr().out and page.read_text().startswith("<!doctype html>")
    with pytest.raises(EvaluationError, match="one model"):
        app(["compare", places[0], "--out", str(tmp_path / "no.html")], standalone_mode=False)
    assert not (tmp_path / "no.html").exists()
