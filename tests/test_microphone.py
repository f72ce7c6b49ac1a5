"""The microphone, by a stand-in for sounddevice: test machines have none."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import islice
from types import ModuleType
from typing import Any, ClassVar

import pytest

from service.client import start
from service.errors import AudioError, MissingExtraError
from service.microphone import SAMPLE_RATE, record


class _PortAudioError(Exception):
    pass


def _install(monkeypatch: pytest.MonkeyPatch, stream: Callable[..., Any]) -> None:
    module = ModuleType("sounddevice")
    module.PortAudioError = _PortAudioError  # type: ignore[attr-defined]
    module.RawInputStream = stream  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sounddevice", module)


class _Stream:
    """Calls back with three pieces when it is opened."""

    closed: ClassVar[list[bool]] = []

    def __init__(self, *, samplerate: int, channels: int, dtype: str, **others: Any) -> None:
        assert (samplerate, channels, dtype) == (SAMPLE_RATE, 1, "int16")
        self._callback = others["callback"]

    def __enter__(self) -> _Stream:
        for piece in (b"one", b"two", b"three"):
            self._callback(memoryview(piece), 0, None, None)
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.append(True)


def test_record_yields_pieces_and_closes_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, _Stream)
    pieces = start(record())
    assert list(islice(pieces, 3)) == [b"one", b"two", b"three"]
    _Stream.closed.clear()
    del pieces
    assert _Stream.closed == [True]


def test_record_without_sounddevice_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(MissingExtraError, match=r"voxgate\[microphone\].*libportaudio2"):
        start(record())


def test_record_without_microphone_names_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise _PortAudioError("no device")

    _install(monkeypatch, fail)
    with pytest.raises(AudioError, match=r"no device.*voxgate stream -"):
        start(record())
