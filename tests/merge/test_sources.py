"""Names of models in merge files: folders, Hub repositories and their revisions, adapters."""

import pytest

from expunge import models
from expunge.errors import ExpungeError
from expunge.merge.sources import Opened


@pytest.fixture
def opened(tiny_folder, branches, monkeypatch):
    """What is asked of the Hub; each repository is one tiny model, or one adapter of it."""
    asked = []

    def find(path, revision=None):
        asked.append((path, revision))
        return tiny_folder

    def fetch(path, revision):
        asked.append((path, revision))
        return branches[0]

    monkeypatch.setattr(models, "fetch", fetch)
    return Opened(find), asked


@pytest.mark.parametrize(
    ("given", "expected", "name"),
    [
        ("o/n", [("o/n", None)], "o/n"),
        ("o/n@main", [("o/n", "main")], "o/n@main"),
        ("o/n@v1+p/q@pr/2", [("o/n", "v1"), ("p/q", "pr/2")], "o/n@v1+p/q@pr/2"),
        ({"model": {"path": "o/n", "revision": "v1"}}, [("o/n", "v1")], "o/n@v1"),
        (
            {"model": "o/n", "lora": {"path": "p/q", "revision": "v2"}},
            [("o/n", None), ("p/q", "v2")],
            "o/n+p/q@v2",
        ),
        ("a@b", [("a@b", None)], "a@b"),
    ],
)
def test_a_revision_reaches_the_hub(opened, given, expected, name):
    sources, asked = opened
    assert sources.source(given).name == name
    assert asked == expected
    assert sources.source(given) is sources.source(given)


def test_two_revisions_are_two_models_and_a_folder_may_have_an_at_sign(opened, tmp_path):
    sources, asked = opened
    assert sources.source("o/n@a") is not sources.source("o/n@b")
    folder = tmp_path / "m@main"
    folder.mkdir()
    sources.source(str(folder))
    assert asked[-1] == (str(folder), None)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"lora": "p/q"},
        {"model": "o/n", "revision": "v1"},
        {"model": {"path": "o/n", "revison": "v1"}},
        {"model": {"path": 5}},
        {"model": {"path": "o/n", "revision": 3}},
        {"model": ["o/n"]},
        "o/n@",
    ],
)
def test_what_names_no_model_is_refused(opened, given):
    sources, asked = opened
    with pytest.raises(ExpungeError, match="a model is a"):
        sources.source(given)
    assert asked == []


def test_a_revision_of_a_folder_is_refused(opened, tmp_path):
    with pytest.raises(ExpungeError, match="is here and has no revision: leave out v1"):
        opened[0].source({"model": {"path": str(tmp_path), "revision": "v1"}})
