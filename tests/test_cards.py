"""Cards of a tiny run: written beside each model, out of every hash, told without what leaks."""

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from expunge import publish, runs
from expunge.cards import section_text
from expunge.errors import RecipeError, RunError
from expunge.finished import Finished
from expunge.pipeline import Pipeline
from expunge.unlearn.section import Branch

BRANCH = {
    "terms": [{"half": "forget", "loss": "npo"}, {"half": "retain", "loss": "nll"}],
    "lora": {"rank": 2, "alpha": 4},
    "schedule": {"epochs": 1},
    "optimizer": {"lr": 1e-3, "compute": "float32"},
}


@pytest.fixture(scope="module")
def fields(tiny_folder):
    return {
        "name": "tiny",
        "model": {"path": str(tiny_folder), "separator": " "},
        "data": {"synthetic": {"documents": 1, "nonmembers": 1}},
        "branches": {"strong": BRANCH, "weak": BRANCH},
        "merges": {"merged": {"method": "ties"}},
        "edits": {"pruned": {"method": "prune", "of": "merged", "options": {"mlp": 0.05}}},
        "guards": {"told": {"kind": "prefix", "of": "target"}},
        "evaluate": {"max_new_tokens": 2, "resamples": 10},
        "unscored": ["weak"],
    }


@pytest.fixture(scope="module")
def run(fields, tmp_path_factory) -> Path:
    """A finished run; its base names a license."""
    root = tmp_path_factory.mktemp("cards") / "run"
    Pipeline(fields, root).report(42)
    return root


def card_paths(run: Path) -> list[Path]:
    return sorted(run.glob("stages/*/*/README.md"))


def test_every_unlearned_model_has_a_card_beside_its_weights(run):
    found = {path.parts[-3].rpartition("-")[0]: path.parts[-2] for path in card_paths(run)}
    assert found == {"strong": "adapter", "weak": "adapter", "merged": "adapter", "pruned": "model"}
    cards = {p.parts[-3].rpartition("-")[0]: ModelCard.load(p) for p in card_paths(run)}
    assert cards["strong"].data.eval_results
    assert "It has not been evaluated" in cards["weak"].text
    assert cards["weak"].data.eval_results is None
    assert cards["pruned"].data.to_dict()["library_name"] == "transformers"
    assert "an edit of merged" in cards["pruned"].text
    assert "a merge of strong and weak" in cards["merged"].text


def test_the_numbers_of_a_card_are_those_of_the_results(run):
    said = json.loads((run / "results.json").read_text())["models"]["strong"]["semeval"]
    path = next(run.glob("stages/strong-*/adapter/README.md"))
    found = {r.dataset_config: r for r in ModelCard.load(path).data.eval_results}
    terms = {term: value for term, value in said["terms"].items() if value is not None}
    assert terms
    assert {term: found[term].metric_value for term in terms} == terms
    assert found["membership"].metric_args["n"] == said["mia"]["n"]


def test_no_card_holds_an_item_or_an_id_or_a_place_on_the_disk(run):
    rows = [
        json.loads(line)
        for name in ("forget", "retain", "members")
        for line in next(run.glob(f"stages/data-*/{name}.jsonl")).read_text().splitlines()
    ]
    secrets = {str(value) for row in rows for name, value in row.items() if name != "task"}
    secrets = {text for text in secrets if len(text) > 3} - {"forget", "retain"}
    assert len(secrets) > 20
    for path in card_paths(run):
        text = path.read_text()
        assert not {secret for secret in secrets if secret in text}
        assert str(run.parent) not in text
        assert "invented, seed 0" in text  # control: the set itself is told of


def test_fields_that_may_name_what_is_forgotten_are_left_out():
    weighting = {"kind": "spans", "patterns": ["Bo"]}
    terms = [{"half": "forget", "loss": "npo", "weighting": weighting}]
    by = {"kind": "sequential", "by": "^Bo-[0-9]+"}
    text = section_text(Branch.model_validate({"terms": terms, "schedule": by}))
    assert "Bo" not in text
    said = yaml.safe_load(text)
    assert said["terms"][0]["weighting"] == {"kind": "spans", "patterns": "(left out)"}
    assert said["schedule"] == {"kind": "sequential", "by": "(left out)"}


def test_a_place_on_a_disk_is_left_out_of_a_section(tmp_path):
    fields = {"terms": [{"half": "forget", "loss": "npo"}], "companions": {}}
    (tmp_path / "refusals.txt").write_text("I do not know.\n")
    fields["companions"]["refusal"] = {"file": str(tmp_path / "refusals.txt")}
    fields["lora"] = {"targets": ["/home/me/x", "owner/model", "q_proj"]}
    said = yaml.safe_load(section_text(Branch.model_validate(fields)))
    assert said["companions"] == {"refusal": {"file": "(left out)"}}
    assert said["lora"]["targets"] == ["(a local path)", "owner/model", "q_proj"]


def test_a_card_changes_no_hash_and_no_key(run, fields):
    folder = next(run.glob("stages/pruned-*/model"))
    with_card = runs.hash_folder(folder)
    (folder / "README.md").rename(folder.parent / "away")
    assert runs.hash_folder(folder) == with_card
    (folder.parent / "away").rename(folder / "README.md")
    (folder / ".README.md.00ff.tmp").touch()
    assert runs.hash_folder(folder) == with_card
    (folder / ".README.md.00ff.tmp").unlink()
    (folder / "other.txt").write_text("control")
    assert runs.hash_folder(folder) != with_card
    (folder / "other.txt").unlink()
    before = sorted(path.name for path in (run / "stages").iterdir())
    tables = sorted((run / "cache" / "tables").iterdir())
    Pipeline(fields, run).report(42)
    assert sorted(path.name for path in (run / "stages").iterdir()) == before
    assert sorted((run / "cache" / "tables").iterdir()) == tables


def test_a_finished_run_is_only_read(run, fields, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    text, path = publish.card(run, "merged")
    assert path.read_text() == text
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    begun = tmp_path / "begun"
    Pipeline(fields, begun).branches("strong")
    assert "It has not been evaluated" in publish.card(begun, "strong")[0]
    with pytest.raises(RunError, match=r"'weak' of .* is not finished"):
        publish.card(begun, "weak")


def test_a_branch_that_a_budget_cut_short_has_a_card(fields, tmp_path):
    run = Pipeline(fields, tmp_path / "run")
    folder = run.branch("strong", 42).folder.parent
    said = json.loads((folder / "stage.json").read_text())
    said["inputs"]["budget"] = "60 s"
    section = Branch.model_validate(said["section"])
    said["key"] = runs.stage_key("strong", section, said["inputs"])
    (folder / "stage.json").write_text(json.dumps(said))
    folder.rename(folder.with_name("strong-00ff00ff00ff"))
    _, path = publish.card(tmp_path / "run", "strong")
    assert path.parts[-3] == "strong-00ff00ff00ff"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("stronk", "Did you mean 'strong'"),
        ("target", "'target' knows it all"),
        ("told", "a guard, which changes no weights"),
    ],
)
def test_a_model_without_a_card_is_refused(run, name, said):
    with pytest.raises((RunError, RecipeError), match=said):
        publish.card(run, name)


def test_a_folder_without_a_run_and_a_seed_that_it_has_not_are_refused(run, tmp_path):
    with pytest.raises(RunError, match="is no run folder"):
        publish.card(tmp_path, "strong")
    with pytest.raises(RunError, match=r"no seed 7\. Known: 42"):
        publish.card(run, "strong", seed=7)


def test_license_and_language_are_the_bases_own(fields, tmp_path, tiny_folder):
    base = tmp_path / "base"
    base.mkdir()
    for file in tiny_folder.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    (base / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\nA model.\n")
    branch = {"branches": {"strong": BRANCH}, "merges": {}, "edits": {}, "unscored": []}
    recipe = {**fields, **branch, "guards": {}, "model": {"path": str(base)}}
    run = Pipeline(recipe, tmp_path / "run")
    run.branches()
    data = ModelCard(publish.card(tmp_path / "run", "strong")[0]).data
    assert (data.license, data.language) == ("mit", ["en"])
    (base / "README.md").write_text("---\nlicense: [: {\n---\n")
    data = ModelCard(publish.card(tmp_path / "run", "strong")[0]).data
    assert data.license is None
    assert isinstance(publish.opened(tmp_path / "run").folder, Finished)
