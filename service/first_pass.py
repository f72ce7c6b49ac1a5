"""The first pass: log_probs of a stream, window by window, at bounded latency and cost.

A window is a chunk of output frames and some frames to its right. Reading it settles the log_probs
of the chunk; those of the frames to the right are tentative, as they know less of what follows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from service.bundle import Profile
from service.engine import StreamingEngine, StreamState

FloatArray = npt.NDArray[np.float32]
Mute = Callable[[FloatArray, FloatArray], None]


class FirstPass:
    """Reads the features of one stream; every window has the profile's length."""

    def __init__(
        self,
        engine: StreamingEngine,
        profile: Profile,
        *,
        n_mels: int,
        n_units: int,
        subsampling: int,
        spell: bool,
        mute: Mute,
    ) -> None:
        """Start a stream.

        Args:
            engine: the acoustic model.
            profile: length of chunk and right context.
            n_mels: bands of the features.
            n_units: tokens and phones.
            subsampling: feature frames for each output frame.
            spell: whether the tokens are wanted; see `AcousticEngine`.
            mute: changes log_probs (frames, unit) in place, given their features (time, mel).
        """
        self._engine = engine
        self._n_chunk = profile.chunk_frames
        self._n_chunk_features = profile.chunk_frames * subsampling
        self._spell = spell
        self._mute = mute
        self._state = engine.initial_state()
        self._window = np.zeros((profile.window_feature_frames, n_mels), np.float32)
        self._n_waiting = 0
        self._nothing = np.zeros((0, n_units), np.float32)
        self.tentative: FloatArray = self._nothing
        """Log_probs right of the settled ones, (frames, unit), as far as they are known."""

    def push(self, features: FloatArray) -> FloatArray:
        """Take the next features, float32, (time, mel); return what they settle, (frames, unit).

        The settled log_probs do not depend on how the features are cut.
        """
        settled = []
        while len(features):
            taken = features[: len(self._window) - self._n_waiting]
            self._window[self._n_waiting : self._n_waiting + len(taken)] = taken
            self._n_waiting += len(taken)
            features = features[len(taken) :]
            if self._n_waiting == len(self._window):
                settled.append(self._settle())
        return np.concatenate(settled) if settled else self._nothing

    def look_ahead(self) -> None:
        """Make `tentative` reach as far as the features do, as if the audio ended there."""
        if self._n_waiting:
            self.tentative, _ = self._read()

    def finish(self) -> FloatArray:
        """Settle what is left at the end of the audio: log_probs, float32, (frames, unit)."""
        settled = [self._nothing]
        while self._n_waiting > 0:
            settled.append(self._settle())
        self.tentative = self._nothing
        return np.concatenate(settled)

    def _settle(self) -> FloatArray:
        """Read the window, go on by a chunk, and return the chunk's log_probs."""
        log_probs, self._state = self._read()
        self._n_waiting = max(0, self._n_waiting - self._n_chunk_features)
        self._window[: self._n_waiting] = self._window[self._n_chunk_features :][: self._n_waiting]
        self.tentative = log_probs[self._n_chunk :]
        return log_probs[: self._n_chunk]

    def _read(self) -> tuple[FloatArray, StreamState]:
        log_probs, lengths, state = self._engine.step(
            self._window[None],
            np.array([self._n_waiting]),
            n_chunk_frames=self._n_chunk,
            state=self._state,
            spell=self._spell,
        )
        read = log_probs[0, : int(lengths[0])]
        self._mute(read, self._window[: self._n_waiting])
        return read, state
