"""How the kernels of merging are compiled: by numba, once, into our own cache folder."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llvmlite import binding
from numba import config as _numba
from numba import njit
from numba.core.registry import cpu_target

from expunge.models import cache_folder

_config: Any = _numba
_config.THREADING_LAYER = "workqueue"
"""A pool of its own: numba on OpenMP would change how many threads torch sums with from then on,
and so the last bits of whatever is trained after a merge."""
_host = binding.get_host_cpu_features()
_told = _config.CPU_NAME or _config.CPU_FEATURES or not _config.ENABLE_AVX
if _host.get("avx512f") and not _told:
    _config.CPU_FEATURES = f"{_host.flatten()},-prefer-256-bit"
"""On Intel's servers LLVM leaves half of each register unused, unless told not to."""
_target: Any = cpu_target
_target.target_context.refresh()
"""What numba would import at the first call of a kernel, imported with the rest."""
_KERNELS = ("codec", "counting", "draws", "jit", "kernels", "ranks", "sums")
_SOURCES = [Path(__file__).with_name(f"{name}.py") for name in _KERNELS]
_CACHE = hashlib.sha256(b"".join(path.read_bytes() for path in _SOURCES)).hexdigest()[:12]


def compiled(**options: Any) -> Callable[[Any], Any]:
    """numba.njit, its machine code kept in our cache folder under the hash of these sources.

    (Beside a source file, numba would not notice that a function it calls elsewhere has changed.)
    """

    def wrap(function: Any) -> Any:
        before, _config.CACHE_DIR = _config.CACHE_DIR, str(cache_folder() / f"kernels-{_CACHE}")
        try:
            return njit(cache=True, nogil=True, error_model="numpy", **options)(function)
        finally:
            _config.CACHE_DIR = before

    return wrap
