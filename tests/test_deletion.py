"""What someone with a deletion request does: three files of their own, their model, one recipe."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from commands import run as command
from expunge.data.synthetic import Synthetic, synthesize
from expunge.report.results import TERMS, read_results

RECIPE = Path(__file__).parents[1] / "recipes" / "deletion.yaml"


def plain(file: Path) -> None:
    """The items of a file as id and text alone, questions left out."""
    items = [json.loads(line) for line in file.read_text().splitlines()]
    texts = [
        {"id": f"text-{number}", "text": f"{item['input']} {item['output']}"}
        for number, item in enumerate(items)
        if "qa" not in item["id"][-5:]
    ]
    file.write_text("".join(json.dumps(text) + "\n" for text in texts))


@pytest.mark.parametrize("texts", [False, True])
def test_three_files_and_a_model_give_another_model_and_what_it_forgot(
    tiny_folder, tmp_path, texts
):
    def expunge(*words: object) -> None:
        done = command(*words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr

    synthesize(Synthetic(documents=1, nonmembers=1), tmp_path)
    recipe = RECIPE.read_text().replace("epochs: 40", "epochs: 3")
    if texts:
        plain(tmp_path / "forget.jsonl")
        plain(tmp_path / "retain.jsonl")
        asked = (
            "      - {half: forget, loss: hinge_token, items: questions, options: {target: 7.0}}\n"
        )
        assert asked in recipe
        recipe = recipe.replace(asked, "")
    (tmp_path / "deletion.yaml").write_text(recipe)
    expunge("data", "standins", "forget.jsonl", "unseen.jsonl", "--count", 210)
    expunge("run", "deletion.yaml", "--model", tiny_folder, "--out", "run")
    scored = read_results(tmp_path / "run" / "results.json").models
    terms = {"forget/items/sc", "retain/items/sc"} if texts else set(TERMS)
    assert set(scored["unlearned"].semeval.terms) == terms
    assert scored["unlearned"].nll.forget != scored["target"].nll.forget
    (made,) = (tmp_path / "run" / "stages").glob("unlearned-*/model")
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_folder, made))
    assert set(after) == set(before)
    assert any(not after[name].equal(before[name]) for name in before)
    assert "Nothing has been measured" not in (made / "README.md").read_text()
