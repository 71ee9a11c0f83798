"""The YAML that the documentation shows is what a recipe takes."""

import re
from pathlib import Path

import pytest
import yaml

from expunge.unlearn.section import Branch

BLOCK = re.compile(r"```yaml\n(branches:.*?)```", re.DOTALL)
SHOWN = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
    for number, block in enumerate(BLOCK.findall(page.read_text()))
    if "[...]" not in block  # cut short
]


@pytest.mark.parametrize("block", SHOWN)
def test_branches_read(block):
    for fields in yaml.safe_load(block)["branches"].values():
        Branch.model_validate(fields)


def test_some_are_found():
    assert SHOWN
