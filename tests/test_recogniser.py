"""The recogniser and the session on real speech: files and streams must agree."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from service.audio import AudioFormat, load_audio
from service.decoding.greedy import GreedyDecoder
from service.errors import AudioError
from service.manifest import Utterance
from service.recogniser import FloatArray, Recogniser, Segment
from service.scoring import count_errors, pool
from service.session import Session


def _text(segments: list[Segment]) -> str:
    return " ".join(s.alternatives[0].transcript for s in segments)


def _stream(
    recogniser: Recogniser, data: bytes, sizes: list[int], *, interim: bool = False
) -> list[Segment]:
    """Final segments of a session that gets the bytes in pieces of the given sizes, repeated."""
    session = Session(recogniser, AudioFormat(), decoder="greedy", interim_results=interim)
    results, place, turn = [], 0, 0
    while place < len(data):
        size = sizes[turn % len(sizes)]
        results += session.push(data[place : place + size])
        place, turn = place + size, turn + 1
    results += session.finish()
    return [result.segment for result in results if result.is_final]


def _pcm(waveform: FloatArray) -> bytes:
    return (waveform * 32767).astype("<i2").tobytes()


def _load_all(recogniser: Recogniser, clips: list[Utterance]) -> list[FloatArray]:
    return [load_audio(clip.audio_path, target_rate=recogniser.sample_rate) for clip in clips]


def test_shipped_model_recognises_most_words_of_the_examples(
    recogniser: Recogniser, clips: list[Utterance]
) -> None:
    references = [clip.text or "" for clip in clips]
    waveforms = _load_all(recogniser, clips)
    wer = {
        decoder: pool(
            count_errors([reference], [_text(recogniser.recognise(waveform, decoder=decoder))])
            for reference, waveform in zip(references, waveforms, strict=True)
        ).wer
        for decoder in ("greedy", "beam")
    }
    assert wer["beam"] < 0.6
    assert wer["beam"] < wer["greedy"]


@pytest.mark.parametrize("sizes", [[2], [1, 3, 7], [3200], [1 << 20]])
def test_stream_equals_file_for_any_chunking(
    recogniser: Recogniser, clips: list[Utterance], sizes: list[int]
) -> None:
    data = _pcm(load_audio(clips[1].audio_path, target_rate=16_000)[:24_000])
    expected = _stream(recogniser, data, [len(data)])
    if sizes[0] < 10:
        data, expected = data[:16_000], _stream(recogniser, data[:16_000], [16_000])
    assert _stream(recogniser, data, sizes) == expected
    waveform = (np.frombuffer(data, "<i2") / 32768).astype(np.float32)
    assert recogniser.recognise(waveform, decoder="greedy") == expected


def test_interim_results_do_not_change_the_final_ones(
    recogniser: Recogniser, clips: list[Utterance]
) -> None:
    data = _pcm(load_audio(clips[0].audio_path, target_rate=16_000))
    session = Session(recogniser, AudioFormat(), decoder="greedy", interim_results=True)
    results = [r for i in range(0, len(data), 3200) for r in session.push(data[i : i + 3200])]
    results += session.finish()
    assert [r.is_final for r in results] == [False] * (len(results) - 1) + [True]
    assert len(results) > 5
    assert [r.segment for r in results if r.is_final] == _stream(recogniser, data, [len(data)])


def test_long_recording_is_recognised_in_segments(
    recogniser: Recogniser, clips: list[Utterance]
) -> None:
    waveforms = _load_all(recogniser, clips)
    pause = np.random.default_rng(1).normal(0, 1e-3, 8_000).astype(np.float32)
    long = np.concatenate([part for waveform in waveforms * 2 for part in (waveform, pause)])
    segments = recogniser.recognise(long, decoder="greedy")
    assert len(segments) >= 3
    assert all(s.n_feature_frames <= recogniser.window_frames for s in segments)
    ends = [s.end_s for s in segments]
    assert ends == sorted(ends)
    assert ends[-1] == pytest.approx(len(long) / 16_000, abs=0.05)
    words = [word for s in segments for word in s.alternatives[0].words]
    starts = [word.start_s for word in words]
    assert starts == sorted(starts)
    assert words[-1].start_s > 60
    one_by_one = " ".join(_text(recogniser.recognise(w, decoder="greedy")) for w in waveforms * 2)
    differences = count_errors([one_by_one], [_text(segments)])
    assert differences.cer < 0.2  # other neighbours, and a pause instead of an end, change some
    assert _stream(recogniser, _pcm(long), [50_000]) == _stream(recogniser, _pcm(long), [777_777])


def test_silence_gives_an_empty_transcript(recogniser: Recogniser) -> None:
    for decoder in ("greedy", "beam"):
        segments = recogniser.recognise(np.zeros(32_000, np.float32), decoder=decoder)
        assert _text(segments) == ""
        assert segments[0].alternatives[0].confidence == 0.0


@pytest.mark.parametrize("n_samples", [1, 399, 400, 401, 1_000])
def test_very_short_audio_gives_a_result(recogniser: Recogniser, n_samples: int) -> None:
    noise = np.random.default_rng(1).normal(0, 0.01, n_samples).astype(np.float32)
    for decoder in ("greedy", "beam"):
        assert len(recogniser.recognise(noise, decoder=decoder)) == 1


def test_alternatives_are_distinct_and_sorted(
    recogniser: Recogniser, clips: list[Utterance]
) -> None:
    waveform = load_audio(clips[0].audio_path, target_rate=16_000)
    (segment,) = recogniser.recognise(waveform, decoder="beam", n_best=5)
    assert len(segment.alternatives) == 5
    assert len({a.transcript for a in segment.alternatives}) == 5
    scores = [a.score for a in segment.alternatives]
    assert scores == sorted(scores, reverse=True)


def test_word_times_and_confidences_are_in_range(
    recogniser: Recogniser, clips: list[Utterance]
) -> None:
    for clip in clips:
        waveform = load_audio(clip.audio_path, target_rate=16_000)
        (segment,) = recogniser.recognise(waveform, decoder="beam")
        last_end = 0.0
        for word in segment.alternatives[0].words:
            assert last_end <= word.start_s < word.end_s <= len(waveform) / 16_000 + 0.04
            assert 0.0 <= word.confidence <= 1.0
            last_end = word.end_s


def test_padding_a_batch_does_not_change_the_words(
    recogniser: Recogniser, clips: list[Utterance]
) -> None:
    """int8 scales depend on the batch, so what may change is bounded, not forbidden."""
    from service.features import log_mel  # noqa: PLC0415

    features = [log_mel(w, recogniser.features) for w in _load_all(recogniser, clips)]
    lengths = np.array([len(f) for f in features])
    batch = np.zeros((len(features), lengths.max(), features[0].shape[1]), np.float32)
    for row, f in zip(batch, features, strict=True):
        row[: len(f)] = f
    together = recogniser.engine.log_probs(batch, lengths)
    greedy = recogniser.decoders["greedy"]
    assert isinstance(greedy, GreedyDecoder)
    counts = []
    for row, f in zip(together, features, strict=True):
        alone = recogniser.engine.log_probs(f[None], np.array([len(f)]))[0]
        texts = [greedy.decode(e)[0].text for e in (alone, row[: len(alone)])]
        counts.append(count_errors(texts[:1], texts[1:]))
    assert pool(counts).cer < 0.02


def test_session_refuses_broken_audio_and_others_go_on(
    recogniser: Recogniser, clips: list[Utterance]
) -> None:
    broken = Session(recogniser, AudioFormat(), decoder="greedy")
    with pytest.raises(AudioError, match="no header"):
        broken.push(b"dear server, this is a letter and no audio at all. " * 20)
    data = clips[0].audio_path.read_bytes()
    assert _text(_stream(recogniser, data, [1000])) != ""


def test_timings_are_collected_by_stage(recogniser: Recogniser, clips: list[Utterance]) -> None:
    before = dataclasses.replace(recogniser.timings)
    recogniser.recognise(load_audio(clips[0].audio_path, target_rate=16_000), decoder="beam")
    after = recogniser.timings
    assert after.features_s > before.features_s
    assert after.acoustic_model_s > before.acoustic_model_s
    assert after.decoding_s > before.decoding_s
