"""Streams the example clips to a server of its own and prints what it hears.

The server is started on a free port with the shipped bundle and stopped at the end. Each clip is
sent over gRPC as a live source would send it, only faster; each transcript is printed beside its
reference, with the time of every word.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from service.client import read_pcm, stream_recognise
from service.errors import VoxgateError
from service.manifest import Utterance, read_manifest
from service.pb.voxgate.v1 import speech_pb2 as pb
from service.scoring import count_errors, pool

EXAMPLES: Final = Path(__file__).resolve().parent
_LISTENING: Final = "listening on "


def main() -> None:
    """Transcribe every clip of the manifest."""
    utterances = read_manifest(EXAMPLES / "manifest.jsonl")
    counts = []
    with start_server() as address:
        for number, utterance in enumerate(utterances, start=1):
            words = recognise(address, utterance)
            transcript = " ".join(word.word for word in words)
            print(f"\n[{number}/{len(utterances)}] {utterance.name}")
            print(f"  reference   {utterance.text}")
            print(f"  transcript  {transcript}")
            print(f"  word times  {format_times(words)}", flush=True)
            counts.append(count_errors([utterance.text or ""], [transcript]))
    total = pool(counts)
    print(f"\n{total.n_words} words, word error rate {total.wer:.1%} on these clips")


@contextmanager
def start_server() -> Iterator[str]:
    """Run `voxgate serve` on a free port; yield its address."""
    command = [sys.executable, "-m", "service.cli", "serve", "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        yield _wait_for_address(server)
    finally:
        server.terminate()
        server.wait(timeout=20)
        print("server stopped", file=sys.stderr)


def _wait_for_address(server: subprocess.Popen[str]) -> str:
    assert server.stderr is not None
    said = []
    for line in server.stderr:
        print(f"server: {line.rstrip()}", file=sys.stderr, flush=True)
        said.append(line)
        if line.startswith(_LISTENING):
            return line.removeprefix(_LISTENING).split(": ")[0]
    raise SystemExit("the server did not start; it said: " + "".join(said))


def recognise(address: str, utterance: Utterance) -> list[pb.WordInfo]:
    """Stream one clip and return the words of its final results."""
    sample_rate, n_channels, pieces = read_pcm(utterance.audio_path)
    config = pb.RecognitionConfig(
        encoding=pb.RecognitionConfig.LINEAR16,
        sample_rate_hertz=sample_rate,
        audio_channel_count=n_channels,
    )
    results = stream_recognise(address, pieces, pb.StreamingRecognitionConfig(config=config))
    return [word for result in results for word in result.alternatives[0].words]


def format_times(words: list[pb.WordInfo]) -> str:
    """Words with their start and end, seconds."""
    return " ".join(
        f"{word.word}[{word.start_time.ToMilliseconds() / 1000:.2f}-"
        f"{word.end_time.ToMilliseconds() / 1000:.2f}]"
        for word in words
    )


if __name__ == "__main__":
    try:
        main()
    except VoxgateError as error:
        sys.exit(f"transcribe: {error}")
