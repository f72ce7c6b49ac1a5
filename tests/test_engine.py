"""The engine: graphs run as the model does, stream by stream, or are refused with the fix."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from tiny import N_MELS, make_model

from export.graph import (
    export_graph,
    export_streaming_graph,
    make_spelling_optional,
    quantise_graph,
)
from export.parity import measure_parity
from service.bundle import BundleConfig, load_bundle
from service.engine import FloatArray, OnnxEngine, OnnxStreamingEngine, check_installation
from service.errors import ProviderError
from service.text import CHARACTERS
from training.lexicon import PHONES
from training.model import AcousticModel, Cell, Chunking

_LENGTHS = (57, 1, 23, 2, 40, 5, 96)
_CHUNKINGS = (Chunking(1, 1), Chunking(3, 2), Chunking(8, 4), Chunking(4, 9), Chunking(40, 1))


@pytest.fixture(scope="module")
def model() -> AcousticModel:
    return make_model(subsampling=3)


@pytest.fixture(scope="module")
def graph(model: AcousticModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graph") / "streaming.onnx"
    export_streaming_graph(model, path)
    return path


def _draw_features(*lengths: int) -> FloatArray:
    """Features of a batch, (batch, time, mel), with numbers behind an utterance's length too."""
    generator = np.random.default_rng(3)
    shape = (len(lengths), max(lengths), N_MELS)
    return generator.normal(-8.0, 4.0, size=shape).astype(np.float32)


def _stream(
    engine: OnnxStreamingEngine,
    model: AcousticModel,
    features: FloatArray,
    lengths: tuple[int, ...],
    chunking: Chunking,
    *,
    spell: bool = True,
) -> FloatArray:
    """Settled log_probs of a batch of streams, (batch, frames, unit)."""
    n_window = model.window_frames(chunking)
    n_step = chunking.n_chunk * model.convolutions.subsampling
    padded = np.pad(features, ((0, 0), (0, n_window), (0, 0)), constant_values=1e3)
    state = engine.initial_state(len(features))
    chunks = []
    for first in range(0, features.shape[1], n_step):
        log_probs, n_frames, state = engine.step(
            padded[:, first : first + n_window],
            np.clip(np.array(lengths) - first, 1, n_window),
            n_chunk_frames=chunking.n_chunk,
            state=state,
            spell=spell,
        )
        assert n_frames.max() <= log_probs.shape[1]
        chunks.append(log_probs[:, : chunking.n_chunk])
    return np.concatenate(chunks, axis=1)


def _read(
    model: AcousticModel, features: FloatArray, lengths: tuple[int, ...], chunking: Chunking | None
) -> tuple[FloatArray, list[int]]:
    """The model's own log_probs, (batch, frames, unit), and the frames of each utterance."""
    with torch.no_grad():
        *heads, n_frames = model(torch.from_numpy(features), torch.tensor(lengths), chunking)
    return torch.cat([head.log_softmax(-1) for head in heads], -1).numpy(), n_frames.tolist()


# Streams


@pytest.mark.parametrize(
    ("cell", "bidirectional", "subsampling"),
    [
        ("lstm", True, 4),
        ("lstm", True, 2),
        ("lstm", False, 4),
        ("gru", True, 4),
        ("gru", False, 3),
        ("rnn", True, 3),
        ("rnn", False, 2),
    ],
)
def test_one_streaming_graph_equals_the_model_for_any_chunking_and_batch(
    tmp_path: Path, cell: Cell, bidirectional: bool, subsampling: int
) -> None:
    model = make_model(cell=cell, bidirectional=bidirectional, subsampling=subsampling)
    export_streaming_graph(model, tmp_path / "streaming.onnx")
    engine = OnnxStreamingEngine(tmp_path / "streaming.onnx")
    for chunking in _CHUNKINGS:
        for lengths in (_LENGTHS, _LENGTHS[:1], _LENGTHS[1:2]):
            features = _draw_features(*lengths)
            expected, n_frames = _read(model, features, lengths, chunking)
            actual = _stream(engine, model, features, lengths, chunking)
            for i, n in enumerate(n_frames):
                np.testing.assert_allclose(actual[i, :n], expected[i, :n], atol=1e-4, rtol=0)


def test_stream_in_one_window_equals_full_context(model: AcousticModel, graph: Path) -> None:
    features = _draw_features(57)
    expected, _ = _read(model, features, (57,), None)
    actual = _stream(OnnxStreamingEngine(graph), model, features, (57,), Chunking(19, 1))
    np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=0)


def test_streams_of_a_batch_do_not_hear_each_other(model: AcousticModel, graph: Path) -> None:
    engine = OnnxStreamingEngine(graph)
    features = _draw_features(*_LENGTHS)
    together = _stream(engine, model, features, _LENGTHS, Chunking(3, 2))
    for i, n in enumerate(_LENGTHS):
        alone = _stream(engine, model, features[i : i + 1, :n], (n,), Chunking(3, 2))
        n_frames = -(-n // 3)
        np.testing.assert_allclose(together[i, :n_frames], alone[0, :n_frames], atol=1e-5, rtol=0)


def test_step_gives_the_frames_of_chunk_and_right_context(
    model: AcousticModel, graph: Path
) -> None:
    engine = OnnxStreamingEngine(graph)
    chunking = Chunking(4, 2)
    n_window = model.window_frames(chunking)
    log_probs, lengths, state = engine.step(
        _draw_features(n_window, n_window),
        np.array([n_window, 4]),
        n_chunk_frames=4,
        state=engine.initial_state(2),
    )
    assert log_probs.shape == (2, 6, len(CHARACTERS) + len(PHONES))
    assert log_probs.dtype == np.float32
    assert lengths.tolist() == [6, 2]
    np.testing.assert_allclose(np.exp(log_probs).sum(axis=-1), 2.0, atol=1e-4)
    for before, after in zip(engine.initial_state(2), state, strict=True):
        assert after.shape == before.shape
        assert after.dtype == np.float32


def test_step_leaves_the_state_that_it_was_given(model: AcousticModel, graph: Path) -> None:
    engine = OnnxStreamingEngine(graph)
    n_window = model.window_frames(Chunking(4, 2))
    features = _draw_features(n_window)

    def step(state: Any) -> tuple[FloatArray, Any]:
        log_probs, _, after = engine.step(
            features, np.array([n_window]), n_chunk_frames=4, state=state
        )
        return log_probs, after

    initial = engine.initial_state()
    first, state = step(initial)
    second, _ = step(state)
    again, _ = step(initial)
    assert all((part == 0).all() for part in initial)
    np.testing.assert_array_equal(again, first)
    assert np.abs(second - first).max() > 1e-3


@pytest.mark.parametrize(("cell", "n_parts"), [("lstm", 2), ("gru", 1)])
def test_initial_state_is_the_models(tmp_path: Path, cell: Cell, n_parts: int) -> None:
    model = make_model(cell=cell)
    export_streaming_graph(model, tmp_path / "streaming.onnx")
    actual = OnnxStreamingEngine(tmp_path / "streaming.onnx").initial_state(3)
    for part, expected in zip(actual[:3], model.initial_state(3)[:3], strict=True):
        assert part.dtype == np.float32
        np.testing.assert_array_equal(part, expected)
    assert actual.spelling.shape == (3, 0)  # this model does not spell
    assert actual.recurrent.shape == (3, 2, n_parts, 16)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_int8_streaming_graph_runs_close_to_the_model(tmp_path: Path, cell: Cell) -> None:
    model = make_model(cell=cell, hidden_size=32)
    export_streaming_graph(model, tmp_path / "full.onnx")
    quantise_graph(tmp_path / "full.onnx", tmp_path / "int8.onnx")
    features = _draw_features(*_LENGTHS)
    expected, n_frames = _read(model, features, _LENGTHS, Chunking(3, 2))
    engine = OnnxStreamingEngine(tmp_path / "int8.onnx")
    actual = _stream(engine, model, features, _LENGTHS, Chunking(3, 2))
    for i, n in enumerate(n_frames):
        difference = np.abs(np.exp(actual[i, :n]) - np.exp(expected[i, :n]))
        assert 0 < difference.max() < 0.02


# Spelling


@pytest.fixture(scope="module")
def spelling_model() -> AcousticModel:
    model = make_model(subsampling=3, n_layers=3, conditioned_layers=(1,), n_spelling_layers=2)
    torch.nn.init.normal_(model.get_parameter("conditionings.1.feedback.weight"))
    return model


def _export_spelling(model: AcousticModel, folder: Path) -> tuple[Path, Path]:
    """The graphs of both ways to read, their spelling optional."""
    graphs = folder / "offline.onnx", folder / "streaming.onnx"
    for export, graph in zip((export_graph, export_streaming_graph), graphs, strict=True):
        export(model, graph)
        make_spelling_optional(graph)
    return graphs


def test_graph_that_spells_equals_the_model_and_can_leave_it(
    spelling_model: AcousticModel, tmp_path: Path
) -> None:
    engine = OnnxEngine(_export_spelling(spelling_model, tmp_path)[0])
    features, lengths = _draw_features(60, 45), np.array([60, 45])
    expected, (n_frames, _) = _read(spelling_model, features, (60, 45), None)
    whole = engine.log_probs(features, lengths)
    np.testing.assert_allclose(whole[0], expected[0, :n_frames], atol=1e-4, rtol=0)
    heard = engine.log_probs(features, lengths, spell=False)
    n_tokens = len(CHARACTERS)
    assert np.isnan(heard[..., :n_tokens]).all()
    np.testing.assert_array_equal(heard[..., n_tokens:], whole[..., n_tokens:])


def test_stream_that_spells_equals_the_model_and_can_leave_it(
    spelling_model: AcousticModel, tmp_path: Path
) -> None:
    engine = OnnxStreamingEngine(_export_spelling(spelling_model, tmp_path)[1])
    features, n_tokens = _draw_features(*_LENGTHS), len(CHARACTERS)
    for chunking in _CHUNKINGS:
        expected, n_frames = _read(spelling_model, features, _LENGTHS, chunking)
        whole = _stream(engine, spelling_model, features, _LENGTHS, chunking)
        heard = _stream(engine, spelling_model, features, _LENGTHS, chunking, spell=False)
        for i, n in enumerate(n_frames):
            np.testing.assert_allclose(whole[i, :n], expected[i, :n], atol=1e-4, rtol=0)
        assert np.isnan(heard[..., :n_tokens]).all()
        np.testing.assert_array_equal(heard[..., n_tokens:], whole[..., n_tokens:])


def test_int8_graph_that_spells_runs_close_to_the_model(tmp_path: Path) -> None:
    model = make_model(hidden_size=32, n_spelling_layers=1)
    export_graph(model, tmp_path / "full.onnx")
    quantise_graph(tmp_path / "full.onnx", tmp_path / "int8.onnx")
    make_spelling_optional(tmp_path / "int8.onnx")
    assert 0 < measure_parity(model, tmp_path / "int8.onnx").mean < 0.002


# Full context


def _n_units(config: BundleConfig) -> int:
    return len(config.tokens) + len(config.phones)


def test_engine_gives_both_heads_side_by_side(tmp_path: Path) -> None:
    model = make_model()
    export_graph(model, tmp_path / "graph.onnx")
    features = _draw_features(60, 60)
    expected, _ = _read(model, features, (60, 60), None)
    actual = OnnxEngine(tmp_path / "graph.onnx").log_probs(features, np.array([60, 60]))
    np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=0)


def test_engine_runs_the_shipped_graph_for_any_length_and_batch(shipped_bundle: Path) -> None:
    loaded = load_bundle(shipped_bundle)
    engine = OnnxEngine(loaded.offline_graph, n_threads=min(2, os.cpu_count() or 1))
    for n_utterances, n_frames in ((1, 1), (1, 99), (3, 40)):
        features = np.full((n_utterances, n_frames, loaded.config.features.n_mels), -8, np.float32)
        log_probs = engine.log_probs(features, np.full(n_utterances, n_frames))
        n_output = -(-n_frames // loaded.config.subsampling)
        assert log_probs.shape == (n_utterances, n_output, _n_units(loaded.config))
        assert log_probs.dtype == np.float32
        np.testing.assert_allclose(np.exp(log_probs).sum(axis=-1), 2.0, atol=1e-4)


def test_engine_runs_the_shipped_streaming_graph_in_every_profile(shipped_bundle: Path) -> None:
    config = load_bundle(shipped_bundle).config
    engine = OnnxStreamingEngine(load_bundle(shipped_bundle).streaming_graph)
    for profile in config.profiles.values():
        n_window = profile.window_feature_frames
        log_probs, lengths, _ = engine.step(
            np.full((1, n_window, config.features.n_mels), -8, np.float32),
            np.array([n_window]),
            n_chunk_frames=profile.chunk_frames,
            state=engine.initial_state(),
        )
        assert lengths.tolist() == [profile.chunk_frames + profile.right_frames]
        assert log_probs.shape == (1, int(lengths[0]), _n_units(config))


# What it runs on

_every_engine = pytest.mark.parametrize("engine", [OnnxEngine, OnnxStreamingEngine])


@_every_engine
def test_cuda_that_is_not_there_is_refused_with_the_repair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: Callable[..., object]
) -> None:
    monkeypatch.setattr(  # so it is here, but not on every machine
        onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"]
    )
    with pytest.raises(ProviderError, match=r"make install-gpu.*--provider cpu") as raised:
        engine(tmp_path / "any.onnx", provider="cuda")
    assert "--provider cuda was asked for" in str(raised.value)
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in str(raised.value)
    assert "pip install 'onnxruntime-gpu[cuda,cudnn]'" in str(raised.value)


def _install(folder: Path, distribution: str) -> None:
    """What pip leaves of a distribution: its metadata."""
    metadata = folder / f"{distribution.replace('-', '_')}-1.0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")


@_every_engine
@pytest.mark.parametrize("provider", ["cpu", "cuda"])
def test_two_onnxruntime_packages_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine: Callable[..., object], provider: str
) -> None:
    for distribution in ("onnxruntime", "onnxruntime-gpu"):
        _install(tmp_path / "packages", distribution)
    check_installation("cpu")
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    with pytest.raises(ProviderError, match=r"both installed.*make install-gpu"):
        engine(tmp_path / "any.onnx", provider=provider)
