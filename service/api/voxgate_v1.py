"""voxgate.v1.Speech: messages in, requests carried out, messages out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Final

import grpc

from service.api.fields import (
    read_first,
    split_model,
    to_duration,
    to_endpointing,
    to_phrases,
    to_timeout,
)
from service.audio import AudioFormat, Encoding
from service.bundle import DEFAULT_PROFILE, SearchTokens
from service.calls import Calls, EndUtterance, Piece
from service.errors import PermissionDeniedError, RequestError
from service.models import Model
from service.pb.voxgate.v1 import speech_pb2 as pb
from service.pb.voxgate.v1 import speech_pb2_grpc
from service.recogniser import Alternative, DecoderName, Segment, TimedWord
from service.request import Request, StreamRequest
from service.security import current_client
from service.session import Result, SpeechEvent, Update

_ENCODINGS: Final = {
    pb.RecognitionConfig.ENCODING_UNSPECIFIED: None,
    pb.RecognitionConfig.LINEAR16: Encoding.LINEAR16,
    pb.RecognitionConfig.FLAC: Encoding.FLAC,
    pb.RecognitionConfig.MULAW: Encoding.MULAW,
    pb.RecognitionConfig.OGG_OPUS: Encoding.OGG,
    pb.RecognitionConfig.MP3: Encoding.MP3,
    pb.RecognitionConfig.ALAW: Encoding.ALAW,
}
_DECODERS: Final[dict[int, DecoderName | None]] = {
    pb.RecognitionConfig.DECODER_UNSPECIFIED: None,
    pb.RecognitionConfig.GREEDY: "greedy",
    pb.RecognitionConfig.BEAM: "beam",
    pb.RecognitionConfig.REFERENCE: "reference",
    pb.RecognitionConfig.RESCORED: "rescored",
}
_SEARCH_TOKENS: Final[dict[int, SearchTokens | None]] = {
    pb.RecognitionConfig.SEARCH_TOKENS_UNSPECIFIED: None,
    pb.RecognitionConfig.CHARACTERS: "characters",
    pb.RecognitionConfig.PHONES: "phones",
}
_EVENTS: Final = {
    SpeechEvent.SPEECH_BEGAN: pb.StreamingRecognizeResponse.SPEECH_ACTIVITY_BEGIN,
    SpeechEvent.SPEECH_ENDED: pb.StreamingRecognizeResponse.SPEECH_ACTIVITY_END,
    SpeechEvent.END_OF_SINGLE_UTTERANCE: pb.StreamingRecognizeResponse.END_OF_SINGLE_UTTERANCE,
    SpeechEvent.TIMEOUT: pb.StreamingRecognizeResponse.SPEECH_ACTIVITY_TIMEOUT,
}
_OWN_MACHINE: Final = ("ipv4:127.", "ipv6:[::1]", "ipv6:%5B::1%5D", "unix:")


class SpeechService(speech_pb2_grpc.SpeechServicer):
    """The voxgate.v1.Speech servicer."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def Recognize(  # noqa: N802  # the name gRPC calls
        self, request: pb.RecognizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.RecognizeResponse:
        """Transcribe one recording."""
        del context
        if request.audio.WhichOneof("audio_source") == "uri":
            raise RequestError("audio.uri is not served; send the bytes in audio.content")
        wanted = _to_request(request.config)
        found = await self._calls.recognise(wanted, request.audio.content)
        return pb.RecognizeResponse(
            results=[
                pb.SpeechRecognitionResult(
                    alternatives=_to_alternatives(segment.alternatives, is_final=True),
                    channel_tag=channel,
                    result_end_time=to_duration(segment.end_s),
                    language_code=found.language,
                    intent=_to_intent(segment),
                    slots=_to_slots(segment),
                )
                for channel, segment in found.segments
            ],
            total_billed_time=to_duration(found.duration_s),
        )

    async def StreamingRecognize(  # noqa: N802  # the name gRPC calls
        self,
        request_iterator: AsyncIterator[pb.StreamingRecognizeRequest],
        context: grpc.aio.ServicerContext,
    ) -> AsyncIterator[pb.StreamingRecognizeResponse]:
        """Transcribe a stream."""
        del context
        idle_s = self._calls.admission.limits.idle_s
        first = await read_first(request_iterator, idle_s=idle_s)
        wanted = _to_stream_request(first.streaming_config)
        client = current_client.get()
        async for update, language in self._calls.stream(
            wanted, _pieces(request_iterator), client=client.name if client else None
        ):
            yield _to_response(update, language)

    async def ListModels(  # noqa: N802  # the name gRPC calls
        self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListModelsResponse:
        """List the loaded models."""
        del request, context
        return pb.ListModelsResponse(models=[_to_model(m) for m in self._calls.models.loaded])

    async def ReloadModels(  # noqa: N802  # the name gRPC calls
        self, request: pb.ReloadModelsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ReloadModelsResponse:
        """Load what is new or has changed."""
        del request
        client = current_client.get()
        if client is None and not context.peer().startswith(_OWN_MACHINE):
            raise PermissionDeniedError(
                "models can be reloaded from the server's own machine, or with an admin's key"
            )
        if client is not None and not client.is_admin:
            raise PermissionDeniedError(
                f"{client.name} is no admin; make an admin's key with `voxgate keys add --admin`"
            )
        changes = await asyncio.get_running_loop().run_in_executor(None, self._calls.models.reload)
        return pb.ReloadModelsResponse(changes=changes)


async def _pieces(requests: AsyncIterator[pb.StreamingRecognizeRequest]) -> AsyncIterator[Piece]:
    async for request in requests:
        kind = request.WhichOneof("streaming_request")
        if kind == "audio_content":
            yield request.audio_content
        elif kind == "end_utterance":
            yield EndUtterance()
        else:
            raise RequestError(
                f"a request after the first holds {kind or 'nothing'}; "
                "expected audio_content or end_utterance"
            )


def _to_request(config: pb.RecognitionConfig) -> Request:
    if config.encoding not in _ENCODINGS:
        served = ", ".join(pb.RecognitionConfig.AudioEncoding.Name(e) for e in _ENCODINGS)
        raise RequestError(f"encoding {config.encoding} is not served; expected one of {served}")
    if config.decoder not in _DECODERS:
        raise RequestError(
            f"decoder {config.decoder} is unknown; expected GREEDY (1), BEAM (2), REFERENCE (3) or "
            "RESCORED (4)"
        )
    if config.search_tokens not in _SEARCH_TOKENS:
        raise RequestError(
            f"search_tokens {config.search_tokens} is unknown; expected CHARACTERS (1) or "
            "PHONES (2)"
        )
    model, domain = split_model(config.model, config.domain)
    return Request(
        audio=AudioFormat(
            encoding=_ENCODINGS[config.encoding],
            sample_rate=config.sample_rate_hertz or None,
            n_channels=config.audio_channel_count or None,
        ),
        model=model,
        domain=domain,
        language=config.language_code,
        decoder=_DECODERS[config.decoder],
        search_tokens=_SEARCH_TOKENS[config.search_tokens],
        n_best=config.max_alternatives or 1,
        phrases=to_phrases((c.phrases, c.boost) for c in config.speech_contexts),
        masks_profanity=config.profanity_filter,
        separates_channels=config.enable_separate_recognition_per_channel,
    )


def _to_stream_request(streaming: pb.StreamingRecognitionConfig) -> StreamRequest:
    timeout = streaming.voice_activity_timeout
    return StreamRequest(
        **vars(_to_request(streaming.config)),
        interim_results=streaming.interim_results,
        profile=streaming.profile or DEFAULT_PROFILE,
        second_pass=not streaming.disable_second_pass,
        endpointing=to_endpointing(streaming.endpointing_config),
        single_utterance=streaming.single_utterance,
        speech_events=streaming.enable_voice_activity_events,
        speech_start_timeout_s=to_timeout("speech_start_timeout", timeout.speech_start_timeout),
        speech_end_timeout_s=to_timeout("speech_end_timeout", timeout.speech_end_timeout),
    )


def _to_response(update: Update, language: str) -> pb.StreamingRecognizeResponse:
    if update.event is not None:
        return pb.StreamingRecognizeResponse(
            speech_event_type=_EVENTS[update.event],
            speech_event_time=to_duration(update.time_s),
            channel_tag=update.channel,
        )
    messages = [_to_result(result, update.channel, language) for result in update.results]
    for message in messages[1:]:  # so that the transcripts can be joined as they are
        for alternative in message.alternatives:
            alternative.transcript = f" {alternative.transcript}"
    return pb.StreamingRecognizeResponse(results=messages)


def _to_result(result: Result, channel: int, language: str) -> pb.StreamingRecognitionResult:
    segment: Segment = result.segment
    return pb.StreamingRecognitionResult(
        alternatives=_to_alternatives(segment.alternatives, is_final=result.is_final),
        is_final=result.is_final,
        stability=result.stability,
        result_end_time=to_duration(segment.end_s),
        channel_tag=channel,
        language_code=language,
        intent=_to_intent(segment),
        slots=_to_slots(segment),
    )


def _to_intent(segment: Segment) -> pb.Intent | None:
    intent = segment.intent
    return None if intent is None else pb.Intent(name=intent.name, confidence=intent.confidence)


def _to_slots(segment: Segment) -> list[pb.Slot]:
    return [
        pb.Slot(
            name=slot.name,
            value=slot.value,
            raw=slot.raw,
            start_time=to_duration(slot.start_s),
            end_time=to_duration(slot.end_s),
            confidence=slot.confidence,
        )
        for slot in segment.slots
    ]


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
        start_time=to_duration(word.start_s),
        end_time=to_duration(word.end_s),
        word=word.text,
        confidence=word.confidence,
    )


def _to_model(model: Model) -> pb.Model:
    recogniser = model.live
    return pb.Model(
        name=model.name,
        language_code=model.language,
        sample_rate_hertz=recogniser.sample_rate,
        profiles=[
            pb.StreamingProfile(name=name, latency=to_duration(recogniser.latency_s(name)))
            for name in recogniser.profiles
        ],
        domains=recogniser.domains,
    )
