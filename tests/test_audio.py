"""Bytes of every format to samples, whatever the chunks, and an error for whatever is broken."""

from __future__ import annotations

import io
import logging
import struct
import tracemalloc
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import soundfile

from service import audio
from service.audio import (
    AudioFormat,
    AudioStream,
    Encoding,
    Stopwatch,
    decode_blocks,
    duration_hint_s,
    load_audio,
    load_blocks,
    resample,
)
from service.errors import AudioError, InputError, RequestError

FloatArray = npt.NDArray[np.float32]

EXAMPLES = Path(__file__).parent.parent / "examples"
RATE = 16_000
PCM, IEEE_FLOAT, ALAW, MULAW, EXTENSIBLE = 1, 3, 6, 7, 0xFFFE
G711 = [(Encoding.MULAW, "ULAW", MULAW), (Encoding.ALAW, "ALAW", ALAW)]
GUID_TAIL = bytes.fromhex("000000001000800000aa00389b71")


def noise(n_samples: int, *, n_channels: int = 1, seed: int = 0) -> FloatArray:
    """Samples within [-0.5, 0.5], (time, channel)."""
    draws = np.random.default_rng(seed).uniform(-0.5, 0.5, (n_samples, n_channels))
    return draws.astype(np.float32)


def tone(frequency_hz: float, *, sample_rate: int, seconds: float = 1.0) -> FloatArray:
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    return np.asarray(0.5 * np.sin(2 * np.pi * frequency_hz * time), np.float32)


def speech() -> FloatArray:
    samples, sample_rate = soundfile.read(EXAMPLES / "1462-170138-0012.mp3", dtype="float32")
    assert sample_rate == RATE
    return np.asarray(samples, np.float32)


def encode(
    samples: FloatArray, *, container: str, subtype: str | None = None, sample_rate: int = RATE
) -> bytes:
    """A file as libsndfile writes it."""
    file = io.BytesIO()
    soundfile.write(file, samples, sample_rate, format=container, subtype=subtype)
    return file.getvalue()


def libsndfile_decode(data: bytes) -> FloatArray:
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        return np.asarray(file.read(file.frames, dtype="float32"), np.float32)


def pcm16(samples: FloatArray) -> bytes:
    return bytes(np.round(samples * 32768).astype("<i2").tobytes())


def chunk(name: bytes, body: bytes, *, size: int | None = None) -> bytes:
    """A RIFF chunk, padded to an even length; `size` is what it says of its own length."""
    return (
        name + struct.pack("<I", len(body) if size is None else size) + body + bytes(len(body) % 2)
    )


def format_chunk(
    *, tag: int = PCM, n_channels: int = 1, sample_rate: int = RATE, n_bits: int = 16
) -> bytes:
    frame_bytes = n_channels * n_bits // 8
    rates = (sample_rate, sample_rate * frame_bytes % 2**32)
    layout = struct.pack("<HHIIHH", tag, n_channels, *rates, frame_bytes % 2**16, n_bits)
    return chunk(b"fmt ", layout)


def wav(*chunks: bytes) -> bytes:
    body = b"WAVE" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def pcm16_wav(samples: FloatArray, *, n_channels: int = 1, sample_rate: int = RATE) -> bytes:
    layout = format_chunk(n_channels=n_channels, sample_rate=sample_rate)
    return wav(layout, chunk(b"data", pcm16(samples)))


def decode(
    data: bytes, audio_format: AudioFormat | None = None, *, target_rate: int = RATE
) -> FloatArray:
    """A whole recording that is sent in one piece."""
    blocks = decode_blocks([data], audio_format or AudioFormat(), target_rate=target_rate)
    return np.concatenate(list(blocks))


def decode_in_chunks(
    data: bytes,
    lengths: Iterator[int] | list[int],
    audio_format: AudioFormat | None = None,
    *,
    separate_channels: bool = False,
) -> FloatArray:
    """Push pieces of these lengths, then what is left."""
    stream = AudioStream(
        audio_format or AudioFormat(), target_rate=RATE, separate_channels=separate_channels
    )
    blocks = []
    place = 0
    for length in lengths:
        blocks.append(stream.push(data[place : place + length]))
        place += length
    blocks += [stream.push(data[place:]), stream.finish()]
    if separate_channels:
        assert {block.shape[1] for block in blocks if len(block)} <= {stream.n_channels}
        blocks = [block for block in blocks if len(block)] or blocks[-1:]
    return np.concatenate(blocks)


def decode_separately(data: bytes, audio_format: AudioFormat | None = None) -> FloatArray:
    """All channels of a recording, (time, channel)."""
    said = audio_format or AudioFormat()
    blocks = decode_blocks([data], said, target_rate=RATE, separate_channels=True)
    return np.concatenate(list(blocks))


def outcome(
    data: bytes,
    lengths: list[int],
    audio_format: AudioFormat | None = None,
    *,
    separate_channels: bool = False,
) -> str | list[float]:
    """The samples, or the error's class and message."""
    try:
        waveform = decode_in_chunks(
            data, lengths, audio_format, separate_channels=separate_channels
        )
    except InputError as error:
        return f"{type(error).__name__}: {error}"
    assert np.isfinite(waveform).all()
    samples: list[float] = waveform.tolist()
    return samples


def random_lengths(n_bytes: int, *, longest: int, seed: int) -> list[int]:
    """Lengths that sum to at most `n_bytes`, zero among them."""
    lengths = np.random.default_rng(seed).integers(0, longest + 1, 2 * n_bytes // longest)
    return [0, *lengths[np.cumsum(lengths) <= n_bytes].tolist()]


def correlation(a: FloatArray, b: FloatArray) -> float:
    return float(np.corrcoef(a, b)[0, 1])


# --- right answers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("container", "subtype", "tolerance"),
    [
        ("WAV", "PCM_U8", 2**-7),
        ("WAV", "PCM_16", 2**-15),
        ("WAV", "PCM_24", 2**-23),
        ("WAV", "PCM_32", 2**-24),
        ("WAV", "FLOAT", 0),
        ("WAV", "DOUBLE", 0),
        ("WAVEX", "PCM_16", 2**-15),
        ("WAVEX", "PCM_24", 2**-23),
        ("WAVEX", "FLOAT", 0),
        ("RF64", "PCM_16", 2**-15),
        ("FLAC", "PCM_16", 2**-15),
        ("FLAC", "PCM_24", 2**-23),
    ],
)
@pytest.mark.parametrize("n_channels", [1, 2])
def test_decode_gives_the_samples_of_exact_formats(
    container: str, subtype: str, tolerance: float, n_channels: int
) -> None:
    samples = noise(3_001, n_channels=n_channels)
    data = encode(samples, container=container, subtype=subtype)
    decoded = decode(data)
    assert decoded.dtype == np.float32
    np.testing.assert_allclose(decoded, samples.mean(axis=1), rtol=0, atol=tolerance + 1e-7)


@pytest.mark.parametrize(
    ("container", "subtype"), [("OGG", "OPUS"), ("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III")]
)
def test_decode_gives_speech_of_lossy_formats(container: str, subtype: str) -> None:
    samples = speech()
    decoded = decode(encode(samples, container=container, subtype=subtype))
    assert len(decoded) == len(samples)
    assert correlation(decoded, samples) > 0.99


@pytest.mark.parametrize(
    ("subtype", "n_padding"),
    [("ULAW", 0), ("ALAW", 0), ("IMA_ADPCM", 1_100), ("MS_ADPCM", 1_100), ("GSM610", 320)],
)
def test_decode_gives_speech_of_compressed_wav(subtype: str, n_padding: int) -> None:
    samples = speech()
    decoded = decode(encode(samples, container="WAV", subtype=subtype))
    assert len(samples) <= len(decoded) <= len(samples) + n_padding
    assert correlation(decoded[: len(samples)], samples) > 0.98


@pytest.mark.parametrize("seconds", ["1462-170138-0008 6.32", "2428-83699-0019 4.91"])
def test_load_audio_reads_an_example_of_known_length(seconds: str) -> None:
    name, length_s = seconds.split()
    path = EXAMPLES / f"{name}.mp3"
    waveform = load_audio(path, target_rate=RATE)
    assert len(waveform) == round(float(length_s) * RATE)
    np.testing.assert_array_equal(waveform, libsndfile_decode(path.read_bytes()))


def test_decode_reads_raw_pcm_as_16_khz_mono_without_header() -> None:
    decoded = decode(struct.pack("<5h", 0, 1, -1, 32767, -32768))
    np.testing.assert_array_equal(
        decoded, np.array([0, 1, -1, 32767, -32768], np.float32) / np.float32(32768)
    )


def test_decode_reads_raw_pcm_by_what_the_sender_says() -> None:
    said = AudioFormat(encoding=Encoding.LINEAR16, sample_rate=8_000, n_channels=2)
    left = tone(440, sample_rate=8_000)
    data = pcm16(np.stack([left, np.zeros_like(left)], axis=1))
    decoded = decode(data, said)
    assert len(decoded) == RATE
    expected = tone(440, sample_rate=RATE) / 2
    np.testing.assert_allclose(decoded[200:-200], expected[200:-200], atol=1e-3)


@pytest.mark.parametrize("n_bytes", [3, 4_001])
def test_decode_drops_the_half_sample_of_an_odd_number_of_pcm_bytes(n_bytes: int) -> None:
    data = pcm16(noise(2_001))[:n_bytes]
    np.testing.assert_array_equal(decode(data), decode(data[:-1]))
    assert len(decode(data)) == n_bytes // 2


def test_decode_reads_a_wav_that_was_said_to_be_linear16() -> None:
    samples = noise(500)[:, 0]
    said = AudioFormat(encoding=Encoding.LINEAR16, sample_rate=RATE, n_channels=1)
    np.testing.assert_allclose(decode(pcm16_wav(samples), said), samples, atol=2**-15)


@pytest.mark.parametrize("body", [b"", b"x", b"INFOISFT\x0e\0\0\0Lavf58.76.100\0", bytes(70_001)])
def test_decode_skips_chunks_around_the_samples_of_a_wav(body: bytes) -> None:
    samples = noise(500)[:, 0]
    other = chunk(b"LIST", body)
    data = wav(other, format_chunk(), other, chunk(b"data", pcm16(samples)), other)
    decoded = decode(data)
    assert len(decoded) == len(samples)
    np.testing.assert_allclose(decoded, samples, atol=2**-15)
    np.testing.assert_array_equal(decode_in_chunks(data, [7] * 100), decoded)


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF, 0])
def test_decode_reads_to_the_end_when_the_wav_leaves_its_length_open(
    size: int, caplog: pytest.LogCaptureFixture
) -> None:
    samples = noise(500)[:, 0]
    data = wav(format_chunk(), chunk(b"data", pcm16(samples), size=size))
    np.testing.assert_allclose(decode(data), samples, atol=2**-15)
    assert not caplog.records  # nothing is missing


@pytest.mark.parametrize(
    ("tag", "n_bits"), [(PCM, 8), (PCM, 16), (PCM, 24), (PCM, 32), (IEEE_FLOAT, 32)]
)
def test_decode_gives_the_samples_that_are_there_when_a_wav_is_truncated(
    tag: int, n_bits: int, caplog: pytest.LogCaptureFixture
) -> None:
    subtype = {(PCM, 8): "PCM_U8", (IEEE_FLOAT, 32): "FLOAT"}.get((tag, n_bits), f"PCM_{n_bits}")
    whole = encode(noise(1_000, n_channels=2), container="WAV", subtype=subtype)
    n_missing = 300 * 2 * n_bits // 8 + 1  # 300 frames and a part of one
    with caplog.at_level(logging.WARNING):
        decoded = decode(whole[:-n_missing])
    np.testing.assert_array_equal(decoded, decode(whole)[:699])
    assert f"ends {n_missing} bytes before" in caplog.text


@pytest.mark.parametrize(("container", "is_cut"), [("WAV", True), ("MP3", True), ("WAV", False)])
def test_what_a_header_promised_and_did_not_come_is_told(
    container: str, is_cut: bool, tmp_path: Path
) -> None:
    data = encode(speech(), container=container)
    path = tmp_path / "recording"
    path.write_bytes(data[: len(data) // 2] if is_cut else data)
    missing_s: list[float] = []
    decoded_s = sum(
        len(block) / RATE
        for block in load_blocks(path, target_rate=RATE, on_shortage=missing_s.append)
    )
    whole_s = len(speech()) / RATE
    assert missing_s == ([pytest.approx(whole_s - decoded_s, abs=0.1)] if is_cut else [])


def test_a_flac_of_unknown_length_lacks_nothing() -> None:
    data = bytearray(encode(speech(), container="FLAC"))
    data[21] &= 0xF0  # the 36 bits of STREAMINFO that count the samples
    data[22:26] = bytes(4)
    missing_s: list[float] = []
    blocks = decode_blocks(
        [bytes(data)], AudioFormat(), target_rate=RATE, on_shortage=missing_s.append
    )
    assert sum(map(len, blocks)) == len(speech())
    assert missing_s == []


def test_decode_invents_no_samples_when_an_mp3_is_truncated() -> None:
    whole = encode(speech(), container="MP3")
    half = whole[: len(whole) // 2]
    decoded = decode(half)
    assert len(decoded) == pytest.approx(len(speech()) / 2, rel=0.1)
    np.testing.assert_array_equal(decoded, libsndfile_decode(half))


def test_decode_invents_no_samples_when_an_mp3_exaggerates_its_length() -> None:
    samples = speech()
    data = bytearray(encode(samples, container="MP3"))
    place = max(data.find(b"Xing"), data.find(b"Info"))
    assert place > 0
    n_frames = struct.unpack_from(">I", data, place + 8)[0]
    assert n_frames == pytest.approx(len(samples) / 576, abs=3)
    struct.pack_into(">I", data, place + 8, 10 * n_frames)
    assert len(decode(bytes(data))) < len(samples) + 2_000


def test_decode_invents_no_samples_when_an_ogg_is_damaged_inside() -> None:
    samples = speech()
    data = bytearray(encode(samples, container="OGG", subtype="VORBIS"))
    middle = len(data) // 2
    whole = decode(bytes(data))
    data[middle : middle + 3_000] = np.random.default_rng(0).bytes(3_000)
    decoded = decode(bytes(data))
    assert 10_000 < len(decoded) < len(samples)
    np.testing.assert_array_equal(decoded[:10_000], whole[:10_000])
    np.testing.assert_array_equal(decoded, libsndfile_decode(bytes(data)))


@pytest.mark.parametrize("n_channels", [2, 3, 8, 32])
def test_decode_averages_channels(n_channels: int) -> None:
    samples = noise(400, n_channels=n_channels)
    decoded = decode(pcm16_wav(samples, n_channels=n_channels))
    np.testing.assert_allclose(decoded, samples.mean(axis=1), atol=2**-15)


def test_decode_cancels_channels_of_opposite_sign() -> None:
    samples = np.repeat(noise(400), 2, axis=1) * np.array([1, -1], np.float32)
    data = encode(samples, container="WAV", subtype="FLOAT")
    np.testing.assert_array_equal(decode(data), np.zeros(400, np.float32))


@pytest.mark.parametrize("sample_rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000, 192_000])
@pytest.mark.parametrize("container", ["WAV", "FLAC"])
def test_decode_keeps_frequency_and_length_of_a_tone_when_resampling(
    sample_rate: int, container: str
) -> None:
    data = encode(
        tone(1_000, sample_rate=sample_rate), container=container, sample_rate=sample_rate
    )
    decoded = decode(data)
    assert abs(len(decoded) - RATE) <= 1
    inside = slice(500, 15_500)  # the filter's edges left out
    expected = tone(1_000, sample_rate=RATE)
    np.testing.assert_allclose(decoded[inside], expected[inside], atol=1e-3)


def test_decode_removes_what_the_target_rate_cannot_hold() -> None:
    data = encode(tone(12_000, sample_rate=44_100), container="WAV", sample_rate=44_100)
    decoded = decode(data)
    assert abs(decoded[500:-500]).max() < 1e-3


@pytest.mark.parametrize("target_rate", [8_000, 16_000, 22_050])
def test_decode_gives_the_rate_asked_for(target_rate: int) -> None:
    data = pcm16_wav(tone(500, sample_rate=RATE))
    decoded = decode(data, target_rate=target_rate)
    expected = tone(500, sample_rate=target_rate)
    assert len(decoded) == len(expected)
    np.testing.assert_allclose(decoded[500:-500], expected[500:-500], atol=1e-3)


# --- any chunking --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("container", "subtype"),
    [
        ("WAV", "PCM_U8"),
        ("WAV", "PCM_16"),
        ("WAV", "PCM_24"),
        ("WAV", "DOUBLE"),
        ("WAV", "ULAW"),
        ("WAVEX", "PCM_32"),
        ("FLAC", "PCM_16"),
        ("OGG", "OPUS"),
        ("MP3", "MPEG_LAYER_III"),
    ],
)
@pytest.mark.parametrize(("sample_rate", "n_channels"), [(16_000, 1), (48_000, 2), (8_000, 1)])
def test_stream_gives_the_same_samples_for_any_chunks(
    container: str, subtype: str, sample_rate: int, n_channels: int
) -> None:
    samples = noise(2_003, n_channels=n_channels)
    data = encode(samples, container=container, subtype=subtype, sample_rate=sample_rate)
    whole = decode_in_chunks(data, [])
    assert abs(len(whole) - 2_003 * RATE / sample_rate) <= 1
    np.testing.assert_array_equal(decode_in_chunks(data, [1] * len(data)), whole)
    for seed, longest in enumerate([13, 50, 700, len(data)]):
        lengths = random_lengths(len(data), longest=longest, seed=seed)
        np.testing.assert_array_equal(decode_in_chunks(data, lengths), whole)


@pytest.mark.parametrize("n_channels", [1, 2, 8])
@pytest.mark.parametrize("sample_rate", [16_000, 44_100, 8_000])
def test_stream_gives_the_same_samples_for_any_chunks_of_pcm(
    sample_rate: int, n_channels: int
) -> None:
    said = AudioFormat(encoding=Encoding.LINEAR16, sample_rate=sample_rate, n_channels=n_channels)
    data = pcm16(noise(5_001, n_channels=n_channels)) + b"\x01"
    whole = decode_in_chunks(data, [], said)
    assert abs(len(whole) - 5_001 * RATE / sample_rate) <= 1
    np.testing.assert_array_equal(decode_in_chunks(data, [1] * 9_000, said), whole)
    for seed, longest in enumerate([5, 333, 8_000]):
        lengths = random_lengths(len(data), longest=longest, seed=seed)
        np.testing.assert_array_equal(decode_in_chunks(data, lengths, said), whole)


@pytest.mark.parametrize("n_letters", [12, 200, 600])
def test_stream_gives_the_same_outcome_for_any_chunks_when_pcm_begins_like_text(
    n_letters: int,
) -> None:
    data = b"A" * n_letters + pcm16(noise(3_000))
    whole = outcome(data, [])
    for lengths in ([12], [13, 1], [1] * 1_000, [511], [512], [100, 412], [3_000]):
        assert outcome(data, lengths) == whole


def test_stream_gives_samples_as_they_arrive() -> None:
    stream = AudioStream(AudioFormat(), target_rate=RATE)
    data = pcm16_wav(noise(10_000))
    assert len(stream.push(data[:20])) == 0  # inside the header
    assert len(stream.push(data[20:44])) == 0
    assert len(stream.push(data[44:10_044])) == 5_000
    assert len(stream.push(data[10_044:10_047])) == 1
    assert len(stream.push(data[10_047:])) == 4_999
    assert len(stream.finish()) == 0
    assert stream.n_bytes == len(data)


@pytest.mark.parametrize(("tag", "n_bits"), [(PCM, 24), (IEEE_FLOAT, 32)])
def test_stream_gives_samples_of_an_extensible_wav_as_they_arrive(tag: int, n_bits: int) -> None:
    plain = format_chunk(tag=EXTENSIBLE, n_bits=n_bits)[8:]
    guid = struct.pack("<H", tag) + GUID_TAIL
    layout = chunk(b"fmt ", plain + struct.pack("<HHI", 22, n_bits, 0) + guid)
    samples = noise(400)[:, 0]
    if tag == IEEE_FLOAT:
        body = samples.astype("<f4").tobytes()
    else:
        body = b"".join(
            round(x * 2**23).to_bytes(3, "little", signed=True) for x in samples.tolist()
        )
    stream = AudioStream(AudioFormat(), target_rate=RATE)
    data = wav(layout, chunk(b"data", body))
    decoded = stream.push(data)
    np.testing.assert_allclose(decoded, samples, atol=2**-23)
    assert len(stream.finish()) == 0


def test_stream_gives_resampled_samples_as_they_arrive() -> None:
    said = AudioFormat(encoding=Encoding.LINEAR16, sample_rate=48_000)
    stream = AudioStream(said, target_rate=RATE)
    second = pcm16(tone(300, sample_rate=48_000))
    n_samples = [len(stream.push(second)) for _ in range(3)]
    assert sum(n_samples) > 3 * RATE - 2_000  # a filter's delay, no more
    assert sum(n_samples) + len(stream.finish()) == 3 * RATE


def test_stream_without_bytes_gives_no_samples() -> None:
    stream = AudioStream(AudioFormat(), target_rate=RATE)
    assert len(stream.push(b"")) == 0
    assert len(stream.finish()) == 0


# --- errors --------------------------------------------------------------------------------------


def test_decode_says_what_is_missing_when_there_are_no_bytes() -> None:
    with pytest.raises(AudioError, match=r"no bytes at all; expected a recording"):
        decode(b"")


@pytest.mark.parametrize(
    "data",
    [
        pcm16_wav(noise(0)),
        encode(noise(0), container="WAV", subtype="FLOAT"),
        encode(noise(0), container="WAV", subtype="ULAW"),
        b"\x01",
    ],
    ids=["wav", "float-wav", "mu-law-wav", "half-sample"],
)
def test_decode_refuses_a_recording_without_samples(data: bytes) -> None:
    message = f"the audio is empty: {len(data)} bytes that hold no sample; expected a recording"
    with pytest.raises(AudioError) as caught:
        decode(data)
    assert str(caught.value) == message
    with pytest.raises(AudioError) as caught:
        decode_in_chunks(data, [1] * len(data))
    assert str(caught.value) == message


@pytest.mark.parametrize("n_bytes", [4, 8, 9, 11, 12, 15, 20, 30, 36, 43])
def test_decode_refuses_a_wav_truncated_in_its_header(n_bytes: int) -> None:
    data = pcm16_wav(noise(100))[:n_bytes]
    with pytest.raises(AudioError, match=rf"cut off .* {n_bytes} bytes .* again"):
        decode(data)


def test_decode_refuses_a_wav_without_data_chunk() -> None:
    with pytest.raises(AudioError, match=r"no samples; copy or encode the recording again"):
        decode(wav(format_chunk(), chunk(b"LIST", bytes(100))))


def test_decode_refuses_a_wav_with_data_before_its_format() -> None:
    with pytest.raises(AudioError, match=r"no format before its data; encode it again"):
        decode(wav(chunk(b"data", bytes(100)), format_chunk()))


def test_decode_refuses_a_wav_with_a_short_format() -> None:
    with pytest.raises(AudioError, match=r"has 14 bytes, expected at least 16"):
        decode(wav(chunk(b"fmt ", bytes(14)), chunk(b"data", bytes(100))))


def test_decode_refuses_a_wav_with_an_endless_header() -> None:
    data = wav(format_chunk(), chunk(b"LIST", b"", size=2**31))
    with pytest.raises(AudioError, match=r"longer than 1 MiB; encode the recording again"):
        decode(data)


def test_load_audio_refuses_text_named_wav(tmp_path: Path) -> None:
    path = tmp_path / "notes.wav"
    path.write_text("Dear reader, this is no recording.", encoding="utf-8")
    with pytest.raises(AudioError, match=r"begins with b'Dear reader,'.* convert the recording"):
        load_audio(path, target_rate=RATE)


@pytest.mark.parametrize(
    ("container", "name"), [("AIFF", "AIFF"), ("CAF", "CAF"), ("AU", "AU"), ("W64", "Wave64")]
)
def test_other_containers_are_refused_by_name(container: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / "clip.wav"
    path.write_bytes(encode(noise(1_000), container=container, subtype="PCM_16"))
    with pytest.raises(AudioError, match=f"the data is {name}, which is not decoded here; convert"):
        load_audio(path, target_rate=RATE)
    with pytest.raises(AudioError, match=name):
        decode(path.read_bytes())


def test_load_audio_refuses_pcm_without_header(tmp_path: Path) -> None:
    path = tmp_path / "clip.wav"
    path.write_bytes(pcm16(noise(1_000)))
    with pytest.raises(AudioError, match=r"no header of a WAV, FLAC, Ogg or mp3 file; convert"):
        load_audio(path, target_rate=RATE)


def test_load_audio_names_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "missing.wav"
    with pytest.raises(AudioError) as caught:
        load_audio(path, target_rate=RATE)
    assert str(caught.value) == f"cannot read {path}: No such file or directory"


def test_load_audio_names_a_folder(tmp_path: Path) -> None:
    with pytest.raises(AudioError) as caught:
        load_audio(tmp_path, target_rate=RATE)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "text", [b"<!doctype html><html>", b"not audio\r\n", b'{"error": 404}', b"x"]
)
def test_decode_refuses_text_without_header_and_encoding(text: bytes) -> None:
    with pytest.raises(AudioError, match=r"no header of a WAV, FLAC, Ogg or mp3 file; convert"):
        decode(text)
    with pytest.raises(AudioError, match=r"no header of a WAV, FLAC, Ogg or mp3 file; convert"):
        decode_in_chunks(text, [1] * len(text))


def test_decode_takes_text_for_pcm_when_the_sender_says_so() -> None:
    said = AudioFormat(encoding=Encoding.LINEAR16)
    assert len(decode(b"these may be samples", said)) == 10


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
@pytest.mark.parametrize("sample_rate", [16_000, 44_100])
def test_decode_refuses_samples_that_are_not_numbers(
    value: float, subtype: str, sample_rate: int
) -> None:
    samples = noise(1_000, n_channels=2)
    samples[700, 1] = value
    data = encode(samples, container="WAV", subtype=subtype, sample_rate=sample_rate)
    with pytest.raises(AudioError, match=r"NaN or infinite.* between -1 and 1: repair"):
        decode(data)


@pytest.mark.parametrize("n_channels", [1, 2])
@pytest.mark.parametrize("sample_rate", [16_000, 44_100])
def test_decode_gives_finite_samples_or_refuses_when_samples_are_huge(
    n_channels: int, sample_rate: int
) -> None:
    signs = np.sign(noise(4_000, n_channels=1))
    samples = np.repeat(np.float32(3e38) * signs, n_channels, axis=1)
    data = encode(samples, container="WAV", subtype="FLOAT", sample_rate=sample_rate)
    result = outcome(data, [])  # it asserts that samples are finite
    assert isinstance(result, list) or "between -1 and 1" in result


def test_decode_refuses_float64_samples_beyond_float32() -> None:
    body = np.full(100, 1e300).tobytes()
    data = wav(format_chunk(tag=IEEE_FLOAT, n_bits=64), chunk(b"data", body))
    with pytest.raises(AudioError, match=r"NaN or infinite"):
        decode(data)


@pytest.mark.parametrize(("container", "name"), [("WAV", "WAV"), ("FLAC", "FLAC"), ("MP3", "MP3")])
def test_decode_refuses_a_rate_that_the_header_contradicts(container: str, name: str) -> None:
    data = encode(noise(5_000), container=container)
    message = rf"says 8000 Hz but the {name} header says 16000 Hz; leave .* or correct it"
    with pytest.raises(RequestError, match=message):
        decode(data, AudioFormat(sample_rate=8_000))
    assert len(decode(data, AudioFormat(sample_rate=RATE))) == 5_000


@pytest.mark.parametrize(("container", "name"), [("WAV", "WAV"), ("FLAC", "FLAC")])
def test_decode_refuses_a_channel_count_that_the_header_contradicts(
    container: str, name: str
) -> None:
    data = encode(noise(5_000, n_channels=2), container=container)
    message = rf"says 1 channels but the {name} header says 2; leave .* or correct it"
    with pytest.raises(RequestError, match=message):
        decode(data, AudioFormat(n_channels=1))
    assert len(decode(data, AudioFormat(n_channels=2))) == 5_000


@pytest.mark.parametrize(
    ("said", "container"),
    [
        (Encoding.FLAC, "WAV"),
        (Encoding.WAV, "FLAC"),
        (Encoding.MP3, "OGG"),
        (Encoding.OGG, "MP3"),
        (Encoding.LINEAR16, "FLAC"),
    ],
)
def test_decode_refuses_another_format_than_the_sender_says(said: Encoding, container: str) -> None:
    data = encode(noise(5_000), container=container)
    message = rf"says {said.value} but the audio has the header of {container}.*correct it"
    with pytest.raises(RequestError, match=message):
        decode(data, AudioFormat(encoding=said))


@pytest.mark.parametrize("said", [Encoding.MP3, Encoding.FLAC, Encoding.OGG, Encoding.WAV])
def test_decode_refuses_garbage_that_the_sender_gives_a_format(said: Encoding) -> None:
    garbage = bytes(range(7, 107))
    message = rf"said to be {said.value} but begins with .*; send the file's bytes from its start"
    with pytest.raises(AudioError, match=message):
        decode(garbage, AudioFormat(encoding=said))


@pytest.mark.parametrize("sample_rate", [0, 1, 3_999, 384_001, 4_000_000_000])
def test_decode_refuses_an_absurd_sample_rate_in_the_header(sample_rate: int) -> None:
    data = wav(format_chunk(sample_rate=sample_rate), chunk(b"data", bytes(100)))
    with pytest.raises(AudioError, match=rf"rate is {sample_rate} Hz, expected 4000 to 384000 Hz"):
        decode(data)


def test_decode_refuses_an_absurd_sample_rate_in_a_flac_header() -> None:
    data = encode(noise(1_000), container="FLAC", sample_rate=2_000)
    with pytest.raises(AudioError, match=r"rate is 2000 Hz, expected 4000 to 384000 Hz"):
        decode(data)


@pytest.mark.parametrize("n_channels", [0, 33, 64, 65_535])
def test_decode_refuses_an_absurd_channel_count_in_the_header(n_channels: int) -> None:
    data = wav(format_chunk(n_channels=n_channels), chunk(b"data", bytes(100)))
    with pytest.raises(AudioError, match=rf"has {n_channels} channels, expected 1 to 32"):
        decode(data)


def test_decode_refuses_absurd_layouts_that_the_sender_says() -> None:
    with pytest.raises(AudioError, match=r"rate is 100 Hz, expected 4000 to 384000 Hz"):
        decode(bytes(100), AudioFormat(encoding=Encoding.LINEAR16, sample_rate=100))
    with pytest.raises(AudioError, match=r"has 64 channels, expected 1 to 32"):
        decode(bytes(100), AudioFormat(encoding=Encoding.LINEAR16, n_channels=64))


@pytest.mark.parametrize(
    ("container", "subtype", "name"),
    [("FLAC", "PCM_16", "FLAC"), ("OGG", "OPUS", "OGG_OPUS"), ("OGG", "VORBIS", "OGG_OPUS")],
)
def test_decode_refuses_a_compressed_file_damaged_in_its_header(
    container: str, subtype: str, name: str
) -> None:
    data = bytearray(encode(speech()[:RATE], container=container, subtype=subtype))
    data[4:60] = np.random.default_rng(0).bytes(56)
    message = rf"the {name} audio cannot be decoded \(.+\); it may be cut off or damaged: encode it"
    with pytest.raises(AudioError, match=message):
        decode(bytes(data))


def test_decode_refuses_a_flac_damaged_inside() -> None:
    data = bytearray(encode(speech()[:RATE], container="FLAC"))
    middle = len(data) // 2
    data[middle : middle + 2_000] = np.random.default_rng(0).bytes(2_000)
    with pytest.raises(AudioError, match=r"the FLAC audio cannot be decoded \(.+\); it may be"):
        decode(bytes(data))


@pytest.mark.parametrize("container", ["FLAC", "OGG", "MP3"])
def test_decode_refuses_a_compressed_file_truncated_in_its_header(container: str) -> None:
    data = encode(speech()[:RATE], container=container)[:40]
    said = AudioFormat(header_required=True)
    with pytest.raises(AudioError, match=r"encode it again|convert the recording"):
        decode(data, said)


# --- G.711 ---------------------------------------------------------------------------------------


def g711(samples: FloatArray, subtype: str) -> bytes:
    """Headerless bytes as libsndfile writes them."""
    return encode(samples, container="RAW", subtype=subtype, sample_rate=8_000)


def libsndfile_decode_raw(data: bytes, subtype: str, *, n_channels: int = 1) -> FloatArray:
    samples, _ = soundfile.read(
        io.BytesIO(data),
        format="RAW",
        subtype=subtype,
        samplerate=8_000,
        channels=n_channels,
        dtype="float32",
        always_2d=True,
    )
    return np.asarray(samples, np.float32)


@pytest.mark.parametrize(("said", "subtype", "_tag"), G711)
def test_g711_gives_the_sample_of_every_byte(said: Encoding, subtype: str, _tag: int) -> None:
    data = bytes(range(256))
    decoded = decode(data, AudioFormat(said), target_rate=8_000)
    assert decoded.dtype == np.float32
    np.testing.assert_array_equal(decoded, libsndfile_decode_raw(data, subtype)[:, 0])


@pytest.mark.parametrize(("said", "subtype", "tag"), G711)
def test_g711_is_speech_with_and_without_header(said: Encoding, subtype: str, tag: int) -> None:
    samples = speech()
    data = g711(samples, subtype)
    assert len(data) == len(samples)
    decoded = decode(data, AudioFormat(said, RATE))
    assert correlation(decoded, samples) > 0.99
    file = encode(samples, container="WAV", subtype=subtype)
    np.testing.assert_array_equal(decoded, libsndfile_decode(file))
    np.testing.assert_array_equal(decoded, decode(file))
    layout = format_chunk(tag=tag, n_bits=8)
    np.testing.assert_array_equal(decoded, decode(wav(layout, chunk(b"data", data))))


@pytest.mark.parametrize(("said", "subtype", "_tag"), G711)
def test_g711_without_header_is_8_khz_mono_by_default(
    said: Encoding, subtype: str, _tag: int
) -> None:
    data = g711(tone(440, sample_rate=8_000), subtype)
    decoded = decode(data, AudioFormat(said))
    assert len(decoded) == RATE
    expected = tone(440, sample_rate=RATE)
    np.testing.assert_allclose(decoded[200:-200], expected[200:-200], atol=0.02)
    assert len(decode(data, AudioFormat(said, RATE))) == 8_000
    assert len(decode(data, AudioFormat(said, n_channels=2))) == 8_000


@pytest.mark.parametrize(("said", "subtype", "_tag"), G711)
@pytest.mark.parametrize(("sample_rate", "n_channels"), [(8_000, 1), (16_000, 2), (44_100, 3)])
@pytest.mark.parametrize("separate_channels", [False, True])
def test_g711_gives_the_same_samples_for_any_chunks(
    said: Encoding,
    subtype: str,
    _tag: int,
    sample_rate: int,
    n_channels: int,
    separate_channels: bool,
) -> None:
    audio_format = AudioFormat(said, sample_rate, n_channels)
    data = g711(noise(2_003, n_channels=n_channels), subtype) + b"\x2a" * (n_channels - 1)

    def decode_pieces(lengths: list[int]) -> FloatArray:
        return decode_in_chunks(data, lengths, audio_format, separate_channels=separate_channels)

    whole = decode_pieces([])
    assert abs(len(whole) - 2_003 * RATE / sample_rate) <= 1
    np.testing.assert_array_equal(decode_pieces([1] * len(data)), whole)
    for seed, longest in enumerate([5, 333, 2_000]):
        lengths = random_lengths(len(data), longest=longest, seed=seed)
        np.testing.assert_array_equal(decode_pieces(lengths), whole)


@pytest.mark.parametrize(("said", "subtype", "_tag"), G711)
def test_g711_drops_the_part_of_a_frame_at_its_end(
    said: Encoding, subtype: str, _tag: int, caplog: pytest.LogCaptureFixture
) -> None:
    data = g711(noise(100, n_channels=3), subtype)
    audio_format = AudioFormat(said, RATE, 3)
    with caplog.at_level(logging.WARNING):
        decoded = decode(data[:-1], audio_format)
    np.testing.assert_array_equal(decoded, decode(data, audio_format)[:-1])
    assert "2 bytes left out" in caplog.text


@pytest.mark.parametrize(("named", "subtype", "tag"), G711)
@pytest.mark.parametrize("said", [None, Encoding.WAV, Encoding.LINEAR16, Encoding.MULAW])
@pytest.mark.parametrize("is_extensible", [False, True])
def test_g711_in_a_wav_is_given_as_it_arrives(
    named: Encoding, subtype: str, tag: int, said: Encoding | None, is_extensible: bool
) -> None:
    said = named if said == Encoding.MULAW else said
    layout = format_chunk(tag=tag, n_bits=8, n_channels=1)
    if is_extensible:
        guid = struct.pack("<H", tag) + GUID_TAIL
        plain = format_chunk(tag=EXTENSIBLE, n_bits=8)[8:]
        layout = chunk(b"fmt ", plain + struct.pack("<HHI", 22, 8, 0) + guid)
    body = g711(noise(1_001), subtype)  # odd, hence padded
    data = wav(layout, chunk(b"data", body), chunk(b"LIST", bytes(50)))
    stream = AudioStream(AudioFormat(said), target_rate=RATE)
    start = data.index(b"data") + 8
    assert [len(stream.push(data[:start])), stream.n_channels] == [0, 1]
    decoded = [stream.push(data[i : i + 100]) for i in range(start, len(data), 100)]
    assert len(decoded[0]) == 100
    decoded.append(stream.finish())
    expected = libsndfile_decode_raw(body, subtype)[:, 0]
    np.testing.assert_array_equal(np.concatenate(decoded), expected)


@pytest.mark.parametrize(
    ("said", "subtype"),
    [
        (Encoding.MULAW, "ALAW"),
        (Encoding.ALAW, "ULAW"),
        (Encoding.MULAW, "PCM_16"),
        (Encoding.ALAW, "FLOAT"),
        (Encoding.MULAW, "IMA_ADPCM"),
        (Encoding.FLAC, "ULAW"),
    ],
)
def test_g711_that_a_wav_header_contradicts_is_refused(said: Encoding, subtype: str) -> None:
    data = encode(noise(1_000), container="WAV", subtype=subtype)
    found = "WAV" if said == Encoding.FLAC else f"a WAV that is not {said.value}"
    message = rf"says {said.value} but the audio has the header of {found}; leave .* correct it"
    with pytest.raises(RequestError, match=message):
        decode(data, AudioFormat(said))
    with pytest.raises(RequestError, match=message):
        decode_in_chunks(data, [1] * len(data), AudioFormat(said))


@pytest.mark.parametrize("said", [Encoding.MULAW, Encoding.ALAW])
@pytest.mark.parametrize("container", ["FLAC", "OGG", "MP3"])
def test_g711_that_has_another_header_is_refused(said: Encoding, container: str) -> None:
    data = encode(noise(2_000), container=container)
    with pytest.raises(RequestError, match=rf"says {said.value} but .* header of {container}"):
        decode(data, AudioFormat(said))


@pytest.mark.parametrize(("said", "subtype", "_tag"), G711)
def test_g711_refuses_layouts_that_the_header_contradicts(
    said: Encoding, subtype: str, _tag: int
) -> None:
    data = encode(noise(500, n_channels=2), container="WAV", subtype=subtype, sample_rate=8_000)
    with pytest.raises(RequestError, match=r"says 16000 Hz but the WAV header says 8000 Hz"):
        decode(data, AudioFormat(said, RATE))
    with pytest.raises(RequestError, match=r"says 1 channels but the WAV header says 2"):
        decode(data, AudioFormat(said, n_channels=1))
    assert len(decode(data, AudioFormat(said, 8_000, 2))) == 1_000


@pytest.mark.parametrize("said", [Encoding.MULAW, Encoding.ALAW])
def test_g711_is_what_the_sender_says_it_is(said: Encoding) -> None:
    assert len(decode(b"these may be samples", AudioFormat(said))) == 40
    with pytest.raises(AudioError, match=r"no header of a WAV, FLAC, Ogg or mp3 file; convert"):
        decode(bytes(100), AudioFormat(said, header_required=True))
    with pytest.raises(AudioError, match=r"has 33 channels, expected 1 to 32"):
        decode(bytes(100), AudioFormat(said, n_channels=33))
    with pytest.raises(AudioError, match=r"rate is -1 Hz, expected 4000 to 384000 Hz"):
        decode(bytes(100), AudioFormat(said, sample_rate=-1))
    with pytest.raises(AudioError, match=r"1 bytes that hold no sample"):
        decode(b"\xff", AudioFormat(said, n_channels=2))


# --- channels apart ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("container", "subtype"),
    [("WAV", "PCM_16"), ("WAV", "ULAW"), ("WAV", "IMA_ADPCM"), ("FLAC", "PCM_24"),
     ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")],
)  # fmt: skip
@pytest.mark.parametrize("sample_rate", [8_000, 16_000, 48_000])
def test_separate_channels_are_each_what_it_is_alone(
    container: str, subtype: str, sample_rate: int
) -> None:
    samples = noise(9_001, n_channels=2)
    data = encode(samples, container=container, subtype=subtype, sample_rate=sample_rate)
    decoded = decode_separately(data)
    assert decoded.dtype == np.float32
    frames = libsndfile_decode(data)
    assert decoded.shape[1] == frames.shape[1] == 2
    for channel in range(2):
        alone = resample(np.ascontiguousarray(frames[:, channel]), sample_rate, RATE)
        np.testing.assert_allclose(decoded[:, channel], alone, rtol=0, atol=1e-7)
    np.testing.assert_allclose(decoded.mean(axis=1), decode(data), rtol=0, atol=1e-5)


@pytest.mark.parametrize("n_channels", [1, 3, 32])
def test_separate_channels_of_pcm_do_not_touch_each_other(n_channels: int) -> None:
    samples = np.zeros((4_000, n_channels), np.float32)
    samples[:, n_channels // 2] = noise(4_000)[:, 0]
    said = AudioFormat(Encoding.LINEAR16, 44_100, n_channels)
    decoded = decode_separately(pcm16(samples), said)
    assert decoded.shape == (len(decoded), n_channels)
    loudest = np.abs(decoded).max(axis=0)
    assert loudest[n_channels // 2] > 0.4
    assert np.delete(loudest, n_channels // 2).sum() == 0


@pytest.mark.parametrize(
    ("container", "subtype", "sample_rate", "n_channels"),
    [
        ("WAV", "PCM_16", 44_100, 2),
        ("WAV", "ULAW", 8_000, 2),
        ("WAV", "PCM_24", 16_000, 5),
        ("FLAC", "PCM_16", 48_000, 3),
        ("OGG", "VORBIS", 8_000, 2),
        ("MP3", "MPEG_LAYER_III", 16_000, 1),
    ],
)
def test_separate_channels_are_the_same_for_any_chunks(
    container: str,
    subtype: str,
    sample_rate: int,
    n_channels: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    samples = noise(2_003, n_channels=n_channels)
    data = encode(samples, container=container, subtype=subtype, sample_rate=sample_rate)
    whole = decode_separately(data)
    assert whole.shape[1] == n_channels
    for lengths in (
        [1] * len(data),
        *(random_lengths(len(data), longest=n, seed=n) for n in (13, 700, len(data))),
    ):
        pieces = decode_in_chunks(data, lengths, separate_channels=True)
        np.testing.assert_array_equal(pieces, whole)
    monkeypatch.setattr(audio, "_BLOCK_FRAMES", 300)
    np.testing.assert_allclose(decode_separately(data), whole, rtol=0, atol=1e-6)


def test_separate_channels_of_one_channel_are_its_samples() -> None:
    data = pcm16_wav(noise(3_000), sample_rate=22_050)
    np.testing.assert_array_equal(decode_separately(data)[:, 0], decode(data))


@pytest.mark.parametrize(("container", "is_streamed"), [("WAV", True), ("FLAC", False)])
@pytest.mark.parametrize("separate_channels", [False, True])
def test_n_channels_is_known_with_the_header(
    container: str, is_streamed: bool, separate_channels: bool
) -> None:
    data = encode(noise(1_000, n_channels=3), container=container)
    stream = AudioStream(AudioFormat(), target_rate=RATE, separate_channels=separate_channels)
    assert stream.n_channels is None
    shape = (0, 1) if separate_channels else (0,)
    assert stream.push(data[:20]).shape == shape
    assert stream.n_channels is None
    stream.push(data[20:])
    assert stream.n_channels == (3 if is_streamed else None)
    assert stream.finish().shape[1:] == ((3,) if separate_channels else ())
    assert stream.n_channels == 3


def test_separate_channels_of_nothing_are_empty() -> None:
    stream = AudioStream(AudioFormat(), target_rate=RATE, separate_channels=True)
    assert stream.push(b"").shape == (0, 1)
    assert stream.finish().shape == (0, 1)
    assert stream.n_channels is None
    with pytest.raises(AudioError, match="no bytes at all"):
        decode_separately(b"")


def test_separate_channels_refuse_a_sample_that_is_not_a_number() -> None:
    samples = noise(1_000, n_channels=2)
    samples[700, 1] = np.nan
    with pytest.raises(AudioError, match="not numbers"):
        decode_separately(encode(samples, container="WAV", subtype="FLOAT"))


def test_separate_channels_refuse_a_header_without_samples() -> None:
    data = wav(format_chunk(n_channels=2), chunk(b"data", b""))
    with pytest.raises(AudioError, match="hold no sample"):
        decode_separately(data)


# --- the longest recording -----------------------------------------------------------------------


def silence(seconds: int, *, container: str, sample_rate: int = RATE) -> bytes:
    """A file far smaller than the samples it decodes to."""
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", sample_rate, 1, format=container) as writer:
        for _ in range(seconds):
            writer.write(np.zeros(sample_rate, np.float32))
    return file.getvalue()


@pytest.mark.parametrize("container", ["FLAC", "OGG"])
def test_longest_stops_a_file_that_expands_to_hours(
    container: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = silence(1_800, container=container)
    monkeypatch.setattr(audio, "_BLOCK_FRAMES", RATE)
    message = (
        r"the audio is too long: 11\.0 s so far, and the limit is 10 s; "
        r"cut the recording, or raise the server's limit"
    )
    blocks = decode_blocks([bomb], AudioFormat(), target_rate=RATE, longest_s=10.0)
    tracemalloc.start()
    try:
        assert [len(block) for block in islice(blocks, 10)] == 10 * [RATE]
        with pytest.raises(AudioError, match=message):  # one block of a second beyond, no more
            next(blocks)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(bomb) < 150_000
    assert peak_bytes < 1_000_000  # whole, it would be 115 MB


def test_longest_stops_a_stream_that_finishes_at_once() -> None:
    stream = AudioStream(AudioFormat(), target_rate=RATE, longest_s=60)
    stream.push(silence(61, container="FLAC"))
    with pytest.raises(AudioError, match=r"61\.0 s so far, and the limit is 60 s"):
        stream.finish()


@pytest.mark.parametrize("sample_rate", [8_000, 16_000, 48_000])
@pytest.mark.parametrize("container", ["WAV", "FLAC"])
@pytest.mark.parametrize("separate_channels", [False, True])
def test_longest_counts_frames_at_the_source_rate(
    sample_rate: int, container: str, separate_channels: bool
) -> None:
    def n_decoded(n_frames: int) -> int:
        samples = noise(n_frames, n_channels=2)
        data = encode(samples, container=container, sample_rate=sample_rate)
        blocks = decode_blocks(
            [data],
            AudioFormat(),
            target_rate=RATE,
            separate_channels=separate_channels,
            longest_s=0.5,
        )
        return sum(len(block) for block in blocks)

    assert n_decoded(sample_rate // 2) == RATE // 2
    with pytest.raises(AudioError, match=r"the limit is 0\.5 s"):
        n_decoded(sample_rate // 2 + 1)


@pytest.mark.parametrize("said", [Encoding.LINEAR16, Encoding.MULAW])
def test_longest_is_the_same_for_any_chunks_of_raw_samples(said: Encoding) -> None:
    n_bytes = {Encoding.LINEAR16: 32_000, Encoding.MULAW: 8_000}[said]
    for length in (1, 999, n_bytes):
        stream = AudioStream(AudioFormat(said), target_rate=RATE, longest_s=1.0)
        for start in range(0, n_bytes, length):
            stream.push(bytes(min(length, n_bytes - start)))
        with pytest.raises(AudioError, match=r"1\.0 s so far, and the limit is 1 s"):
            stream.push(bytes(2))


def test_longest_stops_raw_samples_that_come_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio, "_PIECE_BYTES", 8_000)
    blocks = decode_blocks(
        [bytes(8_000_000)], AudioFormat(Encoding.MULAW), target_rate=8_000, longest_s=2.5
    )
    assert [len(next(blocks)) for _ in range(2)] == [8_000, 8_000]
    with pytest.raises(AudioError, match=r"too long: 3\.0 s so far"):
        next(blocks)


@pytest.mark.parametrize("n_channels", [1, 2, 8])
def test_blocks_of_many_channels_are_shorter(
    n_channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encode(noise(4_000, n_channels=n_channels), container="FLAC")
    whole = decode(data)
    monkeypatch.setattr(audio, "_BLOCK_SAMPLES", 2_000)
    monkeypatch.setattr(audio, "_BLOCK_FRAMES", 1_500)
    blocks = list(decode_blocks([data], AudioFormat(), target_rate=RATE))
    assert max(len(block) for block in blocks) == min(1_500, 2_000 // n_channels)
    np.testing.assert_array_equal(np.concatenate(blocks), whole)


# --- how long it will be -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("container", "subtype"),
    [("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAV", "FLOAT"), ("WAV", "ULAW"), ("WAV", "ALAW"),
     ("WAV", "IMA_ADPCM"), ("WAV", "GSM610"), ("WAVEX", "PCM_32"), ("RF64", "PCM_16"),
     ("FLAC", "PCM_16"), ("OGG", "OPUS"), ("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III")],
)  # fmt: skip
@pytest.mark.parametrize("n_channels", [1, 2])
def test_duration_hint_is_the_length_of_what_is_decoded(
    container: str, subtype: str, n_channels: int
) -> None:
    if subtype == "GSM610" and n_channels == 2:
        n_channels = 1  # it has no more
    data = encode(noise(8_003, n_channels=n_channels), container=container, subtype=subtype)
    hint = duration_hint_s(data, AudioFormat())
    assert hint == len(decode(data)) / RATE


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        (AudioFormat(), 0.5),
        (AudioFormat(Encoding.LINEAR16, 8_000), 1.0),
        (AudioFormat(Encoding.LINEAR16, n_channels=4), 0.125),
        (AudioFormat(Encoding.MULAW), 2.0),
        (AudioFormat(Encoding.ALAW, 16_000, 2), 0.5),
    ],
)
def test_duration_hint_of_raw_samples_is_exact(said: AudioFormat, seconds: float) -> None:
    assert duration_hint_s(bytes(16_000), said) == seconds
    assert len(decode(bytes(16_000), said)) == seconds * RATE
    assert duration_hint_s(bytes(16_001), said) == pytest.approx(seconds, abs=2e-4)


@pytest.mark.parametrize("tag", [PCM, MULAW, ALAW])
@pytest.mark.parametrize("size", [None, 0, 0xFFFFFFFF, 1 << 30, 100])
def test_duration_hint_of_a_wav_counts_the_bytes_that_are_there(tag: int, size: int | None) -> None:
    n_bits = 16 if tag == PCM else 8
    data = wav(format_chunk(tag=tag, n_bits=n_bits), chunk(b"data", bytes(6_400), size=size))
    assert duration_hint_s(data, AudioFormat()) == len(decode(data)) / RATE


@pytest.mark.parametrize("container", ["FLAC", "OGG", "MP3"])
def test_duration_hint_believes_a_file_that_expands_to_minutes(container: str) -> None:
    data = silence(180, container=container, sample_rate=8_000)
    assert duration_hint_s(data, AudioFormat()) == 180.0


@pytest.mark.parametrize("n_frames", [0, 2**36 - 1])
def test_duration_hint_is_none_when_a_flac_leaves_its_length_open_or_lies(n_frames: int) -> None:
    data = bytearray(encode(noise(5_000), container="FLAC"))
    data[21] = data[21] & 0xF0 | n_frames >> 32
    data[22:26] = struct.pack(">I", n_frames & 0xFFFFFFFF)
    assert duration_hint_s(bytes(data), AudioFormat()) is None


def test_duration_hint_is_none_when_an_mp3_exaggerates() -> None:
    data = bytearray(encode(speech(), container="MP3"))
    place = max(data.find(b"Xing"), data.find(b"Info"))
    struct.pack_into(">I", data, place + 8, 1_000_000)
    assert duration_hint_s(bytes(data), AudioFormat()) is None


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", AudioFormat()),
        (b"", AudioFormat(Encoding.MULAW)),
        (b"<!doctype html><html>", AudioFormat()),
        (bytes(100), AudioFormat(header_required=True)),
        (bytes(100), AudioFormat(Encoding.FLAC)),
        (bytes(100), AudioFormat(Encoding.LINEAR16, sample_rate=1)),
        (bytes(100), AudioFormat(Encoding.ALAW, n_channels=-3)),
        (b"fLaC" + bytes(100), AudioFormat()),
        (b"OggS" + bytes(100), AudioFormat()),
        (b"ID3", AudioFormat()),
        (b"RIFF", AudioFormat()),
        (pcm16_wav(noise(100), sample_rate=100), AudioFormat()),
        (pcm16_wav(noise(100)), AudioFormat(Encoding.MULAW)),
        (pcm16_wav(noise(100)), AudioFormat(sample_rate=8_000)),
        (encode(noise(1_000), container="FLAC", sample_rate=2_000), AudioFormat()),
    ],
)
def test_duration_hint_is_none_when_it_cannot_be_told(data: bytes, said: AudioFormat) -> None:
    assert duration_hint_s(data, said) is None


# --- whatever arrives ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "magic",
    [b"RIFF", b"RIFF\0\0\0\0WAVE", b"RIFF\0\0\0\0WAVEfmt \x10\0\0\0", b"RF64", b"OggS", b"fLaC",
     b"ID3", b"\xff\xfb\x90\x00", b""],
)  # fmt: skip
def test_decode_raises_only_input_errors_on_random_bytes(magic: bytes) -> None:
    rng = np.random.default_rng(len(magic))
    for seed in range(40):
        data = magic + rng.bytes(int(rng.integers(0, 1_500)))
        lengths = random_lengths(len(data), longest=100, seed=seed)
        assert outcome(data, lengths) == outcome(data, [])
        said = AudioFormat(list(Encoding)[seed % len(Encoding)], n_channels=[None, 3][seed % 2])
        results = [outcome(data, n, said, separate_channels=True) for n in (lengths, [])]
        assert results[0] == results[1]
        for audio_format in (AudioFormat(), said):
            hint = duration_hint_s(data, audio_format)
            assert hint is None or 0 <= hint < len(data)


@pytest.mark.parametrize(
    ("container", "subtype"),
    [
        ("WAV", "PCM_16"),
        ("WAV", "FLOAT"),
        ("WAV", "ULAW"),
        ("WAV", "ALAW"),
        ("WAV", "IMA_ADPCM"),
        ("WAVEX", "PCM_24"),
        ("RF64", "PCM_16"),
        ("FLAC", "PCM_16"),
        ("OGG", "OPUS"),
        ("OGG", "VORBIS"),
        ("MP3", "MPEG_LAYER_III"),
    ],
)
def test_decode_raises_only_input_errors_on_mutated_files(container: str, subtype: str) -> None:
    whole = encode(noise(2_000), container=container, subtype=subtype)
    rng = np.random.default_rng(7)
    extremes = np.array([0, 1, 127, 128, 255], np.uint8)
    kinds = set()
    for seed in range(40):
        data = np.frombuffer(whole, np.uint8).copy()
        n_mutations = int(rng.integers(1, 5))
        places = rng.integers(0, 100 if seed % 3 else len(data), n_mutations)
        data[places] = np.where(
            rng.random(n_mutations) < 0.5,
            rng.choice(extremes, n_mutations),
            rng.integers(0, 256, n_mutations, dtype=np.uint8),
        )
        mutated = data[: rng.integers(12, len(data))] if seed % 4 == 0 else data
        lengths = random_lengths(len(mutated), longest=100, seed=seed)
        result = outcome(mutated.tobytes(), lengths)
        assert result == outcome(mutated.tobytes(), [])
        separate = [outcome(mutated.tobytes(), n, separate_channels=True) for n in (lengths, [])]
        assert separate[0] == separate[1]
        assert type(separate[0]) is type(result)
        hint = duration_hint_s(mutated.tobytes(), AudioFormat())
        assert hint is None or hint >= 0
        kinds.add(type(result))
    assert kinds == {str, list}  # some were refused, some were decoded


# --- block by block ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("container", "sample_rate"), [("WAV", RATE), ("FLAC", 44_100), ("OGG", 48_000)]
)
def test_blocks_join_to_the_whole_recording(
    container: str, sample_rate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "clip.audio"
    path.write_bytes(encode(noise(30_000), container=container, sample_rate=sample_rate))
    whole = load_audio(path, target_rate=RATE)
    monkeypatch.setattr(audio, "_BLOCK_FRAMES", 7_000)
    monkeypatch.setattr(audio, "_PIECE_BYTES", 5_000)
    blocks = list(load_blocks(path, target_rate=RATE))
    assert np.array_equal(np.concatenate(blocks), whole)
    assert max(len(block) for block in blocks) < len(whole) / 2


@pytest.mark.parametrize("container", ["WAV", "FLAC", "MP3"])
def test_drain_gives_in_blocks_what_finish_gives_at_once(
    container: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encode(noise(20_000), container=container, sample_rate=32_000)
    streams = [AudioStream(AudioFormat(), target_rate=RATE) for _ in range(2)]
    pushed = [stream.push(data) for stream in streams]
    assert np.array_equal(pushed[0], pushed[1])
    monkeypatch.setattr(audio, "_BLOCK_FRAMES", 3_000)
    blocks = list(streams[0].drain())
    assert np.array_equal(np.concatenate(blocks), streams[1].finish())


def test_blocks_of_no_bytes_are_refused() -> None:
    for pieces in ([], [b"", b""]):
        with pytest.raises(AudioError, match="no bytes at all"):
            list(decode_blocks(pieces, AudioFormat(), target_rate=RATE))


def test_blocks_come_before_what_is_broken_behind_them() -> None:
    samples = noise(4_000)
    samples[3_000] = np.nan
    data = encode(samples, container="WAV", subtype="FLOAT")
    blocks = decode_blocks([data[:8_000], data[8_000:]], AudioFormat(), target_rate=RATE)
    assert len(next(blocks)) > 1_000
    with pytest.raises(AudioError, match="not numbers"):
        list(blocks)


@pytest.mark.parametrize("source_rate", [8_000, 22_050, 44_100, RATE])
def test_resample_equals_a_stream_sample_for_sample(source_rate: int) -> None:
    samples = noise(source_rate // 2)
    stream = AudioStream(AudioFormat(Encoding.LINEAR16, source_rate), target_rate=RATE)
    data = pcm16(samples)
    streamed = [stream.push(data[i : i + 1_001]) for i in range(0, len(data), 1_001)]
    waveform = (np.frombuffer(data, "<i2") / 32768).astype(np.float32)
    resampled = resample(waveform, source_rate, RATE)
    assert np.array_equal(np.concatenate([*streamed, stream.finish()]), resampled)
    assert len(resampled) == pytest.approx(RATE / 2, abs=2)


def test_stopwatch_counts_what_passes_and_changes_nothing() -> None:
    blocks = [noise(n)[:, 0] for n in (0, 1_600, 800)]
    stopwatch = Stopwatch(RATE)
    passing = stopwatch.measure(blocks)
    assert stopwatch.seconds == 0.0
    assert [next(passing) is block for block in blocks[:2]] == [True, True]
    assert stopwatch.seconds == pytest.approx(0.1)
    assert next(passing) is blocks[2]
    assert list(passing) == []
    assert stopwatch.seconds == pytest.approx(0.15)
