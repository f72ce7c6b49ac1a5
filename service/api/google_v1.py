"""google.cloud.speech.v1.Speech: what Google's clients speak, translated.

A transcript that follows another begins with a space, as Google's do, so that they can be joined as
they are. Names of Google's own models are understood as any model.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from typing import Final

import grpc
from google.longrunning import operations_pb2

from service.api.fields import (
    Unsupported,
    audio_pieces,
    read_first,
    refuse,
    split_model,
    to_duration,
    to_phrases,
    to_timeout,
)
from service.api.operations import Operations
from service.audio import AudioFormat, Encoding, duration_hint_s
from service.calls import Calls, Recording
from service.decoding.hypothesis import Phrase
from service.errors import RequestError
from service.pb.google.cloud.speech.v1 import cloud_speech_pb2 as pb
from service.pb.google.cloud.speech.v1 import cloud_speech_pb2_grpc
from service.recogniser import Alternative
from service.request import Request, StreamRequest
from service.security import current_client
from service.session import SpeechEvent, Update

_Config = pb.RecognitionConfig
_ENCODINGS: Final = {
    _Config.ENCODING_UNSPECIFIED: None,
    _Config.LINEAR16: Encoding.LINEAR16,
    _Config.FLAC: Encoding.FLAC,
    _Config.MULAW: Encoding.MULAW,
    _Config.OGG_OPUS: Encoding.OGG,
    _Config.MP3: Encoding.MP3,
}
_EVENTS: Final = {
    SpeechEvent.SPEECH_BEGAN: pb.StreamingRecognizeResponse.SPEECH_ACTIVITY_BEGIN,
    SpeechEvent.SPEECH_ENDED: pb.StreamingRecognizeResponse.SPEECH_ACTIVITY_END,
    SpeechEvent.END_OF_SINGLE_UTTERANCE: pb.StreamingRecognizeResponse.END_OF_SINGLE_UTTERANCE,
    SpeechEvent.TIMEOUT: pb.StreamingRecognizeResponse.SPEECH_ACTIVITY_TIMEOUT,
}
_GOOGLES_MODELS: Final = frozenset({
    "default", "latest_long", "latest_short", "command_and_search", "phone_call", "video",
    "telephony", "telephony_short", "medical_dictation", "medical_conversation",
})  # fmt: skip


class GoogleService(cloud_speech_pb2_grpc.SpeechServicer):
    """The Google servicer."""

    def __init__(self, calls: Calls, unsupported: Unsupported, operations: Operations) -> None:
        self._calls = calls
        self._unsupported = unsupported
        self._operations = operations

    async def Recognize(  # noqa: N802  # the name gRPC calls
        self, request: pb.RecognizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.RecognizeResponse:
        """Transcribe one recording."""
        wanted = self._read(request.config, request.audio, context)
        found = await self._calls.recognise(wanted, request.audio.content)
        return pb.RecognizeResponse(
            results=_to_results(found, request.config),
            total_billed_time=to_duration(found.duration_s),
        )

    async def LongRunningRecognize(  # noqa: N802  # the name gRPC calls
        self, request: pb.LongRunningRecognizeRequest, context: grpc.aio.ServicerContext
    ) -> operations_pb2.Operation:
        """Begin to transcribe one recording; the operation has the result when it is done."""
        refuse(["output_config"] if request.HasField("output_config") else [])
        wanted = self._read(request.config, request.audio, context)
        await self._calls.check(wanted)
        config, content = request.config, request.audio.content
        total_s = duration_hint_s(content, wanted.audio)
        client = current_client.get()
        return await self._operations.start(
            lambda on_audio: self._calls.recognise(wanted, content, on_audio=on_audio),
            to_response=lambda found: pb.LongRunningRecognizeResponse(
                results=_to_results(found, config), total_billed_time=to_duration(found.duration_s)
            ),
            total_s=total_s,
            client=client.name if client else None,
        )

    async def StreamingRecognize(  # noqa: N802  # the name gRPC calls
        self,
        request_iterator: AsyncIterator[pb.StreamingRecognizeRequest],
        context: grpc.aio.ServicerContext,
    ) -> AsyncIterator[pb.StreamingRecognizeResponse]:
        """Transcribe a stream."""
        idle_s = self._calls.admission.limits.idle_s
        first = await read_first(request_iterator, idle_s=idle_s)
        streaming = first.streaming_config
        self._unsupported.check(_not_served(streaming.config), context)
        timeout = streaming.voice_activity_timeout
        has_events = streaming.enable_voice_activity_events
        wanted = StreamRequest(
            **vars(_to_request(streaming.config)),
            interim_results=streaming.interim_results,
            single_utterance=streaming.single_utterance,
            speech_events=has_events,
            speech_start_timeout_s=to_timeout("speech_start_timeout", timeout.speech_start_timeout),
            speech_end_timeout_s=to_timeout("speech_end_timeout", timeout.speech_end_timeout),
        )
        client = current_client.get()
        n_finals = 0
        async for update, language in self._calls.stream(
            wanted, audio_pieces(request_iterator), client=client.name if client else None
        ):
            response = _to_response(
                update, streaming.config, language, has_text_before=n_finals > 0
            )
            n_finals += sum(result.is_final for result in update.results)
            yield response

    def _read(
        self,
        config: pb.RecognitionConfig,
        audio: pb.RecognitionAudio,
        context: grpc.aio.ServicerContext,
    ) -> Request:
        if audio.WhichOneof("audio_source") == "uri":
            raise RequestError("audio.uri is not served; send the bytes in audio.content")
        self._unsupported.check(_not_served(config), context)
        return _to_request(config)


def _not_served(config: pb.RecognitionConfig) -> Iterator[str]:
    """What a model could do that is not here; `use_enhanced` and `metadata` ask for nothing."""
    for name in ("enable_automatic_punctuation", "alternative_language_codes"):
        if getattr(config, name):
            yield name
    for name in ("enable_spoken_punctuation", "enable_spoken_emojis"):
        if getattr(config, name).value:
            yield name
    if config.diarization_config.enable_speaker_diarization:
        yield "diarization_config"
    if config.transcript_normalization.entries:
        yield "transcript_normalization"


def _to_request(config: pb.RecognitionConfig) -> Request:
    if config.encoding not in _ENCODINGS:
        served = ", ".join(_Config.AudioEncoding.Name(e) for e in _ENCODINGS)
        raise RequestError(f"encoding {config.encoding} is not served; expected one of {served}")
    model, domain = split_model("" if config.model in _GOOGLES_MODELS else config.model)
    contexts = to_phrases((c.phrases, c.boost) for c in config.speech_contexts)
    return Request(
        audio=AudioFormat(
            encoding=_ENCODINGS[config.encoding],
            sample_rate=config.sample_rate_hertz or None,
            n_channels=config.audio_channel_count or None,
        ),
        model=model,
        domain=domain,
        language=config.language_code,
        n_best=config.max_alternatives or 1,
        phrases=(*contexts, *_adaptation_phrases(config)),
        masks_profanity=config.profanity_filter,
        separates_channels=config.enable_separate_recognition_per_channel,
    )


def _adaptation_phrases(config: pb.RecognitionConfig) -> Sequence[Phrase]:
    """The phrases that come with the request; references to stored ones are refused."""
    adaptation = config.adaptation
    names = ("phrase_set_references", "custom_classes", "abnf_grammar")
    set_names = [d.name for d, _ in adaptation.ListFields()]
    refuse(f"adaptation.{name}" for name in names if name in set_names)
    return to_phrases(
        ([phrase.value], phrase.boost or phrases.boost)
        for phrases in adaptation.phrase_sets
        for phrase in phrases.phrases
    )


def _to_results(found: Recording, config: pb.RecognitionConfig) -> list[pb.SpeechRecognitionResult]:
    return [
        pb.SpeechRecognitionResult(
            alternatives=_to_alternatives(segment.alternatives, config, has_text_before=number > 0),
            channel_tag=channel,
            result_end_time=to_duration(segment.end_s),
            language_code=found.language,
        )
        for number, (channel, segment) in enumerate(found.segments)
    ]


def _to_response(
    update: Update, config: pb.RecognitionConfig, language: str, *, has_text_before: bool
) -> pb.StreamingRecognizeResponse:
    if update.event is not None:
        return pb.StreamingRecognizeResponse(
            speech_event_type=_EVENTS[update.event], speech_event_time=to_duration(update.time_s)
        )
    return pb.StreamingRecognizeResponse(
        results=[
            pb.StreamingRecognitionResult(
                alternatives=_to_alternatives(
                    result.segment.alternatives,
                    config,
                    has_text_before=has_text_before or number > 0,
                    is_final=result.is_final,
                ),
                is_final=result.is_final,
                stability=result.stability,
                result_end_time=to_duration(result.segment.end_s),
                channel_tag=update.channel,
                language_code=language,
            )
            for number, result in enumerate(update.results)
        ]
    )


def _to_alternatives(
    alternatives: Iterable[Alternative],
    config: pb.RecognitionConfig,
    *,
    has_text_before: bool,
    is_final: bool = True,
) -> list[pb.SpeechRecognitionAlternative]:
    has_times = is_final and config.enable_word_time_offsets
    has_confidences = is_final and config.enable_word_confidence
    space = " " if has_text_before else ""
    return [
        pb.SpeechRecognitionAlternative(
            transcript=f"{space}{alternative.transcript}" if alternative.words else "",
            confidence=alternative.confidence if is_final else 0.0,
            words=[
                pb.WordInfo(
                    start_time=to_duration(word.start_s) if has_times else None,
                    end_time=to_duration(word.end_s) if has_times else None,
                    word=word.text,
                    confidence=word.confidence if has_confidences else 0.0,
                )
                for word in (alternative.words if has_times or has_confidences else ())
            ],
        )
        for alternative in alternatives
    ]
