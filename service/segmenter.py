"""Cuts the features of a stream into utterances, output frame by output frame.

The first pass and the endpointer meet here. What comes out depends on the features alone, not on
how they were cut on their way; memory is bounded by the longest utterance, however long the stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import Final

import numpy as np
import numpy.typing as npt

from service.endpointing import Endpointer, EndpointSettings, QuietDetector, levels_db
from service.first_pass import FirstPass
from service.text import BLANK

FloatArray = npt.NDArray[np.float32]

PRE_ROLL_S: Final = 0.4
"""Audio before the first speech that belongs to an utterance."""
_LOOK_AGAIN_S: Final = 0.16
_LEFT_SILENCE: Final = 3  # a third of the silence at the end is left to the next utterance
_NO_FEATURES: Final = np.zeros((0, 0), np.float32)


@dataclass(frozen=True)
class Utterance:
    """A stretch of audio that holds one utterance."""

    first_frame: int
    """Output frame of the stream at which it begins, in the silence before its first word."""
    earliest_frame: int
    """Output frame at which the utterance before it ended; no word begins earlier."""
    features: FloatArray
    """Log-mel energies, float32, (time, mel)."""
    log_probs: FloatArray
    """Of the first pass, float32, (frames, unit)."""
    has_speech: bool
    """Whether the beginning of speech was detected in it."""


@dataclass(frozen=True)
class SpeechBegan:
    """Speech was detected."""

    frame: int
    """Output frame at which it begins."""


@dataclass(frozen=True)
class Settled:
    """More log_probs of the running utterance are known."""

    is_pause: bool = False
    """Whether the shorter silence window was met: what was said so far is settled."""


@dataclass(frozen=True)
class UtteranceEnded:
    """An utterance has ended."""

    utterance: Utterance


Event = SpeechBegan | Settled | UtteranceEnded


class Segmenter:
    """The state of one stream between features and utterances."""

    def __init__(
        self,
        first_pass: FirstPass,
        settings: EndpointSettings,
        *,
        subsampling: int,
        frame_s: float,
        columns: slice,
        space: int | None,
    ) -> None:
        """Start a stream.

        Args:
            first_pass: gives the log_probs.
            settings: when utterances begin and end.
            subsampling: feature frames for each output frame.
            frame_s: seconds of one output frame.
            columns: the columns of log_probs that tell speech from blanks: one head's.
            space: unit between words, which is no speech; None where there is none.
        """
        self._first_pass = first_pass
        self._endpointer = Endpointer(settings, frame_s=frame_s)
        self._detector = QuietDetector(frame_s=frame_s)
        self._subsampling = subsampling
        self._columns = columns
        self._space = space
        self._n_pre_roll = round(PRE_ROLL_S / frame_s)
        self._n_look_again = round(_LOOK_AGAIN_S / frame_s)
        self._waiting: FloatArray | None = None  # feature frames short of an output frame
        # positions are output frames from the start of the stream
        self._first = 0
        self._end = 0
        self._settled_end = 0
        self._earliest_speech = 0
        self._look_for_end_at = 0
        self._look_for_pause_at = 0
        self._speech: int | None = None
        self._has_paused = False
        # one entry for each frame from `_first` on
        self._features: list[FloatArray] = []
        self._is_quiet: list[bool] = []
        # one entry for each settled frame from `_first` on
        self._settled: list[FloatArray] = []
        self._is_blank: list[bool] = []

    @property
    def first_frame(self) -> int:
        """Output frame at which the running utterance begins."""
        return self._first

    @property
    def known_end(self) -> int:
        """Output frame of the stream up to which log_probs are known."""
        return self._first + len(self._settled) + len(self._tentative())

    @property
    def n_settled(self) -> int:
        """Settled output frames of the running utterance."""
        return len(self._settled)

    def log_probs(self) -> FloatArray:
        """Of the running utterance as far as known, float32, (frames, unit): settled first."""
        return np.concatenate([*(row[None] for row in self._settled), self._tentative()])

    def push(self, features: FloatArray) -> Iterator[Event]:
        """Take the next features, float32, (time, mel); yield what happens in them, in order."""
        if self._waiting is not None:
            features = np.concatenate([self._waiting, features])
        n_whole = len(features) // self._subsampling * self._subsampling
        self._waiting = features[n_whole:].copy()
        if n_whole == 0:
            return
        frames = features[:n_whole].reshape(-1, self._subsampling, features.shape[1])
        for frame, level_db in zip(frames, levels_db(frames), strict=True):
            yield from self._advance(frame, level_db)

    def end_utterance(self) -> Iterator[Event]:
        """End the running utterance here, at the sender's wish, if anybody has spoken."""
        self._first_pass.look_ahead()
        yield from self._find_start()
        if self._speech is not None:
            yield UtteranceEnded(self._cut(self._end, n_kept=0))

    def finish(self) -> Iterator[Event]:
        """Say that the audio is complete; the last event is the end of what is left of it."""
        if self._waiting is not None and len(self._waiting):
            self._features.append(self._waiting)
            self._is_quiet.append(self._detector.push(self._waiting))
            self._add_settled(self._first_pass.push(self._waiting))
            self._end += 1
        self._add_settled(self._first_pass.finish())
        yield from self._find_start()
        yield UtteranceEnded(self._cut(self._end, n_kept=0))

    def _advance(self, features: FloatArray, level_db: float) -> Iterator[Event]:
        """Take the features and the level of one output frame."""
        self._features.append(features)
        self._is_quiet.append(self._detector.push_level(level_db))
        self._end += 1
        settled = self._first_pass.push(features)
        if len(settled):
            self._add_settled(settled)
            yield from self._find_start()
        if self._speech is None:
            self._drop_silence()
            return
        if len(settled):
            yield Settled()
        yield from self._look_for_pause()
        yield from self._look_for_end(is_window_read=len(settled) > 0)

    def _add_settled(self, log_probs: FloatArray) -> None:
        rows = log_probs[max(0, self._first - self._settled_end) :]
        self._settled_end += len(log_probs)
        self._settled += list(rows)
        self._is_blank += self._blanks(rows)

    def _tentative(self) -> FloatArray:
        rows = self._first_pass.tentative[max(0, self._first - self._settled_end) :]
        return rows[: max(0, self._end - self._first - len(self._settled))]

    def _blanks(self, log_probs: FloatArray) -> list[bool]:
        best = log_probs[:, self._columns].argmax(axis=1)
        return [unit in (BLANK, self._space) for unit in best.tolist()]

    def _known_blanks(self) -> list[bool]:
        return self._is_blank + self._blanks(self._tentative())

    def _find_start(self) -> Iterator[Event]:
        """Look for the beginning of speech in what is known; keep some audio before it."""
        if self._speech is not None:
            return
        n_skipped = max(0, self._earliest_speech - self._first)
        found = self._endpointer.find_start(self._known_blanks()[n_skipped:])
        if found is not None:
            self._speech = self._first + n_skipped + found
            self._drop_before(self._speech - self._n_pre_roll)
            yield SpeechBegan(self._speech)

    def _look_for_pause(self) -> Iterator[Event]:
        if not self._endpointer.may_pause(self._is_quiet):
            self._has_paused = False
        elif not self._has_paused and self._end >= self._look_for_pause_at:
            self._look_for_pause_at = self._end + self._n_look_again
            self._first_pass.look_ahead()
            is_blank = self._known_blanks()
            if self._endpointer.has_paused(self._is_quiet[: len(is_blank)], is_blank):
                self._has_paused = True
                yield Settled(is_pause=True)

    def _look_for_end(self, *, is_window_read: bool) -> Iterator[Event]:
        if self._end - self._first >= self._endpointer.n_longest:
            yield UtteranceEnded(self._cut(self._longest_pause(), n_kept=0))
            yield from self._find_start()
            return
        is_quiet_enough = (
            self._endpointer.may_end(self._is_quiet) and self._end >= self._look_for_end_at
        )
        if not is_quiet_enough and not is_window_read:
            return
        if is_quiet_enough:
            self._first_pass.look_ahead()
            self._look_for_end_at = self._end + self._n_look_again
        is_blank = self._known_blanks()
        if self._endpointer.has_ended(self._is_quiet[: len(is_blank)], is_blank):
            n_left = self._endpointer.n_stop // _LEFT_SILENCE
            n_silent = len(list(takewhile(bool, reversed(is_blank)))) - n_left
            n_kept = max(0, min(self._n_pre_roll, n_silent))
            yield UtteranceEnded(self._cut(self._end - n_left, n_kept=n_kept))

    def _longest_pause(self) -> int:
        """The frame in the middle of the longest run of blanks in the second half."""
        is_blank = self._known_blanks()
        frame = len(is_blank) // 2
        longest, middle = 0, len(is_blank)
        for blank, group in groupby(is_blank[frame:]):
            n_frames = len(list(group))
            if blank and n_frames > longest:
                longest, middle = n_frames, frame + (n_frames + 1) // 2
            frame += n_frames
        return self._first + middle

    def _drop_silence(self) -> None:
        """Keep no more of a silence than the next utterance may need."""
        n_known = len(self._settled) + len(self._tentative())
        self._drop_before(self._first + n_known - self._n_pre_roll - self._endpointer.n_start)

    def _cut(self, end: int, *, n_kept: int) -> Utterance:
        """End the utterance before frame `end`; the next one begins `n_kept` frames earlier."""
        n_frames = end - self._first
        utterance = Utterance(
            first_frame=self._first,
            earliest_frame=self._earliest_speech,
            features=np.concatenate(self._features[:n_frames] or [_NO_FEATURES]),
            log_probs=self.log_probs()[:n_frames],
            has_speech=self._speech is not None,
        )
        self._speech = None
        self._earliest_speech = end
        self._drop_before(end - n_kept)
        return utterance

    def _drop_before(self, frame: int) -> None:
        n_frames = frame - self._first
        if n_frames <= 0:
            return
        self._first = frame
        for entries in (self._features, self._is_quiet, self._settled, self._is_blank):
            del entries[:n_frames]
