"""Options of the command line: fields in YAML, nested by dots, wrong ones refused by their flag."""

import pytest

from expunge.config import put_field, read_options
from expunge.errors import RecipeError


def test_options_are_fields_in_yaml_nested_by_the_dots_of_their_paths():
    texts = ["lr=1e-3", "terms=[a, 2]", "lora.rank=4", "lora.dropout=0", "why=a=b", "none=null"]
    assert read_options(texts, "-o") == {
        "lr": "1e-3",  # YAML 1.1 asks for 1.0e-3; a section reads the text as a number
        "terms": ["a", 2],
        "lora": {"rank": 4, "dropout": 0},
        "why": "a=b",
        "none": None,
    }
    assert read_options(["lr=1", "lr=2"], "-o") == {"lr": 2}  # the last one counts
    assert read_options([], "-o") == {}


@pytest.mark.parametrize("text", ["lr", "=3", " =3", "lr=[1", "lr=1\tx: 2", "lr=1 lr.first=2"])
def test_what_is_no_option_is_one_line_that_names_the_flag(text):
    with pytest.raises(RecipeError) as found:
        read_options(text.split(" ") if "." in text else [text], "--set")
    assert str(found.value).startswith("--set ")
    assert "\n" not in str(found.value)


def test_a_field_within_a_list_is_set_by_its_number():
    fields = {"terms": [{"weight": 1}, {"weight": 2}]}
    put_field(fields, "terms.1.weight", 5, origin="--sweep")
    assert fields == {"terms": [{"weight": 1}, {"weight": 5}]}
    with pytest.raises(RecipeError, match=r"--sweep terms\.2\.weight: there is no '2' there"):
        put_field(fields, "terms.2.weight", 5, origin="--sweep")
