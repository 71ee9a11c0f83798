"""The tables, the verdict and the page say what the results say."""

import csv
import io
import json
import re
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from expunge.errors import RunError
from expunge.report.certainty import changes
from expunge.report.documents import explorer, script_json
from expunge.report.drawing import csv_text, write_figures
from expunge.report.page import cards, html_page, markdown_report, write_pages, write_report
from expunge.report.pieces import Material, Table
from expunge.report.results import Results, read_results
from expunge.report.sections import sections
from expunge.report.tables import column_names, lines, markdown, markdown_table, results_tables
from expunge.report.terminal import print_results, print_rows
from expunge.report.verdict import verdict


def cells(results, label) -> dict[str, str]:
    (line,) = [line for line in lines(results) if line.label == label]
    return dict(zip(column_names(results), line.cells, strict=True))


def test_the_table_has_twelve_terms_and_every_score(results):
    labels = [line.label for line in lines(results)]
    assert len([label for label in labels if label.startswith(("forget ", "retain "))]) == 12
    assert labels[12:] == [
        "task aggregate ↑",
        "MIA AUC → 0.5",
        "MIA AUC interval",
        "MIA score ↑",
        "MMLU ↑",
        "final ↑",
        "repetition",
    ]
    assert cells(results, "forget Task2 knowledge ↓")["merged"] == "0.050"


def test_terms_have_their_counts_and_in_markdown_their_intervals(results):
    content, term = results.model_dump(), "forget/Task2/qa"
    for model in content["models"].values():
        model["semeval"]["counts"] = {term: 8}
    merged = content["models"]["merged"]["semeval"]
    merged["intervals"] = {term: {"low": 0.01, "high": 0.3}}
    merged["intervals"]["task_aggregate"] = {"low": 0.6, "high": 0.8}
    found = Results.model_validate(content)
    assert cells(found, "forget Task2 knowledge ↓ (n=8)")["merged"] == "0.050"
    assert cells(found, "task aggregate interval")["merged"] == "0.60–0.80"
    assert "| 0.050 (0.01–0.30) |" in markdown_table(found)
    content["models"]["merged"]["semeval"]["counts"] = {term: 7}
    uneven = Results.model_validate(content)
    assert cells(uneven, "forget Task2 knowledge ↓")["merged"] == "0.050"  # no one count


def test_a_collapsed_model_has_no_aggregate_in_the_table(results):
    content = results.model_dump()
    for model in content["models"].values():
        model["semeval"]["task_aggregate"] = 0.9
    found = cells(Results.model_validate(content), "task aggregate ↑")
    assert found["strong"] == cells(results, "final ↑")["strong"] == "COLLAPSED"
    assert found["merged"] == "0.900"  # control


def test_membership_has_its_interval(results):
    assert cells(results, "MIA AUC → 0.5")["merged"] == "0.500"
    assert cells(results, "MIA AUC interval")["merged"] == "0.40–0.60"
    assert cells(results, "repetition")["strong"] == "0.875"


def test_a_destroyed_model_has_no_final_score(results):
    final = cells(results, "final ↑")
    assert final["strong"] == "COLLAPSED" and final["merged"] == "0.810"
    for text in (markdown_table(results), page_of(results)):
        assert "COLLAPSED" in text and "0.432" not in text


def test_what_is_not_measured_is_a_dash_and_zero_is_a_zero(results):
    assert cells(results, "forget Task1 completion ↓")["strong"] == "0.000"
    assert cells(results, "MIA AUC → 0.5")["linear"] == "–"
    assert "original" not in cells(results, "MMLU ↑")  # nothing of it was measured
    assert set(cells(results, "MMLU ↑").values()) == {"–"}


def test_a_sample_says_that_it_is_one(results):
    content = results.model_dump()
    content["models"]["merged"]["semeval"]["mmlu"] = {"accuracy": 0.25, "n": 570, "sampled": True}
    content["models"]["target"]["semeval"]["mmlu"] = {"accuracy": 0.25, "n": 14042}
    found = cells(Results.model_validate(content), "MMLU ↑")
    assert (found["merged"], found["before"]) == ("0.250 (n=570)", "0.250")
    for model in content["models"].values():
        model["semeval"]["mmlu"] = content["models"]["merged"]["semeval"]["mmlu"]
    found = cells(Results.model_validate(content), "MMLU ↑ (n=570)")
    assert set(found.values()) == {"0.250"}
    ends = cells(Results.model_validate(content), "MMLU interval")
    assert set(ends.values()) == {"0.22–0.29"}  # Wilson's, of 142.5 of 570


def test_a_narrow_terminal_gets_the_models_below_each_other(results):
    assert len(results_tables(results, 60)) > 1
    for width in range(50, 100):
        out = io.StringIO()
        Console(file=out, width=width).print(*results_tables(results, width))
        assert "…" not in out.getvalue()
        for line in lines(results):
            assert all(cell in out.getvalue() for cell in line.cells)


@pytest.mark.parametrize("width", range(40, 60))
def test_rows_too_wide_for_a_terminal_go_on_below_under_the_same_names(width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    names = [f"column-{n}" for n in range(8)]
    rows = [{"name": name, **{n: f"{name}/{n}" for n in names}} for name in "ab"]
    print_rows(rows, as_json=False)
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= width
    words = said.split()
    assert all(words.count(f"{name}/{n}") == 1 for name in "ab" for n in names)
    assert words.count("a") == words.count("name") > 1
    if width > 50:
        print_rows([{"name": "n" * 40, **dict.fromkeys(names, "0.5")}], as_json=False)
        said = capsys.readouterr().out.split()
        assert (said.count("n" * 40), said.count("0.5")) == (len(names), len(names))
        assert set(names) <= set(said)
    print_rows([{"name": "a", "says": "long " * 30}], as_json=False)
    assert capsys.readouterr().out.split().count("long") == 30  # folded, not cut


def test_the_terminal_shows_the_same_cells(results):
    out = io.StringIO()
    Console(file=out, width=140).print(*results_tables(results, 140))
    for line in lines(results):
        assert line.label in out.getvalue()
        assert all(cell in out.getvalue() for cell in line.cells)


def test_markup_in_names_is_text_everywhere(results):
    hostile = results.model_copy(update={"recipe": "[red]<b>|x"})
    out = io.StringIO()
    Console(file=out, width=140).print(*results_tables(hostile, 140))
    assert "[red]<b>|x" in out.getvalue()
    assert markdown(["a"], [["x|y\nz"]]).splitlines()[-1] == "| x\\|y z |"


def page_of(results, items=None, **more) -> str:
    return html_page(Material(results, items or {}, **more), ())


def carried(page: str, name: str):
    (text,) = re.findall(rf'<script type="application/json" id="{name}">(.*?)</script>', page)
    return json.loads(text)


def test_what_a_model_wrote_is_carried_as_data_and_never_as_markup(results, items):
    page = page_of(results, items, recipe_text="name: </pre><script>")
    tags = Tags()
    tags.feed(page)
    assert not {"img", "iframe", "link"} & set(tags.names)
    assert "src" not in tags.attributes
    assert tags.names.count("script") == 5  # two of data, the library, two of ours
    assert "table" in tags.names  # control: the parser sees the page's own markup
    assert "name: </pre><script>" in tags.text
    (item,) = carried(page, "items")["items"]
    assert item["answers"][0][0] == "<script>alert('x')</script><img src=//evil.example>"
    assert "<script>alert" not in page


def test_only_the_scripts_that_the_page_names_may_run(results, items):
    page = page_of(results, items)
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digests = [b64encode(sha256(text.encode()).digest()).decode() for text in scripts]
    (policy,) = re.findall(r"script-src ([^\"]*)", page)
    assert policy.split() == [f"'sha256-{digest}'" for digest in digests]
    assert len(digests) == 3 and "default-src 'none'" in page


def test_the_page_sets_the_models_beside_the_truth(results, items):
    found = explorer(items, whole="items.csv")
    assert found["models"] == ["merged", "target"] and found["given"] == 1
    (item,) = found["items"]
    assert item["truth"] == "there was a queen" and item["document"] == "0"
    merged, target = item["answers"]
    assert target == ["there was a queen", 1.0, None, [(0, 17)]]
    assert merged[1:] == [0.25, None, []]


def test_texts_are_cut_where_not_all_fit_and_say_so(items):
    (row,) = items["merged"]
    many = {"m": [row | {"id": f"{n}sc1", "generation": "word " * 1000} for n in range(40)]}
    whole = explorer(many, whole="items.csv")
    assert whole["items"][0]["answers"][0][0] == "word " * 1000
    cut = explorer(many, room=60_000, whole="items.csv")
    assert len(cut["items"]) == 40
    assert cut["items"][0]["answers"][0][0] == (("word " * 1000)[:1000], 4000)
    assert len(script_json(cut).encode()) < 60_000
    few = explorer(many, room=2000, whole="items.csv")
    assert 0 < len(few["items"]) < 40 and few["given"] == 40


def test_data_in_a_script_cannot_end_it():
    text = "</script><!--<script>&\u2028\u2029"
    carried = script_json({"text": text})
    assert not set("<>&\u2028\u2029") & set(carried)
    assert json.loads(carried) == {"text": text}


def test_a_page_says_what_is_missing(results):
    page = page_of(results, missing=("merged is not made: it was begun",), finished=False)
    assert "This run is not finished" in page and "merged is not made: it was begun" in page
    assert "This run is not finished" not in page_of(results)


def test_the_first_screen_has_each_half_with_its_interval(results):
    rows = {
        name: [
            {"id": f"{n}sc1", "half": half, "task": task, "kind": "sc", "score": score}
            for half in ("forget", "retain")
            for task in ("Task1", "Task2", "Task3")
            for n, score in enumerate(scores[half])
        ]
        for name, scores in {
            "target": {"forget": [1.0] * 8, "retain": [1.0] * 8},
            "merged": {"forget": [0.0] * 8, "retain": [1.0] * 4 + [0.9, 1.0, 1.0, 1.0]},
        }.items()
    }
    content = results.model_dump()
    semeval = content["models"]["merged"]["semeval"]
    semeval["counts"] = dict.fromkeys(semeval["terms"], 8)
    forget, _, retain, _ = changes(Material(Results.model_validate(content), rows))
    assert (forget.difference.value, forget.difference.low) == (-1.0, -1.0)
    assert forget.within_noise is False
    assert retain.difference.value == pytest.approx(-0.1 / 8) and retain.after.n == 24
    assert retain.within_noise is True


def test_the_first_card_says_collapse_and_each_other_has_before_and_after(results):
    content = results.model_dump()
    for name, accuracy in (("target", 0.33), ("merged", 0.31)):
        mmlu = {"accuracy": accuracy, "n": 570}
        content["models"][name]["semeval"] |= {"mmlu": mmlu}
    content["models"]["target"]["semeval"]["final"] = 0.4
    merged = content["models"]["merged"]["semeval"]
    merged["intervals"] = {"task_aggregate": {"low": 0.6, "high": 0.8}}
    merged |= {"task_aggregate": 0.7, "final": 0.67}
    found = {card.name: card for card in cards(Material(Results.model_validate(content)))}
    assert next(iter(found)) == "merged collapsed" and found["merged collapsed"].value == "no"
    assert found["membership AUC"].value == "0.89 → 0.50"
    assert found["membership AUC"].note == "after: 0.40 to 0.60; 0.50 is guessing"
    assert (found["MMLU"].value, found["MMLU"].note) == (
        "0.33 → 0.31",
        "after: 0.27 to 0.35; 570 questions",
    )
    assert found["final score"].value == "0.400 → 0.670"
    assert found["final score"].note == "after: 0.59 to 0.71"
    content["models"]["merged"]["collapse"]["collapsed"] = True
    first, *_, last = cards(Material(Results.model_validate(content)))
    assert (first.value, first.bad, last.value, last.bad) == (
        "yes",
        True,
        "0.400 → COLLAPSED",
        True,
    )


def test_tables_beside_the_page_are_whole(results, items, tmp_path):
    page = write_pages(Material(results, items), tmp_path)
    assert page.stat().st_size < 5_000_000
    with (tmp_path / "report" / "tables" / "items.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["generation"] == items["merged"][0]["generation"]
    header, first, *_ = (tmp_path / "report" / "tables" / "halves.csv").read_text().splitlines()
    assert header == "model,forget,retain" and first.startswith("target,1.0,0.98999")
    for name in ("terms-by-model", "halves", "membership"):
        assert "<svg" in (tmp_path / "report" / "figures" / f"{name}.svg").read_text()
        assert (tmp_path / "report" / "figures" / f"{name}.png").read_bytes()[1:4] == b"PNG"


def test_a_cell_is_no_formula_for_a_spreadsheet():
    table = Table("t", "", ("a", "b"), [("=cmd()", 1.25), ("plain", None)])
    assert csv_text(table) == "a,b\n'=cmd(),1.25\nplain,\n"


@pytest.fixture
def searched(tmp_path) -> Path:
    """A run folder with a calibration and analyses."""
    side = {
        "aggregate": 0.9,
        "auc": 0.5,
        "two_sided": 0.6,
        "ks": 0.2,
        "neutral_nll": 3.0,
        "forgetting": 0.9,
        "retention": 0.95,
        "balance": 0.8,
        "terms": {"retain/Task1/sc": 0.97},
        "membership": {
            "loss": {
                "auc": 0.52,
                "auc_low": 0.4,
                "auc_high": 0.6,
                "ks": 0.2,
                "ks_p": 0.3,
                "two_sided": 0.6,
                "two_sided_low": 0.5,
                "two_sided_high": 0.7,
            }
        },
    }
    end = {"branch": "deep", "step": None}
    points = [
        {
            "point": n,
            "role": role,
            "label": f"linear {n}",
            "front": n == 1,
            "balanced": True,
            "short": {},
            "refused": None,
            "calibration": side,
            "test": side,
            "official": {"aggregate": 0.75} if role == "trial" else None,
            "candidate": {
                "over": end,
                "under": {"branch": "mild", "step": 40},
                "density": 0.8,
                "weights": [1.0, 1.0],
            },
        }
        for n, role in enumerate(("target", "trial", "baseline"))
    ]
    found = {
        "name": "calibrated",
        "stage": "calibrated-0123456789ab",
        "chosen": 1,
        "settings": {"standins": False},
        "points": points,
        "line": [{"t": t, "auc": t, "two_sided": 0.5, "ks": 0.1} for t in (0.2, 0.5)],
        "cross": {
            "folds": [{"membership": {"loss": {"two_sided": 0.6, "ks": 0.2}}}],
            "auc_mean": 0.5,
            "auc_deviation": 0.1,
            "t_deviation": 0.02,
        },
        "screening": {"candidates": 4, "seconds": 8.0, "official_seconds": 60.0},
    }
    (tmp_path / "calibration").mkdir()
    (tmp_path / "calibration" / "calibrated-seed-42.json").write_text(json.dumps(found))
    at = {"method": "ties", "dial": "density", "value": 0.8}
    measured = {"aggregate": 0.5, "two_sided": 0.5}
    tables = {
        "landscape": {
            "surface": [{**at, **measured, "t": t, "auc": t} for t in (0.0, 1.0)],
            "balance": [{**at, "t": 0.5}],
        },
        "weights": {
            "norms": [
                {"model": "a", "scope": "block", "place": place, "norm": 2.5}
                for place in ("0", "1", "2", "outside")
            ]
        },
        "trajectories": {
            "epochs": [
                {"branch": "a", "epoch": 1.0, "step": 3, "half": "forget", "task": "all"}
                | {"regurgitation": 0.5, "knowledge": None}
            ],
            "objectives": [
                {"branch": "a", "epoch": 1.0, "step": 3, "forget_nll": 1.0, "retain_nll": 0.1}
                | {"kl": None}
            ],
        },
    }
    (tmp_path / "analysis").mkdir()
    for name, content in tables.items():
        path = tmp_path / "analysis" / f"{name}.json"
        path.write_text(json.dumps({"tables": content}))
    return tmp_path


def test_calibrations_and_analyses_are_drawn_and_listed(results, searched):
    material = Material(results, run=searched, folder=searched)
    found = {one.anchor: one for one in sections(material)}
    calibrated = found["calibration"]
    assert [figure.title for figure in calibrated.figures] == [
        *("Pareto front", "Membership along the line")
    ]
    header, rows = calibrated.tables[0].header, calibrated.tables[0].rows
    shown = [dict(zip(header, row, strict=True)) for row in rows]
    assert shown[1]["AUC"] == shown[2]["AUC"] == "0.50 [0.40, 0.60] / 0.50 [0.40, 0.60]"
    assert [row["official"] for row in shown] == ["–", "0.75", "–"]
    assert shown[0]["task (screened)"] == "0.90 / 0.90"
    assert shown[2]["merge"] == "TIES 0.8, weights 1, 1: deep and mild@40"
    assert any("held-out AUC 0.50 ± 0.10" in line for line in calibrated.text)
    assert any("4 candidates were screened in 8 s (2.0 s each" in line for line in calibrated.text)
    drawn = {figure.title for figure in found["analysis"].figures}
    assert drawn == {
        "Knowledge and regurgitation over epochs",
        "Losses and distance over epochs",
        "Where the edit lives",
        "Merge landscape",
        "Balance line",
    }
    blocks = found["analysis"].figures[2].chart
    assert blocks["encoding"]["x"]["axis"]["values"] == [0, 1, 2]
    names = {table.name for table in found["analysis"].tables}
    assert {"analysis-landscape-surface", "analysis-weights-norms"} <= names
    assert {one.anchor for one in sections(Material(results))} == {"plots"}  # control


def test_the_page_shortens_a_long_table_and_says_so_and_its_file_has_every_row(results, tmp_path):
    rows = [{"layer": n, "norm": n / 2} for n in range(140)]
    (tmp_path / "analysis").mkdir()
    (tmp_path / "analysis" / "weights.json").write_text(json.dumps({"tables": {"layers": rows}}))
    page = write_pages(Material(results, folder=tmp_path), tmp_path).read_text(encoding="utf-8")
    written = (tmp_path / "report" / "tables" / "analysis-weights-layers.csv").read_text()
    assert len(written.splitlines()) == 141 and written.splitlines()[-1] == "139,69.5"
    assert "the first 60 of 140 rows; report/tables/analysis-weights-layers.csv has all" in page
    assert "<bdi>59</bdi>" in page and "<bdi>60</bdi>" not in page


def test_a_cell_of_several_values_is_read_as_words(results, tmp_path):
    kinds = {"constant": 22, "wordless": 6, "none": None}
    row = {"kinds": kinds, "values": [0.02770136, 1.0], "drop": {"value": 0.0, "n": 5}, "empty": {}}
    (tmp_path / "analysis").mkdir()
    (tmp_path / "analysis" / "failures.json").write_text(json.dumps({"tables": {"x": [row]}}))
    (table,) = sections(Material(results, folder=tmp_path))[-1].tables
    assert table.rows == [("constant 22, wordless 6", "0.0277, 1", "value 0, n 5", "")]


def test_every_figure_of_calibrations_and_analyses_can_be_drawn(results, searched, tmp_path):
    found = sections(Material(results, run=searched, folder=searched))
    figures = [f for one in found if one.anchor != "plots" for f in one.figures]
    write_figures(figures, tmp_path / "figures")
    assert len(list((tmp_path / "figures").glob("*.svg"))) == len(figures) == 7


def test_the_files_are_written_and_read_back(results, items, tmp_path):
    folder = tmp_path / "report"
    write_report(results, items, folder)
    assert sorted(p.name for p in folder.iterdir()) == [
        *("report", "report.html", "report.md", "results.json")
    ]
    assert read_results(folder / "results.json") == results
    assert "forgot what it should, and kept the rest" in (folder / "report.md").read_text("utf-8")


def test_markdown_has_the_claim_and_then_a_bullet_for_each_reason(results):
    claim, *reasons = verdict(results)
    lines_ = markdown_report(results).splitlines()
    assert lines_[2] == f"**{claim}**"
    assert [line for line in lines_ if line.startswith("- ")] == [f"- {one}" for one in reasons]
    only = results.model_copy(update={"models": {"target": results.models["target"]}})
    assert "\n- " not in markdown_report(only)  # control: no reasons, no list


def test_an_item_that_was_not_generated_says_so(results, items):
    (row,) = items["merged"]
    unseen = row | {"id": "7sc1", "generation": None, "score": None}
    first, second = explorer({"merged": [row, unseen]}, whole="")["items"]
    assert first["answers"][0][0] and second["answers"] == [[None, None, None, []]]


def test_a_finished_run_is_printed(results, items, tmp_path):
    write_report(results, items, tmp_path)
    out = io.StringIO()
    print_results(tmp_path, Console(file=out, width=200))
    assert "final ↑" in out.getvalue() and verdict(results)[0] in out.getvalue()


def test_a_folder_that_cannot_be_written_is_a_run_error(results, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="not a folder"):
        write_report(results, {}, tmp_path / "file" / "report")


class Tags(HTMLParser):
    """What a browser would take for markup, and what for text."""

    def __init__(self):
        super().__init__()
        self.names, self.attributes, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data):
        self.text += data
