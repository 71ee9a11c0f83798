"""Several results side by side on one page."""

import json

import pytest

from expunge.errors import EvaluationError
from expunge.evaluate.compare import Comparison, Difference, compare
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
        "Of 1 number that can be judged, 1 differs by more than the choice of items explains. "
        "Were the two models alike, hardly any would seem to by chance."
    )
    (row,) = numbers_table(readings).rows
    assert row == (f"semeval.{TERM}", "0.835 (0.81 to 0.86)", "0.435 (0.41 to 0.46)")
    page = comparison_page(readings, [found], verdicts_of(places))
    assert "<td>-0.400</td>" in page and "differs" in page
    assert "\\u003cb\\u003ethere was a queen of" in page and "<b>there" not in page
    assert 'data-chart="differences-1-plot"' in page


def test_what_is_the_same_is_only_noise(places):
    readings = [one for place in (places[0], places[0]) for one in read_place(place)]
    assert "judged, none differs" in headline(compare(*readings))


def test_the_headline_says_how_many_would_differ_by_chance():
    def row(within_noise):
        return Difference("n", "paired", 0.0, 0.1, 0.1, 0.05, 0.15, 9, within_noise)

    found = Comparison("a", "b", [row(False)] * 2 + [row(True)] * 13 + [row(None)] * 4)
    assert headline(found) == (
        "b against a. Of 15 numbers that can be judged, 2 differ by more than the choice of items "
        "explains. Were the two models alike, about 1 would seem to by chance."
    )
    assert "too few items to say" in headline(Comparison("a", "b", [row(None)]))


def test_a_run_says_its_verdict(results, places, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "results.json").write_text(results.model_dump_json())
    told = verdicts_of([f"{run}:merged", *places])
    assert list(told) == [str(run)]
    said = told[str(run)]
    assert said == "The merged model forgot what it should, and kept the rest."
    readings = [one for place in places for one in read_place(place)]
    page = comparison_page(readings, [compare(*readings)], told)
    assert f"by its own report: {said}" in page and "On the forget half" not in page


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
