"""How the search is compiled: by numba, to run without the interpreter's lock.

Machine code is kept on disk, keyed by processor and numba version (numba does that) and by the
source of all compiled files (numba looks at one file at a time, and a search would go on using an
old version of what it calls). Where nothing can be written, every start compiles.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

import numba

CACHE_VARIABLE: Final = "VOXGATE_CACHE"

Function = TypeVar("Function", bound=Callable[..., object])


def _cache_folder() -> Path | None:
    """The folder of this version's machine code; None where it cannot be written."""
    home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    base = Path(os.environ.get(CACHE_VARIABLE) or Path(home) / "voxgate")
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    folder = base / f"decoding-{digest.hexdigest()[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return None


_FOLDER: Final = _cache_folder()


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
