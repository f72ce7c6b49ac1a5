"""Measures how long a server takes to listen, what memory it holds then, and the sizes on disk.

python benchmarks/server_start.py

The server starts three times: with an empty cache for the compiled search, with a full one, and
where no cache can be written.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from service.bundle import find_bundle
from service.cache import CACHE_VARIABLE
from service.processors import count_usable_processors
from training.precision import processor_name


def main() -> None:
    """Start servers, measure them, stop them."""
    print(f"{processor_name()}, {count_usable_processors()} processors")
    with tempfile.TemporaryDirectory() as folder:
        for name, cache in (
            ("empty cache", folder),
            ("full cache", folder),
            ("no cache can be written", os.devnull),
        ):
            seconds, resident = start_server(cache)
            print(f"{name}: port open after {seconds:.1f} s, {resident / 1e6:.0f} MB resident")
    print(f"bundle: {_size(find_bundle(None)) / 1e6:.1f} MB")
    print(f"environment ({sys.prefix}): {_size(Path(sys.prefix)) / 1e6:.0f} MB")


def start_server(cache: str) -> tuple[float, int]:
    """Seconds until a server listens, and bytes it holds then."""
    command = [sys.executable, "-m", "service.cli", "serve", "--port", "0"]
    environment = os.environ | {CACHE_VARIABLE: cache}
    start = time.perf_counter()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stderr is not None
        listening = any(line.startswith("listening") for line in server.stderr)
        seconds = time.perf_counter() - start
        assert listening, "the server did not start"
        resident = psutil.Process(server.pid).memory_info().rss
        server.terminate()
    return seconds, resident


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


if __name__ == "__main__":
    main()
