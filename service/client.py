"""A streaming client of voxgate.v1: what `voxgate stream` and the tests use."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Server:
    """A server, and how it is reached."""

    address: str
    """`host:port`."""
    api_key: str = ""
    """Where the server wants one."""
    ca: Path | None = None
    """PEM file of who signed the server's certificate; None speaks without TLS."""
    certificate: Path | None = None
    """PEM file of the client's own certificate, where the server wants one."""
    key: Path | None = None
    """PEM file of that certificate's key."""
    name: str = ""
    """The server's name in its certificate, where it is not that of the address."""

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call carries."""
        return (("x-api-key", self.api_key),) if self.api_key else ()

    def open(self) -> grpc.Channel:
        """A channel to the server; nothing is sent yet.

        Raises:
            ServerError: a PEM file cannot be read, or is named without `ca`.
        """
        if self.ca is None:
            if self.certificate or self.key:
                raise ServerError("a client's certificate needs TLS: name the server's CA as well")
            return grpc.insecure_channel(self.address)
        credentials = grpc.ssl_channel_credentials(
            _read_pem(self.ca), _read_pem(self.key), _read_pem(self.certificate)
        )
        options = (("grpc.ssl_target_name_override", self.name),) if self.name else ()
        return grpc.secure_channel(self.address, credentials, options)


def _read_pem(path: Path | None) -> bytes | None:
    try:
        return None if path is None else path.read_bytes()
    except OSError as error:
        raise ServerError(f"cannot read {path}: {error.strerror}; expected a PEM file") from error


def stream_recognise(
    server: Server | str, pieces: Iterable[bytes], config: pb.StreamingRecognitionConfig
) -> Iterator[pb.StreamingRecognitionResult]:
    """`stream_responses`, but the results alone."""
    for response in stream_responses(server, pieces, config):
        yield from response.results


def stream_responses(
    server: Server | str, pieces: Iterable[bytes], config: pb.StreamingRecognitionConfig
) -> Iterator[pb.StreamingRecognizeResponse]:
    """Send pieces of audio as they come and yield the responses as they come.

    Args:
        server: the server, or its `host:port` where that is all.
        pieces: audio bytes; consumed on another thread.
        config: the first request.

    Raises:
        ServerError: the server cannot be reached or ends the stream with an error.
    """
    server = _as_server(server)
    with server.open() as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=_CONNECT_S)
        except grpc.FutureTimeoutError as error:
            spoken = "without TLS, which it may want (--tls-ca)" if server.ca is None else "by TLS"
            raise ServerError(
                f"no server answers at {server.address} {spoken}; start one with `voxgate serve`"
            ) from error
        responses = speech_pb2_grpc.SpeechStub(channel).StreamingRecognize(
            _requests(pieces, config), metadata=server.metadata
        )
        try:
            yield from responses
        except grpc.RpcError as error:
            raise _server_error(error) from error


def list_models(server: Server | str) -> list[pb.Model]:
    """The models of a server.

    Raises:
        ServerError: it cannot be reached or refuses.
    """
    return list(_call(server, "ListModels", pb.ListModelsRequest()).models)


def reload_models(server: Server | str) -> list[str]:
    """Make a server reload its models; sentences that say what it did.

    Raises:
        ServerError: it cannot be reached or refuses.
    """
    return list(_call(server, "ReloadModels", pb.ReloadModelsRequest()).changes)


def _call(server: Server | str, method: str, request: Message) -> Any:  # noqa: ANN401
    server = _as_server(server)
    with server.open() as channel:
        call = getattr(speech_pb2_grpc.SpeechStub(channel), method)
        try:
            return call(request, metadata=server.metadata, timeout=_LOAD_S)
        except grpc.RpcError as error:
            raise _server_error(error) from error


def check_health(
    server: Server | str, *, on_error: Callable[[str], object] = lambda _: None
) -> bool:
    """Whether a server says that it is serving; `on_error` is told why it did not answer."""
    with _as_server(server).open() as channel:
        try:
            response = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=_CONNECT_S
            )
        except grpc.RpcError as error:
            on_error(str(_server_error(error)))
            return False
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


def _as_server(server: Server | str) -> Server:
    return Server(server) if isinstance(server, str) else server


def _server_error(error: grpc.RpcError) -> ServerError:
    """What the server said, and the option that helps."""
    code = error.code()
    fixes = {
        grpc.StatusCode.UNAUTHENTICATED: "; see --api-key",
        grpc.StatusCode.UNAVAILABLE: "; does the server run, and does it want TLS (--tls-ca)?",
    }
    return ServerError(f"{code.name}: {error.details()}{fixes.get(code, '')}")


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
        reason = "there is no such file" if not path.exists() else error.error_string
        raise AudioError(f"cannot read {path}: {reason}; expected a recording") from error
    if len(samples) == 0:
        raise AudioError(f"{path} holds no samples; expected a recording")
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
