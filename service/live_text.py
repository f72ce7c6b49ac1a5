"""Interim results on a terminal: text that settles, or plain lines where there is no terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from service.pb.voxgate.v1 import speech_pb2 as pb

_COMMITTED_STABILITY = 0.9


def print_responses(responses: Iterable[pb.StreamingRecognizeResponse], output: TextIO) -> None:
    """Print what a stream is told as it comes: in colour on a terminal, else a line each."""
    console = Console(file=output, highlight=False, markup=False, soft_wrap=True)
    if console.is_terminal:
        _print_live(responses, console)
        return
    for response in responses:
        _print_lines(response, output)


def _print_live(responses: Iterable[pb.StreamingRecognizeResponse], console: Console) -> None:
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for response in responses:
            if not response.results:
                continue
            if response.results[0].is_final:
                live.update("", refresh=True)
                console.print(_transcript(response.results[0]))
                if response.results[0].HasField("intent"):
                    console.print(describe_intent(response.results[0]), style="cyan")
            else:
                live.update(colour(response), refresh=True)


def colour(response: pb.StreamingRecognizeResponse) -> Text:
    """The text of an interim response: what is committed in bold, the rest dim."""
    text = Text()
    for result in response.results:
        is_committed = result.stability >= _COMMITTED_STABILITY
        text.append(_transcript(result), style="bold green" if is_committed else "dim")
    return text


def _print_lines(response: pb.StreamingRecognizeResponse, output: TextIO) -> None:
    if not response.results:
        return
    last = response.results[-1]
    mark = "final  " if last.is_final else "interim"
    end_s = last.result_end_time.ToMilliseconds() / 1000
    transcript = "".join(_transcript(result) for result in response.results)
    output.write(f"{mark} {end_s:8.2f}  {transcript}\n")
    if last.HasField("intent"):
        output.write(f"intent            {describe_intent(last)}\n")
    output.flush()


def describe_intent(result: pb.StreamingRecognitionResult) -> str:
    """What was asked for, on one line."""
    slots = "".join(f", {slot.name}: {slot.value}" for slot in result.slots)
    return f"{result.intent.name or 'none'} ({result.intent.confidence:.2f}){slots}"


def _transcript(result: pb.StreamingRecognitionResult) -> str:
    return result.alternatives[0].transcript if result.alternatives else ""
