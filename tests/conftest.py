"""Fixtures shared by the tests: the shipped bundle, the example clips, a running server."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest

from service.audio import load_audio
from service.manifest import Utterance, read_manifest
from service.pb.voxgate.v1 import speech_pb2_grpc
from service.recogniser import FloatArray, Recogniser, load_recogniser

CHECKOUT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shipped_bundle() -> Path:
    return CHECKOUT / "bundles" / "en-small"


@pytest.fixture(scope="session")
def clips() -> list[Utterance]:
    return read_manifest(CHECKOUT / "examples" / "manifest.jsonl")


@pytest.fixture(scope="session")
def recogniser(shipped_bundle: Path) -> Recogniser:
    return load_recogniser(shipped_bundle)


@pytest.fixture(scope="session")
def waveforms(recogniser: Recogniser, clips: list[Utterance]) -> list[FloatArray]:
    """The samples of the example clips."""
    return [load_audio(clip.audio_path, target_rate=recogniser.sample_rate) for clip in clips]


def noise(seconds: float, *, level: float = 3e-4) -> FloatArray:
    """White noise at 16 kHz; as it is, the noise of a quiet room."""
    draws = np.random.default_rng(0).normal(0, level, round(seconds * 16_000))
    return draws.astype(np.float32)


def join_with_pauses(waveforms: list[FloatArray], *, pause_s: float = 1.0) -> FloatArray:
    """Recordings one after another, a quiet pause behind each."""
    return np.concatenate([part for w in waveforms for part in (w, noise(pause_s))])


@dataclass(frozen=True)
class RunningServer:
    """A `voxgate serve` in a process of its own."""

    process: subprocess.Popen[str]
    address: str
    stub: speech_pb2_grpc.SpeechStub


@contextmanager
def run_server(*arguments: str) -> Iterator[RunningServer]:
    """Start a server on a free port, wait until it listens, stop it at the end."""
    command = [sys.executable, "-m", "service.cli", "serve", "--port", "0", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            address = _wait_for_address(process)
            with grpc.insecure_channel(address) as channel:
                yield RunningServer(process, address, speech_pb2_grpc.SpeechStub(channel))
            process.terminate()
            assert process.wait(timeout=20) == 0
        finally:
            process.kill()


def _drain(process: subprocess.Popen[str]) -> None:
    """Read the log of a server, so that it is never held up by a full pipe."""

    def read() -> None:
        assert process.stderr is not None
        with suppress(ValueError):  # closed at the end
            for _ in process.stderr:
                pass

    threading.Thread(target=read, daemon=True).start()


def _wait_for_address(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith("listening on "):
            _drain(process)
            return line.removeprefix("listening on ").split(": ")[0]
    raise AssertionError(f"the server did not start: {said}")


@pytest.fixture(scope="session")
def server() -> Iterator[RunningServer]:
    with run_server() as running:
        yield running
