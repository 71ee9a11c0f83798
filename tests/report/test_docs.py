"""The generated documents: methods from docstrings, results from rows."""

from dataclasses import dataclass

import pytest

from expunge.errors import RunError
from expunge.needs import FORGET, Needs
from expunge.report.board import add_rows
from expunge.report.docs import write_docs
from expunge.report.methods_page import Description, describe, method_row, method_rows, methods_page
from expunge.report.results_page import results_page


def npo(current, reference, *, beta=0.1):
    """Negative preference optimization: the answer is
    the rejected half of a pair.

        L = -(2/β) log σ(-β r),
            r = log π(y|x) - log π_ref(y|x)

    Starts as gradient ascent and
    fades as r falls.

    Source: Zhang et al. 2024,
        arXiv:2404.05868.
    Differs: per token | not per sequence.
    """


def bare():
    """Only a sentence."""


@dataclass(frozen=True)
class Loss:
    fn: object
    needs: Needs = FORGET
    test: str = ""


def test_a_docstring_is_taken_apart():
    assert describe(npo) == Description(
        summary="Negative preference optimization: the answer is the rejected half of a pair.",
        equation="L = -(2/β) log σ(-β r),\n    r = log π(y|x) - log π_ref(y|x)",
        notes="Starts as gradient ascent and fades as r falls.",
        source="Zhang et al. 2024, arXiv:2404.05868.",
        differs="per token | not per sequence.",
    )
    assert describe(bare) == Description(summary="Only a sentence.")
    assert describe(lambda: None) == Description(summary="")


def test_a_row_takes_from_its_table_then_from_its_function():
    row = method_row("npo", "forget losses", Loss(npo, test="test_limits"))
    assert (str(row.needs), row.test) == ("data: forget; access: weights", "test_limits")
    assert row.source.startswith("Zhang") and row.differs == "per token | not per sequence."

    @dataclass(frozen=True)
    class Merge:
        source: str

    merge = method_row("ties", "merges", Merge("arXiv:2306.01708"), function=npo)
    assert merge.source == "arXiv:2306.01708" and merge.equation.startswith("L = ")


def test_methods_stand_under_their_kind():
    rows = method_rows({"forget losses": {"npo": Loss(npo)}, "masks": {"bare": bare}})
    page = methods_page(rows)
    first, second = page.index("## Forget losses"), page.index("## Masks")
    assert first < page.index("| `npo` |") < page.index("L = -(2/β)") < second
    assert second < page.index("| `bare` | Only a sentence. |")
    assert "Differs: per token | not per sequence." in page
    assert "No methods yet" in methods_page([]) and "No methods yet" not in page


def row(system, seed, **values):
    return {
        "system": system,
        "board": "smollm2",
        "seed": seed,
        "recipe": "board",
        "commit": f"c{seed}",
        "collapsed": False,
        **values,
    }


def line_of(page, system):
    return next(line for line in page.splitlines() if line.startswith(f"| {system} |"))


def test_an_empty_board_says_so_beside_the_papers():
    page = results_page([])
    assert "Nothing measured yet" in page
    assert "| TIES, local | OLMo-7B | 0.939 | 0.997 | 0.501 | 0.480 | 0.806 |" in page


def test_seeds_become_mean_and_spread():
    page = results_page([row("merged", 1, final=0.6, mmlu=0.25), row("merged", 2, final=0.8)])
    line = line_of(page, "merged")
    assert "0.700 ± 0.141" in line  # stdev of 0.6, 0.8 is sqrt(0.02)
    assert "0.250 (1 of 2 seeds)" in line
    assert line.endswith("| 0.806 | board | c1, c2 |") and "| 1, 2 |" in line
    assert "Nothing measured yet" not in page and "## Board: smollm2" in page


def test_measured_stands_beside_published_with_the_order_of_both():
    page = results_page(
        [
            row("strong", 1, final=0.7, task_aggregate=0.5, task_low=0.4, task_high=0.6),
            row("strong", 2, final=0.8, task_aggregate=0.7, task_low=0.6, task_high=0.8),
            row("merged", 1, final=0.6),
            row("target", 1, final=0.1),  # no paper has it
        ]
    )
    assert "0.600 ± 0.141 [0.40, 0.80]" in line_of(page, "strong")
    section = page[page.index("### Beside") : page.index("## What the papers")]
    assert "0.600 / 0.968 |" in section and "| 0.750 / 0.481 |" in section
    assert "here: strong (0.750) > merged (0.600)." in section
    assert "in the paper: merged (0.806) > strong (0.481)." in section
    assert "target" not in section


def test_what_was_not_scored_has_no_row():
    page = results_page([row("original", 1), row("merged", 1, final=0.6)])
    assert "| original |" not in page
    assert "| merged |" in page


def test_a_destroyed_system_has_no_final_in_the_docs():
    rows = [row("strong", n, final=0.42, collapsed=True) for n in (1, 2)]
    assert "**COLLAPSED**" in line_of(results_page(rows), "strong")
    assert "0.420" not in line_of(results_page(rows), "strong")
    rows[0]["collapsed"] = False
    rows[0] |= {"final": 0.25, "task_aggregate": 0.3}
    rows[1] |= {"task_aggregate": 0.9}
    line = line_of(results_page(rows), "strong")
    assert "| 0.250 (**COLLAPSED** in 1 of 2 seeds) |" in line  # the sound seed's alone
    assert "| 0.300 |" in line and "0.600" not in line


def test_stale_documents_are_found_and_written(tmp_path):
    methods = method_rows({"masks": {"bare": bare}})
    with pytest.raises(
        RunError, match=r"stale: .*methods\.md, .*results\.md, .*leaderboard\.md; run make docs"
    ):
        write_docs(methods, check=True, folder=tmp_path)
    assert not list(tmp_path.iterdir())
    assert len(write_docs(methods, folder=tmp_path)) == 4
    assert write_docs(methods, check=True, folder=tmp_path) == []  # control: now they are not
    add_rows(tmp_path / "results.json", [row("merged", 1, final=0.6)])
    with pytest.raises(RunError, match=r"stale: [^,]*results\.md; run"):
        write_docs(methods, check=True, folder=tmp_path)
    assert [path.name for path in write_docs(methods, folder=tmp_path)] == ["results.md"]


def test_a_missing_docs_folder_is_a_run_error(tmp_path):
    with pytest.raises(RunError, match="there is no folder"):
        write_docs([], folder=tmp_path / "docs")
