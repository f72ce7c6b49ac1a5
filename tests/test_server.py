"""A real server, a real client, a real port."""

from __future__ import annotations

import io
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import grpc
import numpy as np
import numpy.typing as npt
import pytest
import soundfile
from conftest import RunningServer, join_with_pauses, noise, run_server
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.audio import load_audio, to_pcm
from service.client import check_health, read_pcm, stream_recognise, stream_responses
from service.errors import ServerError
from service.manifest import Utterance
from service.pb.voxgate.v1 import speech_pb2 as pb
from service.recogniser import DecoderName, FloatArray, Recogniser
from service.request import StreamRequest
from service.scoring import count_errors
from service.session import Session

Config = pb.RecognitionConfig
Response = pb.StreamingRecognizeResponse


def _recognise(
    server: RunningServer, content: bytes, config: pb.RecognitionConfig | None = None
) -> pb.RecognizeResponse:
    request = pb.RecognizeRequest(config=config, audio=pb.RecognitionAudio(content=content))
    response: pb.RecognizeResponse = server.stub.Recognize(request, timeout=60)
    return response


def _refusal(
    server: RunningServer, content: bytes, config: pb.RecognitionConfig | None = None
) -> str:
    """The details of the INVALID_ARGUMENT that a request gets; the server must go on serving."""
    with pytest.raises(grpc.RpcError) as caught:
        _recognise(server, content, config)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert check_health(server.address)
    return str(caught.value.details())


def _stream_refusal(server: RunningServer, requests: Iterable[pb.StreamingRecognizeRequest]) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        list(server.stub.StreamingRecognize(iter(requests), timeout=60))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert check_health(server.address)
    return str(caught.value.details())


def _wav(samples: npt.NDArray[np.float32], sample_rate: int, subtype: str = "PCM_16") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, sample_rate, format="WAV", subtype=subtype)
    return buffer.getvalue()


def _transcript(response: pb.RecognizeResponse) -> str:
    return " ".join(result.alternatives[0].transcript for result in response.results)


def _config_request(**fields: object) -> pb.StreamingRecognizeRequest:
    streaming = pb.StreamingRecognitionConfig(**fields)  # type: ignore[arg-type]  # test shorthand
    return pb.StreamingRecognizeRequest(streaming_config=streaming)


def test_recognize_gives_what_the_recogniser_gives(
    server: RunningServer, recogniser: Recogniser, clips: list[Utterance]
) -> None:
    waveform = load_audio(clips[0].audio_path, target_rate=16_000)
    best = recogniser.best_decoder
    (expected,) = recogniser.recognise(waveform, decoder=best, n_best=3)
    response = _recognise(
        server, clips[0].audio_path.read_bytes(), Config(max_alternatives=3, language_code="en-GB")
    )
    (result,) = response.results
    assert [a.transcript for a in result.alternatives] == [
        a.transcript for a in expected.alternatives
    ]
    words = result.alternatives[0].words
    assert [w.word for w in words] == [w.text for w in expected.alternatives[0].words]
    starts = [w.start_time.ToMilliseconds() / 1000 for w in words]
    assert starts == pytest.approx([w.start_s for w in expected.alternatives[0].words], abs=1e-3)
    assert 0 < result.alternatives[0].confidence <= 1
    assert result.language_code == "en-US"
    assert response.total_billed_time.ToMilliseconds() == pytest.approx(len(waveform) / 16, abs=30)


@pytest.mark.parametrize("decoder", ["greedy", "beam"])
@pytest.mark.parametrize("profile", ["", "fast", "balanced", "offline"])
def test_stream_gives_what_the_session_gives(
    server: RunningServer,
    recogniser: Recogniser,
    clips: list[Utterance],
    decoder: DecoderName,
    profile: str,
) -> None:
    sample_rate, n_channels, pieces = read_pcm(clips[2].audio_path)
    pcm = list(pieces)
    config = Config(
        encoding=Config.LINEAR16,
        sample_rate_hertz=sample_rate,
        audio_channel_count=n_channels,
        max_alternatives=2,
        decoder=Config.GREEDY if decoder == "greedy" else Config.BEAM,
    )
    streaming = pb.StreamingRecognitionConfig(config=config, interim_results=True, profile=profile)
    results = list(stream_recognise(server.address, pcm, streaming))
    (final,) = [r for r in results if r.is_final]
    assert (len(results) > 1) == (profile != "offline")
    assert not any(r.alternatives[0].words for r in results if not r.is_final)
    session = Session(
        recogniser,
        StreamRequest(n_best=2, profile=profile or "balanced", interim_results=True),
        decoder=decoder,
    )
    expected = [r for piece in pcm for update in session.push(piece) for r in update.results]
    expected += [r for update in session.finish() for r in update.results]
    assert [r.alternatives[0].transcript.strip() for r in results] == [
        r.segment.alternatives[0].transcript for r in expected
    ]
    assert [a.transcript for a in final.alternatives] == [
        a.transcript for a in expected[-1].segment.alternatives
    ]
    assert final.result_end_time.ToMilliseconds() / 1000 == pytest.approx(
        expected[-1].segment.end_s, abs=1e-3
    )


@pytest.mark.parametrize(
    ("file_format", "subtype"),
    [("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")],
)
def test_every_format_is_transcribed(
    server: RunningServer, clips: list[Utterance], file_format: str, subtype: str
) -> None:
    samples = load_audio(clips[3].audio_path, target_rate=16_000)
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, 16_000, format=file_format, subtype=subtype)
    greedy = Config(decoder=Config.GREEDY)
    reference = _transcript(_recognise(server, _wav(samples, 16_000), greedy))
    transcript = _transcript(_recognise(server, buffer.getvalue(), greedy))
    assert count_errors([reference], [transcript]).cer < 0.3


def test_eight_channels_and_192_khz_are_transcribed(
    server: RunningServer, clips: list[Utterance]
) -> None:
    samples = load_audio(clips[1].audio_path, target_rate=16_000)
    expected = _transcript(_recognise(server, _wav(samples, 16_000)))
    eight = np.repeat(samples[:, None], 8, axis=1)
    assert _transcript(_recognise(server, _wav(eight, 16_000))) == expected
    fast = np.repeat(samples, 12)
    assert _transcript(_recognise(server, _wav(fast, 192_000))) != ""


def test_silence_is_an_empty_transcript(server: RunningServer) -> None:
    response = _recognise(server, _wav(np.zeros(16_000, np.float32), 16_000))
    assert _transcript(response) == ""


def test_odd_number_of_pcm_bytes_is_answered(server: RunningServer, clips: list[Utterance]) -> None:
    _, _, pieces = read_pcm(clips[1].audio_path)
    pcm = b"".join(pieces)
    config = Config(encoding=Config.LINEAR16, sample_rate_hertz=16_000)
    odd = _transcript(_recognise(server, pcm + b"\x01", config))
    assert odd == _transcript(_recognise(server, pcm, config))


def test_wav_cut_off_in_its_samples_is_answered(
    server: RunningServer, clips: list[Utterance]
) -> None:
    wav = _wav(load_audio(clips[1].audio_path, target_rate=16_000), 16_000)
    assert _transcript(_recognise(server, wav[: len(wav) // 2])) != ""


def test_bad_audio_is_refused_with_its_cause(server: RunningServer) -> None:
    tone = np.sin(np.arange(16_000) / 10).astype(np.float32)
    wav = _wav(tone, 16_000)
    not_a_number = tone.copy()
    not_a_number[5_000] = np.nan
    assert "empty" in _refusal(server, b"")
    assert "empty" in _refusal(server, _wav(tone[:0], 16_000))
    assert "cut off inside its header" in _refusal(server, wav[:30])
    assert "no header" in _refusal(server, b"To whom it may concern: " * 20)
    assert "not numbers" in _refusal(server, _wav(not_a_number, 16_000, "FLOAT"))
    assert "8000 Hz but the WAV header says 16000" in _refusal(
        server, wav, Config(sample_rate_hertz=8_000)
    )
    assert "2 channels" in _refusal(server, wav, Config(audio_channel_count=2))
    assert "FLAC" in _refusal(server, wav, Config(encoding=Config.FLAC))
    assert "MP4" in _refusal(server, b"\x00\x00\x00\x20ftypM4A " + bytes(1_000))
    assert "cannot be decoded" in _refusal(server, b"OggS" + bytes(range(256)) * 20)


@pytest.mark.parametrize("search_tokens", [Config.CHARACTERS, Config.PHONES])
@pytest.mark.parametrize("decoder", [Config.GREEDY, Config.BEAM])
def test_unwanted_phrase_is_not_read(
    server: RunningServer, clips: list[Utterance], decoder: int, search_tokens: int
) -> None:
    data = clips[0].audio_path.read_bytes()
    config = Config(decoder=decoder, search_tokens=search_tokens)  # type: ignore[arg-type]  # enum
    (plain,) = _recognise(server, data, config).results
    unwanted = max(plain.alternatives[0].transcript.split(), key=len)
    config.speech_contexts.append(pb.SpeechContext(phrases=[unwanted], boost=-60.0))
    (result,) = _recognise(server, data, config).results
    words = result.alternatives[0].transcript.split()
    assert len(words) > 3
    assert unwanted not in words


def test_phrases_that_cannot_be_used_are_refused(server: RunningServer) -> None:
    wav = _wav(np.zeros(16_000, np.float32), 16_000)
    heavy = pb.SpeechContext(phrases=["voxgate"], boost=1e4)
    assert "expected -100 to 100" in _refusal(server, wav, Config(speech_contexts=[heavy]))
    empty = pb.SpeechContext(phrases=["?"])
    assert "has no word" in _refusal(server, wav, Config(speech_contexts=[empty]))
    many = pb.SpeechContext(phrases=[f"word {'a' * i}" for i in range(1, 5_002)])
    assert "5001 phrases" in _refusal(server, wav, Config(speech_contexts=[many]))
    assert "reference is not there" in _refusal(server, wav, Config(decoder=Config.REFERENCE))


def test_fields_that_are_not_served_are_refused(server: RunningServer) -> None:
    wav = _wav(np.zeros(16_000, np.float32), 16_000)
    assert "no domain 'tea'; this model has barista" in _refusal(server, wav, Config(domain="tea"))
    twice = Config(domain="tea", model="en-small/barista")
    assert "model names the domain 'barista'" in _refusal(server, wav, twice)
    assert "encoding" in _refusal(server, wav, Config(encoding=Config.MULAW))
    assert "encoding" in _refusal(server, wav, Config(encoding=99))  # type: ignore[arg-type]
    assert "decoder" in _refusal(server, wav, Config(decoder=99))  # type: ignore[arg-type]
    assert "max_alternatives" in _refusal(server, wav, Config(max_alternatives=31))
    assert "sample_rate_hertz" in _refusal(server, wav, Config(sample_rate_hertz=-1))
    assert "en-small" in _refusal(server, wav, Config(model="de-large"))
    assert "en-US" in _refusal(server, wav, Config(language_code="de-DE"))
    with pytest.raises(grpc.RpcError, match="uri is not served"):
        server.stub.Recognize(pb.RecognizeRequest(audio=pb.RecognitionAudio(uri="gs://a/b")))


def test_stream_that_breaks_the_order_is_refused(server: RunningServer) -> None:
    audio = pb.StreamingRecognizeRequest(audio_content=b"\x00\x00")
    assert "closed before its config" in _stream_refusal(server, [])
    assert "expected streaming_config" in _stream_refusal(server, [audio])
    assert "expected streaming_config" in _stream_refusal(server, [pb.StreamingRecognizeRequest()])
    config = _config_request()
    assert "expected audio_content" in _stream_refusal(server, [config, audio, config])


def _responses(
    server: RunningServer, waveform: FloatArray, **fields: object
) -> list[pb.StreamingRecognizeResponse]:
    """What a greedy stream is told of a waveform that is sent in pieces of 0.1 s."""
    pcm = to_pcm(waveform)
    pieces = (pcm[i : i + 3_200] for i in range(0, len(pcm), 3_200))
    config = _config_request(config=Config(decoder=Config.GREEDY), **fields).streaming_config
    return list(stream_responses(server.address, pieces, config))


def _final_transcripts(responses: Iterable[pb.StreamingRecognizeResponse]) -> list[str]:
    return [r.alternatives[0].transcript for x in responses for r in x.results if r.is_final]


def test_disable_second_pass_gives_the_results_of_the_first(
    server: RunningServer, recogniser: Recogniser, waveforms: list[FloatArray]
) -> None:
    both = join_with_pauses(waveforms[:2])
    found = {
        disabled: _final_transcripts(_responses(server, both, disable_second_pass=disabled))
        for disabled in (False, True)
    }
    for disabled, transcripts in found.items():
        session = Session(recogniser, StreamRequest(second_pass=not disabled), decoder="greedy")
        updates = session.push(to_pcm(both)) + list(session.finish())
        expected = [u.results[0].segment.alternatives[0].transcript for u in updates]
        assert transcripts == expected
    assert found[False] != found[True]


def test_interim_response_is_what_is_committed_and_then_the_rest(
    server: RunningServer, waveforms: list[FloatArray]
) -> None:
    joined = join_with_pauses(waveforms[:3])
    responses = _responses(server, joined, interim_results=True, disable_second_pass=True)
    interim = [x for x in responses if x.results and not x.results[0].is_final]
    assert any(len(x.results) == 2 for x in interim)
    committed = ""
    for response in responses:
        text = "".join(r.alternatives[0].transcript for r in response.results)
        assert text == " ".join(text.split())
        assert text.startswith(committed)
        if response.results[0].is_final:
            assert len(response.results) == 1
            committed = ""
            continue
        stabilities = [r.stability for r in response.results]
        assert stabilities == sorted(stabilities, reverse=True)
        assert all(s < 0.9 for s in stabilities[1:])
        assert not any(r.alternatives[0].confidence for r in response.results)
        if stabilities[0] >= 0.9:
            committed = response.results[0].alternatives[0].transcript


def test_voice_activity_events_come_where_they_are_wanted(
    server: RunningServer, waveforms: list[FloatArray]
) -> None:
    both = join_with_pauses([waveforms[1], waveforms[3]])
    responses = _responses(server, both, enable_voice_activity_events=True)
    kinds = [x.speech_event_type for x in responses if not x.results]
    assert kinds == [Response.SPEECH_ACTIVITY_BEGIN, Response.SPEECH_ACTIVITY_END] * 2
    assert all(x.speech_event_type == 0 for x in responses if x.results)
    times = [x.speech_event_time.ToMilliseconds() for x in responses if not x.results]
    assert times == sorted(times)
    assert times[2] > len(waveforms[1]) / 16
    without = _responses(server, both)
    assert [x for x in responses if x.results] == without


def test_single_utterance_ends_the_stream(
    server: RunningServer, waveforms: list[FloatArray]
) -> None:
    both = join_with_pauses([waveforms[1], waveforms[3]])
    event, final = _responses(server, both, single_utterance=True)
    assert event.speech_event_type == Response.END_OF_SINGLE_UTTERANCE
    assert not event.results
    assert _final_transcripts([final]) == _final_transcripts(_responses(server, both))[:1]


def test_end_utterance_gives_a_final_before_the_audio_goes_on(
    server: RunningServer, waveforms: list[FloatArray]
) -> None:
    pcm = to_pcm(waveforms[0])
    has_answered = threading.Event()

    def requests() -> Iterator[pb.StreamingRecognizeRequest]:
        yield _config_request(config=Config(decoder=Config.GREEDY))
        yield pb.StreamingRecognizeRequest(audio_content=pcm[:96_000])
        yield pb.StreamingRecognizeRequest(end_utterance=pb.EndUtterance())
        assert has_answered.wait(30)
        yield pb.StreamingRecognizeRequest(audio_content=pcm[96_000:])

    stream = server.stub.StreamingRecognize(requests(), timeout=60)
    first = next(stream).results[0]
    has_answered.set()
    (second,) = [result for response in stream for result in response.results]
    assert first.is_final
    assert second.is_final
    assert first.result_end_time.ToMilliseconds() == pytest.approx(3_000, abs=100)
    start = second.alternatives[0].words[0].start_time
    assert start.ToMilliseconds() >= first.result_end_time.ToMilliseconds()


def test_each_endpointing_field_reaches_the_endpointer(
    server: RunningServer, waveforms: list[FloatArray]
) -> None:
    both = join_with_pauses([waveforms[1], waveforms[3]])

    def n_finals(**fields: object) -> int:
        config = pb.EndpointingConfig(**fields)  # type: ignore[arg-type]  # test shorthand
        return len(_final_transcripts(_responses(server, both, endpointing_config=config)))

    assert n_finals() == 2
    assert n_finals(stop_history=3_000) == 1
    assert n_finals(stop_threshold=0.3) > 2
    assert n_finals(longest_utterance=Duration(seconds=1, nanos=500_000_000)) > 2
    assert n_finals(start_history=40, start_threshold=1.0, stop_history=3_000) == 1
    nothing = {"start_history": 10_000, "start_threshold": 1.0}
    assert n_finals(**nothing) == 1  # empty, at the end
    pause = pb.EndpointingConfig(stop_history_eou=200, stop_threshold_eou=0.9, stop_history=3_000)
    responses = _responses(server, both, endpointing_config=pause, interim_results=True)
    committed = [r for x in responses for r in x.results if not r.is_final and r.stability >= 0.9]
    assert len(committed) >= 1


def test_endpointing_out_of_range_is_refused_by_field(server: RunningServer) -> None:
    for name, values in {
        "start_history": (-1, 0, 10_001),
        "start_threshold": (0.0, 1.5, float("nan")),
        "stop_history": (39, 2**31 - 1),
        "stop_threshold": (-0.1, 1.1),
        "stop_history_eou": (0, 20_000),
        "stop_threshold_eou": (0.0, 2.0),
        "longest_utterance": (
            Duration(),
            Duration(seconds=31),
            Duration(seconds=-1),
            Duration(seconds=2**62),
        ),
    }.items():
        for value in values:
            config = pb.EndpointingConfig(**{name: value})  # type: ignore[arg-type]  # as above
            refusal = _stream_refusal(server, [_config_request(endpointing_config=config)])
            assert refusal.startswith(name)
            assert "expected" in refusal


def test_unknown_profiles_are_refused_with_those_there_are(server: RunningServer) -> None:
    refusal = _stream_refusal(server, [_config_request(profile="turbo")])
    assert all(name in refusal for name in ("'turbo'", "fast", "balanced", "offline"))
    both = _config_request(profile="offline", disable_second_pass=True)
    assert "offline" in _stream_refusal(server, [both])


def test_stream_without_audio_ends_without_results(server: RunningServer) -> None:
    assert list(server.stub.StreamingRecognize(iter([_config_request()]), timeout=30)) == []


def test_stream_error_comes_after_the_results_so_far(
    server: RunningServer, clips: list[Utterance]
) -> None:
    """A stream that turns bad loses nothing that was recognised before."""
    samples = np.concatenate([load_audio(c.audio_path, target_rate=16_000) for c in clips])
    data = _wav(samples, 16_000, "FLOAT") + struct.pack("<f", float("nan")) * 4
    size = struct.pack("<I", 0xFFFFFFFF)
    place = data.index(b"data") + 4
    data = data[:place] + size + data[place + 4 :]

    def requests() -> Iterator[pb.StreamingRecognizeRequest]:
        yield _config_request(config=Config(decoder=Config.GREEDY))
        for start in range(0, len(data), 64_000):
            yield pb.StreamingRecognizeRequest(audio_content=data[start : start + 64_000])

    received: list[pb.StreamingRecognizeResponse] = []
    with pytest.raises(grpc.RpcError, match="not numbers"):
        received.extend(server.stub.StreamingRecognize(requests(), timeout=60))
    assert any(result.is_final for response in received for result in response.results)


def test_message_of_ten_minutes_of_pcm_is_accepted(server: RunningServer) -> None:
    config = Config(encoding=Config.LINEAR16, sample_rate_hertz=16_000, decoder=Config.GREEDY)
    response = _recognise(server, bytes(600 * 32_000), config)
    assert response.total_billed_time.seconds == pytest.approx(600, abs=1)
    assert _transcript(response) == ""


def test_long_recording_has_a_result_for_each_utterance(
    server: RunningServer, recogniser: Recogniser, waveforms: list[FloatArray]
) -> None:
    long = np.concatenate([join_with_pauses(waveforms * 2), noise(20.0)])
    config = Config(encoding=Config.LINEAR16, decoder=Config.GREEDY)
    response = _recognise(server, to_pcm(long), config)
    heard = (np.frombuffer(to_pcm(long), "<i2") / 32768).astype(np.float32)
    expected = recogniser.recognise(heard, decoder="greedy")
    assert len(expected) == 16
    assert [r.alternatives[0].transcript for r in response.results] == [
        s.alternatives[0].transcript for s in expected
    ]
    ends = [r.result_end_time.ToMilliseconds() / 1000 for r in response.results]
    assert ends == pytest.approx([s.end_s for s in expected], abs=1e-3)
    billed_s = response.total_billed_time.ToMilliseconds() / 1000
    assert billed_s == pytest.approx(len(long) / 16_000, abs=0.1)


def test_cancelled_streams_leave_the_server_serving(
    server: RunningServer, clips: list[Utterance]
) -> None:
    data = clips[0].audio_path.read_bytes()

    def endless() -> Iterator[pb.StreamingRecognizeRequest]:
        yield _config_request(interim_results=True)
        for _ in range(3):
            yield pb.StreamingRecognizeRequest(audio_content=data[:2_000])
            time.sleep(0.01)
        time.sleep(0.5)

    calls = [server.stub.StreamingRecognize(endless()) for _ in range(20)]
    time.sleep(0.2)
    for call in calls:
        call.cancel()
    assert _transcript(_recognise(server, data)) != ""


def test_models_are_listed(server: RunningServer) -> None:
    response = server.stub.ListModels(pb.ListModelsRequest())
    assert [(m.name, m.language_code, m.sample_rate_hertz) for m in response.models] == [
        ("en-small", "en-US", 16_000)
    ]
    assert list(response.models[0].domains) == ["barista"]
    profiles = response.models[0].profiles
    latencies_s = {p.name: p.latency.ToMilliseconds() / 1000 for p in profiles}
    assert latencies_s["fast"] == pytest.approx(0.635)
    assert latencies_s["balanced"] == pytest.approx(0.965)


@pytest.mark.parametrize(
    "config", [Config(domain="barista"), Config(model="en-small/barista")], ids=["domain", "model"]
)
def test_speech_that_is_no_order_has_an_empty_intent(
    server: RunningServer, clips: list[Utterance], config: pb.RecognitionConfig
) -> None:
    response = _recognise(server, clips[0].audio_path.read_bytes(), config)
    assert all(result.HasField("intent") for result in response.results)
    assert {result.intent.name for result in response.results} == {""}
    assert not any(result.slots for result in response.results)
    streaming = pb.StreamingRecognitionConfig(config=config, interim_results=True)
    data = clips[0].audio_path.read_bytes()
    results = list(stream_recognise(server.address, [data], streaming))
    assert all(result.HasField("intent") == result.is_final for result in results)


def test_without_a_domain_there_is_no_intent(server: RunningServer, clips: list[Utterance]) -> None:
    response = _recognise(server, clips[0].audio_path.read_bytes())
    assert not any(result.HasField("intent") for result in response.results)


def test_health_is_told_for_the_server_and_the_service(server: RunningServer) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", "voxgate.v1.Speech"):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_stop_lets_a_running_stream_end(clips: list[Utterance]) -> None:
    pcm = to_pcm(load_audio(clips[0].audio_path, target_rate=16_000))
    half = len(pcm) // 4 * 2
    is_running = threading.Event()
    with run_server("--decoder", "greedy", "--threads", "1") as server:

        def slow() -> Iterator[pb.StreamingRecognizeRequest]:
            yield _config_request(
                config=Config(encoding=Config.LINEAR16, sample_rate_hertz=16_000),
                interim_results=True,
            )
            yield pb.StreamingRecognizeRequest(audio_content=pcm[:half])
            assert is_running.wait(timeout=30)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(1.0)
            yield pb.StreamingRecognizeRequest(audio_content=pcm[half:])

        responses = []
        for response in server.stub.StreamingRecognize(slow(), timeout=60):
            is_running.set()
            responses.append(response)
        assert [r.is_final for r in responses[-1].results] == [True]
        assert responses[-1].results[0].result_end_time.ToMilliseconds() / 1000 == pytest.approx(
            clips[0].duration_s, abs=0.1
        )
        assert server.process.wait(timeout=20) == 0
        assert not check_health(server.address)


def test_start_fails_with_the_cause_and_status_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "service.cli", "serve", "--port", "0"]
    missing = subprocess.run(
        [*command, "--bundle", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert missing.returncode == 2
    assert "is no bundle" in missing.stderr
    cuda = subprocess.run(
        [*command, "--provider", "cuda"], capture_output=True, text=True, check=False
    )
    assert cuda.returncode == 2
    assert "make install-gpu" in cuda.stderr


def test_port_in_use_is_named(server: RunningServer) -> None:
    port = server.address.split(":")[1]
    command = [sys.executable, "-m", "service.cli", "serve", "--port", port]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in result.stderr


def test_client_says_when_no_server_answers() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        assert not check_health(address)
        with pytest.raises(ServerError, match="voxgate serve"):
            list(stream_recognise(address, [], pb.StreamingRecognitionConfig()))
