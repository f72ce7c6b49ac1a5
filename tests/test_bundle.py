"""The bundle: what does not fit is refused with its name and the fix."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CHECKOUT

import service
from service.bundle import (
    BundleConfig,
    DecodingSettings,
    Profile,
    Survival,
    find_bundle,
    hash_file,
    load_bundle,
)
from service.errors import BundleError
from service.features import FeatureSettings

_FILES = {
    "offline.onnx": b"a graph" * 100,
    "streaming.onnx": b"another graph" * 100,
    "lm/lm.ngram": b"a language model",
    "MODEL_CARD.md": b"# tiny\n",
}
_CHECKED = [name for name in _FILES if name != "MODEL_CARD.md"]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle that is whole, though its graphs and language model are none."""
    folder = tmp_path / "bundle"
    for name, content in _FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    config = BundleConfig(
        format_version=3,
        name="tiny",
        language="en-US",
        features=FeatureSettings(),
        tokens=("<blank>", " ", "a"),
        phones=("<blank>", "AH"),
        subsampling=4,
        profiles={"balanced": Profile(chunk_frames=8, right_frames=4, window_feature_frames=48)},
        decoding=DecodingSettings(),
        survival={"beam": Survival(intercept=-0.5, confidence=0.75)},
        files={name: hashlib.sha256(content).hexdigest() for name, content in _FILES.items()},
        provenance={"trained_on": "tones"},
    )
    (folder / "config.json").write_text(config.model_dump_json())
    return folder


def _change(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


# Reading


def test_shipped_bundle_is_whole(shipped_bundle: Path) -> None:
    loaded = load_bundle(shipped_bundle)
    assert loaded.config.name == "en-small"
    assert loaded.offline_graph.is_file()
    assert loaded.streaming_graph.is_file()
    assert len(loaded.read_lexicon()) > 50_000
    assert sum(p.stat().st_size for p in shipped_bundle.rglob("*")) < 80e6


def test_load_bundle_finds_every_part(bundle: Path) -> None:
    loaded = load_bundle(bundle)
    assert loaded.folder == bundle
    assert loaded.offline_graph == bundle / "offline.onnx"
    assert loaded.streaming_graph == bundle / "streaming.onnx"
    assert loaded.ngram == bundle / "lm" / "lm.ngram"
    assert loaded.config.tokens == ("<blank>", " ", "a")
    assert loaded.config.decoding == DecodingSettings()
    assert loaded.config.profiles["balanced"].window_feature_frames == 48
    assert loaded.config.survival["beam"].confidence == 0.75


def test_bundle_without_a_calibration_has_none(bundle: Path) -> None:
    _change(bundle, lambda c: c.pop("survival"))
    assert load_bundle(bundle).config.survival == {}


def test_bundle_without_a_language_model_has_none(bundle: Path) -> None:
    _change(bundle, lambda c: c["files"].pop("lm/lm.ngram"))
    assert load_bundle(bundle).ngram is None


@pytest.mark.parametrize("name", _CHECKED)
def test_missing_file_is_named(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is missing.*copy the whole folder"):
        load_bundle(bundle)


@pytest.mark.parametrize("name", _CHECKED)
@pytest.mark.parametrize("place", [0, -1])
def test_file_altered_in_one_byte_is_named(bundle: Path, name: str, place: int) -> None:
    content = bytearray(_FILES[name])
    content[place] ^= 1
    (bundle / name).write_bytes(content)
    with pytest.raises(BundleError, match=f"{name} was altered.*copy the bundle again"):
        load_bundle(bundle)


@pytest.mark.parametrize("name", _CHECKED)
def test_file_cut_short_is_named(bundle: Path, name: str) -> None:
    (bundle / name).write_bytes(_FILES[name][:-1])
    with pytest.raises(BundleError, match=f"{name} was altered"):
        load_bundle(bundle)


def test_model_card_may_be_added_to(bundle: Path) -> None:
    (bundle / "MODEL_CARD.md").write_bytes(_FILES["MODEL_CARD.md"] + b"Our notes.\n")
    assert load_bundle(bundle).config.name == "tiny"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format_version=99), "format version 99.*reads 3.*export"),
        (lambda c: c.update(format_version=1), "format version 1.*reads 3.*export"),
        (lambda c: c.update(surprise=1), "surprise: Extra.*export the bundle again"),
        (lambda c: c["decoding"]["phones"].update(alfa=1), r"decoding\.phones\.alfa: Extra"),
        (lambda c: c.pop("tokens"), "tokens: Field required"),
        (lambda c: c.update(subsampling="four"), "subsampling: .*integer"),
        (lambda c: c["tokens"].insert(0, "a"), "token 0 and phone 0 must be <blank>"),
        (lambda c: c["phones"].reverse(), "token 0 and phone 0 must be <blank>"),
        (lambda c: c["features"].update(n_mels=0), r"features\.n_mels"),
        (
            lambda c: c["decoding"]["characters"].update(beam_width=0),
            r"decoding\.characters\.beam_width",
        ),
        (lambda c: c.pop("profiles"), "profiles: Field required"),
        (lambda c: c["profiles"].clear(), "there is no profile balanced"),
        (
            lambda c: c["profiles"]["balanced"].update(window_feature_frames=47),
            "the window of profile balanced is too short",
        ),
        (
            lambda c: c["profiles"]["balanced"].update(chunk_frames=0),
            r"profiles\.balanced\.chunk_frames",
        ),
        (
            lambda c: c["profiles"]["balanced"].update(right_frames=-1),
            r"profiles\.balanced\.right_frames",
        ),
        (
            lambda c: c["profiles"]["balanced"].pop("window_feature_frames"),
            r"window_feature_frames",
        ),
        (lambda c: c["survival"]["beam"].update(age=1), r"survival\.beam\.age: Extra"),
        (lambda c: c["files"].pop("offline.onnx"), r"lists no offline\.onnx; export"),
        (lambda c: c["files"].pop("streaming.onnx"), r"lists no streaming\.onnx; export"),
    ],
)
def test_config_that_does_not_fit_is_refused(
    bundle: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    _change(bundle, change)
    with pytest.raises(BundleError, match=rf"config\.json .*{message}"):
        load_bundle(bundle)


@pytest.mark.parametrize("name", ["tokens", "phones"])
def test_config_without_tokens_is_refused(bundle: Path, name: str) -> None:
    _change(bundle, lambda c: c.update({name: []}))
    with pytest.raises(BundleError, match=r"config\.json does not fit"):
        load_bundle(bundle)


def test_config_of_a_later_format_is_refused_as_such(bundle: Path) -> None:
    _change(bundle, lambda c: c.update(format_version=4, surprise=True))
    with pytest.raises(BundleError, match="format version 4"):
        load_bundle(bundle)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format_version": 1'])
def test_broken_json_is_refused(bundle: Path, text: str) -> None:
    (bundle / "config.json").write_text(text)
    with pytest.raises(BundleError, match=r"config\.json does not fit.*export the bundle again"):
        load_bundle(bundle)


def test_config_that_is_no_text_is_refused(bundle: Path) -> None:
    (bundle / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BundleError, match=r"is no bundle: cannot read .*config\.json"):
        load_bundle(bundle)


def test_absent_folder_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path / "absent", tmp_path):
        with pytest.raises(BundleError, match=rf"{folder} is no bundle.*`voxgate export` wrote"):
            load_bundle(folder)


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3 << 20])
def test_hash_file_is_sha256(tmp_path: Path, size: int) -> None:
    content = np.random.default_rng(size).bytes(size)
    (tmp_path / "file").write_bytes(content)
    assert hash_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()


# Finding


def test_find_bundle_prefers_the_argument_then_the_variable_then_the_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VOXGATE_BUNDLE", raising=False)
    assert find_bundle(None) == CHECKOUT / "bundles" / "en-small"
    monkeypatch.setenv("VOXGATE_BUNDLE", "/from/environment")
    assert find_bundle(None) == Path("/from/environment")
    assert find_bundle(Path("asked")) == Path("asked")
    monkeypatch.setenv("VOXGATE_BUNDLE", "")
    assert find_bundle(None) == CHECKOUT / "bundles" / "en-small"


def test_find_bundle_without_any_names_both_places(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("VOXGATE_BUNDLE", raising=False)
    monkeypatch.setattr(service, "__file__", str(tmp_path / "service" / "__init__.py"))
    shipped = tmp_path.resolve() / "bundles" / "en-small"
    with pytest.raises(BundleError, match=f"VOXGATE_BUNDLE is not set and {shipped} .*--bundle"):
        find_bundle(None)
