"""The recogniser: features in, segments of text with times out.

Files and streams meet here. Audio is recognised in segments: a window of at most 30 s goes through
the acoustic model, and where more audio follows, the segment ends in the longest pause of its
second half. Where segments end depends on the audio alone, so a stream gets the text a file gets.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from service.bundle import Bundle, load_bundle
from service.decoding.greedy import GreedyDecoder
from service.decoding.hypothesis import Decoder, Hypothesis
from service.decoding.reference import ReferenceDecoder
from service.engine import AcousticEngine, OnnxEngine, Provider
from service.features import FeatureSettings, log_mel
from service.text import BLANK, SPACE

FloatArray = npt.NDArray[np.float32]
DecoderName = Literal["greedy", "beam"]

LONGEST_SEGMENT_S: Final = 30.0
_WARM_UP_S: Final = 1.0
_SILENCE_LOG_ENERGY: Final = -12.0  # below the loudest band of white noise at -90 dBFS
_NEVER: Final = -100.0


@dataclass(frozen=True)
class TimedWord:
    """One recognised word; times count from the start of the recording."""

    text: str
    start_s: float
    end_s: float
    confidence: float
    """Between 0 and 1."""


@dataclass(frozen=True)
class Alternative:
    """One reading of a segment."""

    words: tuple[TimedWord, ...]
    score: float
    """Log score, comparable between the alternatives of one segment only."""
    confidence: float
    """Between 0 and 1; 0 without words."""

    @property
    def transcript(self) -> str:
        """The words, separated by single spaces."""
        return " ".join(word.text for word in self.words)


@dataclass(frozen=True)
class Segment:
    """A stretch of a recording and what was said in it."""

    alternatives: tuple[Alternative, ...]
    """Best first, at least one."""
    end_s: float
    """Where the stretch ends, seconds from the start of the recording."""
    n_feature_frames: int
    """Feature frames of the stretch."""


@dataclass
class Timings:
    """Seconds of work by stage; add to it as work is done."""

    features_s: float = 0.0
    acoustic_model_s: float = 0.0
    decoding_s: float = 0.0

    @property
    def total_s(self) -> float:
        """Seconds of all stages."""
        return self.features_s + self.acoustic_model_s + self.decoding_s


@dataclass(frozen=True)
class Recogniser:
    """A loaded model; safe to use from several threads."""

    name: str
    """Name by which requests choose the model."""
    language: str
    """BCP-47 tag."""
    features: FeatureSettings
    """The front end the model was trained with."""
    subsampling: int
    """Feature frames for each output frame."""
    speech_tokens: npt.NDArray[np.int64]
    """Ids of the tokens that are neither the blank nor the space."""
    engine: AcousticEngine
    decoders: Mapping[DecoderName, Decoder]
    timings: Timings = field(default_factory=Timings)

    @property
    def sample_rate(self) -> int:
        """Rate of the waveforms it takes, Hz."""
        return self.features.sample_rate

    @property
    def frame_s(self) -> float:
        """Seconds of one output frame."""
        return self.subsampling * self.features.hop_ms / 1000

    @property
    def window_frames(self) -> int:
        """Feature frames of the longest segment."""
        return round(LONGEST_SEGMENT_S * 1000 / self.features.hop_ms)

    def warm_up(self) -> None:
        """Run every stage once, so that no request pays for what the first run sets up."""
        silence = np.zeros(int(_WARM_UP_S * self.sample_rate), np.float32)
        for decoder in self.decoders:
            self.recognise(silence, decoder=decoder)

    def recognise(
        self, waveform: FloatArray, *, decoder: DecoderName, n_best: int = 1
    ) -> list[Segment]:
        """Recognise a whole recording.

        Args:
            waveform: mono samples in [-1, 1], float32, (time,), at `sample_rate`.
            decoder: how emissions are searched.
            n_best: alternatives wanted for each segment.

        Returns:
            Consecutive segments, at least one.
        """
        start = time.perf_counter()
        features = log_mel(waveform, self.features)
        self.timings.features_s += time.perf_counter() - start
        return list(self._segments(features, decoder=decoder, n_best=n_best))

    def _segments(
        self, features: FloatArray, *, decoder: DecoderName, n_best: int
    ) -> Iterator[Segment]:
        first = 0
        while True:
            window = features[first : first + self.window_frames]
            is_last = first + len(window) == len(features)
            segment = self.recognise_window(
                window, is_last=is_last, first_frame=first, decoder=decoder, n_best=n_best
            )
            yield segment
            first += segment.n_feature_frames
            if is_last:
                return

    def recognise_window(
        self,
        window: FloatArray,
        *,
        is_last: bool,
        first_frame: int,
        decoder: DecoderName,
        n_best: int = 1,
    ) -> Segment:
        """Recognise the next segment of a recording.

        Args:
            window: log-mel energies, float32, (time, mel), from the segment's start; at most
                `window_frames`, and exactly so many unless `is_last`.
            is_last: whether the recording ends with the window; otherwise the segment ends in a
                pause inside it.
            first_frame: feature frames of the recording before the window.
            decoder: how the emission is searched.
            n_best: alternatives wanted.
        """
        emission = self.emission(window)
        n_feature_frames = len(window)
        if not is_last:
            n_frames = _find_pause(emission)
            n_feature_frames = n_frames * self.subsampling
            emission = emission[:n_frames]
        start = time.perf_counter()
        hypotheses = self.decoders[decoder].decode(emission, n_best=n_best)
        self.timings.decoding_s += time.perf_counter() - start
        hop_s = self.features.hop_ms / 1000
        offset_s = first_frame * hop_s
        return Segment(
            alternatives=tuple(self._to_alternative(h, offset_s) for h in hypotheses),
            end_s=offset_s + n_feature_frames * hop_s,
            n_feature_frames=n_feature_frames,
        )

    def emission(self, window: FloatArray) -> FloatArray:
        """Compute the log_probs of one window of at most `window_frames` feature frames.

        Args:
            window: log-mel energies, float32, (time, mel).

        Returns:
            Log probabilities, float32, (frames, token).
        """
        if len(window) == 0:
            return np.zeros((0, 1), np.float32)
        start = time.perf_counter()
        log_probs: FloatArray = self.engine.log_probs(window[None], np.array([len(window)]))[0]
        self.timings.acoustic_model_s += time.perf_counter() - start
        self._mute_silence(log_probs, window)
        return log_probs

    def _mute_silence(self, emission: FloatArray, window: FloatArray) -> None:
        """Allow no speech where the audio is silent: the model has only heard live recordings."""
        n_frames = len(emission)
        loudness = np.full(n_frames * self.subsampling, -np.inf, np.float32)
        loudness[: len(window)] = window.max(axis=1)[: len(loudness)]
        silent = loudness.reshape(n_frames, -1).max(axis=1) < _SILENCE_LOG_ENERGY
        emission[np.ix_(silent, self.speech_tokens)] = _NEVER

    def _to_alternative(self, hypothesis: Hypothesis, offset_s: float) -> Alternative:
        words = tuple(
            TimedWord(
                text=word.text,
                start_s=offset_s + word.start_frame * self.frame_s,
                end_s=offset_s + word.end_frame * self.frame_s,
                confidence=min(1.0, max(0.0, word.confidence)),
            )
            for word in hypothesis.words
        )
        return Alternative(words, score=hypothesis.score, confidence=hypothesis.confidence)


def load_recogniser(
    folder: Path,
    *,
    provider: Provider = "cpu",
    n_threads: int = 1,
    decoders: tuple[DecoderName, ...] = ("greedy", "beam"),
) -> Recogniser:
    """Load a bundle, ready to use.

    Args:
        folder: the bundle.
        provider: where the acoustic model runs.
        n_threads: threads of one run of the acoustic model and of numpy.
        decoders: which decoders are made; `beam` loads the language model.

    Raises:
        BundleError: the bundle is missing, incomplete, altered, or of another format.
        ProviderError: the provider is not there.
    """
    threadpool_limits(n_threads)
    bundle = load_bundle(folder)
    config = bundle.config
    recogniser = Recogniser(
        name=config.name,
        language=config.language,
        features=config.features,
        subsampling=config.subsampling,
        speech_tokens=np.array(
            [i for i, token in enumerate(config.tokens) if i != BLANK and token != SPACE]
        ),
        engine=OnnxEngine(bundle.offline_graph, provider=provider, n_threads=n_threads),
        decoders={name: _make_decoder(name, bundle) for name in decoders},
    )
    recogniser.warm_up()
    return recogniser


def _make_decoder(name: DecoderName, bundle: Bundle) -> Decoder:
    if name == "greedy":
        return GreedyDecoder(bundle.config.tokens)
    return ReferenceDecoder(
        bundle.config.tokens,
        lm_path=bundle.lm_binary,
        words=bundle.read_words(),
        **bundle.config.decoder.model_dump(),
    )


def _find_pause(emission: FloatArray) -> int:
    """The output frame in the middle of the longest run of blanks in the second half."""
    first = len(emission) // 2
    frame = first
    longest, middle = 0, len(emission)
    for is_blank, group in groupby(emission[first:].argmax(axis=1) == BLANK):
        n_frames = len(list(group))
        if is_blank and n_frames > longest:
            longest, middle = n_frames, frame + (n_frames + 1) // 2
        frame += n_frames
    return middle
