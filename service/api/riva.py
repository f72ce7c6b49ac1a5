"""nvidia.riva.asr.RivaSpeechRecognition: what Riva's clients speak, translated.

Riva ends every transcript with a space, so that its clients can join them as they are, and counts
word times in milliseconds; so does this.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Final

import grpc

from service.api.fields import (
    Unsupported,
    audio_pieces,
    read_first,
    split_model,
    to_endpointing,
    to_phrases,
)
from service.audio import AudioFormat, Encoding
from service.calls import Calls
from service.errors import RequestError
from service.pb.riva.proto import riva_asr_pb2 as pb
from service.pb.riva.proto import riva_asr_pb2_grpc, riva_audio_pb2
from service.recogniser import Alternative
from service.request import Request, StreamRequest
from service.security import current_client

_ENCODINGS: Final = {
    riva_audio_pb2.ENCODING_UNSPECIFIED: None,
    riva_audio_pb2.LINEAR_PCM: Encoding.LINEAR16,
    riva_audio_pb2.FLAC: Encoding.FLAC,
    riva_audio_pb2.MULAW: Encoding.MULAW,
    riva_audio_pb2.OGGOPUS: Encoding.OGG,
    riva_audio_pb2.ALAW: Encoding.ALAW,
}


class RivaService(riva_asr_pb2_grpc.RivaSpeechRecognitionServicer):
    """The Riva servicer."""

    def __init__(self, calls: Calls, unsupported: Unsupported) -> None:
        self._calls = calls
        self._unsupported = unsupported

    async def Recognize(  # noqa: N802  # the name gRPC calls
        self, request: pb.RecognizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.RecognizeResponse:
        """Transcribe one recording."""
        config = request.config
        self._unsupported.check(_not_served(config), context)
        found = await self._calls.recognise(_to_request(config), request.audio)
        results = [
            pb.SpeechRecognitionResult(
                alternatives=_to_alternatives(segment.alternatives, config, found.language),
                channel_tag=channel or 1,
                audio_processed=segment.end_s,
            )
            for channel, segment in found.segments
        ]
        return pb.RecognizeResponse(results=results, id=request.id)

    async def StreamingRecognize(  # noqa: N802  # the name gRPC calls
        self,
        request_iterator: AsyncIterator[pb.StreamingRecognizeRequest],
        context: grpc.aio.ServicerContext,
    ) -> AsyncIterator[pb.StreamingRecognizeResponse]:
        """Transcribe a stream."""
        idle_s = self._calls.admission.limits.idle_s
        first = await read_first(request_iterator, idle_s=idle_s)
        streaming = first.streaming_config
        config = streaming.config
        self._unsupported.check(_not_served(config), context)
        wanted = StreamRequest(
            **vars(_to_request(config)),
            interim_results=streaming.interim_results,
            endpointing=to_endpointing(config.endpointing_config),
        )
        client = current_client.get()
        async for update, language in self._calls.stream(
            wanted, audio_pieces(request_iterator), client=client.name if client else None
        ):
            yield pb.StreamingRecognizeResponse(
                results=[
                    pb.StreamingRecognitionResult(
                        alternatives=_to_alternatives(
                            result.segment.alternatives,
                            config,
                            language,
                            is_final=result.is_final,
                        ),
                        is_final=result.is_final,
                        stability=1.0 if result.is_final else result.stability,
                        channel_tag=update.channel or 1,
                        audio_processed=result.segment.end_s,
                    )
                    for result in update.results
                ],
                id=first.id,
            )

    async def GetRivaSpeechRecognitionConfig(  # noqa: N802  # the name gRPC calls
        self, request: pb.RivaSpeechRecognitionConfigRequest, context: grpc.aio.ServicerContext
    ) -> pb.RivaSpeechRecognitionConfigResponse:
        """List the models and their domains, for streams (online) and for recordings (offline)."""
        del context
        wanted = request.model_name
        listed = [
            (name, model)
            for model in self._calls.models.loaded
            for name in (model.name, *(f"{model.name}/{domain}" for domain in model.live.domains))
            if wanted in ("", name)
        ]
        if not listed:
            model_name, domain_name = split_model(wanted)
            model = self._calls.models.choose(model_name, "")  # says which there are
            model.live.in_domain(domain_name)
        return pb.RivaSpeechRecognitionConfigResponse(
            model_config=[
                pb.RivaSpeechRecognitionConfigResponse.Config(
                    model_name=name,
                    parameters={
                        "language_code": model.language,
                        "type": kind,
                        "streaming": str(kind == "online"),
                        "sample_rate": str(model.live.sample_rate),
                        "decoder_type": "beam",
                    },
                )
                for name, model in listed
                for kind in ("online", "offline")
            ]
        )


def _not_served(config: pb.RecognitionConfig) -> Iterator[str]:
    if config.enable_automatic_punctuation:
        yield "enable_automatic_punctuation"
    if config.diarization_config.enable_speaker_diarization:
        yield "diarization_config"
    yield from (f"custom_configuration[{name}]" for name in config.custom_configuration)


def _to_request(config: pb.RecognitionConfig) -> Request:
    if config.encoding not in _ENCODINGS:
        served = ", ".join(riva_audio_pb2.AudioEncoding.Name(e) for e in _ENCODINGS)
        raise RequestError(f"encoding {config.encoding} is not served; expected one of {served}")
    model, domain = split_model(config.model)
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
        phrases=to_phrases((c.phrases, c.boost) for c in config.speech_contexts),
        masks_profanity=config.profanity_filter,
        separates_channels=config.enable_separate_recognition_per_channel,
    )


def _to_alternatives(
    alternatives: Iterable[Alternative],
    config: pb.RecognitionConfig,
    language: str,
    *,
    is_final: bool = True,
) -> list[pb.SpeechRecognitionAlternative]:
    has_words = is_final and config.enable_word_time_offsets
    return [
        pb.SpeechRecognitionAlternative(
            transcript=f"{alternative.transcript} " if alternative.words else "",
            confidence=alternative.confidence if is_final else 0.0,
            words=[
                pb.WordInfo(
                    start_time=round(1000 * word.start_s),
                    end_time=round(1000 * word.end_s),
                    word=word.text,
                    confidence=word.confidence,
                    language_code=language,
                )
                for word in (alternative.words if has_words else ())
            ],
            language_code=[language],
        )
        for alternative in alternatives
    ]
