"""A streaming client of voxgate.v1: what `voxgate stream` and the tests use."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Final

import grpc
import soundfile
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.errors import AudioError, ServerError
from service.pb.voxgate.v1 import speech_pb2 as pb
from service.pb.voxgate.v1 import speech_pb2_grpc

PIECE_S: Final = 0.1
_PIECE_BYTES: Final = 3_200
_CONNECT_S: Final = 10.0
_LOAD_S: Final = 120.0


def stream_recognise(
    address: str, pieces: Iterable[bytes], config: pb.StreamingRecognitionConfig
) -> Iterator[pb.StreamingRecognitionResult]:
    """`stream_responses`, but the results alone."""
    for response in stream_responses(address, pieces, config):
        yield from response.results


def stream_responses(
    address: str, pieces: Iterable[bytes], config: pb.StreamingRecognitionConfig
) -> Iterator[pb.StreamingRecognizeResponse]:
    """Send pieces of audio as they come and yield the responses as they come.

    Args:
        address: `host:port` of the server.
        pieces: audio bytes; consumed on another thread.
        config: the first request.

    Raises:
        ServerError: the server cannot be reached or ends the stream with an error.
    """
    with grpc.insecure_channel(address) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=_CONNECT_S)
        except grpc.FutureTimeoutError as error:
            raise ServerError(
                f"no server answers at {address}; start one with `voxgate serve`"
            ) from error
        responses = speech_pb2_grpc.SpeechStub(channel).StreamingRecognize(
            _requests(pieces, config)
        )
        try:
            yield from responses
        except grpc.RpcError as error:
            raise ServerError(f"{error.code().name}: {error.details()}") from error


def list_models(address: str, *, api_key: str | None = None) -> list[pb.Model]:
    """The models of the server at `host:port`.

    Raises:
        ServerError: it cannot be reached or refuses.
    """
    return list(_call(address, api_key, "ListModels", pb.ListModelsRequest()).models)


def reload_models(address: str, *, api_key: str | None = None) -> list[str]:
    """Make the server at `host:port` reload its models; sentences that say what it did.

    Raises:
        ServerError: it cannot be reached or refuses.
    """
    return list(_call(address, api_key, "ReloadModels", pb.ReloadModelsRequest()).changes)


def _call(address: str, api_key: str | None, method: str, request: Message) -> Any:  # noqa: ANN401
    metadata = (("x-api-key", api_key),) if api_key else ()
    with grpc.insecure_channel(address) as channel:
        call = getattr(speech_pb2_grpc.SpeechStub(channel), method)
        try:
            return call(request, metadata=metadata, timeout=_LOAD_S)
        except grpc.RpcError as error:
            raise ServerError(f"{error.code().name}: {error.details()}") from error


def check_health(address: str) -> bool:
    """Whether the server at `host:port` says that it is serving."""
    with grpc.insecure_channel(address) as channel:
        try:
            response = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=_CONNECT_S
            )
        except grpc.RpcError:
            return False
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


def _requests(
    pieces: Iterable[bytes], config: pb.StreamingRecognitionConfig
) -> Iterator[pb.StreamingRecognizeRequest]:
    yield pb.StreamingRecognizeRequest(streaming_config=config)
    for piece in pieces:
        yield pb.StreamingRecognizeRequest(audio_content=piece)


def read_pcm(path: Path) -> tuple[int, int, Iterator[bytes]]:
    """Read a recording as 16-bit PCM.

    Returns:
        Sample rate in Hz, channels, and pieces of `PIECE_S` seconds.

    Raises:
        AudioError: the file cannot be read.
    """
    try:
        samples, sample_rate = soundfile.read(str(path), dtype="int16", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise AudioError(f"cannot read {path}: {error.error_string}") from error
    n_frames = int(sample_rate * PIECE_S)
    pieces = (
        samples[start : start + n_frames].astype("<i2").tobytes()
        for start in range(0, len(samples), n_frames)
    )
    return sample_rate, samples.shape[1], pieces


def read_pieces(source: BinaryIO) -> Iterator[bytes]:
    """Pieces of whatever arrives on a binary stream, as soon as it arrives."""
    read = getattr(source, "read1", source.read)
    while piece := read(_PIECE_BYTES):
        yield piece


def start(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Wait for the first piece, so that what keeps a source from starting is raised here."""
    return chain([next(pieces)], pieces)


def pace(pieces: Iterable[bytes], piece_s: float = PIECE_S) -> Iterator[bytes]:
    """Hand out pieces no faster than they would be spoken."""
    start = time.monotonic()
    for number, piece in enumerate(pieces, start=1):
        yield piece
        time.sleep(max(0.0, start + number * piece_s - time.monotonic()))
