"""Transcripts as files: captions that stay readable, times that count on for hours."""

from __future__ import annotations

import json
import re
from dataclasses import replace

from service.recogniser import Alternative, Intent, Segment, Slot, TimedWord
from service.transcript import Transcript, write_as


def _segment(words: list[tuple[str, float, float]], *, score: float = -1.0) -> Segment:
    timed = tuple(TimedWord(text, start, end, 0.5) for text, start, end in words)
    best = Alternative(timed, score=score, confidence=0.5 if timed else 0.0)
    other = Alternative((), score=score - 1, confidence=0.0)
    return Segment((best, other), end_s=words[-1][2] if words else 1.0)


def _transcript(*segments: Segment) -> Transcript:
    return Transcript("a.wav", 12.3456789, segments)


def _captions(srt: str) -> list[str]:
    return [block.split("\n")[2] for block in srt.strip().split("\n\n")]


def test_captions_end_at_pauses() -> None:
    words = [("one", 0.0, 0.3), ("two", 0.4, 0.7), ("three", 2.0, 2.3)]
    assert _captions(write_as(_transcript(_segment(words)), "srt")) == ["one two", "three"]


def test_captions_stay_short_in_time_and_in_characters() -> None:
    steady = [("word", i * 0.5, i * 0.5 + 0.5) for i in range(100)]
    srt = write_as(_transcript(_segment(steady)), "srt")
    assert " ".join(_captions(srt)).split() == ["word"] * 100
    assert all(len(caption) <= 80 for caption in _captions(srt))
    fast = [("abcdefghij", i * 0.01, i * 0.01 + 0.01) for i in range(50)]
    lengths = [len(c) for c in _captions(write_as(_transcript(_segment(fast)), "srt"))]
    assert max(lengths) <= 80
    assert sum(lengths) > 500


def test_clock_counts_hours_and_rounds_to_milliseconds() -> None:
    words = [("late", 3 * 3600 + 59 * 60 + 59.9996, 4 * 3600 + 0.5)]
    transcript = _transcript(_segment(words))
    assert "04:00:00,000 --> 04:00:00,500" in write_as(transcript, "srt")
    assert "04:00:00.000 --> 04:00:00.500" in write_as(transcript, "vtt")


def test_nothing_said_is_an_empty_file_of_each_format() -> None:
    transcript = _transcript(_segment([]))
    assert write_as(transcript, "txt") == "\n"
    assert write_as(transcript, "srt") == ""
    assert write_as(transcript, "vtt") == "WEBVTT\n"
    row = json.loads(write_as(transcript, "json"))
    assert row["transcript"] == ""
    assert row["words"] == []
    assert row["confidence"] == 0.0
    assert row["duration_s"] == 12.346


def test_segments_are_joined_in_order() -> None:
    first = _segment([("one", 0.0, 0.5)], score=-1.0)
    second = _segment([("two", 30.0, 30.5)], score=-2.0)
    row = json.loads(write_as(_transcript(first, _segment([]), second), "json"))
    assert row["transcript"] == "one two"
    assert [w["start_s"] for w in row["words"]] == [0.0, 30.0]
    assert row["alternatives"] == [{"transcript": "one two", "score": -4.0}]
    assert write_as(_transcript(first, second), "txt") == "one two\n"


def test_one_segment_keeps_its_alternatives() -> None:
    row = json.loads(write_as(_transcript(_segment([("one", 0.0, 0.5)])), "json"))
    assert [a["transcript"] for a in row["alternatives"]] == ["one", ""]


def test_meaning_is_written_for_each_of_several_segments() -> None:
    def order(word: str, start_s: float, intent: str) -> Segment:
        slot = Slot("drink", word, word, start_s, start_s + 0.5, 0.9)
        spoken = _segment([(word, start_s, start_s + 0.5)])
        return replace(spoken, intent=Intent(intent, 0.8), slots=(slot,))

    latte, nothing, tea = order("latte", 1.0, "get"), order("er", 20.0, ""), order("tea", 40.0, "x")
    row = json.loads(write_as(_transcript(nothing, latte, tea), "json"))
    assert row["transcript"] == "er latte tea"
    assert row["intent"] == {"name": "get", "confidence": 0.8}
    assert [s["value"] for s in row["slots"]] == ["latte"]
    assert [s["transcript"] for s in row["segments"]] == ["er", "latte", "tea"]
    assert [s["intent"]["name"] for s in row["segments"]] == ["", "get", "x"]
    assert [s["slots"][0]["start_s"] for s in row["segments"]] == [20.0, 1.0, 40.0]
    assert "segments" not in json.loads(write_as(_transcript(latte), "json"))


def test_captions_are_numbered_from_one() -> None:
    words = [(f"w{i}", i * 2.0, i * 2.0 + 0.5) for i in range(5)]
    numbers = re.findall(r"^(\d+)\n", write_as(_transcript(_segment(words)), "srt"), re.MULTILINE)
    assert numbers == ["1", "2", "3", "4", "5"]
