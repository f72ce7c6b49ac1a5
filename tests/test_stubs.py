"""The committed gRPC stubs are what protoc makes of the sources."""

from __future__ import annotations

from pathlib import Path

from conftest import CHECKOUT

from service.generate_stubs import generate


def test_stubs_are_up_to_date(tmp_path: Path) -> None:
    generate(tmp_path)
    fresh = {p.relative_to(tmp_path): p.read_text() for p in tmp_path.rglob("*.py*")}
    package = CHECKOUT / "service" / "pb"
    committed = {
        p.relative_to(CHECKOUT): p.read_text()
        for p in package.rglob("*.py*")
        if "__pycache__" not in p.parts
    }
    assert fresh == committed, "run `make stubs`"
