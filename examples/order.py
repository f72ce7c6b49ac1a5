"""A voice interface over gRPC: streams a recording or the microphone, prints what is wanted.

python examples/order.py [FILE] [--address HOST:PORT] [--domain barista]

Start a server first: `voxgate serve`. Without a file it listens to the microphone until Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from service.client import read_pcm, start, stream_recognise
from service.errors import VoxgateError
from service.microphone import SAMPLE_RATE, record
from service.pb.voxgate.v1 import speech_pb2 as pb


def main() -> None:
    """Print every order."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--address", default="127.0.0.1:50051")
    parser.add_argument("--domain", default="barista")
    arguments = parser.parse_args()
    pieces: Iterable[bytes]
    if arguments.file is None:
        rate, n_channels, pieces = SAMPLE_RATE, 1, start(record())
    else:
        rate, n_channels, pieces = read_pcm(arguments.file)
    config = pb.StreamingRecognitionConfig(
        config=pb.RecognitionConfig(
            encoding=pb.RecognitionConfig.LINEAR16,
            sample_rate_hertz=rate,
            audio_channel_count=n_channels,
            domain=arguments.domain,
        )
    )
    for result in stream_recognise(arguments.address, pieces, config):
        if result.is_final:
            act(result)


def act(result: pb.StreamingRecognitionResult) -> None:
    """Do what was asked for: here, say it."""
    if not result.intent.name:
        print(f"?  {result.alternatives[0].transcript!r} is nothing that can be done here")
        return
    print(f"{result.intent.name} ({result.intent.confidence:.0%})")
    for slot in result.slots:
        when_s = slot.start_time.ToMilliseconds() / 1000
        print(f"  {slot.name}: {slot.value}  (heard {slot.raw!r} at {when_s:.2f} s)")


if __name__ == "__main__":
    try:
        main()
    except VoxgateError as error:
        sys.exit(f"order: {error}")
