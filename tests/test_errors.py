"""An error is one line, whatever the files said that it speaks of."""

from expunge.errors import ModelError


def test_control_characters_are_shown_and_not_sent():
    assert str(ModelError("a\nb\x1b[2J\u202ec é 漢")) == "a\\nb\\x1b[2J\\u202ec é 漢"


def test_a_plain_message_stays_as_it_is():
    assert str(ModelError("no 'x' at /tmp/y; give one")) == "no 'x' at /tmp/y; give one"
