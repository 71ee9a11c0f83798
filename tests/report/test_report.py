"""The tables, the verdict and the page say what the results say."""

import io
from html.parser import HTMLParser

import pytest
from rich.console import Console

from expunge.errors import RunError
from expunge.report.page import SHOWN, groups, html_page, write_report
from expunge.report.results import Results, read_results
from expunge.report.tables import column_names, lines, markdown, markdown_table, results_tables
from expunge.report.terminal import print_results, result_folders
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
    assert cells(results, "MIA AUC → 0.5")["merged"] == "0.500"
    assert cells(results, "MIA AUC interval")["merged"] == "0.40–0.60"
    assert cells(results, "repetition")["strong"] == "0.875"


def test_a_destroyed_model_has_no_final_score(results):
    final = cells(results, "final ↑")
    assert final["strong"] == "COLLAPSED" and final["merged"] == "0.810"
    for text in (markdown_table(results), html_page(results, {})):
        assert "COLLAPSED" in text and "0.432" not in text


def test_what_is_not_measured_is_a_dash_and_zero_is_a_zero(results):
    assert set(cells(results, "forget Task1 completion ↓").values()) > {"–", "0.000"}
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


def test_a_narrow_terminal_gets_the_models_below_each_other(results):
    tables = results_tables(results, 60)
    assert len(tables) > 1
    out = io.StringIO()
    Console(file=out, width=60).print(*tables)
    assert "…" not in out.getvalue()
    for line in lines(results):
        assert all(cell in out.getvalue() for cell in line.cells)


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


def test_what_a_model_wrote_is_shown_as_text(results, items):
    page = html_page(results, items, recipe_text="name: </pre><script>")
    tags = Tags()
    tags.feed(page)
    assert not {"script", "img", "iframe", "link"} & set(tags.names)
    assert not {"src", "href"} & set(tags.attributes)
    assert "table" in tags.names  # control: the parser sees the page's own markup
    assert "<script>alert('x')</script>" in tags.text and "name: </pre><script>" in tags.text


def test_the_page_sets_the_models_beside_the_truth(results, items):
    (group,) = groups(results, items)
    (example,) = group.examples
    assert group.title == "forget Task1 completion ↓" and example.truth == "there was a queen"
    assert [(model, score) for model, _, score in example.answers] == [
        ("target", "1.00"),
        ("merged", "0.25"),
    ]


def test_the_page_shows_a_spread_of_many_items(results, items):
    (row,) = items["merged"]
    many = {"merged": [row | {"id": f"{n}sc1"} for n in range(10 * SHOWN)]}
    (group,) = groups(results, many)
    assert group.count == 10 * SHOWN
    assert [e.id for e in group.examples] == [f"{10 * n}sc1" for n in range(SHOWN)]


def test_the_files_are_written_and_read_back(results, items, tmp_path):
    folder = tmp_path / "report"
    write_report(results, items, folder)
    assert sorted(p.name for p in folder.iterdir()) == ["report.html", "report.md", "results.json"]
    assert read_results(folder / "results.json") == results
    assert "forgot what it should, and kept the rest" in (folder / "report.md").read_text("utf-8")


def test_an_item_that_was_not_generated_is_not_shown(results, items):
    (row,) = items["merged"]
    unseen = row | {"id": "7sc1", "generation": None, "score": None}
    (group,) = groups(results, {"merged": [row, unseen]})
    assert group.count == 1 and group.examples[0].id == row["id"]


def test_a_finished_run_is_printed(results, items, tmp_path):
    with pytest.raises(RunError, match="there are no results in"):
        result_folders(tmp_path)
    for seed in (1, 2):
        write_report(results, items, tmp_path / f"seed-{seed}")
    folders = result_folders(tmp_path)
    assert [folder.name for folder in folders] == ["seed-1", "seed-2"]
    out = io.StringIO()
    print_results(folders[0], Console(file=out, width=200))
    assert "final ↑" in out.getvalue() and verdict(results)[0] in out.getvalue()


def test_a_folder_that_cannot_be_written_is_a_run_error(results, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="not a folder"):
        write_report(results, {}, tmp_path / "file" / "report")


def test_the_verdict_follows_the_numbers(results):
    def after(forget, retain, collapsed=False):
        content = results.model_dump()
        merged = content["models"]["merged"]
        merged["collapse"]["collapsed"] = collapsed
        for term in merged["semeval"]["terms"]:
            merged["semeval"]["terms"][term] = forget if term.startswith("forget") else retain
        return verdict(Results.model_validate(content))[0]

    assert after(0.1, 0.9) == "The merged model forgot what it should, and kept the rest."
    assert "lost some" in after(0.1, 0.5)
    assert "still knows some" in after(0.9, 0.9)
    assert "Failed" in after(0.9, 0.5)
    assert "destroyed" in after(0.1, 0.9, collapsed=True)
    assert "was not measured" in after(0.1, 0.9, collapsed=None)


def test_there_is_no_verdict_on_what_was_not_known_before(results):
    content = results.model_dump()
    terms = content["models"]["target"]["semeval"]["terms"]
    terms |= {term: 0.1 for term in terms if term.startswith("forget")}
    assert "no verdict" in verdict(Results.model_validate(content))[0]
    only = results.model_copy(update={"models": {"target": results.models["target"]}})
    assert "no verdict" in verdict(only)[0]


def test_the_verdict_reads_the_membership_attack(results):
    def sentence(name):
        kept = {n: results.models[n] for n in ("target", name)}
        return " ".join(verdict(results.model_copy(update={"models": kept})))

    assert "no better than guessing (AUC 0.50" in sentence("merged")
    assert "below what a stranger knows" in sentence("strong")
    assert "was not measured" in sentence("linear")


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
