"""Endpointing: where speech begins and where an utterance ends.

Two witnesses are heard for every output frame: the acoustic model, which says whether the frame is
blank, and the energy, which says whether it is quiet. An utterance begins where enough frames of a
short window are not blank; it ends where nearly all frames of a window are blank and quiet, or,
in noise that never gets quiet, after blanks for twice as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from service.errors import RequestError

FloatArray = npt.NDArray[np.float32]

_DB_PER_NEPER: Final = 10 / np.log(10)
_FLOOR_RISE_DB_PER_S: Final = 3.0
_PEAK_FALL_DB_PER_S: Final = 3.0
_QUIET_SHARE: Final = 0.35
_QUIET_LEAST_DB: Final = 6.0
_LOUD_BLANK_FACTOR: Final = 2
_LOWEST_DB: Final = -33.0  # white noise at -90 dBFS; digital silence is no quieter


@dataclass(frozen=True)
class EndpointSettings:
    """When an utterance begins and ends; the first six are what Riva calls them."""

    start_history_ms: int = 320
    """Window in which the beginning of speech is looked for."""
    start_threshold: float = 0.1
    """Share of its frames that must not be blank."""
    stop_history_ms: int = 560
    """Window of silence that ends an utterance."""
    stop_threshold: float = 0.98
    """Share of its frames that must be silent."""
    stop_history_eou_ms: int | None = None
    """Shorter window after which what was said so far is sent as settled; None does without."""
    stop_threshold_eou: float = 0.98
    """Share of its frames that must be silent."""
    longest_utterance_s: float = 30.0
    """A longer utterance is cut in the longest pause of its second half."""

    def __post_init__(self) -> None:
        """Refuse what no window or share can be.

        Raises:
            RequestError: a value is outside its range.
        """
        for name in ("start_history", "stop_history", "stop_history_eou"):
            value = getattr(self, f"{name}_ms")
            if value is not None and not 40 <= value <= 10_000:
                raise RequestError(f"{name} is {value} ms, expected 40 to 10,000 ms")
        for name in ("start_threshold", "stop_threshold", "stop_threshold_eou"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise RequestError(f"{name} is {value:g}, expected more than 0, at most 1")
        if not 1 <= self.longest_utterance_s <= 30:
            raise RequestError(
                f"longest_utterance is {self.longest_utterance_s:g} s, expected 1 to 30 s"
            )


class Endpointer:
    """Decides about one stream, output frame by output frame."""

    def __init__(self, settings: EndpointSettings, *, frame_s: float) -> None:
        self._settings = settings
        self.n_start = _count(settings.start_history_ms, frame_s)
        """Output frames in which the beginning of speech is looked for."""
        self.n_stop = _count(settings.stop_history_ms, frame_s)
        """Output frames of silence that end an utterance."""
        self._n_eou = _count(settings.stop_history_eou_ms or 0, frame_s)
        self.n_longest = int(settings.longest_utterance_s / frame_s)
        """Output frames of the longest utterance."""

    def find_start(self, is_blank: Sequence[bool]) -> int | None:
        """The first speech frame, where enough frames around it are speech.

        Args:
            is_blank: of each output frame known so far.
        """
        speech = ~np.asarray(is_blank, dtype=bool)
        n_needed = self._settings.start_threshold * self.n_start
        for frame in np.flatnonzero(speech):
            if speech[frame : frame + self.n_start].sum() >= n_needed:
                return int(frame)
        return None

    def may_end(self, is_quiet: Sequence[bool]) -> bool:
        """Whether the last frames are quiet enough that the utterance may have ended."""
        return _share(is_quiet, self.n_stop) >= self._settings.stop_threshold

    def has_ended(self, is_quiet: Sequence[bool], is_blank: Sequence[bool]) -> bool:
        """Whether the utterance has ended with the last frame; both have the same frames."""
        silent = [q and b for q, b in zip(is_quiet, is_blank, strict=True)]
        threshold = self._settings.stop_threshold
        return (
            _share(silent[-self.n_stop :], self.n_stop) >= threshold
            or _share(is_blank, _LOUD_BLANK_FACTOR * self.n_stop) >= threshold
        )

    def may_pause(self, is_quiet: Sequence[bool]) -> bool:
        """Whether the last frames are quiet enough for the shorter window, where it is wanted."""
        return self._n_eou > 0 and self._has_eou_share(is_quiet)

    def has_paused(self, is_quiet: Sequence[bool], is_blank: Sequence[bool]) -> bool:
        """Whether the shorter window is silent; both have the same frames."""
        return self._has_eou_share([q and b for q, b in zip(is_quiet, is_blank, strict=True)])

    def _has_eou_share(self, flags: Sequence[bool]) -> bool:
        return _share(flags, self._n_eou) >= self._settings.stop_threshold_eou


def levels_db(frames: FloatArray) -> list[float]:
    """Levels of output frames, given their log-mel energies, float32, (frame, time, mel)."""
    energies = np.exp(frames.astype(np.float64)).sum(axis=2).max(axis=1)
    levels: list[float] = np.maximum(_LOWEST_DB, _DB_PER_NEPER * np.log(energies)).tolist()
    return levels


class QuietDetector:
    """Tells quiet frames from loud ones by the range between a stream's floor and its peaks."""

    def __init__(self, *, frame_s: float) -> None:
        self._rise_db = _FLOOR_RISE_DB_PER_S * frame_s
        self._fall_db = _PEAK_FALL_DB_PER_S * frame_s
        self._floor_db: float | None = None
        self._peak_db = 0.0

    def push(self, features: FloatArray) -> bool:
        """Whether an output frame is quiet, given its log-mel energies, float32, (time, mel)."""
        return self.push_level(levels_db(features[None])[0])

    def push_level(self, level_db: float) -> bool:
        """Whether an output frame is quiet, given its level."""
        if self._floor_db is None:
            self._floor_db = self._peak_db = level_db
        self._floor_db = min(self._floor_db + self._rise_db, level_db)
        self._peak_db = max(self._peak_db - self._fall_db, level_db)
        margin_db = max(_QUIET_LEAST_DB, _QUIET_SHARE * (self._peak_db - self._floor_db))
        return level_db < self._floor_db + margin_db


def _count(duration_ms: float, frame_s: float) -> int:
    return max(1, round(duration_ms / 1000 / frame_s)) if duration_ms else 0


def _share(flags: Sequence[bool], n_frames: int) -> float:
    """Share of the last `n_frames` that are set; 0 where there are not so many."""
    if len(flags) < n_frames:
        return 0.0
    return sum(flags[-n_frames:]) / n_frames
