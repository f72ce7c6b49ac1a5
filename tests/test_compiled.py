"""The cache of the compiled search: kept, keyed, and done without."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from service.cache import CACHE_VARIABLE
from service.decoding import compiled

_PROGRAM = """
import numpy as np
from service.decoding.search import kth_largest
print(kth_largest(np.array([3.0, 1.0, 2.0]), 3, 2))
"""


def _run_with_cache(cache: Path | str) -> None:
    """Compile and run one kernel in a fresh process."""
    found = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        env=os.environ | {CACHE_VARIABLE: str(cache)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "2.0"


def test_a_kernel_is_compiled_once(tmp_path: Path) -> None:
    _run_with_cache(tmp_path)
    (folder,) = tmp_path.iterdir()
    kept = {p: p.stat().st_mtime_ns for p in folder.rglob("*.nbc")}
    assert kept
    _run_with_cache(tmp_path)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*.nbc")} == kept


@pytest.mark.parametrize("cache", ["/dev/null", "/dev/null/below"])
def test_the_search_works_where_no_cache_can_be_written(cache: str) -> None:
    _run_with_cache(cache)


def test_another_processor_has_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    mine = compiled._cache_folder()
    monkeypatch.setattr(compiled, "get_host_cpu_name", lambda: "another")
    assert compiled._cache_folder() not in (None, mine)


@pytest.mark.parametrize(
    ("has_folder", "is_filled", "said"),
    [(False, False, "at every start"), (True, False, "about a minute, once"), (True, True, "")],
)
def test_a_start_that_compiles_says_so(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    has_folder: bool,
    is_filled: bool,
    said: str,
) -> None:
    if is_filled:
        (tmp_path / "search.nbi").touch()
    monkeypatch.setattr(compiled, "_FOLDER", tmp_path if has_folder else None)
    with caplog.at_level(logging.INFO):
        compiled.announce()
    assert said in caplog.text
    assert bool(said) == bool(caplog.text)
