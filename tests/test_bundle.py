"""The bundle and the engine: what does not fit is refused with its name and the fix."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import CHECKOUT

import service
from service.bundle import find_bundle, load_bundle
from service.engine import OnnxEngine, check_installation
from service.errors import BundleError, ProviderError


@pytest.fixture
def copy(shipped_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shipped_bundle, tmp_path / "bundle"))


def _change(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def test_shipped_bundle_is_whole(shipped_bundle: Path) -> None:
    loaded = load_bundle(shipped_bundle)
    assert loaded.config.name == "en-small"
    assert loaded.offline_graph.is_file()
    assert len(loaded.read_words()) > 50_000
    size = sum(p.stat().st_size for p in shipped_bundle.rglob("*"))
    assert size < 80e6


@pytest.mark.parametrize("name", ["offline.onnx", "lm/lm.binary", "lm/words.txt", "MODEL_CARD.md"])
def test_missing_and_altered_files_are_named(copy: Path, name: str) -> None:
    path = copy / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=f"{name} was altered"):
        load_bundle(copy)
    path.unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        load_bundle(copy)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(format_version=99), "format version 99"),
        (lambda c: c.update(surprise=1), "surprise"),
        (lambda c: c.pop("tokens"), "tokens"),
        (lambda c: c["tokens"].insert(0, "a"), "<blank>"),
        (lambda c: c["features"].update(n_mels=0), "n_mels"),
        (lambda c: c["files"].pop("offline.onnx"), "lists no offline.onnx"),
    ],
)
def test_config_that_does_not_fit_is_refused(
    copy: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    _change(copy, change)
    with pytest.raises(BundleError, match=said):
        load_bundle(copy)


def test_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is no bundle"):
        load_bundle(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BundleError, match=r"config\.json does not fit"):
        load_bundle(tmp_path)


def test_bundle_is_found_in_the_documented_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VOXGATE_BUNDLE", raising=False)
    assert find_bundle(None) == CHECKOUT / "bundles" / "en-small"
    monkeypatch.setenv("VOXGATE_BUNDLE", "/from/environment")
    assert find_bundle(None) == Path("/from/environment")
    assert find_bundle(Path("asked")) == Path("asked")


def test_no_bundle_at_all_names_both_places(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("VOXGATE_BUNDLE", raising=False)
    package = tmp_path / "service" / "__init__.py"
    monkeypatch.setattr(service, "__file__", str(package))
    with pytest.raises(BundleError, match=r"VOXGATE_BUNDLE.*en-small"):
        find_bundle(None)


def test_cuda_that_is_not_there_is_refused_with_the_repair(shipped_bundle: Path) -> None:
    with pytest.raises(ProviderError, match=r"make install-gpu.*onnxruntime-gpu\[cuda,cudnn\]"):
        OnnxEngine(shipped_bundle / "offline.onnx", provider="cuda")


def test_two_onnxruntime_packages_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check_installation("cpu")
    folder = tmp_path / "onnxruntime_gpu-1.20.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.20\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ProviderError, match="both installed"):
        check_installation("cpu")
