"""Carries out requests: the one place between the APIs and the recogniser.

Every API translates its messages into a request and what comes back into its messages. A stream's
own code runs as fibers on the event loop's thread, a recording's on one of a few threads; what
takes long, the scheduler runs for both, streams first.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Final, TypeVar

import numpy as np

from service.admission import Admission
from service.audio import AudioStream, Stopwatch, decode_blocks, duration_hint_s
from service.errors import AudioError, IdleError, RequestError
from service.fibers import run_fiber
from service.metrics import Metrics
from service.models import Model, Models
from service.profanity import mask_segment
from service.recogniser import DecoderName, FloatArray, Recogniser, Segment
from service.request import Request, StreamRequest
from service.session import Session, Update

T = TypeVar("T")

_HEAD_BYTES: Final = 1 << 16
_OTHER_THREADS: Final = 8
"""For what would keep the event loop: phrases at a stream's start, compressed audio at its end."""


class EndUtterance:
    """What a sender may put between its bytes: the running utterance ends here."""


Piece = bytes | EndUtterance


@dataclass(frozen=True)
class Recording:
    """What was recognised in a recording."""

    segments: tuple[tuple[int, Segment], ...]
    """With their channels: from 1 where channels were wanted separately, else 0; by time."""
    duration_s: float
    language: str
    """Of the model."""


class Calls:
    """Recognises recordings and streams for the APIs."""

    def __init__(
        self,
        models: Models,
        admission: Admission,
        metrics: Metrics,
        *,
        default_decoder: DecoderName | None,
        n_threads: int,
    ) -> None:
        """Take requests.

        Args:
            models: what there is.
            admission: how much of it may be used.
            metrics: told of everything.
            default_decoder: decoder of requests that name none; None for the best of the model.
            n_threads: recordings that are recognised at the same time.
        """
        self.models = models
        self.admission = admission
        self.metrics = metrics
        self._default_decoder = default_decoder
        self._other_threads = ThreadPoolExecutor(_OTHER_THREADS, thread_name_prefix="other")
        self._recording_threads = ThreadPoolExecutor(n_threads, thread_name_prefix="recording")

    def close(self) -> None:
        """Let go of the threads and the models when the work at hand is done."""
        self._other_threads.shutdown()
        self._recording_threads.shutdown(cancel_futures=True)
        self.models.close()

    async def check(self, request: Request) -> None:
        """Refuse at once what cannot be served.

        Raises:
            InputError: no such model, language or decoder, or a phrase that cannot be used.
        """
        await self._run(self._other_threads, self._check, request)  # phrases can take seconds

    def _check(self, request: Request) -> None:
        model = self.models.choose(request.model, request.language)
        recogniser = model.live.in_domain(request.domain)
        decoder = self._decoder_of(request, recogniser)
        recogniser.decoder(decoder).open(phrases=request.phrases)

    async def recognise(
        self,
        request: Request,
        content: bytes,
        *,
        on_audio: Callable[[float], object] = lambda _: None,
    ) -> Recording:
        """Recognise a recording.

        Args:
            request: what is wanted.
            content: the recording's bytes.
            on_audio: called with the seconds that were dealt with since the last call, on another
                thread.

        Raises:
            InputError: the request or the audio cannot be used.
            OverloadError: there is no room.
        """
        if not content:
            raise AudioError("the audio is empty; expected the bytes of a recording")
        audio_s = duration_hint_s(content, request.audio) or 0.0
        longest_s = self.admission.limits.longest_recording_s
        if audio_s > longest_s:
            raise AudioError(
                f"the recording has {audio_s:.0f} s of audio, expected at most {longest_s:.0f}; "
                "cut it, or raise the server's limit"
            )
        is_over = threading.Event()
        with self.admission.recording(audio_s):
            try:
                return await asyncio.get_running_loop().run_in_executor(
                    self._recording_threads, self._recognise, request, content, is_over, on_audio
                )
            finally:
                is_over.set()  # a thread that is not done yet ends at the next utterance

    async def stream(
        self, request: StreamRequest, pieces: AsyncIterator[Piece], *, client: str | None
    ) -> AsyncIterator[tuple[Update, str]]:
        """Recognise a stream while it arrives.

        Args:
            request: what is wanted.
            pieces: audio bytes and signs between them; the next is asked for when the one before
                it has been dealt with, so a fast sender is slowed down.
            client: whose stream it is, where that is known.

        Yields:
            What the stream is told, and the language of the model.

        Raises:
            InputError: the request or the audio cannot be used.
            OverloadError: there is no room.
            IdleError: nothing arrived for too long.
        """
        with (
            self.admission.stream(client),
            self.models.use(request.model, request.language) as model,
            model.scheduler.stream(),
            _Watch(self.admission.limits.idle_s) as watch,
        ):
            session = await self._run(self._other_threads, self._open, request, model)
            try:
                async for piece in watch.over(pieces):
                    start = time.perf_counter()
                    is_end = isinstance(piece, EndUtterance)
                    step = session.end_utterance if is_end else session.push
                    arguments = () if is_end else (piece,)
                    updates = await run_fiber(step, *arguments)
                    self.metrics.stream_step.observe(time.perf_counter() - start)
                    for update in updates:
                        yield self._told(update, request), model.language
                    if session.is_done:
                        return
                last = session.finish()
                while (found := await self._run(self._other_threads, next, last, None)) is not None:
                    yield self._told(found, request), model.language
            finally:
                self.metrics.audio.labels("stream").inc(session.audio_s)

    def _open(self, request: StreamRequest, model: Model) -> Session:
        recogniser = model.live.in_domain(request.domain)
        decoder = self._decoder_of(request, recogniser)
        limits = self.admission.limits
        return Session(
            recogniser,
            request,
            decoder=decoder,
            longest_s=limits.longest_stream_s,
            most_compressed_bytes=limits.compressed_stream_bytes,
        )

    def _told(self, update: Update, request: StreamRequest) -> Update:
        for result in update.results:
            self.metrics.results.labels("final" if result.is_final else "interim").inc()
        if not request.masks_profanity:
            return update
        results = (replace(r, segment=mask_segment(r.segment)) for r in update.results)
        return replace(update, results=tuple(results))

    def _recognise(
        self,
        request: Request,
        content: bytes,
        is_over: threading.Event,
        on_audio: Callable[[float], object],
    ) -> Recording:
        """Recognise a recording on this thread, until it is over."""
        with self.models.use(request.model, request.language) as model:
            recogniser = model.offline.in_domain(request.domain)
            decoder = self._decoder_of(request, recogniser)
            segments: list[tuple[int, Segment]] = []
            channels = [0]
            if request.separates_channels:
                channels = list(range(1, self._count_channels(request, content, recogniser) + 1))
            for channel in channels:
                stopwatch = Stopwatch(recogniser.sample_rate)
                blocks = self._blocks(request, content, recogniser, channel)
                found = recogniser.recognise_blocks(
                    stopwatch.measure(_until(is_over, blocks)),
                    decoder=decoder,
                    n_best=request.n_best,
                    phrases=request.phrases,
                    on_audio=lambda seconds: on_audio(seconds / len(channels)),
                )
                segments += [(channel, segment) for segment in _until(is_over, found)]
            segments.sort(key=lambda pair: (pair[1].end_s, pair[0]))
            if request.masks_profanity:
                segments = [(channel, mask_segment(segment)) for channel, segment in segments]
            self.metrics.audio.labels("recording").inc(stopwatch.seconds)
            self.metrics.results.labels("final").inc(len(segments))
            return Recording(tuple(segments), stopwatch.seconds, model.language)

    def _blocks(
        self, request: Request, content: bytes, recogniser: Recogniser, channel: int
    ) -> Iterator[FloatArray]:
        """The samples of one channel, from 1, or the average for 0."""
        blocks = decode_blocks(
            [content],
            request.audio,
            target_rate=recogniser.sample_rate,
            separate_channels=channel > 0,
            longest_s=self.admission.limits.longest_recording_s,
        )
        if channel == 0:
            return blocks
        return (np.ascontiguousarray(block[:, channel - 1]) for block in blocks)

    def _count_channels(self, request: Request, content: bytes, recogniser: Recogniser) -> int:
        stream = AudioStream(
            request.audio,
            target_rate=recogniser.sample_rate,
            separate_channels=True,
            longest_s=self.admission.limits.longest_recording_s,
        )
        stream.push(content[:_HEAD_BYTES])
        if stream.n_channels is None:  # of a compressed file, the first block says it
            stream.push(content[_HEAD_BYTES:])
            next(stream.drain(), None)
        return stream.n_channels or 1

    def _decoder_of(self, request: Request, recogniser: Recogniser) -> DecoderName:
        name = request.decoder or self._default_decoder or recogniser.best_decoder
        if request.search_tokens and request.decoder == "rescored":
            raise RequestError(
                "the decoder rescored searches what the model's settings say; leave search_tokens "
                "out, or ask for the decoder beam"
            )
        if request.search_tokens and name.startswith(("beam", "rescored")):
            name = "beam-phones" if request.search_tokens == "phones" else "beam-characters"
        recogniser.decoder(name)  # refuses one that is not there
        return name

    async def _run(self, threads: Executor, work: Callable[..., T], *arguments: object) -> T:
        """Run work on a thread; a call that is cancelled waits until the thread has let go."""
        running = threads.submit(work, *arguments)
        ended = asyncio.wrap_future(running)
        try:
            return await asyncio.shield(ended)
        except asyncio.CancelledError:
            if not running.cancel():
                await asyncio.wait([ended])
                ended.exception()  # nobody is left to hear of it
            raise


class _Over(Exception):  # noqa: N818  # nobody waits for it
    """The call that wanted this work has ended."""


def _until(is_over: threading.Event, items: Iterator[T]) -> Iterator[T]:
    for item in items:
        if is_over.is_set():
            raise _Over
        yield item


class _Watch:
    """Ends the wait for a sender that is silent."""

    def __init__(self, idle_s: float) -> None:
        self._idle_s = idle_s
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._timer: asyncio.TimerHandle | None = None
        self._waiting_since: float | None = None  # None while the server works
        self._has_fired = False

    def __enter__(self) -> _Watch:
        self._look()
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()

    async def over(self, pieces: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
        """Hand on pieces; see `Calls.stream`.

        Raises:
            IdleError: none arrived for too long.
        """
        while True:
            self._waiting_since = self._loop.time()
            try:
                piece = await pieces.__anext__()
            except StopAsyncIteration:
                return
            except asyncio.CancelledError:
                if not self._has_fired:
                    raise
                raise IdleError(
                    f"no audio for {self._idle_s:g} s; send audio as it is spoken, or half-close "
                    "the stream when it is complete"
                ) from None
            finally:
                self._waiting_since = None
            yield piece

    def _look(self) -> None:
        """Cancel the wait if it has lasted too long; else look again when it may have."""
        waited_s = 0.0
        if self._waiting_since is not None:
            waited_s = self._loop.time() - self._waiting_since
        if waited_s >= self._idle_s and self._task is not None:
            self._has_fired = True
            self._task.cancel()
            return
        self._timer = self._loop.call_later(max(0.05, self._idle_s - waited_s), self._look)
