"""The tables of methods: every row says where it is from, what it needs, and what proves it."""

import re
from pathlib import Path

import pytest
import yaml

from expunge.errors import RecipeError
from expunge.methods import method_card, method_rows, rows_called
from expunge.report.methods_guide import EXAMPLE, named
from expunge.unlearn.objective import Term
from expunge.unlearn.objectives import OBJECTIVES
from expunge.unlearn.section import Branch

ROOT = Path(__file__).parents[1]
ROWS = method_rows()
FIDELITY = ("exact", "as-released quirk", "adapted", "inspired", "own")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['kind']}-{row['name']}")
def test_a_row_says_where_it_is_from_and_what_proves_it(row):
    assert row["summary"]
    assert row["source"]
    assert row["cost"]
    assert row["fidelity"] in FIDELITY
    for place in row["test"].split(", "):
        path, _, function = place.partition("::")
        text = (ROOT / path).read_text(encoding="utf-8")
        assert not function or re.search(rf"def {re.escape(function.split('[')[0])}\(", text)
    if row["fidelity"] == "exact":
        assert not row["differs"], "what differs is not exact"
    elif row["fidelity"] != "own":
        assert row["differs"], "what is not exact says what differs"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_is_no_nearer_to_its_source_than_its_terms(name):
    row, order = OBJECTIVES[name], [*FIDELITY]
    for term in map(Term.model_validate, row.terms):
        weighting = term.weighting.row.fidelity if term.weighting else "exact"
        for part in (term.row.fidelity, weighting):
            assert order.index(part) <= order.index(row.fidelity), term


def test_no_name_stands_twice_in_a_table():
    places = [(row["kind"], row["name"]) for row in ROWS]
    assert len(set(places)) == len(places)


def test_the_guide_names_methods_that_there_are():
    assert named() <= {row["name"] for row in ROWS}
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert "## What do I have?" in page
    assert "## What do I want?" in page


def test_the_example_of_the_guide_is_a_branch():
    branch = Branch.model_validate(yaml.safe_load(EXAMPLE)["branches"]["forgets"])
    assert [(term.loss, term.weight, term.options) for term in branch.terms] == [
        ("npo", 1, {"beta": 0.2}), ("nll", 2, {}),
    ]  # fmt: skip
    assert EXAMPLE in (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name",
    [
        *("gradient_ascent", "gradient_difference", "kl_minimisation", "npo", "npo_batch"),
        *("npo_token", "simnpo", "dpo", "idk_dpo", "idk", "alt_po", "undial", "ce_u", "wga"),
        *("tnpo", "satimp", "pdu", "dual", "rmu", "adaptive_rmu", "llmu", "spans", "entities"),
        *("surprisal", "memorised", "random_label", "ngdiff", "repselect", "sam", "pcgu", "tar"),
        *("latent_adversarial", "wagle", "last_blocks", "layers", "column", "sugd", "agad"),
        *("layered", "alternate", "sequential", "sage", "negate", "ia3_negate", "sku"),
        *("regmean", "revs", "prune", "needle", "bias", "prefix", "input_filter"),
        *("output_filter", "icul", "uld", "offset", "eco", "ties", "kto", "flat", "relearn"),
    ],
)
def test_what_the_field_asks_for_can_be_looked_up(name):
    assert name in {row["name"] for row in ROWS}


def test_a_method_is_looked_up_by_name_in_every_table():
    kinds = {row["kind"] for row in rows_called("npo")}
    assert kinds == {"objective", "forget loss"}
    card = method_card(rows_called("wagle")[0])
    assert "s_i = |(θ_i - g_r,i/μ) · g_f,i|" in card
    assert "fidelity: adapted" in card
    with pytest.raises(RecipeError, match=r"no method is called 'wagel'. Did you mean 'wagle'\?"):
        rows_called("wagel")
