"""Imports point one way: export → training → service, and serving needs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CHECKOUT

_SERVICE_ENTRIES = ("service.server", "service.cli", "service.evaluation", "service.batch")


@pytest.mark.parametrize("module", _SERVICE_ENTRIES)
def test_serving_imports_no_torch(module: str) -> None:
    code = (
        f"import sys, {module}; "
        "found = {'torch', 'lhotse', 'torchaudio', 'onnx'} & set(sys.modules); "
        "sys.exit(str(found) if found else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert result.returncode == 0, result.stderr


def _imported_packages(path: Path) -> set[str]:
    """Top-level packages a file imports at its top level (not lazily inside a function)."""
    packages = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            packages.add((node.module or "").split(".")[0])
    return packages


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("service", {"training", "export", "torch", "torchaudio", "lhotse"}),
        ("training", {"export", "onnxruntime", "grpc"}),
        ("export", {"grpc", "lhotse"}),
    ],
)
def test_imports_point_one_way(folder: str, forbidden: set[str]) -> None:
    for path in (CHECKOUT / folder).rglob("*.py"):
        assert not _imported_packages(path) & forbidden, path


@pytest.mark.parametrize(
    ("package", "homes"),
    [
        (
            "grpc",
            {
                "service/server.py",
                "service/security.py",
                "service/observe.py",
                "service/client.py",
                "service/load_test.py",
                "service/api",
                "service/pb",
            },
        ),
        ("onnxruntime", {"service/engine.py"}),
        ("pyctcdecode", {"service/decoding/reference.py"}),
        ("kenlm", {"service/decoding/reference.py"}),
    ],
)
def test_a_dependency_is_imported_where_it_lives_only(package: str, homes: set[str]) -> None:
    importers = {
        str(path.relative_to(CHECKOUT))
        for path in (CHECKOUT / "service").rglob("*.py")
        if package in _imported_packages(path)
    }
    assert importers
    assert all(any(i == home or i.startswith(home + "/") for home in homes) for i in importers)
