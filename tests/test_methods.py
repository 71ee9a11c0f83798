"""The tables of methods: every row says where it is from, what it needs, and what proves it."""

import re
from functools import cache
from pathlib import Path

import pytest
import yaml

from expunge.companions.making import COMPANIONS
from expunge.errors import RecipeError
from expunge.methods import every_method, method_card, method_rows, rows_called
from expunge.report.methods_guide import EXAMPLE, WHERE, asked_for, named
from expunge.unlearn.objectives import OBJECTIVES
from expunge.unlearn.section import Branch

ROOT = Path(__file__).parents[1]
ROWS = method_rows()
MADE = [row for row in every_method() if row.kind not in ("metric", "attack")]
ALONE, RETAIN = "the forget set alone", "the forget set and a retain set"
MODELS = "models or adapters that are trained already"
FIDELITY = ("exact", "as-released quirk", "adapted", "inspired", "own")


@cache
def guide() -> list[tuple[str, str, list[str]]]:
    """What one has, where to look, and the names there, as docs/methods.md lists them."""
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    table = page.split("## What do I have?")[1].split("##")[0]
    lines = [line.strip("|\n").split(" | ") for line in table.splitlines() if line.startswith("|")]
    found, have = [], ""
    for first, where, names in lines[2:]:
        have = first.strip() or have
        found.append((have, where, re.findall(r"`(\w+)`", names)))
    return found


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['kind']}-{row['name']}")
def test_a_row_says_where_it_is_from_and_what_proves_it(row):
    assert row["summary"]
    assert row["source"]
    assert row["cost"]
    assert row["fidelity"] in FIDELITY
    for place in row["test"].split(", "):
        path, _, function = place.partition("::")
        assert function.startswith("test_"), "names a file and a test in it"
        text = (ROOT / path).read_text(encoding="utf-8")
        assert re.search(rf"def {re.escape(function.split('[')[0])}\(", text), "names a test"
    if row["fidelity"] == "exact":
        assert not row["differs"], "what differs is not exact"
    elif row["fidelity"] != "own":
        assert row["differs"], "what is not exact says what differs"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_is_no_nearer_to_its_source_than_its_parts(name):
    """Its losses, their weightings and sets, and its step rule."""
    row = OBJECTIVES[name]
    branch = Branch.model_validate({"objective": name})
    parts = [branch.rule]
    for term in branch.terms:
        parts += [term.row, *([term.weighting.row] if term.weighting else [])]
        parts += [COMPANIONS[term.half]] if term.half in COMPANIONS else []
    for part in parts:
        assert FIDELITY.index(part.fidelity) <= FIDELITY.index(row.fidelity), part


def test_no_name_stands_twice_in_a_table():
    places = [(row["kind"], row["name"]) for row in ROWS]
    assert len(set(places)) == len(places)


def test_the_guide_names_methods_that_there_are():
    assert named() <= {row["name"] for row in ROWS}
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert "## What do I have?" in page
    assert "## What do I want?" in page


@pytest.mark.parametrize("row", MADE, ids=lambda row: f"{row.kind}-{row.name}")
def test_a_method_stands_in_the_guide_once_where_it_belongs(row):
    found = [
        have for have, where, names in guide() if where == WHERE[row.kind] and row.name in names
    ]
    assert found == [asked_for(row.needs)]


def test_the_guide_names_nothing_else():
    assert sum(len(names) for *_, names in guide()) == len(MADE)


@pytest.mark.parametrize(
    ("have", "kind", "names"),
    [
        (ALONE, "forget loss", "npo npo_batch npo_token rmu adaptive_rmu undial hinge"),
        (ALONE, "preference loss", "dpo kto flat_kl"),
        (ALONE, "objective", "gradient_ascent dpo flat"),
        (ALONE, "step rule", "joint sam smooth latent_adversarial repselect tar"),
        (ALONE, "weight mask", "gradient magnitude wanda random last_blocks layers column"),
        (ALONE, "token weighting", "spans entities surprisal memorised"),
        (ALONE, "edit", "revs needle ablate"),
        (ALONE, "schedule", "pairing sequential"),
        (RETAIN, "objective", "npo rmu adaptive_rmu idk_dpo pdu"),
        (RETAIN, "step rule", "dual normalized raised ngdiff ilu pcgu"),
        (RETAIN, "weight mask", "wagle"),
        (RETAIN, "schedule", "sugd agad layered alternate"),
        (RETAIN, "edit", "prune"),
        ("neutral texts", "objective", "llmu sku_learn"),
        ("texts never read", "forget loss", "hinge_level match_level match_profile"),
        (MODELS, "token weighting", "memorisation_gap"),
        (MODELS, "forget loss", "hinge_level_token"),
        (MODELS, "edit", "add pem_add analogy ia3_negate sku bias negate revert"),
        (MODELS, "merge", "ties regmean"),
        ("a retain set, and a model or an adapter", "edit", "sage"),
        ("as an API gives them", "guard", "prefix input_filter output_filter icul"),
        ("left alone, and helper models", "guard", "uld offset whp contrast"),
        ("its weights left alone", "guard", "eco"),
    ],
)
def test_who_has_this_is_sent_there(have, kind, names):
    there = {n for h, where, each in guide() if have in h and where == WHERE[kind] for n in each}
    assert set(names.split()) <= there


def test_only_what_asks_for_less_stands_under_less():
    alone = [row for row in MADE if ALONE in asked_for(row.needs)]
    assert all(set(row.needs.data) <= {"forget"} and not row.needs.models for row in alone)
    guards = {row.name: row.needs.access for row in MADE if row.kind == "guard"}
    page = (ROOT / "docs" / "guards.md").read_text(encoding="utf-8")
    acts_on = dict(re.findall(r"^\| `(\w+)` \| (\w+) \|", page, flags=re.MULTILINE))
    text = ("prompt", "answer")
    assert guards == {n: "text" if what in text else what for n, what in acts_on.items()}
    assert {row.needs.access for row in MADE if row.kind != "guard"} == {"weights"}


def test_needs_are_readable_text_in_json():
    needs = {(row["kind"], row["name"]): row["needs"] for row in ROWS}
    assert needs["guard", "uld"] == (
        "data: forget, retain; models: an assistant that learnt forget alone; access: logits"
    )
    assert needs["forget loss", "npo"] == "data: forget; access: weights; reference log-probs"
    assert needs["merge", "ties"] == "models: 1 model or more and a base; access: weights; density"
    assert needs["metric", "regurgitation"] == "generations"


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
