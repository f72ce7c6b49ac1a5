"""One stream: bytes in, results out; no socket and no clock.

The first pass reads the audio window by window as it arrives; a search that goes on with it gives
the interim results. Where an utterance ends, the second pass reads it again with full context, and
its decoding is the final result; a request can do without it. Events and final results depend on
the audio alone, however its bytes were cut. Channels are averaged, or each is a stream of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import Final

import numpy as np

from service.audio import AudioStream
from service.bundle import DEFAULT_PROFILE, Survival
from service.decoding.hypothesis import Search, Word
from service.errors import RequestError
from service.features import FeatureStream
from service.recogniser import (
    Alternative,
    DecoderName,
    FloatArray,
    Recogniser,
    Segment,
)
from service.request import StreamRequest
from service.segmenter import Event, SpeechBegan, Utterance, UtteranceEnded
from service.stability import SETTLING_PROBABILITY, survival_probability

OFFLINE_PROFILE: Final = "offline"
"""The profile without interim results: every result is read with full context."""
_LEAST_STABLE: Final = 0.91  # 0.9 itself is less than 0.9 in a message's 32 bits
_MOST_TENTATIVE: Final = 0.89


@dataclass(frozen=True)
class Result:
    """A reading of a stretch of the audio."""

    segment: Segment
    is_final: bool
    """Whether this stretch of the audio is settled."""
    stability: float = 0.0
    """Probability that an interim result survives; at least 0.9 for what is committed."""


class SpeechEvent(Enum):
    """What happened in the audio."""

    SPEECH_BEGAN = "speech began"
    SPEECH_ENDED = "speech ended"
    END_OF_SINGLE_UTTERANCE = "end of single utterance"
    TIMEOUT = "nobody spoke for too long"


@dataclass(frozen=True)
class Update:
    """What a stream is told at once: an event, or results that follow each other in time."""

    results: tuple[Result, ...] = ()
    """One final result, or interim ones: what is committed, then what may still change."""
    event: SpeechEvent | None = None
    time_s: float = 0.0
    """When the event happened, seconds from the start of the stream."""
    channel: int = 0
    """From 1 where channels are recognised separately, else 0."""


@dataclass(frozen=True)
class _TimedOut:
    """Nobody has spoken for as long as the request allows."""

    time_s: float


@dataclass(frozen=True)
class _Reading:
    """The words of a running utterance; frames count from the start of the stream."""

    words: list[Word]
    settled_end: int
    known_end: int
    n_certain: int
    """Words that no later audio can change, unless a second pass does."""


class Session:
    """The state of one stream; use it from one thread at a time."""

    def __init__(
        self,
        recogniser: Recogniser,
        request: StreamRequest,
        *,
        decoder: DecoderName,
        longest_s: float | None = None,
        most_compressed_bytes: int | None = None,
    ) -> None:
        """Open a stream.

        Args:
            recogniser: the loaded model.
            request: what is wanted.
            decoder: how final results are searched.
            longest_s: the most seconds of audio that may be in it; None allows any.
            most_compressed_bytes: the most bytes of compressed audio; None allows any.

        Raises:
            InputError: there is no such profile or decoder, the profile needs what was declined,
                or a phrase cannot be used.
        """
        self._open_channel = partial(_Channel, recogniser, request, decoder=decoder)
        self._separates = request.separates_channels
        self._audio = AudioStream(
            request.audio,
            target_rate=recogniser.sample_rate,
            separate_channels=self._separates,
            longest_s=longest_s,
            most_collected_bytes=most_compressed_bytes,
        )
        self._channels = [self._open_channel()]  # refuses what cannot be served

    @property
    def is_done(self) -> bool:
        """Whether the stream is over, whatever follows: see `StreamRequest.single_utterance`."""
        return all(channel.is_done for channel in self._channels)

    @property
    def audio_s(self) -> float:
        """Seconds of audio read so far."""
        return self._channels[0].audio_s

    def push(self, data: bytes) -> list[Update]:
        """Take the next audio bytes; return what they settle, and at most one interim update.

        Raises:
            InputError: the bytes are no audio, broken, or contradict what was said of them.
        """
        return [] if self.is_done else self._advance(self._audio.push(data))

    def end_utterance(self) -> list[Update]:
        """End the running utterance here, whatever the endpointing thinks."""
        return self._tag(channel.end_utterance() for channel in self._channels)

    def finish(self) -> Iterator[Update]:
        """Say that the audio is complete; yield the last results as they are found.

        A stream that held any audio has at least one final result, be it empty.

        Raises:
            InputError: what arrived is no audio, broken, or contradicts what was said of it.
        """
        for block in () if self.is_done else self._audio.drain():
            yield from self._advance(block)
            if self.is_done:
                return
        if self._audio.n_bytes > 0:
            yield from self._tag(channel.finish() for channel in self._channels)

    def _advance(self, block: FloatArray) -> list[Update]:
        if not self._separates:
            return self._channels[0].push(block)
        while len(self._channels) < block.shape[1]:
            self._channels.append(self._open_channel())
        return self._tag(
            channel.push(np.ascontiguousarray(column))
            for channel, column in zip(self._channels, block.T, strict=False)
        )

    def _tag(self, updates: Iterable[list[Update]]) -> list[Update]:
        """What the channels say, each with its number."""
        return [
            replace(update, channel=number) if self._separates else update
            for number, said in enumerate(updates, start=1)
            for update in said
        ]


class _Channel:
    """One channel of a stream, or the average of all."""

    def __init__(
        self, recogniser: Recogniser, request: StreamRequest, *, decoder: DecoderName
    ) -> None:
        is_offline = request.profile == OFFLINE_PROFILE
        if is_offline and not request.second_pass:
            raise RequestError(
                "the profile offline is the second pass; ask for another profile to do without it"
            )
        if not is_offline and request.profile not in recogniser.profiles:
            raise RequestError(
                f"there is no profile {request.profile!r}; this model has "
                f"{', '.join([*recogniser.profiles, OFFLINE_PROFILE])}"
            )
        self._recogniser = recogniser
        self._request = request
        self._decoder: DecoderName = decoder
        self._columns = recogniser.columns(decoder)
        self._phrases = request.phrases
        recogniser.decoder(decoder).open(phrases=self._phrases)  # refuses what cannot be used
        self._search: Search | None = None
        self._search_start: int | None = None  # output frame at which the search began
        self._n_searched = 0
        self._interim_results = request.interim_results and not is_offline
        self._second_pass = request.second_pass
        self._features = FeatureStream(recogniser.features)
        self._segmenter = recogniser.open_segmenter(
            DEFAULT_PROFILE if is_offline else request.profile, request.endpointing, decoder
        )
        self._survival = recogniser.survival.get(
            _kind_of(decoder, second_pass=request.second_pass), Survival()
        )
        self._committed: list[Word] = []
        self._stability = 1.0  # of the committed words
        self._has_final = False
        self._n_samples = 0
        self._quiet_since_s: float | None = 0.0  # None while somebody speaks
        self._quiet_limit_s = request.speech_start_timeout_s
        self.is_done = False

    @property
    def audio_s(self) -> float:
        return self._n_samples / self._recogniser.sample_rate

    def push(self, waveform: FloatArray) -> list[Update]:
        if self.is_done:
            return []
        self._n_samples += len(waveform)
        return self._handle(self._listen(self._features.push(waveform)))

    def end_utterance(self) -> list[Update]:
        return [] if self.is_done else self._handle(self._segmenter.end_utterance())

    def finish(self) -> list[Update]:
        if self.is_done:
            return []
        return self._handle(self._segmenter.finish(), must_answer=not self._has_final)

    def _listen(self, features: FloatArray) -> Iterator[Event | _TimedOut]:
        """What happens in the features, and where nobody has spoken for as long as is allowed."""
        request = self._request
        if request.speech_start_timeout_s is None and request.speech_end_timeout_s is None:
            yield from self._segmenter.push(features)
            return
        for i in range(len(features)):  # the time is over at the same frame however bytes were cut
            yield from self._segmenter.push(features[i : i + 1])
            if self._quiet_since_s is None or self._quiet_limit_s is None:
                continue
            end_s = self._quiet_since_s + self._quiet_limit_s
            if self._segmenter.known_end * self._recogniser.frame_s >= end_s:
                yield _TimedOut(end_s)

    def _handle(
        self, events: Iterable[Event | _TimedOut], *, must_answer: bool = False
    ) -> list[Update]:
        """What the events are told as; the last interim reading of several is enough."""
        updates: list[Update] = []
        reading: _Reading | None = None
        for event in events:
            if isinstance(event, SpeechBegan):
                self._quiet_since_s = None
                updates += self._tell(SpeechEvent.SPEECH_BEGAN, event.frame)
            elif isinstance(event, UtteranceEnded):
                updates += self._end(event.utterance, must_answer=must_answer)
                reading = None
                if self.is_done:
                    return updates
            elif isinstance(event, _TimedOut):
                self.is_done = True
                return [*updates, Update(event=SpeechEvent.TIMEOUT, time_s=event.time_s)]
            elif self._interim_results:
                reading = self._read_running()
                self._commit(reading, everything=event.is_pause)
        return updates + (self._interim(reading) if reading is not None else [])

    def _end(self, utterance: Utterance, *, must_answer: bool) -> list[Update]:
        """The final result of an utterance, unless nothing was said after all."""
        if not utterance.has_speech and not must_answer:
            return []
        updates = []
        segment = self._read(utterance)
        end_frame = utterance.first_frame + len(utterance.log_probs)
        self._committed = [word for word in self._committed if word.start_frame >= end_frame]
        if not self._committed:
            self._stability = 1.0
        if utterance.has_speech:
            self._quiet_since_s = end_frame * self._recogniser.frame_s
            self._quiet_limit_s = self._request.speech_end_timeout_s
            updates += self._tell(SpeechEvent.SPEECH_ENDED, end_frame)
        if segment.alternatives[0].words or must_answer:
            if self._request.single_utterance:
                self.is_done = True
                time_s = end_frame * self._recogniser.frame_s
                updates.append(Update(event=SpeechEvent.END_OF_SINGLE_UTTERANCE, time_s=time_s))
            updates.append(Update((Result(segment, is_final=True),)))
            self._has_final = True
        return updates

    def _read(self, utterance: Utterance) -> Segment:
        """Decode an utterance, after the second pass where it is wanted."""
        emission = utterance.log_probs
        if self._second_pass:
            emission = self._recogniser.emission(utterance.features, self._decoder)
        segment = self._recogniser.segment(
            emission,
            first_frame=utterance.first_frame,
            earliest_frame=utterance.earliest_frame,
            decoder=self._decoder,
            n_best=self._request.n_best,
            phrases=self._phrases,
        )
        if self._second_pass or not self._committed:
            return segment
        end_frame = utterance.first_frame + len(emission)
        told = [word.text for word in self._committed if word.start_frame < end_frame]
        found = [word.text for word in segment.alternatives[0].words[: len(told)]]
        if self._search is not None and found == told:
            return segment  # of the same words it knows times and confidences better
        decoder = self._recogniser.decoder(self._decoder)
        best = decoder.decode(emission[:, self._columns], phrases=self._phrases)[0]
        words = self._after_committed(best.words, utterance.first_frame)
        kept = self._alternative(
            [word for word in words if word.start_frame < end_frame],
            earliest_frame=utterance.earliest_frame,
        )
        kept = replace(kept, score=segment.alternatives[0].score)
        return replace(segment, alternatives=(kept, *segment.alternatives[1:]))

    def _tell(self, event: SpeechEvent, frame: int) -> list[Update]:
        if not self._request.speech_events:
            return []
        return [Update(event=event, time_s=frame * self._recogniser.frame_s)]

    def _after_committed(self, words: Iterable[Word], first_frame: int) -> list[Word]:
        """The committed words as they are, then those behind them.

        Args:
            words: their frames count from `first_frame`; those returned, from the stream's start.
            first_frame: output frames of the stream before the utterance.
        """
        start = self._committed[-1].end_frame if self._committed else 0
        moved = (
            replace(
                word,
                start_frame=first_frame + word.start_frame,
                end_frame=first_frame + word.end_frame,
            )
            for word in words
        )
        behind = (word for word in moved if word.start_frame + word.end_frame >= 2 * start)
        return [*self._committed, *behind]

    def _read_running(self) -> _Reading:
        """The words of the running utterance as far as it is known."""
        first_frame = self._segmenter.first_frame
        log_probs = self._segmenter.log_probs()
        n_settled = self._segmenter.n_settled
        words = self._words_so_far(log_probs, n_settled)
        return _Reading(
            self._after_committed(words, first_frame),
            settled_end=first_frame + n_settled,
            known_end=first_frame + len(log_probs),
            n_certain=self._search.n_shared_words() if self._search else 0,
        )

    def _words_so_far(self, log_probs: FloatArray, n_settled: int) -> Sequence[Word]:
        """Search what was settled since the last time, and for this once what is not settled."""
        if self._search_start != self._segmenter.first_frame:
            decoder = self._recogniser.decoder(self._decoder)
            self._search = decoder.open(phrases=self._phrases)
            self._search_start = self._segmenter.first_frame
            self._n_searched = 0
        if self._search is None:
            tokens = log_probs[:, : len(self._recogniser.tokens)]
            return self._recogniser.greedy.decode(tokens)[0].words
        log_probs = log_probs[:, self._columns]
        unread, n_unread = log_probs[self._n_searched :], n_settled - self._n_searched
        self._n_searched = n_settled
        return self._search.read(unread, n_settled=n_unread).words

    def _commit(self, reading: _Reading, *, everything: bool) -> None:
        """Commit the words that will most likely stay; a committed word is never taken back."""
        words = reading.words
        if self._search is not None and not self._second_pass:
            # the final result keeps what the whole beam agrees on, and nothing else is sure to stay
            self._committed += words[len(self._committed) : reading.n_certain]
            return
        for number in range(len(self._committed), len(words)):
            following = words[number + 1 : number + 2]
            is_complete = any(word.start_frame < reading.settled_end for word in following)
            probability = self._survival_probability(words[number], reading)
            if not everything and not (is_complete and probability >= SETTLING_PROBABILITY):
                return
            self._committed.append(words[number])
            self._stability = min(self._stability, probability)

    def _survival_probability(self, word: Word, reading: _Reading) -> float:
        is_greedy = not self._second_pass and self._search is None and self._decoder == "greedy"
        if is_greedy and word.end_frame < reading.settled_end:
            return 1.0  # the final result reads the same log_probs in the same way
        return survival_probability(
            word, self._survival, n_settled=reading.settled_end, n_known=reading.known_end
        )

    def _interim(self, reading: _Reading) -> list[Update]:
        """What is known of the running utterance: the committed words, then the others."""
        tail = reading.words[len(self._committed) :]
        results = []
        if self._committed:
            end_s = self._committed[-1].end_frame * self._recogniser.frame_s
            settled = Segment((self._alternative(self._committed),), end_s=end_s)
            stability = max(_LEAST_STABLE, self._stability)
            results.append(Result(settled, is_final=False, stability=stability))
        if tail:
            probabilities = [self._survival_probability(word, reading) for word in tail]
            stability = min(_MOST_TENTATIVE, math.prod(probabilities))
            end_s = reading.known_end * self._recogniser.frame_s
            segment = Segment((self._alternative(tail),), end_s=end_s)
            results.append(Result(segment, is_final=False, stability=stability))
        return [Update(tuple(results))] if results else []

    def _alternative(self, words: Sequence[Word], *, earliest_frame: int = 0) -> Alternative:
        """Words whose frames count from the start of the stream, as a reading without a score."""
        timed = self._recogniser.timed_words(words, earliest_frame=earliest_frame)
        confidence = sum(word.confidence for word in timed) / max(1, len(timed))
        return Alternative(timed, score=0.0, confidence=confidence)


def _kind_of(decoder: DecoderName, *, second_pass: bool) -> str:
    """The kind of final result, by which interim results are calibrated."""
    family = "greedy" if decoder == "greedy" else "beam"
    return f"{family}+second-pass" if second_pass else family
