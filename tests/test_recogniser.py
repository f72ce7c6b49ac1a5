"""The recogniser on real speech: short recordings whole, long ones in utterances."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
from conftest import join_with_pauses, noise

from service.audio import AudioFormat, Encoding, to_pcm
from service.decoding.greedy import GreedyDecoder
from service.features import log_mel
from service.manifest import Utterance
from service.recogniser import LONGEST_WHOLE_S, FloatArray, Recogniser, Segment
from service.request import StreamRequest
from service.scoring import count_errors, pool
from service.session import Session

LONGEST_UTTERANCE_S = 30.0


def _text(segments: list[Segment]) -> str:
    return " ".join(s.alternatives[0].transcript for s in segments)


def test_shipped_model_recognises_most_words_of_the_examples(
    recogniser: Recogniser, clips: list[Utterance], waveforms: list[FloatArray]
) -> None:
    references = [clip.text or "" for clip in clips]
    wer = {
        decoder: pool(
            count_errors([reference], [_text(recogniser.recognise(waveform, decoder=decoder))])
            for reference, waveform in zip(references, waveforms, strict=True)
        ).wer
        for decoder in ("greedy", "beam")
    }
    assert wer["beam"] < 0.6
    assert wer["beam"] < wer["greedy"]


@pytest.fixture(scope="module")
def long(waveforms: list[FloatArray]) -> FloatArray:
    """All example clips twice, a pause behind each: 99 s."""
    return join_with_pauses(waveforms * 2)


def test_recording_of_up_to_a_minute_is_one_segment(
    recogniser: Recogniser, long: FloatArray
) -> None:
    minute = long[: int(LONGEST_WHOLE_S * 16_000)]
    (whole,) = recogniser.recognise(minute, decoder="greedy")
    assert whole.end_s == pytest.approx(LONGEST_WHOLE_S, abs=0.05)
    emission = recogniser.emission(log_mel(minute, recogniser.features))
    assert whole == recogniser.segment(emission, first_frame=0, decoder="greedy")
    longer = long[: int((LONGEST_WHOLE_S + 0.5) * 16_000)]
    assert len(recogniser.recognise(longer, decoder="greedy")) >= 9


def test_long_recording_is_recognised_in_utterances(
    recogniser: Recogniser, waveforms: list[FloatArray], long: FloatArray
) -> None:
    segments = recogniser.recognise(long, decoder="greedy")
    assert len(segments) == 2 * len(waveforms)
    ends = [0.0, *(segment.end_s for segment in segments)]
    assert all(0 < b - a <= LONGEST_UTTERANCE_S for a, b in pairwise(ends))
    assert ends[-1] <= len(long) / 16_000
    words = [word for segment in segments for word in segment.alternatives[0].words]
    times = [time for word in words for time in (word.start_s, word.end_s)]
    assert times == sorted(times)
    assert words[-1].start_s > 90
    one_by_one = " ".join(_text(recogniser.recognise(w, decoder="greedy")) for w in waveforms * 2)
    differences = count_errors([one_by_one], [_text(segments)])
    assert differences.cer < 0.2  # other neighbours, and a pause instead of an end, change some


def test_long_recording_without_pauses_is_cut(
    recogniser: Recogniser, waveforms: list[FloatArray]
) -> None:
    speech = [w[4_000:-4_000] for w in waveforms[:4]]
    endless = np.concatenate(speech * 5)
    segments = recogniser.recognise(endless, decoder="greedy")
    ends = [0.0, *(segment.end_s for segment in segments)]
    assert all(0 < b - a <= LONGEST_UTTERANCE_S + 0.4 for a, b in pairwise(ends))
    assert ends[-1] == pytest.approx(len(endless) / 16_000, abs=0.5)
    words = [word for segment in segments for word in segment.alternatives[0].words]
    assert all(a.end_s <= b.start_s for a, b in pairwise(words))


@pytest.mark.parametrize("n_samples", [1_000_000, 777, 160_000])
def test_segments_are_the_same_however_the_blocks_are_cut(
    recogniser: Recogniser, long: FloatArray, n_samples: int
) -> None:
    for waveform in (long[: 5 * 16_000], long[: 70 * 16_000]):
        expected = recogniser.recognise(waveform, decoder="greedy", n_best=2)
        blocks = [waveform[i : i + n_samples] for i in range(0, len(waveform), n_samples)]
        blocks.insert(1, waveform[:0])
        found = recogniser.recognise_blocks(blocks, decoder="greedy", n_best=2)
        assert list(found) == expected


def test_long_recording_has_the_utterances_of_a_stream(
    recogniser: Recogniser, long: FloatArray
) -> None:
    """int8 scales depend on the batch, so the words may differ a little, but not the cuts."""
    pcm = to_pcm(long)
    session = Session(
        recogniser, StreamRequest(audio=AudioFormat(Encoding.LINEAR16)), decoder="greedy"
    )
    updates = [u for i in range(0, len(pcm), 32_000) for u in session.push(pcm[i : i + 32_000])]
    streamed = [update.results[0].segment for update in updates + list(session.finish())]
    heard = (np.frombuffer(pcm, "<i2") / 32768).astype(np.float32)
    segments = recogniser.recognise(heard, decoder="greedy")
    assert [s.end_s for s in segments] == [s.end_s for s in streamed]
    assert count_errors([_text(streamed)], [_text(segments)]).cer < 0.02


@pytest.mark.parametrize("silence_s", [0.0, 30.0])
@pytest.mark.parametrize("speech_s", [3.0, 70.0])
def test_progress_adds_up_to_the_whole_recording(
    recogniser: Recogniser, long: FloatArray, speech_s: float, silence_s: float
) -> None:
    waveform = np.concatenate([long[: int(speech_s * 16_000)], noise(silence_s)])
    passed: list[float] = []
    list(recogniser.recognise_blocks([waveform], decoder="greedy", on_audio=passed.append))
    assert min(passed) >= 0
    assert sum(passed) == pytest.approx(speech_s + silence_s, abs=1.5)


def test_first_pass_recognises_a_recording_as_one_utterance(
    recogniser: Recogniser, waveforms: list[FloatArray]
) -> None:
    waveform = join_with_pauses(waveforms[:2])
    found: list[Segment] = []
    for n_samples in (len(waveform), 5_000):
        blocks = [waveform[i : i + n_samples] for i in range(0, len(waveform), n_samples)]
        found += recogniser.recognise_first_pass(blocks, decoder="greedy", profile="fast")
    assert found[0] == found[1]
    assert found[0].end_s == pytest.approx(len(waveform) / 16_000, abs=0.05)
    whole = recogniser.recognise(waveform, decoder="greedy")
    assert count_errors([_text(whole)], [_text(found[:1])]).cer < 0.5


def test_latency_is_that_of_window_and_front_end(recogniser: Recogniser) -> None:
    assert recogniser.latency_s("fast") == pytest.approx(0.635)
    assert recogniser.latency_s("balanced") == pytest.approx(0.965)


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
    recogniser: Recogniser, waveforms: list[FloatArray]
) -> None:
    (segment,) = recogniser.recognise(waveforms[0], decoder="beam", n_best=5)
    assert len(segment.alternatives) == 5
    assert len({a.transcript for a in segment.alternatives}) == 5
    scores = [a.score for a in segment.alternatives]
    assert scores == sorted(scores, reverse=True)


def test_word_times_and_confidences_are_in_range(
    recogniser: Recogniser, waveforms: list[FloatArray]
) -> None:
    for waveform in waveforms:
        (segment,) = recogniser.recognise(waveform, decoder="beam")
        last_end = 0.0
        for word in segment.alternatives[0].words:
            assert last_end <= word.start_s < word.end_s <= len(waveform) / 16_000 + 0.04
            assert 0.0 <= word.confidence <= 1.0
            last_end = word.end_s


def test_padding_a_batch_does_not_change_the_words(
    recogniser: Recogniser, waveforms: list[FloatArray]
) -> None:
    """int8 scales depend on the batch, so what may change is bounded, not forbidden."""
    features = [log_mel(w, recogniser.features) for w in waveforms]
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
        both = (alone, row[: len(alone)])
        texts = [greedy.decode(e[:, : len(recogniser.tokens)])[0].text for e in both]
        counts.append(count_errors(texts[:1], texts[1:]))
    assert pool(counts).cer < 0.02


def test_timings_are_collected_by_stage(
    recogniser: Recogniser, waveforms: list[FloatArray], long: FloatArray
) -> None:
    before = dataclasses.replace(recogniser.timings)
    recogniser.recognise(waveforms[0], decoder="beam")
    after = dataclasses.replace(recogniser.timings)
    assert after.features_s > before.features_s
    assert after.segmentation_s == before.segmentation_s
    assert after.acoustic_model_s > before.acoustic_model_s
    assert after.decoding_s > before.decoding_s
    recogniser.recognise(long, decoder="greedy")
    assert recogniser.timings.segmentation_s > after.segmentation_s
    stages = dataclasses.astuple(recogniser.timings)
    assert recogniser.timings.total_s == pytest.approx(sum(stages))
