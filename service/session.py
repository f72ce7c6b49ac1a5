"""One stream: bytes in, results out; no socket and no clock.

The final results are those of the whole recording, however the bytes were cut. Interim results are
greedy readings of the audio since the last final one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from service.audio import AudioFormat, AudioStream
from service.features import FeatureStream
from service.recogniser import DecoderName, FloatArray, Recogniser, Segment

_INTERIM_EVERY_S: Final = 0.5


@dataclass(frozen=True)
class Result:
    """What a stream is told."""

    segment: Segment
    is_final: bool
    """Whether this stretch of the audio is settled."""


class Session:
    """The state of one stream; use it from one thread at a time."""

    def __init__(
        self,
        recogniser: Recogniser,
        audio_format: AudioFormat,
        *,
        decoder: DecoderName,
        n_best: int = 1,
        interim_results: bool = False,
    ) -> None:
        self._recogniser = recogniser
        self._decoder: DecoderName = decoder
        self._n_best = n_best
        self._interim_results = interim_results
        self._audio = AudioStream(audio_format, target_rate=recogniser.sample_rate)
        self._features = FeatureStream(recogniser.features)
        self._window = np.zeros((0, recogniser.features.n_mels), np.float32)
        self._first_frame = 0
        self._reported_frames = 0
        hop_s = recogniser.features.hop_ms / 1000
        self._interim_frames = round(_INTERIM_EVERY_S / hop_s)

    def push(self, data: bytes) -> list[Result]:
        """Take the next audio bytes; return what they settle, and at most one interim result.

        Raises:
            InputError: the bytes are no audio, broken, or contradict what was said of them.
        """
        results = self._advance(self._audio.push(data))
        if self._interim_results and self._interim_is_due():
            results.append(self._interim())
        return results

    def finish(self) -> list[Result]:
        """Say that the audio is complete; return the last final results.

        Raises:
            InputError: what arrived is no audio, broken, or contradicts what was said of it.
        """
        results = self._advance(self._audio.finish())
        if self._audio.n_bytes == 0:
            return results
        results.append(Result(self._recognise(is_last=True), is_final=True))
        return results

    def _advance(self, waveform: FloatArray) -> list[Result]:
        """Add samples; settle whole segments while more than a window is waiting."""
        frames = self._features.push(waveform)
        self._window = np.concatenate([self._window, frames])
        results = []
        while len(self._window) > self._recogniser.window_frames:
            segment = self._recognise(is_last=False)
            self._window = self._window[segment.n_feature_frames :]
            self._first_frame += segment.n_feature_frames
            self._reported_frames = 0
            results.append(Result(segment, is_final=True))
        return results

    def _recognise(self, *, is_last: bool) -> Segment:
        return self._recogniser.recognise_window(
            self._window[: self._recogniser.window_frames],
            is_last=is_last,
            first_frame=self._first_frame,
            decoder=self._decoder,
            n_best=self._n_best,
        )

    def _interim_is_due(self) -> bool:
        return len(self._window) - self._reported_frames >= self._interim_frames

    def _interim(self) -> Result:
        self._reported_frames = len(self._window)
        segment = self._recogniser.recognise_window(
            self._window, is_last=True, first_frame=self._first_frame, decoder="greedy"
        )
        return Result(segment, is_final=False)
