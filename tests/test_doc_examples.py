"""The YAML that the documentation shows is what a recipe takes."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from expunge.unlearn.section import Branch

BLOCK = re.compile(r"```yaml\n(branches:.*?)```", re.DOTALL)
SHOWN = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
    for number, block in enumerate(BLOCK.findall(page.read_text()))
    if "[...]" not in block  # cut short
]


def holds(made: dict[str, Any], shown: dict[str, Any]) -> bool:
    """Whether every field that is shown has its value, however deep."""
    return all(
        holds(made[name], value) if isinstance(value, dict) else made[name] == value
        for name, value in shown.items()
    )


@pytest.mark.parametrize("block", SHOWN)
def test_branches_are_what_they_show(block):
    for fields in yaml.safe_load(block)["branches"].values():
        branch = Branch.model_validate(fields)
        assert branch.terms
        sections = {n: v for n, v in fields.items() if n not in ("objective", "terms")}
        assert holds(branch.model_dump(), sections)
        with pytest.raises(ValidationError, match="learning_rate"):
            Branch.model_validate({**fields, "learning_rate": 1e-4})  # control


def test_some_are_found():
    assert SHOWN
