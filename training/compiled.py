"""The parts of training that are compiled: C++ in `kernels/`, for the processor at hand.

Each is one file of functions that are called with addresses of arrays. It is compiled when it is
first needed, in some seconds, and kept where the service keeps its compiled search. All have a twin
in torch, which runs on GPUs and where there is no compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from service.cache import cache_folder
from training.precision import processor_name

logger = logging.getLogger(__name__)

_SOURCES: Final = Path(__file__).with_name("kernels")
_FLAGS: Final = (
    *("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math"),
    *("-fno-signed-zeros", "-fassociative-math", "-shared", "-fPIC", "-pthread"),
)


@cache
def load_kernel(name: str) -> ctypes.CDLL | None:
    """The compiled functions of `kernels/<name>.cpp`; None, with a warning, without a compiler."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        logger.warning("no C++ compiler: torch does the work of %s.cpp, but slower", name)
        return None
    sources = [path.read_text(encoding="utf-8") for path in sorted(_SOURCES.iterdir())]
    facts = "\n".join([*sources, compiler, *_FLAGS, processor_name()])
    digest = hashlib.sha256(facts.encode()).hexdigest()[:16]
    library = cache_folder() / f"training-{digest}" / f"{name}.so"
    try:
        if not library.exists():
            _compile(compiler, _SOURCES / f"{name}.cpp", library)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr[-500:] if isinstance(error, subprocess.CalledProcessError) else error
        logger.warning("%s.cpp was not compiled; torch does its work, but slower: %s", name, said)
        return None


def counts(*numbers: int) -> list[ctypes.c_long]:
    """Numbers as a compiled function takes them, and behind them how many threads it may use."""
    return [ctypes.c_long(n) for n in (*numbers, torch.get_num_threads())]


def addresses(*arrays: Tensor | None) -> Sequence[ctypes.c_void_p]:
    """Contiguous arrays as a compiled function takes them; None is no array."""
    assert all(array is None or array.is_contiguous() for array in arrays)
    return [ctypes.c_void_p(None if array is None else array.data_ptr()) for array in arrays]


def _compile(compiler: str, source: Path, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        unfinished = Path(folder, library.name)
        command = [compiler, *_FLAGS, str(source), "-o", str(unfinished)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        unfinished.rename(library)
