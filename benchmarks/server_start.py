"""Measures how long a server takes to listen, what memory it holds then, and the sizes on disk.

python benchmarks/server_start.py
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil

from service.bundle import find_bundle
from service.processors import count_usable_processors


def main() -> None:
    """Start a server, measure it, stop it."""
    command = [sys.executable, "-m", "service.cli", "serve", "--port", "0"]
    start = time.perf_counter()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        listening = any(line.startswith("listening") for line in server.stderr)
        seconds = time.perf_counter() - start
        assert listening, "the server did not start"
        resident = psutil.Process(server.pid).memory_info().rss
        server.terminate()
    print(f"{count_usable_processors()} processors")
    print(f"seconds until the port is open: {seconds:.1f}")
    print(f"resident memory then: {resident / 1e6:.0f} MB")
    print(f"bundle: {_size(find_bundle(None)) / 1e6:.1f} MB")
    print(f"environment ({sys.prefix}): {_size(Path(sys.prefix)) / 1e6:.0f} MB")


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


if __name__ == "__main__":
    main()
