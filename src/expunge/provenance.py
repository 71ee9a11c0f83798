"""What ran: versions, commit, hardware, when."""

import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import expunge
from expunge import parallel
from expunge.memory import peak_bytes, peak_device_bytes


def provenance() -> dict[str, Any]:
    """What ran: versions, commit, hardware, peak memory since the last stage began."""
    return {
        "expunge": expunge.__version__,
        "commit": git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "machine": platform.machine(),
        "processor": processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ranks": parallel.world(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "peak_rss_bytes": peak_bytes(),
        "peak_device_bytes": peak_device_bytes(),
        "finished": now(),
    }


def machine() -> str:
    """The processor, its cores and threads, and torch's version, in one line for a measured row."""
    cores, threads = os.cpu_count(), torch.get_num_threads()
    return f"{processor()}, {cores} CPUs, {threads} threads, torch {torch.__version__}"


def processor() -> str:
    """The processor's name, with its family and model where Linux tells them: names are vague."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor() or platform.machine()
    lines = (line.partition(":") for line in info.read_text().split("\n\n")[0].splitlines())
    said = {name.strip(): value.strip() for name, _, value in lines}
    family = " ".join(f"{name} {said[name]}" for name in ("cpu family", "model") if name in said)
    name = said.get("model name", platform.machine())
    return f"{name} ({family})" if family else name


def now() -> str:
    """The time, UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def git_commit() -> str | None:
    """The commit of the checkout that this code runs from, with `+` where it is modified."""
    here = Path(__file__).parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *words], cwd=here, capture_output=True, text=True, check=True, timeout=10
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    commit = git("rev-parse", "--short=10", "HEAD")
    if not commit:
        return None
    return commit + ("+" if git("status", "--porcelain", "--", str(here)) else "")
