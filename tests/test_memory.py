"""Kept memory is reused, and handed back when asked for."""

import gc
import math
import os
import resource
import subprocess
import sys

import pytest

from expunge.errors import MergeError
from expunge.memory import _LIBRARY, container_room, imports_set_aside

SCRIPT = """
import resource, sys
from pathlib import Path
from expunge.memory import keep_freed_memory, release_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

keep_freed_memory()
size = 64 * 2**20
buffer = b"x" * size
del buffer
first, held = faults(), resident()
for _ in range(5):
    buffer = b"x" * size
    del buffer
again = faults() - first
release_freed_memory()
print(again, held - resident())
"""


@pytest.mark.skipif(_LIBRARY is None, reason="only glibc's heap is tuned")
def test_freed_memory_is_used_again_and_then_released():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    faults, released = map(int, done.stdout.split())
    pages = 64 * 2**20 // resource.getpagesize()
    assert faults < pages / 10  # mapped anew, five buffers would fault five times that
    assert released > 32 * 2**20


@pytest.mark.parametrize(("below", "total"), [("", ""), ("memory", "total_")])
def test_a_containers_limit_leaves_what_is_not_held_and_pages_of_files(tmp_path, below, total):
    assert container_room(tmp_path) == math.inf
    limit, used = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    limit, used = (limit, used) if below else ("memory.max", "memory.current")
    folder = tmp_path / below
    folder.mkdir(exist_ok=True)
    (folder / limit).write_text("1000\n")
    (folder / used).write_text("900\n")
    (folder / "memory.stat").write_text(
        f"anon 600\n{total}inactive_file 200\n{total}active_file 50\n"
    )
    assert container_room(tmp_path) == 350
    (folder / used).write_text("2000\n")
    assert container_room(tmp_path) == 0
    if not below:
        (folder / limit).write_text("max\n")
        assert container_room(tmp_path) == math.inf


KERNELS = """
import resource
from pathlib import Path
import torch
from expunge.memory import keep_few_kernels, keep_freed_memory, release_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

keep_freed_memory()
keep_few_kernels()
weight = torch.ones(64, 64, dtype=torch.bfloat16)
for tokens in range(1, 11):
    torch.nn.functional.linear(torch.ones(tokens, 64, dtype=torch.bfloat16), weight)
held = resident()
for tokens in range(11, 601):
    torch.nn.functional.linear(torch.ones(tokens, 64, dtype=torch.bfloat16), weight)
release_freed_memory()
print(resident() - held)
"""


@pytest.mark.skipif(_LIBRARY is None, reason="freed code is handed back by glibc's heap")
def test_products_of_many_shapes_leave_less_behind_unless_the_user_wants_them_kept():
    def grown(**said) -> int:
        words, env = [sys.executable, "-c", KERNELS], {**os.environ, **said}
        return int(subprocess.run(words, env=env, capture_output=True, check=True).stdout)

    kept = grown(ONEDNN_PRIMITIVE_CACHE_CAPACITY="1024")
    if kept < 100e6:
        pytest.skip("this CPU multiplies bfloat16 without code of its own for each shape")
    assert grown() < 0.75 * kept


def test_what_was_set_aside_is_collected_again_afterwards_however_it_ends():
    before = gc.get_freeze_count()
    with imports_set_aside():
        assert gc.get_freeze_count() > before + 1_000
    assert gc.get_freeze_count() == 0
    with pytest.raises(MergeError), imports_set_aside():
        raise MergeError("of a merge")
    assert gc.get_freeze_count() == 0
