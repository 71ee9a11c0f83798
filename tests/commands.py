"""Commands, each in a process of its own that is forked from one which has imported everything.

A process of its own is what a user has, and what can be killed; the seconds that importing torch
and transformers takes are spent once. What imports cost, limits on a process and several ranks are
tested with processes begun by the interpreter.
"""

import atexit
import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path
from subprocess import CompletedProcess

_FORKED = multiprocessing.get_context("forkserver")
_IMPORTED = """expunge.cli expunge.pipeline expunge.calibrate.run expunge.merge.run optuna peft
rouge_score sklearn.metrics transformers.models.llama.modeling_llama"""
_FORKED.set_forkserver_preload(_IMPORTED.split())


def _become(words: list[str], folder: str, cwd: str, environment: dict[str, str]) -> None:
    for stream, name in ((1, "stdout"), (2, "stderr")):
        with Path(folder, name).open("ab") as file:
            os.dup2(file.fileno(), stream)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["expunge", *words]
    from expunge.cli import main

    main()


class Command:
    """A command that runs, told of as by `subprocess.Popen`."""

    def __init__(self, *words: object, cwd: Path | None = None) -> None:
        self._folder = tempfile.mkdtemp(prefix="command-")
        for name in ("stdout", "stderr"):
            Path(self._folder, name).touch()
        said = [str(word) for word in words]
        arguments = (said, self._folder, str(cwd or Path.cwd()), dict(os.environ))
        self._process = _FORKED.Process(target=_become, args=arguments)
        self._process.start()
        atexit.register(self._process.kill)  # what a failed test left would be waited for

    @property
    def pid(self) -> int:
        assert self._process.pid
        return self._process.pid

    def poll(self) -> int | None:
        """Its exit code (a negative signal where it was killed); None while it runs."""
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float = 120) -> "CompletedProcess[str]":
        """Its exit code and what it said."""
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            self._process.kill()
        said = [Path(self._folder, name).read_text() for name in ("stdout", "stderr")]
        assert code is not None, f"it did not end within {timeout} s and said {said}"
        shutil.rmtree(self._folder)
        return CompletedProcess([], code, *said)


def run(*words: object, cwd: Path | None = None, timeout: float = 120) -> "CompletedProcess[str]":
    """Run `expunge words` to its end."""
    return Command(*words, cwd=cwd).wait(timeout)
