"""voxgate.v1.Speech: messages in, sessions driven, messages out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import Executor
from datetime import timedelta
from typing import Any, Final, TypeVar

import grpc
from google.protobuf.duration_pb2 import Duration

from service.api.status import abort_with, refuse
from service.audio import (
    HIGHEST_RATE,
    LOWEST_RATE,
    MOST_CHANNELS,
    AudioFormat,
    Encoding,
    Stopwatch,
    decode_blocks,
)
from service.bundle import DEFAULT_PROFILE
from service.decoding.hypothesis import Phrase
from service.endpointing import EndpointSettings
from service.errors import AudioError, RequestError
from service.pb.voxgate.v1 import speech_pb2 as pb
from service.pb.voxgate.v1 import speech_pb2_grpc
from service.recogniser import (
    Alternative,
    DecoderName,
    Recogniser,
    Segment,
    TimedWord,
)
from service.session import Result, Session, SpeechEvent, Update

T = TypeVar("T")

_MOST_ALTERNATIVES: Final = 30
_ENCODINGS: Final = {
    pb.RecognitionConfig.ENCODING_UNSPECIFIED: None,
    pb.RecognitionConfig.LINEAR16: Encoding.LINEAR16,
    pb.RecognitionConfig.FLAC: Encoding.FLAC,
    pb.RecognitionConfig.OGG_OPUS: Encoding.OGG,
    pb.RecognitionConfig.MP3: Encoding.MP3,
}

_DECODERS: Final[dict[int, DecoderName | None]] = {
    pb.RecognitionConfig.DECODER_UNSPECIFIED: None,
    pb.RecognitionConfig.GREEDY: "greedy",
    pb.RecognitionConfig.BEAM: "beam",
    pb.RecognitionConfig.REFERENCE: "reference",
}
_BEAMS: Final[dict[int, DecoderName | None]] = {
    pb.RecognitionConfig.SEARCH_TOKENS_UNSPECIFIED: None,
    pb.RecognitionConfig.CHARACTERS: "beam-characters",
    pb.RecognitionConfig.PHONES: "beam-phones",
}
_DEFAULT_BOOST: Final = 5.0
_EVENTS: Final = {
    SpeechEvent.SPEECH_BEGAN: pb.StreamingRecognizeResponse.SPEECH_ACTIVITY_BEGIN,
    SpeechEvent.SPEECH_ENDED: pb.StreamingRecognizeResponse.SPEECH_ACTIVITY_END,
    SpeechEvent.END_OF_SINGLE_UTTERANCE: pb.StreamingRecognizeResponse.END_OF_SINGLE_UTTERANCE,
}
_ENDPOINTING_FIELDS: Final = {
    "start_history": "start_history_ms",
    "start_threshold": "start_threshold",
    "stop_history": "stop_history_ms",
    "stop_threshold": "stop_threshold",
    "stop_history_eou": "stop_history_eou_ms",
    "stop_threshold_eou": "stop_threshold_eou",
}


class SpeechService(speech_pb2_grpc.SpeechServicer):
    """The voxgate.v1.Speech servicer over one loaded recogniser."""

    def __init__(
        self, recogniser: Recogniser, executor: Executor, *, default_decoder: DecoderName
    ) -> None:
        self._recogniser = recogniser
        self._executor = executor
        self._default_decoder = default_decoder

    async def Recognize(  # noqa: N802  # the name gRPC calls
        self, request: pb.RecognizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.RecognizeResponse:
        """Transcribe one recording."""
        try:
            if request.audio.WhichOneof("audio_source") == "uri":
                raise RequestError("audio.uri is not served; send the bytes in audio.content")
            self._check(request.config)
            if not request.audio.content:
                raise AudioError("audio.content is empty; expected the bytes of a recording")
            segments, duration_s = await self._run(self._recognise, request)
        except Exception as error:  # noqa: BLE001  # the edge: everything becomes a status
            await abort_with(error, context)
        return pb.RecognizeResponse(
            results=[self._to_result(segment) for segment in segments],
            total_billed_time=_duration(duration_s),
        )

    async def StreamingRecognize(  # noqa: N802  # the name gRPC calls
        self,
        request_iterator: AsyncIterator[pb.StreamingRecognizeRequest],
        context: grpc.aio.ServicerContext,
    ) -> AsyncIterator[pb.StreamingRecognizeResponse]:
        """Transcribe a stream."""
        try:
            session: Session | None = None
            async for request in request_iterator:
                kind = request.WhichOneof("streaming_request")
                if session is None:
                    session = self._open_stream(request, kind)
                    continue
                if kind == "audio_content":
                    updates = await self._run(session.push, request.audio_content)
                elif kind == "end_utterance":
                    updates = await self._run(session.end_utterance)
                else:
                    raise RequestError(
                        f"a request after the first holds {kind or 'nothing'}; "
                        "expected audio_content or end_utterance"
                    )
                for update in updates:
                    yield self._to_response(update)
                if session.is_done:
                    return
            if session is None:
                raise RequestError(
                    "the stream was closed before its config; "
                    "send streaming_config in the first request, then audio_content"
                )
            last_updates = session.finish()
            while (update := await self._run(next, last_updates, None)) is not None:
                yield self._to_response(update)
        except Exception as error:  # noqa: BLE001  # the edge: everything becomes a status
            await abort_with(error, context)

    async def ListModels(  # noqa: N802  # the name gRPC calls
        self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListModelsResponse:
        """List the loaded models."""
        del request, context
        model = pb.Model(
            name=self._recogniser.name,
            language_code=self._recogniser.language,
            sample_rate_hertz=self._recogniser.sample_rate,
            profiles=[
                pb.StreamingProfile(name=name, latency=_duration(self._recogniser.latency_s(name)))
                for name in self._recogniser.profiles
            ],
        )
        return pb.ListModelsResponse(models=[model])

    async def _run(self, work: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work, *arguments)

    def _open_stream(self, request: pb.StreamingRecognizeRequest, kind: str | None) -> Session:
        if kind != "streaming_config":
            raise RequestError(
                f"the first request holds {kind or 'nothing'}; expected streaming_config"
            )
        streaming = request.streaming_config
        config = streaming.config
        self._check(config)
        return Session(
            self._recogniser,
            _to_audio_format(config),
            decoder=self._to_decoder(config),
            n_best=_to_n_best(config),
            phrases=_to_phrases(config),
            interim_results=streaming.interim_results,
            profile=streaming.profile or DEFAULT_PROFILE,
            second_pass=not streaming.disable_second_pass,
            endpointing=_to_endpointing(streaming.endpointing_config),
            single_utterance=streaming.single_utterance,
            speech_events=streaming.enable_voice_activity_events,
        )

    def _recognise(self, request: pb.RecognizeRequest) -> tuple[list[Segment], float]:
        """The segments of a recording and its length in seconds."""
        config = request.config
        duration = Stopwatch(self._recogniser.sample_rate)
        blocks = decode_blocks(
            [request.audio.content],
            _to_audio_format(config),
            target_rate=self._recogniser.sample_rate,
        )
        segments = self._recogniser.recognise_blocks(
            duration.measure(blocks),
            decoder=self._to_decoder(config),
            n_best=_to_n_best(config),
            phrases=_to_phrases(config),
        )
        return list(segments), duration.seconds

    def _check(self, config: pb.RecognitionConfig) -> None:
        refuse("domain", is_set=bool(config.domain))
        self._check_model(config)

    def _check_model(self, config: pb.RecognitionConfig) -> None:
        name, language = self._recogniser.name, self._recogniser.language
        if config.model not in ("", name):
            raise RequestError(f"there is no model {config.model!r}; this server has {name!r}")
        if config.language_code and _primary(config.language_code) != _primary(language):
            raise RequestError(
                f"language_code {config.language_code!r} is not served; this server has {language}"
            )

    def _to_decoder(self, config: pb.RecognitionConfig) -> DecoderName:
        if config.decoder not in _DECODERS:
            raise RequestError(
                f"decoder {config.decoder} is unknown; expected GREEDY (1), BEAM (2) "
                "or REFERENCE (3)"
            )
        if config.search_tokens not in _BEAMS:
            raise RequestError(
                f"search_tokens {config.search_tokens} is unknown; expected CHARACTERS (1) or "
                "PHONES (2)"
            )
        decoder = _DECODERS[config.decoder] or self._default_decoder
        if decoder.startswith("beam"):
            decoder = _BEAMS[config.search_tokens] or decoder
        self._recogniser.decoder(decoder)  # refuses one that is not there
        return decoder

    def _to_response(self, update: Update) -> pb.StreamingRecognizeResponse:
        if update.event is not None:
            return pb.StreamingRecognizeResponse(
                speech_event_type=_EVENTS[update.event],
                speech_event_time=_duration(update.time_s),
            )
        messages = [self._to_streaming_result(result) for result in update.results]
        for message in messages[1:]:  # so that the transcripts can be joined as they are
            for alternative in message.alternatives:
                alternative.transcript = f" {alternative.transcript}"
        return pb.StreamingRecognizeResponse(results=messages)

    def _to_streaming_result(self, result: Result) -> pb.StreamingRecognitionResult:
        segment = result.segment
        return pb.StreamingRecognitionResult(
            alternatives=_to_alternatives(segment.alternatives, is_final=result.is_final),
            is_final=result.is_final,
            stability=result.stability,
            result_end_time=_duration(segment.end_s),
            language_code=self._recogniser.language,
        )

    def _to_result(self, segment: Segment) -> pb.SpeechRecognitionResult:
        return pb.SpeechRecognitionResult(
            alternatives=_to_alternatives(segment.alternatives, is_final=True),
            result_end_time=_duration(segment.end_s),
            language_code=self._recogniser.language,
        )


def _to_n_best(config: pb.RecognitionConfig) -> int:
    return _check_range("max_alternatives", config.max_alternatives, 1, _MOST_ALTERNATIVES) or 1


def _to_phrases(config: pb.RecognitionConfig) -> list[Phrase]:
    return [
        Phrase(text, context.boost or _DEFAULT_BOOST)
        for context in config.speech_contexts
        for text in context.phrases
    ]


def _to_endpointing(config: pb.EndpointingConfig) -> EndpointSettings:
    """The settings of a request, with the defaults where it says nothing."""
    said: dict[str, Any] = {
        name: getattr(config, field)
        for field, name in _ENDPOINTING_FIELDS.items()
        if config.HasField(field)
    }
    if config.HasField("longest_utterance"):
        said["longest_utterance_s"] = config.longest_utterance.ToMilliseconds() / 1000
    return EndpointSettings(**said)


def _to_audio_format(config: pb.RecognitionConfig) -> AudioFormat:
    if config.encoding not in _ENCODINGS:
        served = ", ".join(pb.RecognitionConfig.AudioEncoding.Name(e) for e in _ENCODINGS)
        raise RequestError(f"encoding {config.encoding} is not served; expected one of {served}")
    return AudioFormat(
        encoding=_ENCODINGS[config.encoding],
        sample_rate=_check_range(
            "sample_rate_hertz", config.sample_rate_hertz, LOWEST_RATE, HIGHEST_RATE
        ),
        n_channels=_check_range(
            "audio_channel_count", config.audio_channel_count, 1, MOST_CHANNELS
        ),
    )


def _check_range(name: str, value: int, lowest: int, highest: int) -> int | None:
    """The value, or None for 0, which leaves it open."""
    if value == 0:
        return None
    if not lowest <= value <= highest:
        raise RequestError(f"{name} is {value}, expected {lowest} to {highest}, or 0")
    return value


def _primary(language_code: str) -> str:
    return language_code.replace("_", "-").split("-")[0].lower()


def _to_alternatives(
    alternatives: Iterable[Alternative], *, is_final: bool
) -> list[pb.SpeechRecognitionAlternative]:
    return [
        pb.SpeechRecognitionAlternative(
            transcript=alternative.transcript,
            confidence=alternative.confidence if is_final else 0.0,
            words=[_to_word(word) for word in alternative.words] if is_final else [],
            score=alternative.score,
        )
        for alternative in alternatives
    ]


def _to_word(word: TimedWord) -> pb.WordInfo:
    return pb.WordInfo(
        start_time=_duration(word.start_s),
        end_time=_duration(word.end_s),
        word=word.text,
        confidence=word.confidence,
    )


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromTimedelta(timedelta(milliseconds=round(seconds * 1000)))
    return duration
