"""Thousands of malformed messages and recordings: does the server stay up and say what is wrong?

python benchmarks/fuzz.py [--messages 20000] [--seed 0] [--address H:P] [--only N]

Every API of the server gets random bytes, damaged messages, absurd field values, streams in the
wrong order, damaged recordings and decompression bombs, over raw channels. A failure is a call that
ends in another way than with an answer or a status that blames the request, one that takes too
long, a status that shows the inside of the server, an answer that cannot be read, or a server that
does not serve any more. Case N of a seed is always the same; `--only N` repeats it. Without
`--address` a server is started, and its log is printed after a failure. The exit status is 1 if
there was any.
"""

from __future__ import annotations

import argparse
import io
import math
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

import grpc
import numpy as np
import soundfile
from google.longrunning import operations_pb2
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError, Message
from google.rpc.code_pb2 import Code

from service.audio import load_audio, to_pcm
from service.client import check_health
from service.pb.google.cloud.speech.v1 import cloud_speech_pb2 as google
from service.pb.riva.proto import riva_asr_pb2 as riva
from service.pb.voxgate.v1 import speech_pb2 as voxgate

EXAMPLES: Final = Path(__file__).resolve().parent.parent / "examples"
DEADLINE_S: Final = 20.0
N_THREADS: Final = 8
_OPERATION_S: Final = 10
_HEALTH_EVERY_S: Final = 2.0
_MOST_SHOWN: Final = 20
_SERVER_LIMITS: Final = ("--longest-recording", "30", "--idle-timeout", "10")
_BOMB_S: Final = 100.0
"""More than a recording may have on a server that is started here."""
_SAMPLE_RATE: Final = 16_000

_ALLOWED: Final = frozenset({
    "OK", "INVALID_ARGUMENT", "OUT_OF_RANGE", "UNIMPLEMENTED", "RESOURCE_EXHAUSTED", "NOT_FOUND",
    "UNAUTHENTICATED", "PERMISSION_DENIED",
})  # fmt: skip
_INSIDE: Final = re.compile(
    r"Traceback|Exception|object at 0x|<class |\b[a-z_]+(\.\w+)*\.\w*Error\b|\.py\b"
    r"|(?<![\w/])/(\w[\w.-]*/)+\w"
)
"""What the sender of a request has no business to see; no text that is sent here matches it."""


@dataclass(frozen=True)
class Method:
    """A method of the server and what it takes and gives."""

    path: str
    request: type[Message]
    response: type[Message]
    weight: float = 1.0
    is_stream: bool = False

    @property
    def is_recogniser(self) -> bool:
        """Whether it takes audio."""
        return self.path.endswith("Recognize")


_LONG_RUNNING: Final = "/google.cloud.speech.v1.Speech/LongRunningRecognize"
_OPERATIONS: Final = "/google.longrunning.Operations"
_METHODS: Final = (
    Method("/voxgate.v1.Speech/Recognize", voxgate.RecognizeRequest, voxgate.RecognizeResponse, 8),
    Method(
        "/voxgate.v1.Speech/StreamingRecognize",
        voxgate.StreamingRecognizeRequest,
        voxgate.StreamingRecognizeResponse,
        8,
        is_stream=True,
    ),
    Method("/voxgate.v1.Speech/ListModels", voxgate.ListModelsRequest, voxgate.ListModelsResponse),
    Method(
        "/voxgate.v1.Speech/ReloadModels", voxgate.ReloadModelsRequest, voxgate.ReloadModelsResponse
    ),
    Method("/voxgate.v1.Speech/Understand", Empty, Empty, 0.2),  # no such method
    Method(
        "/nvidia.riva.asr.RivaSpeechRecognition/Recognize",
        riva.RecognizeRequest,
        riva.RecognizeResponse,
        6,
    ),
    Method(
        "/nvidia.riva.asr.RivaSpeechRecognition/StreamingRecognize",
        riva.StreamingRecognizeRequest,
        riva.StreamingRecognizeResponse,
        6,
        is_stream=True,
    ),
    Method(
        "/nvidia.riva.asr.RivaSpeechRecognition/GetRivaSpeechRecognitionConfig",
        riva.RivaSpeechRecognitionConfigRequest,
        riva.RivaSpeechRecognitionConfigResponse,
    ),
    Method(
        "/google.cloud.speech.v1.Speech/Recognize",
        google.RecognizeRequest,
        google.RecognizeResponse,
        6,
    ),
    Method(
        "/google.cloud.speech.v1.Speech/StreamingRecognize",
        google.StreamingRecognizeRequest,
        google.StreamingRecognizeResponse,
        6,
        is_stream=True,
    ),
    Method(_LONG_RUNNING, google.LongRunningRecognizeRequest, operations_pb2.Operation, 2),
    Method(
        f"{_OPERATIONS}/GetOperation", operations_pb2.GetOperationRequest, operations_pb2.Operation
    ),
    Method(
        f"{_OPERATIONS}/ListOperations",
        operations_pb2.ListOperationsRequest,
        operations_pb2.ListOperationsResponse,
    ),
    Method(
        f"{_OPERATIONS}/WaitOperation",
        operations_pb2.WaitOperationRequest,
        operations_pb2.Operation,
    ),
    Method(f"{_OPERATIONS}/CancelOperation", operations_pb2.CancelOperationRequest, Empty),
    Method(f"{_OPERATIONS}/DeleteOperation", operations_pb2.DeleteOperationRequest, Empty),
)


@dataclass(frozen=True)
class Case:
    """One call, as bytes."""

    number: int
    method: Method
    kind: str
    """How it was made."""
    requests: tuple[bytes, ...]
    metadata: tuple[tuple[str, str | bytes], ...] = ()


@dataclass(frozen=True)
class Recordings:
    """What cases are made of."""

    clips: Mapping[str, bytes]
    """A second of speech in every format."""
    bombs: Mapping[str, bytes]
    """Small files that hold, or claim to hold, very much."""


@dataclass(frozen=True)
class Outcome:
    """How a call ended."""

    case: Case
    code: str
    """Name of its status."""
    details: str
    seconds: float
    answers: tuple[bytes, ...] = ()
    operation_code: int = Code.OK
    """Of the operation that it began."""


@dataclass(frozen=True)
class Failure:
    """An outcome that should not be."""

    outcome: Outcome
    complaint: str


def make_recordings(examples: Path = EXAMPLES, *, bomb_s: float = _BOMB_S) -> Recordings:
    """Clips in every format, and bombs of `bomb_s` seconds of silence."""
    paths = sorted(examples.glob("*.mp3"))
    speech = [load_audio(path, target_rate=_SAMPLE_RATE)[:_SAMPLE_RATE] for path in paths[:2]]
    clips = {"mp3 example": min((path.read_bytes() for path in paths), key=len)}
    for file_format, subtype in (
        ("WAV", "PCM_16"), ("WAV", "PCM_U8"), ("WAV", "PCM_24"), ("WAV", "FLOAT"),
        ("WAV", "DOUBLE"), ("WAV", "ULAW"), ("WAV", "IMA_ADPCM"), ("WAV", "GSM610"),
        ("WAVEX", "PCM_16"), ("RF64", "PCM_16"), ("FLAC", "PCM_16"), ("FLAC", "PCM_24"),
        ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"), ("AIFF", "PCM_16"),
    ):  # fmt: skip
        clips[f"{file_format} {subtype}"] = _encode(speech[0], file_format, subtype)
    stereo = np.stack([w[: min(map(len, speech))] for w in speech], axis=1)
    clips["WAV stereo"] = _encode(stereo, "WAV", "PCM_16")
    clips["FLAC stereo"] = _encode(stereo, "FLAC", "PCM_16")
    clips["raw"] = to_pcm(speech[1])
    clips["raw mu-law"] = _encode(speech[1][::2], "RAW", "ULAW")
    clips["raw silence"] = bytes(2 * _SAMPLE_RATE)
    silence = np.zeros(round(bomb_s * 8000), np.int16)
    bombs = {
        "FLAC of silence": _encode(silence, "FLAC", "PCM_16", sample_rate=8000),
        "Ogg of silence": _encode(silence, "OGG", "OPUS", sample_rate=8000),
        "FLAC of 8 channels": _encode(
            np.zeros((len(silence) // 8, 8), np.int16), "FLAC", "PCM_16", sample_rate=192_000
        ),
    }
    bombs["FLAC of unknown length"] = _without_length(bombs["FLAC of silence"])
    wav = clips["WAV PCM_16"]
    bombs["WAV that claims 2 GB"] = wav[:40] + b"\xf0\xff\xff\x7f" + wav[44:]
    return Recordings(clips, bombs)


def _encode(
    samples: np.ndarray[Any, Any], file_format: str, subtype: str, sample_rate: int = _SAMPLE_RATE
) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, sample_rate, format=file_format, subtype=subtype)
    return buffer.getvalue()


def _without_length(flac: bytes) -> bytes:
    """A FLAC whose header has 0 for the number of samples: 36 bits in bytes 21 to 25."""
    return flac[:21] + bytes([flac[21] & 0xF0]) + bytes(4) + flac[26:]


def make_case(number: int, *, seed: int, recordings: Recordings) -> Case:
    """Case `number` of a seed."""
    draw = Random(f"{seed}/{number}")
    method = draw.choices(_METHODS, [method.weight for method in _METHODS])[0]
    makers = dict(_MAKERS if method.is_recogniser else _PLAIN_MAKERS)
    if method.is_stream:
        makers |= _STREAM_MAKERS
    kind = draw.choice(list(makers))
    requests = makers[kind](method, draw, recordings)
    return Case(number, method, kind, tuple(requests), _metadata(draw))


def _metadata(draw: Random) -> tuple[tuple[str, str | bytes], ...]:
    if draw.random() > 0.05:
        return ()
    return draw.choice(
        (
            (("x-request-id", "i" * 2_000),),
            (("x-request-id", "{} %s"),),
            (("x-request-id-bin", bytes(range(256))),),
            (("authorization", "Bearer " + "k" * 500), ("x-api-key", "%n")),
            tuple((f"key-{number}", "value") for number in range(50)),
        )
    )


Maker = Callable[[Method, Random, Recordings], Iterable[bytes]]


def _random_bytes(method: Method, draw: Random, _: Recordings) -> Iterator[bytes]:
    n_messages = draw.randint(1, 4) if method.is_stream else 1
    for _number in range(n_messages):
        yield draw.randbytes(draw.choice((0, 1, 2, 7, 50, 300, 4_000, 100_000)))


def _damaged_message(method: Method, draw: Random, recordings: Recordings) -> list[bytes]:
    requests = [m.SerializeToString() for m in _plausible(method, draw, recordings)]
    place = draw.randrange(len(requests))
    data = requests[place]
    near = len(data) if draw.random() < 0.3 else min(len(data), 64)  # where the fields are
    requests[place] = _damage(data, draw, near)
    return requests


def _random_fields(method: Method, draw: Random, recordings: Recordings) -> list[bytes]:
    messages = _plausible(method, draw, recordings)
    for _ in range(draw.choice((1, 1, 2, 5))):
        scramble(draw.choice(messages), draw, recordings)
    return [m.SerializeToString() for m in messages]


def _wrong_claims(method: Method, draw: Random, recordings: Recordings) -> list[bytes]:
    messages = _plausible(method, draw, recordings)
    config = _config_of(messages[0])
    config.encoding = draw.choice((0, 1, 2, 3, 4, 5, 6, 8, 10, 20, 99, -1))
    config.sample_rate_hertz = draw.choice((0, 0, 1, 3_999, 8_000, 44_100, 384_000, -1, 2**31 - 1))
    config.audio_channel_count = draw.choice((0, 1, 2, 7, 32, 33, -2, 2**31 - 1))
    config.enable_separate_recognition_per_channel = draw.random() < 0.5
    return [m.SerializeToString() for m in messages]


def _damaged_audio(method: Method, draw: Random, recordings: Recordings) -> list[bytes]:
    audio = _strange_audio(draw, recordings)
    return [m.SerializeToString() for m in _plausible(method, draw, recordings, audio)]


def _bomb(method: Method, draw: Random, recordings: Recordings) -> list[bytes]:
    if draw.random() < 0.9:  # a few of them are enough
        return _damaged_audio(method, draw, recordings)
    audio = draw.choice(list(recordings.bombs.values()))
    messages = _plausible(method, draw, recordings, audio)
    if hasattr(_config_of(messages[0]), "decoder"):
        _config_of(messages[0]).decoder = voxgate.RecognitionConfig.GREEDY
    return [m.SerializeToString() for m in messages]


def _wrong_order(method: Method, draw: Random, recordings: Recordings) -> list[bytes]:
    first, *audio = (m.SerializeToString() for m in _plausible(method, draw, recordings))
    empty = method.request().SerializeToString()
    return draw.choice((
        [], [first], audio, [*audio, first], [first, first, *audio], [first, *audio, first],
        [first, *audio, empty], [empty, first, *audio], [first, empty],
        [first, audio[0][: len(audio[0]) // 2], *audio], [first, draw.randbytes(40), *audio],
    ))  # fmt: skip


def _utterance_ends(method: Method, draw: Random, recordings: Recordings) -> list[bytes]:
    """Ends of utterances between any pieces, and pieces without a byte."""
    first, *audio = (m.SerializeToString() for m in _plausible(method, draw, recordings))
    odd = [method.request(audio_content=b"").SerializeToString()]
    if "end_utterance" in method.request.DESCRIPTOR.fields_by_name:
        odd.append(voxgate.StreamingRecognizeRequest(end_utterance={}).SerializeToString())
    for _ in range(draw.randint(1, 6)):
        audio.insert(draw.randint(0, len(audio)), draw.choice(odd))
    return [first, *audio]


_PLAIN_MAKERS: Final[Mapping[str, Maker]] = {
    "random bytes": _random_bytes,
    "damaged message": _damaged_message,
    "random fields": _random_fields,
}
_MAKERS: Final[Mapping[str, Maker]] = {
    **_PLAIN_MAKERS,
    "wrong claims": _wrong_claims,
    "damaged audio": _damaged_audio,
    "bomb": _bomb,
}
_STREAM_MAKERS: Final[Mapping[str, Maker]] = {
    "wrong order": _wrong_order,
    "ends of utterances": _utterance_ends,
}


def _plausible(
    method: Method, draw: Random, recordings: Recordings, audio: bytes | None = None
) -> list[Any]:
    """The messages of a call that could well be meant."""
    if not method.is_recogniser:
        message = method.request()
        for field in message.DESCRIPTOR.fields:
            if field.type == FieldDescriptor.TYPE_STRING:
                setattr(message, field.name, draw.choice(("", "en-small", draw.randbytes(8).hex())))
        return [message]
    if audio is None:
        audio = draw.choice(list(recordings.clips.values()))
    if not method.is_stream:
        request: Any = method.request()
        if isinstance(request, riva.RecognizeRequest):
            request.audio = audio
        else:
            request.audio.content = audio
        _fill(request.config, draw)
        return [request]
    first: Any = method.request()
    first.streaming_config.interim_results = draw.random() < 0.5
    _fill(first.streaming_config.config, draw)
    size = draw.choice((100, 999, 3_200, 10_000, 1 << 20))
    size = max(size, len(audio) // 100)
    pieces = [audio[start : start + size] for start in range(0, len(audio), size)] or [b""]
    make: Any = method.request
    return [first, *(make(audio_content=piece) for piece in pieces)]


def _fill(config: Any, draw: Random) -> None:  # noqa: ANN401  # of any of the APIs
    config.language_code = draw.choice(("", "en-US", "en"))
    config.max_alternatives = draw.choice((0, 1, 3))
    if hasattr(config, "decoder"):
        config.decoder = draw.choice((0, 1, 2))


def _config_of(message: Any) -> Any:  # noqa: ANN401  # of any of the APIs
    is_stream = "streaming_config" in message.DESCRIPTOR.fields_by_name
    return message.streaming_config.config if is_stream else message.config


def _damage(data: bytes, draw: Random, near: int) -> bytes:
    """Flip, cut, repeat, insert bytes within the first `near`."""
    damaged = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        place = draw.randint(0, max(0, min(near, len(damaged)) - 1))
        size = draw.choice((1, 2, 9, 100))
        what = draw.randrange(5)
        if what == 0 and damaged:
            damaged[place] ^= 1 << draw.randrange(8)
        elif what == 1:
            del damaged[place:]
        elif what == 2:
            damaged[place:place] = damaged[place : place + size] * draw.choice((1, 30))
        elif what == 3:
            damaged[place:place] = draw.randbytes(size)
        else:
            damaged[place : place + size] = bytes([draw.choice((0, 0xFF, 0x7F, 0x80))]) * size
    return bytes(damaged)


def _strange_audio(draw: Random, recordings: Recordings) -> bytes:
    """Bytes that are no audio, or hardly."""
    clips = list(recordings.clips.values())
    noise = draw.randbytes(draw.choice((0, 1, 2, 3, 11, 12, 13, 511, 4_001, 60_001)))
    what = draw.randrange(8)
    if what == 0:
        return noise
    if what == 1:
        heads = (b"RIFF\xff\xff\xff\xffWAVE", b"fLaC", b"OggS", b"ID3\x04", b"\xff\xfb\x90\x64")
        return draw.choice(heads) + noise
    if what == 2:
        clip = draw.choice(clips)
        return clip[: draw.choice((12, 44, 58, 100, 300))] + noise
    if what == 3:
        clip = draw.choice(clips)
        return clip[: draw.randint(0, len(clip))]
    if what == 4:
        return draw.choice(clips) + draw.choice(clips)
    if what == 5:
        return _lying_wav(draw, recordings)
    if what == 6:
        numbers = np.array([math.nan, math.inf, -1e38, 3e5, 0.0], "<f4")
        wav = recordings.clips["WAV FLOAT"]
        odd: bytes = numbers[draw.randrange(5)].tobytes()
        return wav[:100] + odd * draw.choice((1, 2000)) + wav[100:]
    return _damage(draw.choice(clips), draw, draw.choice((64, 64, 1 << 20)))


def _lying_wav(draw: Random, recordings: Recordings) -> bytes:
    """A WAV whose header has one number that is not true."""
    wav = bytearray(recordings.clips["WAV PCM_16"])
    place, size = draw.choice(
        ((4, 4), (16, 4), (20, 2), (22, 2), (24, 4), (32, 2), (34, 2), (40, 4))
    )
    number = draw.choice((0, 1, 2, 3, 17, 33, 255, 65_535, 2**31 - 1, 2**31, 2**32 - 1))
    wav[place : place + size] = number.to_bytes(4, "little")[:size]
    return bytes(wav)


def scramble(message: Any, draw: Random, recordings: Recordings) -> None:  # noqa: ANN401
    """Give one field of a message, or of one inside it, an absurd value."""
    fields = list(message.DESCRIPTOR.fields)
    if not fields:
        return
    field = draw.choice(fields)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        for _ in range(draw.choice((1, 200))):
            getattr(message, field.name)[_absurd_text(draw)[:1_000]] = _absurd_text(draw)
    elif field.is_repeated and field.message_type is not None:
        for _ in range(draw.choice((1, 3))):
            scramble(getattr(message, field.name).add(), draw, recordings)
    elif field.is_repeated:
        values = getattr(message, field.name)
        if field.name == "phrases" and draw.random() < 0.3:
            values.extend(f"phrase {number}" for number in range(6_000))
        else:
            values.extend(_absurd(field, draw, recordings) for _ in range(draw.choice((1, 5))))
    elif field.message_type is not None:
        inner = getattr(message, field.name)
        inner.SetInParent()
        scramble(inner, draw, recordings)
    else:
        setattr(message, field.name, _absurd(field, draw, recordings))


_BITS: Final = {
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1),
}


def _absurd(field: FieldDescriptor, draw: Random, recordings: Recordings) -> Any:  # noqa: ANN401
    """A value that a field of this type can have and hardly should."""
    if field.type == FieldDescriptor.TYPE_STRING:
        return _absurd_text(draw)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return _strange_audio(draw, recordings)
    if field.type == FieldDescriptor.TYPE_BOOL:
        return True
    if field.type == FieldDescriptor.TYPE_ENUM:
        return draw.choice((-1, 0, 1, 2, 3, 5, 7, 8, 9, 21, 99, 2**31 - 1, -(2**31)))
    if field.type in (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE):
        odd = (math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-45, -0.0, 100.0, -100.0, 0.5)
        return draw.choice(odd)
    lowest, highest = _BITS[field.type]
    wanted = draw.choice((lowest, highest, -1, 0, 1, 2, 31, 999_999_999, draw.randint(-99, 99_999)))
    return min(max(wanted, lowest), highest)


def _absurd_text(draw: Random) -> str:
    return draw.choice((
        "", " ", "\0", "\n\r\t", "en-small", "en-US", "xx-XX", "de", "default", "fast", "offline",
        "../../etc", "%s%n{0}", "'\"; --", "e\u0301\u0302" * 50, "\u202eright to left",
        "\U0001f600" * 9, "\ufffe\uffff", "9" * 5_000, "\u0669" * 20, "-1", "1e999", "a" * 20_000,
        "a b " * 5_000, "\u4e2d" * 7_000, "'" * 30, "don't", "naïve café", "ß" * 40,
        "".join(chr(draw.randint(1, 0xD7FF)) for _ in range(draw.choice((3, 60)))),
    ))  # fmt: skip


class Prober:
    """Sends cases to a server; use it from one thread at a time."""

    def __init__(self, address: str) -> None:
        unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        self._channel = grpc.insecure_channel(address, options=unlimited)

    def __enter__(self) -> Prober:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def send(self, case: Case) -> Outcome:
        """Make the call; where it began an operation, see that one end, too."""
        start = time.monotonic()
        answers: list[bytes] = []
        code, details, operation_code = "OK", "", int(Code.OK)
        try:
            if case.method.is_stream:
                call = self._channel.stream_stream(case.method.path)
                answers += call(iter(case.requests), timeout=DEADLINE_S, metadata=case.metadata)
            else:
                answers.append(self._ask(case.method.path, case.requests[0], case.metadata))
            if case.method.path == _LONG_RUNNING:
                operation_code = self._follow(answers[0], Random(case.number))
        except grpc.RpcError as error:
            code, details = error.code().name, error.details() or ""
        seconds = time.monotonic() - start
        return Outcome(case, code, details, seconds, tuple(answers), operation_code)

    def _ask(
        self, path: str, request: bytes, metadata: tuple[tuple[str, str | bytes], ...] = ()
    ) -> bytes:
        call = self._channel.unary_unary(path)
        answer: bytes = call(request, timeout=DEADLINE_S, metadata=metadata)
        return answer

    def _follow(self, answer: bytes, draw: Random) -> int:
        """The code with which an operation ended; a few are cancelled, a few deleted."""
        name = operations_pb2.Operation.FromString(answer).name
        if draw.random() < 0.3:
            cancel = operations_pb2.CancelOperationRequest(name=name)
            self._ask(f"{_OPERATIONS}/CancelOperation", cancel.SerializeToString())
        wait = operations_pb2.WaitOperationRequest(name=name, timeout={"seconds": _OPERATION_S})
        found = self._ask(f"{_OPERATIONS}/WaitOperation", wait.SerializeToString())
        if draw.random() < 0.5:
            delete = operations_pb2.DeleteOperationRequest(name=name)
            self._ask(f"{_OPERATIONS}/DeleteOperation", delete.SerializeToString())
        operation = operations_pb2.Operation.FromString(found)
        return int(operation.error.code) if operation.done else int(Code.DEADLINE_EXCEEDED)


def find_complaint(outcome: Outcome) -> str | None:
    """What is wrong with an outcome; None if nothing is."""
    if outcome.code not in _ALLOWED:
        return f"ended {outcome.code}"
    if _INSIDE.search(outcome.details):
        return "its details show the inside"
    if "metadata size" in outcome.details:
        return "its details are longer than a client takes"
    operation = Code.Name(outcome.operation_code)
    if operation not in (*_ALLOWED, "CANCELLED"):
        return f"its operation ended {operation}"
    try:
        answers = [outcome.case.method.response.FromString(answer) for answer in outcome.answers]
    except DecodeError:
        return "its answer cannot be read"
    if not all(map(_is_finite, answers)):
        return "its answer has a number that is none"
    return None


def _is_finite(message: Message) -> bool:
    for field, value in message.ListFields():
        values = value if field.is_repeated else [value]
        for item in values:
            if isinstance(item, Message) and not _is_finite(item):
                return False
            if isinstance(item, float) and not math.isfinite(item):
                return False
    return True


def probe(
    address: str, cases: Iterable[Case], *, is_alive: Callable[[], bool] = lambda: True
) -> tuple[list[Outcome], list[Failure]]:
    """Send cases from several threads, until they are through or the server is gone.

    Args:
        address: `host:port` of the server.
        cases: what to send.
        is_alive: whether the server's process runs.

    Returns:
        All outcomes, and those that should not be.
    """
    outcomes: list[Outcome] = []
    failures: list[Failure] = []
    waiting, lock = iter(cases), threading.Lock()
    has_ended = threading.Event()

    def work() -> None:
        with Prober(address) as prober:
            while not has_ended.is_set():
                with lock:
                    case = next(waiting, None)
                if case is None:
                    return
                outcome = prober.send(case)
                complaint = find_complaint(outcome)
                with lock:
                    outcomes.append(outcome)
                    if complaint:
                        failures.append(Failure(outcome, complaint))

    with ThreadPoolExecutor(N_THREADS) as threads:
        futures = [threads.submit(work) for _ in range(N_THREADS)]
        while wait(futures, timeout=_HEALTH_EVERY_S).not_done and not has_ended.is_set():
            if not (is_alive() and check_health(address)):
                has_ended.set()  # no use to go on
        for future in futures:
            future.result()
    if has_ended.is_set() or not check_health(address):
        failures.append(Failure(outcomes[-1], "the server does not serve any more"))
    return outcomes, sorted(failures, key=lambda failure: failure.outcome.case.number)


@contextmanager
def _started_server() -> Iterator[tuple[str, Callable[[], bool], Path]]:
    """A server of our own: its address, whether it runs, and its log."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [sys.executable, "-m", "service.cli", "serve", "--port", "0", *_SERVER_LIMITS]
        with log.open("w") as writer, subprocess.Popen(command, stderr=writer) as process:
            try:
                while not (found := re.search(r"^listening on (\S+:\d+)", log.read_text(), re.M)):
                    assert process.poll() is None, log.read_text()
                    time.sleep(0.1)
                yield found[1], lambda: process.poll() is None, log
            finally:
                process.terminate()


def describe(outcomes: Iterable[Outcome]) -> str:
    """Statuses by method, as a table."""
    counts = Counter((outcome.case.method.path.strip("/"), outcome.code) for outcome in outcomes)
    codes = sorted({code for _, code in counts})
    width = max(len(path) for path, _ in counts)
    lines = [f"{'method':{width}}  " + "  ".join(codes)]
    for path in sorted({path for path, _ in counts}):
        numbers = (f"{counts[path, code]:>{len(code)}}" for code in codes)
        lines.append(f"{path:{width}}  " + "  ".join(numbers))
    totals = (
        f"{sum(n for (_, c), n in counts.items() if c == code):>{len(code)}}" for code in codes
    )
    return "\n".join([*lines, f"{'all':{width}}  " + "  ".join(totals)])


def main() -> None:
    """Send, count, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--address", help="of a running server; its limits are its own")
    parser.add_argument("--only", type=int, help="send this case alone")
    arguments = parser.parse_args()
    numbers = range(arguments.messages) if arguments.only is None else [arguments.only]
    recordings = make_recordings()
    cases = (make_case(n, seed=arguments.seed, recordings=recordings) for n in numbers)
    start = time.monotonic()
    if arguments.address:
        outcomes, failures = probe(arguments.address, cases)
    else:
        with _started_server() as (address, is_alive, log):
            outcomes, failures = probe(address, cases, is_alive=is_alive)
            if failures:
                print(_errors_of(log))
    seconds = time.monotonic() - start
    slowest = max(outcomes, key=lambda outcome: outcome.seconds)
    print(describe(outcomes))
    print(f"{len(outcomes)} calls in {seconds:.0f} s; the longest took {slowest.seconds:.1f} s ")
    print(f"(case {slowest.case.number}, {slowest.case.method.path}, {slowest.case.kind})")
    print(f"{len(failures)} failures, seed {arguments.seed}")
    for failure in failures[:_MOST_SHOWN]:
        case = failure.outcome.case
        print(f"--only {case.number}: {failure.complaint}: {case.method.path} ({case.kind}), ")
        print(f"  {failure.outcome.seconds:.1f} s, {failure.outcome.details[:300]!r}")
    sys.exit(1 if failures else 0)


def _errors_of(log: Path) -> str:
    """The last lines of a log, without those that say what was taken."""
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join([line for line in lines if not line.startswith("/")][-200:])


if __name__ == "__main__":
    main()
