"""Interim text: lines where there is no terminal, colour that settles where there is one."""

from __future__ import annotations

import io
import re

from rich.console import Console

from service.live_text import colour, print_responses
from service.pb.voxgate.v1 import speech_pb2 as pb


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _result(
    transcript: str, *, stability: float = 0.0, is_final: bool = False, end_s: int = 1
) -> pb.StreamingRecognitionResult:
    result = pb.StreamingRecognitionResult(
        alternatives=[pb.SpeechRecognitionAlternative(transcript=transcript)],
        stability=stability,
        is_final=is_final,
    )
    result.result_end_time.FromSeconds(end_s)
    return result


def _response(*results: pb.StreamingRecognitionResult) -> pb.StreamingRecognizeResponse:
    return pb.StreamingRecognizeResponse(results=results)


_RESPONSES = [
    pb.StreamingRecognizeResponse(
        speech_event_type=pb.StreamingRecognizeResponse.SPEECH_ACTIVITY_BEGIN
    ),
    _response(_result("good", stability=0.95), _result(" morn", stability=0.3, end_s=2)),
    _response(_result("good morning", is_final=True, end_s=3)),
]


def test_print_responses_without_terminal_writes_a_line_each() -> None:
    output = io.StringIO()
    print_responses(_RESPONSES, output)
    assert output.getvalue().splitlines() == [
        "interim     2.00  good morn",
        "final       3.00  good morning",
    ]


def test_print_responses_on_a_terminal_leaves_only_final_text() -> None:
    output = _Terminal()
    print_responses(_RESPONSES, output)
    written = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.getvalue()).replace("\r", "\n")
    lines = [line for line in written.splitlines() if line.strip()]
    assert lines == ["good morn", "good morning"]
    assert output.getvalue().index("\x1b[2K") < output.getvalue().index("good morning")


def test_colour_tells_committed_words_from_the_tail() -> None:
    text = colour(_RESPONSES[1])
    assert text.plain == "good morn"
    styles = {text.plain[span.start : span.end]: span.style for span in text.spans}
    assert styles["good"] != styles[" morn"]
    assert Console(width=80).render_str(text.plain).plain == text.plain
