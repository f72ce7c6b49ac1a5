"""How much work a server takes on, and what it says to those it turns away."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from service.errors import OverloadError

Kind = Literal["stream", "recording"]
_RETRY_S = {"stream": 2.0, "recording": 1.0}


@dataclass(frozen=True)
class Limits:
    """What a server accepts; beyond it, requests are refused before any work."""

    streams: int = 200
    """Streams that are open at the same time."""
    queued_audio_s: float = 3600.0
    """Seconds of audio in recordings that wait or are being recognised."""
    recordings: int = 64
    """Recordings that wait or are being recognised."""
    streams_per_client: int | None = None
    """Of one API key; None is no limit of its own."""
    longest_recording_s: float = 3 * 3600.0
    """Seconds of audio in one recording or one operation, decoded."""
    longest_stream_s: float | None = None
    """Seconds of audio in one stream; None is no limit."""
    compressed_stream_bytes: int = 64 << 20
    """Bytes of compressed audio in one stream, which are kept until it is complete."""
    idle_s: float = 30.0
    """A stream that sends nothing for so long is ended."""


class Admission:
    """Counts what is going on; safe to use from several threads."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._lock = threading.Lock()
        self._n_open: Counter[Kind] = Counter()
        self._n_streams_of: Counter[str] = Counter()
        self._audio_s = 0.0

    @property
    def n_streams(self) -> int:
        """Streams that are open."""
        return self._n_open["stream"]

    @property
    def n_recordings(self) -> int:
        """Recordings that wait or are being recognised."""
        return self._n_open["recording"]

    @property
    def queued_audio_s(self) -> float:
        """Their seconds of audio, as far as known beforehand."""
        return self._audio_s

    @contextmanager
    def stream(self, client: str | None) -> Iterator[None]:
        """Hold a place for a stream.

        Raises:
            OverloadError: there is none.
        """
        limits = self.limits
        with self._lock:
            if self._n_open["stream"] >= limits.streams:
                raise self._refusal("stream", f"all {limits.streams} streams are in use")
            of_client = self._n_streams_of[client] if client else 0
            most = limits.streams_per_client
            if client and most is not None and of_client >= most:
                raise self._refusal("stream", f"{client} has all of its {most} streams open")
            self._n_open["stream"] += 1
            if client:
                self._n_streams_of[client] += 1
        try:
            yield
        finally:
            with self._lock:
                self._n_open["stream"] -= 1
                if client:
                    self._n_streams_of[client] -= 1
                    if not self._n_streams_of[client]:
                        del self._n_streams_of[client]

    @contextmanager
    def recording(self, audio_s: float) -> Iterator[None]:
        """Hold a place for a recording of that many seconds.

        Raises:
            OverloadError: there is none.
        """
        limits = self.limits
        with self._lock:
            if self._n_open["recording"] >= limits.recordings:
                raise self._refusal("recording", f"{limits.recordings} recordings wait already")
            if self._audio_s > 0 and self._audio_s + audio_s > limits.queued_audio_s:
                raise self._refusal(
                    "recording", f"{self._audio_s:.0f} s of audio wait to be recognised"
                )
            self._n_open["recording"] += 1
            self._audio_s += audio_s
        try:
            yield
        finally:
            with self._lock:
                self._n_open["recording"] -= 1
                self._audio_s -= audio_s
                if not self._n_open["recording"]:
                    self._audio_s = 0.0  # no rounding piles up

    def _refusal(self, kind: Kind, reason: str) -> OverloadError:
        retry_s = _RETRY_S[kind]
        return OverloadError(f"the server is busy: {reason}; try again in {retry_s:g} s", retry_s)
