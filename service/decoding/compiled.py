"""How the search is compiled: by numba, to run without the interpreter's lock.

Machine code is kept on disk, in a folder for each processor, numba version and source of the
compiled files (numba itself looks at one file at a time, and a search would go on using an old
version of what it calls). Where nothing can be written, every start compiles.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

import numba
from llvmlite.binding import get_host_cpu_features, get_host_cpu_name

from service.cache import CACHE_VARIABLE, cache_folder

logger = logging.getLogger(__name__)

Function = TypeVar("Function", bound=Callable[..., object])


def _cache_folder() -> Path | None:
    """The folder of this version's machine code; None where it cannot be written."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    for fact in (numba.__version__, get_host_cpu_name(), get_host_cpu_features().flatten()):
        digest.update(fact.encode())
    folder = cache_folder() / f"decoding-{digest.hexdigest()[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return None


_FOLDER: Final = _cache_folder()


def announce() -> None:
    """Say so if the search is going to be compiled: that takes much longer than loading it."""
    if _FOLDER is None:
        logger.info(
            "compiling the search, which takes about a minute at every start, as no cache can be "
            "written; set %s to a folder that can",
            CACHE_VARIABLE,
        )
    elif not any(_FOLDER.rglob("*.nbi")):
        logger.info("compiling the search for this processor: about a minute, once")


_OPTIONS: Final = {"nogil": True, "error_model": "numpy", "cache": _FOLDER is not None}


def compiled(function: Function) -> Function:
    """Compile a function when it is first called with arguments of some types.

    Division by zero gives infinity or NaN as in numpy; integers are 64 bits wide. It cannot make
    arrays: numba does not count references in it, which would cost more than the search.
    """
    return _compile(function, _nrt=False)


def inlined(function: Function) -> Function:
    """Compile a function as `compiled` does, into each of its callers."""
    return _compile(function, _nrt=False, inline="always")


def allocating(function: Function) -> Function:
    """Compile a function that makes arrays."""
    return _compile(function)


def _compile(function: Function, **options: object) -> Function:
    numba.config.CACHE_DIR = "" if _FOLDER is None else str(_FOLDER)
    return numba.njit(**_OPTIONS, **options)(function)  # type: ignore[no-any-return]  # not annotated
