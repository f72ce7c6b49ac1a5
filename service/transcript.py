"""The transcript of one file, and how it is written: txt, json, srt, vtt."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from service.recogniser import Segment, TimedWord

Format = Literal["txt", "json", "srt", "vtt"]

_LONGEST_CUE_S: Final = 6.0
_LONGEST_CUE_CHARACTERS: Final = 80
_CUE_PAUSE_S: Final = 0.8
_DECIMALS: Final = 3


@dataclass(frozen=True)
class Transcript:
    """What was recognised in one recording."""

    audio_filepath: str
    """The recording, as it was named."""
    duration_s: float
    """Its length in seconds."""
    segments: Sequence[Segment]
    """Consecutive stretches, at least one."""

    @property
    def words(self) -> list[TimedWord]:
        """The words of the best alternatives, in order."""
        return [word for segment in self.segments for word in segment.alternatives[0].words]

    @property
    def text(self) -> str:
        """The words, separated by single spaces."""
        return " ".join(word.text for word in self.words)

    @property
    def confidence(self) -> float:
        """Mean confidence of the words; 0 without words."""
        words = self.words
        return sum(word.confidence for word in words) / len(words) if words else 0.0


def write_as(transcript: Transcript, output_format: Format) -> str:
    """The whole content of a file in the given format, with its last line end."""
    return _WRITERS[output_format](transcript)


def _write_txt(transcript: Transcript) -> str:
    return transcript.text + "\n"


def _write_json(transcript: Transcript) -> str:
    row = {
        "audio_filepath": transcript.audio_filepath,
        "duration_s": round(transcript.duration_s, _DECIMALS),
        "transcript": transcript.text,
        "confidence": round(transcript.confidence, _DECIMALS),
        "words": [
            {
                "word": word.text,
                "start_s": round(word.start_s, _DECIMALS),
                "end_s": round(word.end_s, _DECIMALS),
                "confidence": round(word.confidence, _DECIMALS),
            }
            for word in transcript.words
        ],
        "alternatives": _alternatives(transcript),
        **_understood(transcript.segments),
    }
    return json.dumps(row, ensure_ascii=False) + "\n"


def _understood(segments: Sequence[Segment]) -> dict[str, Any]:
    """What was asked for where a domain was listened for: first, and in each of several parts."""
    heard = [_meaning(segment) for segment in segments if segment.intent is not None]
    if not heard:
        return {}
    asked = next((meaning for meaning in heard if meaning["intent"]["name"]), heard[0])
    first = {name: asked[name] for name in ("intent", "slots")}
    return {**first, "segments": heard} if len(heard) > 1 else first


def _meaning(segment: Segment) -> dict[str, Any]:
    assert segment.intent is not None
    return {
        "transcript": segment.alternatives[0].transcript,
        "end_s": round(segment.end_s, _DECIMALS),
        "intent": {
            "name": segment.intent.name,
            "confidence": round(segment.intent.confidence, _DECIMALS),
        },
        "slots": [
            {
                "name": slot.name,
                "value": slot.value,
                "raw": slot.raw,
                "start_s": round(slot.start_s, _DECIMALS),
                "end_s": round(slot.end_s, _DECIMALS),
                "confidence": round(slot.confidence, _DECIMALS),
            }
            for slot in segment.slots
        ],
    }


def _alternatives(transcript: Transcript) -> list[dict[str, str | float]]:
    """Readings of the whole recording: those of its one segment, or the best of each joined."""
    if len(transcript.segments) == 1:
        return [
            {"transcript": a.transcript, "score": round(a.score, _DECIMALS)}
            for a in transcript.segments[0].alternatives
        ]
    score = sum(segment.alternatives[0].score for segment in transcript.segments)
    return [{"transcript": transcript.text, "score": round(score, _DECIMALS)}]


def _write_srt(transcript: Transcript) -> str:
    cues = [
        f"{number}\n{_clock(cue[0].start_s, ',')} --> {_clock(cue[-1].end_s, ',')}\n{_join(cue)}\n"
        for number, cue in enumerate(_cues(transcript.words), start=1)
    ]
    return "\n".join(cues)


def _write_vtt(transcript: Transcript) -> str:
    cues = [
        f"\n{_clock(cue[0].start_s, '.')} --> {_clock(cue[-1].end_s, '.')}\n{_join(cue)}\n"
        for cue in _cues(transcript.words)
    ]
    return "WEBVTT\n" + "".join(cues)


def _cues(words: Sequence[TimedWord]) -> Iterator[list[TimedWord]]:
    """Group words into captions that end at pauses and stay readable."""
    cue: list[TimedWord] = []
    for word in words:
        if cue and (
            word.start_s - cue[-1].end_s > _CUE_PAUSE_S
            or word.end_s - cue[0].start_s > _LONGEST_CUE_S
            or len(_join([*cue, word])) > _LONGEST_CUE_CHARACTERS
        ):
            yield cue
            cue = []
        cue.append(word)
    if cue:
        yield cue


def _join(words: Sequence[TimedWord]) -> str:
    return " ".join(word.text for word in words)


def _clock(seconds: float, separator: str) -> str:
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    return (
        f"{minutes // 60:02d}:{minutes % 60:02d}:"
        f"{milliseconds // 1000:02d}{separator}{milliseconds % 1000:03d}"
    )


_WRITERS: Final[Mapping[Format, Callable[[Transcript], str]]] = {
    "txt": _write_txt,
    "json": _write_json,
    "srt": _write_srt,
    "vtt": _write_vtt,
}
