"""Audio: bytes of any supported format in, float32 at the model's rate out.

Raw PCM and G.711, and WAV of either, are decoded as they arrive; FLAC, Ogg (Opus, Vorbis), mp3 and
other WAV encodings are collected and decoded by libsndfile when they are complete. Channels are
averaged, unless they are wanted apart, then resampled by soxr. However the bytes are cut, the
samples are the same.
"""

from __future__ import annotations

import io
import logging
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import chain
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from service.errors import AudioError, InputError, RequestError

logger = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.float32]
OnShortage = Callable[[float], object]
"""Gets the seconds of audio that a header promised and that did not come."""

AUDIO_EXTENSIONS: Final = frozenset({".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3"})
DEFAULT_SAMPLE_RATE: Final = 16_000
TELEPHONE_RATE: Final = 8_000
LOWEST_RATE: Final = 4_000
HIGHEST_RATE: Final = 384_000
MOST_CHANNELS: Final = 32

_PIECE_BYTES: Final = 1 << 20
_BLOCK_FRAMES: Final = 1 << 18
_BLOCK_SAMPLES: Final = 1 << 23  # of all channels together
_SNIFF_BYTES: Final = 12
_LOUDEST: Final = 1e6  # float samples beyond are no audio, and could overflow in what follows
_TEXT_BYTES: Final = 512
_LARGEST_SAMPLE: Final = 32_767
_LONGEST_HEADER_BYTES: Final = 1 << 20
_SHORTAGE_S: Final = 0.1


class Encoding(Enum):
    """How audio bytes are encoded."""

    LINEAR16 = "LINEAR16"
    MULAW = "MULAW"
    ALAW = "ALAW"
    WAV = "WAV"
    FLAC = "FLAC"
    OGG = "OGG_OPUS"
    MP3 = "MP3"


@dataclass(frozen=True)
class AudioFormat:
    """What a sender says about its audio; None leaves it to the header, or to the default."""

    encoding: Encoding | None = None
    """None: from the header; without a header, 16-bit little-endian PCM."""
    sample_rate: int | None = None
    """Samples a second and channel, Hz; without a header 16,000 by default, of G.711 8,000."""
    n_channels: int | None = None
    """Interleaved channels; without a header the default is 1."""
    header_required: bool = False
    """Whether bytes without a known header are an error rather than raw samples (files)."""


class AudioStream:
    """Turns the bytes of one recording into samples, piece by piece.

    Args:
        audio_format: what the sender says of it.
        target_rate: rate of the samples returned, Hz.
        separate_channels: whether channels are resampled each on its own and come as
            (time, channel), rather than averaged, as (time,). What is returned before `n_channels`
            is known is empty and of shape (0, 1).
        longest_s: seconds of audio beyond which a recording is refused; None for no limit.
        most_collected_bytes: bytes of compressed audio, which is kept until it is complete, beyond
            which a recording is refused; None for no limit.
    """

    def __init__(
        self,
        audio_format: AudioFormat,
        *,
        target_rate: int,
        separate_channels: bool = False,
        longest_s: float | None = None,
        most_collected_bytes: int | None = None,
    ) -> None:
        self._format = audio_format
        self._target_rate = target_rate
        self._separate_channels = separate_channels
        self._longest_s = longest_s
        self._most_collected_bytes = most_collected_bytes
        self._head = b""
        self._reader: _Reader | None = None
        self._resampler: _Resampler | None = None
        self._n_frames = 0
        self._n_samples = 0
        self.n_bytes = 0
        """Bytes received so far."""

    @property
    def n_channels(self) -> int | None:
        """Channels of the recording; None while that is not known."""
        reader = self._reader
        return reader.n_channels if reader is not None and reader.is_open else None

    @property
    def shortage_s(self) -> float:
        """At the end: audio that the header promised and that did not come, seconds."""
        return self._reader.shortage_s if self._reader is not None else 0.0

    def push(self, data: bytes) -> FloatArray:
        """Take the next bytes; return the samples they complete, float32.

        Returns:
            (time,), or (time, channel) where channels are separate.

        Raises:
            AudioError: the bytes are no audio, broken, or longer than the limit.
            RequestError: they contradict what the sender said of them.
        """
        self.n_bytes += len(data)
        if self._reader is None:
            self._head += data
            self._reader = _open_reader(self._head, self._format, is_complete=False)
            if self._reader is None:
                return self._nothing()
            data, self._head = self._head, b""
        most = self._most_collected_bytes
        if most is not None and self.n_bytes > most and isinstance(self._reader, _ContainerReader):
            raise AudioError(
                f"the compressed audio has more than {most} bytes, and is decoded only when it is "
                "complete; send PCM, or a recording instead of a stream"
            )
        return self._count(self._convert(self._reader, self._reader.push(data), is_last=False))

    def finish(self) -> FloatArray:
        """Say that the recording is complete; return the remaining samples, as `push` does.

        Raises:
            AudioError: what arrived is no audio, broken, or longer than the limit.
            RequestError: it contradicts what the sender said of it.
        """
        blocks = [block for block in self.drain() if len(block) > 0]
        return np.concatenate([self._nothing(), *blocks])

    def drain(self) -> Iterator[FloatArray]:
        """`finish` in blocks, so that a long compressed recording is never whole in memory."""
        if self._reader is None:
            self._reader = _open_reader(self._head, self._format, is_complete=True)
            if self._reader is None:
                return
            yield self._count(
                self._convert(self._reader, self._reader.push(self._head), is_last=False)
            )
        for frames in self._reader.finish():
            yield self._count(self._convert(self._reader, frames, is_last=False))
        nothing = np.zeros((0, self._reader.n_channels), np.float32)
        yield self._count(self._convert(self._reader, nothing, is_last=True))
        if self._n_samples == 0 and self.n_bytes > 0:
            raise AudioError(
                f"the audio is empty: {self.n_bytes} bytes that hold no sample; "
                "expected a recording"
            )

    def _nothing(self) -> FloatArray:
        shape = (0, self.n_channels or 1) if self._separate_channels else (0,)
        return np.zeros(shape, np.float32)

    def _count(self, waveform: FloatArray) -> FloatArray:
        self._n_samples += len(waveform)
        return waveform

    def _convert(self, reader: _Reader, frames: FloatArray, *, is_last: bool) -> FloatArray:
        """Average the channels of (time, channel) frames, if they are to be, and resample them."""
        self._check_length(reader, len(frames))
        if not (np.abs(frames) <= _LOUDEST).all():  # NaN is not either
            raise AudioError(
                "the audio has samples that are not numbers (NaN or infinite) or far too large; "
                "expected values between -1 and 1: repair or re-encode the recording"
            )
        if not self._separate_channels:  # (time, channel) → (time,)
            is_mono = frames.shape[1] == 1
            frames = frames[:, 0] if is_mono else frames.mean(axis=1, dtype=np.float32)
        if self._resampler is None:
            if not reader.is_open:
                return frames
            n_channels = reader.n_channels if self._separate_channels else 1
            self._resampler = _Resampler(reader.sample_rate, self._target_rate, n_channels)
        return self._resampler.push(frames, is_last=is_last)

    def _check_length(self, reader: _Reader, n_new: int) -> None:
        """Count frames before resampling; refuse those beyond the limit."""
        self._n_frames += n_new
        if self._longest_s is None or self._n_frames <= self._longest_s * reader.sample_rate:
            return
        raise AudioError(
            f"the audio is too long: {self._n_frames / reader.sample_rate:.1f} s so far, and the "
            f"limit is {self._longest_s:g} s; cut the recording, or raise the server's limit"
        )


def decode_blocks(
    pieces: Iterable[bytes],
    audio_format: AudioFormat,
    *,
    target_rate: int,
    separate_channels: bool = False,
    longest_s: float | None = None,
    on_shortage: OnShortage = lambda _: None,
) -> Iterator[FloatArray]:
    """Decode a recording block by block.

    Args:
        pieces: of its bytes.
        audio_format: see `AudioStream`, as for all others but the last.
        target_rate: Hz.
        separate_channels: whether channels are kept apart.
        longest_s: seconds of audio beyond which a recording is refused; None for no limit.
        on_shortage: at the end gets the seconds that the header promised and that did not come,
            where they are more than an encoder's padding.

    Yields:
        Samples at `target_rate`, at least one in each block: mono, float32, (time,), or
        (time, channel) where channels are separate.

    Raises:
        AudioError: the bytes are no audio, broken, hold no sample, or more than the limit.
        RequestError: they contradict what the sender said of them.
    """
    stream = AudioStream(
        audio_format,
        target_rate=target_rate,
        separate_channels=separate_channels,
        longest_s=longest_s,
    )
    pushed = (
        stream.push(piece[start : start + _PIECE_BYTES])  # samples take more memory than bytes
        for piece in pieces
        for start in range(0, len(piece), _PIECE_BYTES)
    )
    yield from (block for block in chain(pushed, stream.drain()) if len(block) > 0)
    if stream.n_bytes == 0:
        raise AudioError("the audio is empty: no bytes at all; expected a recording")
    if stream.shortage_s > _SHORTAGE_S:
        on_shortage(stream.shortage_s)


def duration_hint_s(data: bytes, audio_format: AudioFormat) -> float | None:
    """How long a recording says it is, seconds, without decoding it; None where it does not say.

    Of raw samples it is exact; of compressed ones it is the word of their header.

    Args:
        data: the complete recording.
        audio_format: what the sender says of it.
    """
    try:
        reader = _open_reader(data, audio_format, is_complete=True)
        return reader.duration_hint_s(data) if reader is not None else None
    except (InputError, soundfile.LibsndfileError):
        return None  # decoding it will say what is wrong


class Stopwatch:
    """Measures how much audio passes by."""

    def __init__(self, sample_rate: int) -> None:
        self._sample_rate = sample_rate
        self.seconds = 0.0
        """Audio that has passed, seconds."""

    def measure(self, blocks: Iterable[FloatArray]) -> Iterator[FloatArray]:
        """Hand on blocks of samples as they are."""
        for block in blocks:
            self.seconds += len(block) / self._sample_rate
            yield block


def load_blocks(
    path: Path, *, target_rate: int, on_shortage: OnShortage = lambda _: None
) -> Iterator[FloatArray]:
    """Read a recording block by block: mono samples, float32 (time,), at `target_rate`.

    Args:
        path: the recording.
        target_rate: Hz.
        on_shortage: see `decode_blocks`.

    Raises:
        AudioError: the file cannot be read, is no audio, broken, or holds no sample.
    """
    return decode_blocks(
        _read_pieces(path),
        AudioFormat(header_required=True),
        target_rate=target_rate,
        on_shortage=on_shortage,
    )


def load_audio(path: Path, *, target_rate: int) -> FloatArray:
    """Read a whole recording; see `load_blocks`."""
    try:
        blocks = list(load_blocks(path, target_rate=target_rate))
    except AudioError as error:
        if str(path) in str(error):
            raise
        raise AudioError(f"{path}: {error}") from error
    return np.concatenate([np.zeros(0, np.float32), *blocks])


def _read_pieces(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE_BYTES):
                yield piece
    except OSError as error:
        raise AudioError(f"cannot read {path}: {error.strerror}") from error


def to_pcm(waveform: FloatArray) -> bytes:
    """Samples in [-1, 1] as 16-bit little-endian PCM; louder ones are clipped."""
    return (np.clip(waveform, -1, 1) * _LARGEST_SAMPLE).astype("<i2").tobytes()


def resample(waveform: FloatArray, source_rate: int, target_rate: int) -> FloatArray:
    """Resample a whole recording, sample for sample as a stream of it is.

    Args:
        waveform: mono samples, float32, (time,).
        source_rate: Hz.
        target_rate: Hz.
    """
    return _Resampler(source_rate, target_rate, 1).push(waveform, is_last=True)


class _Reader(Protocol):
    """Decodes bytes to float32 frames of shape (time, channel)."""

    @property
    def is_open(self) -> bool:
        """Whether the sample rate and the channels are known."""
        ...

    @property
    def sample_rate(self) -> int:
        """Hz."""
        ...

    @property
    def n_channels(self) -> int:
        """Channels of each frame."""
        ...

    @property
    def shortage_s(self) -> float:
        """At the end: audio that the header promised and that did not come, seconds."""
        ...

    def push(self, data: bytes) -> FloatArray:
        """Take bytes, return the frames they complete."""
        ...

    def finish(self) -> Iterator[FloatArray]:
        """Return what is left, block by block."""
        ...

    def duration_hint_s(self, data: bytes) -> float | None:
        """Seconds of a whole recording of which nothing was pushed; None if it does not say."""
        ...


class _PcmReader:
    """Interleaved samples of a fixed width, as they arrive; what follows `n_bytes` is ignored."""

    is_open = True

    def __init__(
        self, *, sample_rate: int, n_channels: int, sample_format: str, n_bytes: int | None = None
    ) -> None:
        _check_layout(sample_rate, n_channels)
        self.sample_rate = sample_rate
        self.n_channels = n_channels
        self._sample_format = sample_format
        self._frame_bytes = n_channels * _SAMPLE_BYTES[sample_format]
        self._left = n_bytes
        self._rest = b""

    def push(self, data: bytes) -> FloatArray:
        if self._left is not None:
            data = data[: self._left]
            self._left -= len(data)
        data = self._rest + data
        whole = len(data) - len(data) % self._frame_bytes
        self._rest = data[whole:]
        samples = _to_float(data[:whole], self._sample_format)
        return samples.reshape(-1, self.n_channels)

    def finish(self) -> Iterator[FloatArray]:
        if self._left:
            logger.warning("the WAV ends %d bytes before its header says", self._left)
        if self._rest:
            logger.warning("the audio ends inside a sample: %d bytes left out", len(self._rest))
        return iter(())

    @property
    def shortage_s(self) -> float:
        return self.duration_s(self._left or 0)

    def duration_hint_s(self, data: bytes) -> float | None:
        return self.duration_s(len(data))

    def duration_s(self, n_bytes: int) -> float:
        """Seconds of that many bytes, as far as they hold samples."""
        n_bytes = n_bytes if self._left is None else min(n_bytes, self._left)
        return n_bytes // self._frame_bytes / self.sample_rate


class _WavReader:
    """Skips the header of a WAV of PCM or G.711, then reads its samples as they arrive."""

    def __init__(self, header: _WavHeader) -> None:
        self._pcm = _PcmReader(
            sample_rate=header.sample_rate,
            n_channels=header.n_channels,
            sample_format=header.sample_format,
            n_bytes=header.data_bytes,
        )
        self._to_skip = header.data_start
        self.is_open = True
        self.sample_rate = header.sample_rate
        self.n_channels = header.n_channels

    def push(self, data: bytes) -> FloatArray:
        skipped = min(self._to_skip, len(data))
        self._to_skip -= skipped
        return self._pcm.push(data[skipped:])

    def finish(self) -> Iterator[FloatArray]:
        return self._pcm.finish()

    @property
    def shortage_s(self) -> float:
        return self._pcm.shortage_s

    def duration_hint_s(self, data: bytes) -> float | None:
        return self._pcm.duration_s(len(data) - self._to_skip)


class _ForwardFile(soundfile.SoundFile):  # type: ignore[misc]  # soundfile has no types
    """Reads on from block to block.

    soundfile seeks after each block of what can be sought, which fails in a FLAC of unknown length
    and is heard in an mp3.
    """

    def seekable(self) -> bool:
        return False


class _ContainerReader:
    """Collects a compressed file and lets libsndfile decode it once it is complete."""

    def __init__(self, encoding: Encoding, audio_format: AudioFormat) -> None:
        self._encoding = encoding
        self._name = encoding.value
        self._format = audio_format
        self._data = io.BytesIO()
        self.is_open = False
        self.sample_rate = 0
        self.n_channels = 1
        self.shortage_s = 0.0

    def push(self, data: bytes) -> FloatArray:
        self._data.write(data)
        return np.zeros((0, 1), np.float32)

    def finish(self) -> Iterator[FloatArray]:
        self._data.seek(0)
        try:
            with _ForwardFile(self._data) as file:
                _check_layout(file.samplerate, file.channels)
                _check_claims(self._format, self._name, file.samplerate, file.channels)
                self.sample_rate, self.n_channels = file.samplerate, file.channels
                self.is_open = True
                n_frames = min(_BLOCK_FRAMES, _BLOCK_SAMPLES // file.channels)
                n_missing = self._promised_frames(file, self._data.getbuffer().nbytes) or 0
                while True:
                    block = file.read(n_frames, dtype="float32", always_2d=True)
                    n_missing -= len(block)
                    yield block
                    if len(block) < n_frames:  # not file.blocks(): it trusts the header
                        break
                self.shortage_s = max(0, n_missing) / file.samplerate
        except soundfile.LibsndfileError as error:
            raise AudioError(
                f"the {self._name} audio cannot be decoded ({error.error_string.strip()}); "
                "it may be cut off or damaged: encode it again"
            ) from error

    def duration_hint_s(self, data: bytes) -> float | None:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            _check_layout(file.samplerate, file.channels)
            n_frames = self._promised_frames(file, len(data))
            return None if n_frames is None else n_frames / file.samplerate

    def _promised_frames(self, file: soundfile.SoundFile, n_bytes: int) -> int | None:
        """Frames by the header; None where it does not say, which libsndfile reads as very many."""
        most_frames = _MOST_FRAMES_A_BYTE[self._encoding] * n_bytes
        return file.frames if 0 <= file.frames <= most_frames else None


_MOST_FRAMES_A_BYTE: Final = {
    Encoding.WAV: 16,  # half a bit a sample, which no encoding of a WAV reaches
    Encoding.FLAC: 65_535 // 12,  # one frame of silence
    Encoding.OGG: 8_192 // 2,  # a packet of one byte, which takes another in the page's header
    Encoding.MP3: 576 // 24,  # 8 kbit/s at 24 kHz
}


class _Resampler:
    """soxr in its streaming form, or nothing where the rates agree.

    Takes and gives (time,) samples, or (time, channel) ones of any number of channels.
    """

    def __init__(self, source_rate: int, target_rate: int, n_channels: int) -> None:
        self._stream = (
            soxr.ResampleStream(source_rate, target_rate, n_channels, dtype="float32", quality="HQ")
            if source_rate != target_rate
            else None
        )

    def push(self, waveform: FloatArray, *, is_last: bool) -> FloatArray:
        if self._stream is None:
            return waveform
        resampled: FloatArray = self._stream.resample_chunk(waveform, last=is_last)
        return resampled


@dataclass(frozen=True)
class _WavHeader:
    sample_rate: int
    n_channels: int
    sample_format: str
    """Key of `_SAMPLE_BYTES`."""
    data_start: int
    """Offset of the first sample, bytes."""
    data_bytes: int | None
    """Length of the samples; None where the header leaves it open (a stream)."""


_SAMPLE_BYTES: Final = {
    "u1": 1, "mulaw": 1, "alaw": 1, "<i2": 2, "<i3": 3, "<i4": 4, "<f4": 4, "<f8": 8,
}  # fmt: skip
_HEADERLESS: Final = {
    Encoding.LINEAR16: "<i2",
    Encoding.MULAW: "mulaw",
    Encoding.ALAW: "alaw",
}
_WAV_PCM, _WAV_FLOAT, _WAV_ALAW, _WAV_MULAW, _WAV_EXTENSIBLE = 1, 3, 6, 7, 0xFFFE
_WAV_FORMATS: Final = {
    (_WAV_PCM, 8): "u1",
    (_WAV_PCM, 16): "<i2",
    (_WAV_PCM, 24): "<i3",
    (_WAV_PCM, 32): "<i4",
    (_WAV_FLOAT, 32): "<f4",
    (_WAV_FLOAT, 64): "<f8",
    (_WAV_ALAW, 8): "alaw",
    (_WAV_MULAW, 8): "mulaw",
}
_OPEN_LENGTHS: Final = (0, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def _mulaw_values() -> FloatArray:
    """The sample of each byte, float32, (256,): ITU-T G.711, table 2."""
    code = np.arange(256) ^ 0xFF  # bits are sent inverted
    magnitude = ((2 * (code & 15) + 33) << (code >> 4 & 7)) - 33
    return (np.where(code & 0x80, -magnitude, magnitude) / 2**13).astype(np.float32)


def _alaw_values() -> FloatArray:
    """The sample of each byte, float32, (256,): ITU-T G.711, table 1."""
    code = np.arange(256) ^ 0x55  # every second bit is sent inverted
    segment = code >> 4 & 7
    magnitude = (2 * (code & 15) + np.where(segment, 33, 1)) << np.maximum(segment - 1, 0)
    return (np.where(code & 0x80, magnitude, -magnitude) / 2**12).astype(np.float32)


_G711_VALUES: Final = {"mulaw": _mulaw_values(), "alaw": _alaw_values()}


def _to_float(data: bytes, sample_format: str) -> FloatArray:
    if sample_format in _G711_VALUES:
        return _G711_VALUES[sample_format][np.frombuffer(data, np.uint8)]
    if sample_format == "u1":
        return (np.frombuffer(data, np.uint8).astype(np.float32) - 128) / 128
    if sample_format == "<i3":
        triples = np.frombuffer(data, np.uint8).reshape(-1, 3)
        padded = np.zeros((len(triples), 4), np.uint8)
        padded[:, 1:] = triples
        return (padded.reshape(-1).view("<i4") / 2.0**31).astype(np.float32)
    samples = np.frombuffer(data, sample_format)
    if sample_format in ("<i2", "<i4"):
        return samples.astype(np.float32) * np.float32(2.0 ** (1 - 8 * samples.itemsize))
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite and is refused
        return samples.astype(np.float32)


def _open_reader(head: bytes, said: AudioFormat, *, is_complete: bool) -> _Reader | None:
    """Choose the reader by the first bytes; None while they are too few to tell."""
    if len(head) < _SNIFF_BYTES and not is_complete:
        return None
    found = _sniff(head, is_complete=is_complete)
    if found is _UNDECIDED:
        return None
    if found == Encoding.WAV:
        if said.encoding not in (None, Encoding.WAV, *_HEADERLESS):
            raise _contradiction(said.encoding, "WAV")
        header = _parse_wav_header(head, is_complete=is_complete)
        if header is _UNDECIDED:
            return None
        if said.encoding in (Encoding.MULAW, Encoding.ALAW) and (
            header is None or header.sample_format != _HEADERLESS[said.encoding]
        ):
            raise _contradiction(said.encoding, f"a WAV that is not {said.encoding.value}")
        if header is None:
            return _ContainerReader(Encoding.WAV, said)
        _check_claims(said, "WAV", header.sample_rate, header.n_channels)
        return _WavReader(header)
    if isinstance(found, Encoding):
        if said.encoding not in (None, found):
            raise _contradiction(said.encoding, found.value)
        return _ContainerReader(found, said)
    return _open_headerless(head, said, is_complete=is_complete)


def _open_headerless(head: bytes, said: AudioFormat, *, is_complete: bool) -> _Reader | None:
    if not head:
        return None
    if said.encoding is not None and said.encoding not in _HEADERLESS:
        raise AudioError(
            f"the audio was said to be {said.encoding.value} but begins with {head[:12]!r}, "
            "which is no such header; send the file's bytes from its start, or correct the encoding"
        )
    foreign = _name_foreign(head) if said.encoding is None else None
    if foreign is not None:
        raise AudioError(
            f"the data is {foreign}, which is not decoded here; "
            "convert the recording to WAV, FLAC, Ogg or mp3"
        )
    may_be_text = said.encoding is None and _looks_like_text(head)
    if may_be_text and len(head) < _TEXT_BYTES and not is_complete and not said.header_required:
        return None  # the answer may not depend on how the bytes are cut
    if said.header_required or may_be_text:
        raise AudioError(
            f"the data begins with {head[:12]!r}, which is no header of a WAV, FLAC, Ogg or mp3 "
            "file; convert the recording to one of these"
        )
    sample_format = _HEADERLESS[said.encoding or Encoding.LINEAR16]
    default_rate = TELEPHONE_RATE if sample_format in _G711_VALUES else DEFAULT_SAMPLE_RATE
    return _PcmReader(
        sample_rate=said.sample_rate or default_rate,
        n_channels=said.n_channels or 1,
        sample_format=sample_format,
    )


class _Undecided(Enum):
    UNDECIDED = 0


_UNDECIDED: Final = _Undecided.UNDECIDED


def _sniff(head: bytes, *, is_complete: bool) -> Encoding | _Undecided | None:
    """The encoding a header names; None if there is no header."""
    if head[:4] in (b"RIFF", b"RF64") and b"WAVE".startswith(head[8:12]):
        return Encoding.WAV
    if head[:4] == b"fLaC":
        return Encoding.FLAC
    if head[:4] == b"OggS":
        return Encoding.OGG
    if head[:3] == b"ID3":
        return Encoding.MP3
    frame_bytes = _mp3_frame_bytes(head)
    if frame_bytes is None:
        return None
    if len(head) < frame_bytes + 4:
        return None if is_complete else _UNDECIDED
    return Encoding.MP3 if _mp3_frame_bytes(head[frame_bytes:]) is not None else None


_FOREIGN: Final = (
    (0, b"FORM", "AIFF"),
    (0, b"caff", "CAF"),
    (0, b".snd", "AU"),
    (0, b"RIFX", "big-endian WAV"),
    (0, b"riff", "Wave64"),
    (0, b"#!AMR", "AMR"),
    (0, b"wvpk", "WavPack"),
    (0, b"\x1a\x45\xdf\xa3", "WebM or Matroska"),
    (0, b"\x30\x26\xb2\x75", "WMA"),
    (4, b"ftyp", "MP4 or M4A"),
)


def _name_foreign(head: bytes) -> str | None:
    """The name of a container that is known, but not decoded."""
    for place, magic, name in _FOREIGN:
        if head[place : place + len(magic)] == magic:
            return name
    return None


_MP3_KBITS: Final = {
    3: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),  # MPEG 1
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),  # MPEG 2
    0: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),  # MPEG 2.5
}
_MP3_RATES: Final = {
    3: (44_100, 48_000, 32_000),
    2: (22_050, 24_000, 16_000),
    0: (11_025, 12_000, 8_000),
}


def _mp3_frame_bytes(head: bytes) -> int | None:
    """Length of the layer III frame that begins here; None if none does."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    version, layer = head[1] >> 3 & 3, head[1] >> 1 & 3
    kbits_index, rate_index, padding = head[2] >> 4, head[2] >> 2 & 3, head[2] >> 1 & 1
    if version == 1 or layer != 1 or kbits_index in (0, 15) or rate_index == 3:
        return None
    n_samples = 1152 if version == 3 else 576
    bits = _MP3_KBITS[version][kbits_index] * 1000
    return n_samples // 8 * bits // _MP3_RATES[version][rate_index] + padding


def _parse_wav_header(head: bytes, *, is_complete: bool) -> _WavHeader | _Undecided | None:
    """Read the chunks up to the samples; None for an encoding that libsndfile must decode."""
    layout: tuple[int, int, str] | None = None
    place = 12
    while place + 8 <= len(head):
        name, size = head[place : place + 4], struct.unpack_from("<I", head, place + 4)[0]
        body = place + 8
        if name == b"data":
            if layout is None:
                raise AudioError("the WAV header has no format before its data; encode it again")
            data_bytes = None if size in _OPEN_LENGTHS else size
            return _WavHeader(*layout, data_start=body, data_bytes=data_bytes)
        if name == b"fmt " and body + size <= len(head):
            parsed = _parse_wav_format(head[body : body + size])
            if parsed is None:
                return None
            layout = parsed
        place = body + size + size % 2
        if place > _LONGEST_HEADER_BYTES:
            raise AudioError("the WAV header is longer than 1 MiB; encode the recording again")
    if is_complete:
        raise AudioError(
            f"the WAV is cut off inside its header: {len(head)} bytes and no samples; "
            "copy or encode the recording again"
        )
    return _UNDECIDED


def _parse_wav_format(body: bytes) -> tuple[int, int, str] | None:
    """Sample rate, channels and sample format; None where the samples are not plain numbers."""
    if len(body) < 16:
        raise AudioError(f"the WAV format chunk has {len(body)} bytes, expected at least 16")
    tag, n_channels, sample_rate, _, _, n_bits = struct.unpack_from("<HHIIHH", body)
    if tag == _WAV_EXTENSIBLE and len(body) >= 26:
        tag = struct.unpack_from("<H", body, 24)[0]
    _check_layout(sample_rate, n_channels)
    sample_format = _WAV_FORMATS.get((tag, n_bits))
    return None if sample_format is None else (sample_rate, n_channels, sample_format)


def _check_layout(sample_rate: int, n_channels: int) -> None:
    if not LOWEST_RATE <= sample_rate <= HIGHEST_RATE:
        raise AudioError(
            f"the sample rate is {sample_rate} Hz, expected {LOWEST_RATE} to {HIGHEST_RATE} Hz"
        )
    if not 1 <= n_channels <= MOST_CHANNELS:
        raise AudioError(f"the audio has {n_channels} channels, expected 1 to {MOST_CHANNELS}")


def _check_claims(said: AudioFormat, name: str, sample_rate: int, n_channels: int) -> None:
    """Refuse a sender's rate or channel count that the header contradicts."""
    if said.sample_rate is not None and said.sample_rate != sample_rate:
        raise RequestError(
            f"the request says {said.sample_rate} Hz but the {name} header says {sample_rate} Hz; "
            "leave the sample rate at 0 or correct it"
        )
    if said.n_channels is not None and said.n_channels != n_channels:
        raise RequestError(
            f"the request says {said.n_channels} channels but the {name} header says {n_channels}; "
            "leave the channel count at 0 or correct it"
        )


def _contradiction(said: Encoding | None, found: str) -> RequestError:
    name = "unspecified" if said is None else said.value
    return RequestError(
        f"the request says {name} but the audio has the header of {found}; "
        "leave the encoding unspecified or correct it"
    )


def _looks_like_text(head: bytes) -> bool:
    """Whether all first bytes are printable ASCII or white space, which no PCM audio is."""
    sample = head[:_TEXT_BYTES]
    return all(32 <= byte < 127 or byte in b"\t\n\r" for byte in sample)
