"""An error is one line, whatever the files said that it speaks of."""

import pytest

from expunge import cli
from expunge.errors import ModelError


def test_control_characters_are_shown_and_not_sent():
    assert str(ModelError("a\nb\x1b[2J\u202ec é 漢")) == "a\\nb\\x1b[2J\\u202ec é 漢"


def test_a_plain_message_stays_as_it_is():
    assert str(ModelError("no 'x' at /tmp/y; give one")) == "no 'x' at /tmp/y; give one"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Cannot allocate memory (os error 12)"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_memory_that_runs_out_anywhere_is_one_line(monkeypatch, capsys, error):
    """Loading a model and scoring it too; training says more (unlearn.fit)."""

    def ends(**options):
        raise error

    monkeypatch.setattr(cli, "app", ends)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert line.startswith("expunge: out of memory; expunge plan RECIPE says")


def test_what_the_system_refuses_of_a_file_is_one_line(monkeypatch, capsys):
    def ends(**options):
        raise FileNotFoundError(2, "No such file or directory", "/proc/foo")

    monkeypatch.setattr(cli, "app", ends)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "expunge: /proc/foo: No such file or directory\n"


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), OSError(5, "I/O error")])
def test_other_errors_keep_their_traceback(monkeypatch, error):
    def ends(**options):
        raise error

    monkeypatch.setattr(cli, "app", ends)
    with pytest.raises(type(error)):
        cli.main()
