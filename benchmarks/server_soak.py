"""A server under load for long, with clients that behave and clients that do not.

python benchmarks/server_soak.py DEV.jsonl --streams 60 --minutes 30 [--rude 10]

Well-behaved clients stream recordings at the pace of speech, one after another; every final result
must be the one that a session of this process gives for the same audio. Meanwhile other clients
vanish without a word, stall until they are ended, send garbage, and cancel. At the end no stream
may be left open, and memory may not have grown since the warm-up.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import grpc
import psutil
from tqdm import tqdm

from service.bundle import find_bundle
from service.load_test import PIECE_S, join_audio
from service.manifest import read_manifest
from service.pb.voxgate.v1 import speech_pb2 as pb
from service.pb.voxgate.v1 import speech_pb2_grpc
from service.recogniser import Recogniser, load_recogniser
from service.request import StreamRequest
from service.session import Session

_RECORDING_S: Final = 45.0
_N_RECORDINGS: Final = 24
_WARM_UP_SHARE: Final = 0.15
_LOOK_EVERY_S: Final = 5.0
_CONFIG: Final = pb.StreamingRecognitionConfig(
    config=pb.RecognitionConfig(encoding=pb.RecognitionConfig.LINEAR16, sample_rate_hertz=16_000),
    interim_results=True,
)


@dataclass
class Tally:
    """What happened."""

    n_right: int = 0
    wrong: list[str] = field(default_factory=list)
    n_finals: int = 0
    rude: Counter[str] = field(default_factory=Counter)
    memory_mb: list[tuple[float, float]] = field(default_factory=list)
    """Seconds since the start, resident megabytes."""


def main() -> None:
    """Run and print; exit status 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--streams", type=int, default=40)
    parser.add_argument("--rude", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=30.0)
    arguments = parser.parse_args()
    folder = find_bundle(arguments.bundle)
    recogniser = load_recogniser(folder, decoders=("beam",))
    audios = join_audio(
        read_manifest(arguments.manifest), n_audios=_N_RECORDINGS, seconds=_RECORDING_S
    )
    expected = [_finals_of(recogniser, pieces) for pieces in tqdm(audios, "what is right")]
    tally = Tally()
    with start_server(folder) as (process, address, metrics_url):
        asyncio.run(
            soak(
                address,
                audios,
                expected,
                tally,
                n_streams=arguments.streams,
                n_rude=arguments.rude,
                seconds=60 * arguments.minutes,
                process=process,
            )
        )
        time.sleep(2.0)
        n_open = open_streams(metrics_url)
    is_good = report(tally, n_open, seconds=60 * arguments.minutes)
    sys.exit(0 if is_good else 1)


@contextmanager
def start_server(folder: Path) -> Iterator[tuple[psutil.Process, str, str]]:
    """A server of its own, stopped at the end: its process, address, and metrics."""
    port = 20_000 + os.getpid() % 20_000
    command = [sys.executable, "-m", "service.cli", "serve", "--port", "0"]
    command += ["--bundle", str(folder), "--idle-timeout", "5"]
    command += ["--metrics-port", str(port), "--log-format", "json"]
    with tempfile.NamedTemporaryFile("w", suffix=".log") as log:
        server = subprocess.Popen(command, stderr=log, text=True)
        try:
            address = _wait_for_address(Path(log.name))
            yield psutil.Process(server.pid), address, f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(timeout=30)


def _wait_for_address(log: Path) -> str:
    for _ in range(1200):
        text = log.read_text(encoding="utf-8")
        if "listening on " in text:
            return text.split("listening on ")[1].split(": ")[0]
        time.sleep(0.1)
    raise TimeoutError("the server did not start")


def _finals_of(recogniser: Recogniser, pieces: Sequence[bytes]) -> list[str]:
    session = Session(recogniser, StreamRequest(interim_results=True), decoder="beam")
    updates = [u for piece in pieces for u in session.push(piece)] + list(session.finish())
    results = [result for update in updates for result in update.results if result.is_final]
    return [result.segment.alternatives[0].transcript for result in results]


async def soak(
    address: str,
    audios: Sequence[Sequence[bytes]],
    expected: Sequence[Sequence[str]],
    tally: Tally,
    *,
    n_streams: int,
    n_rude: int,
    seconds: float,
    process: psutil.Process,
) -> None:
    """Run all clients until the time is over."""
    end = time.monotonic() + seconds
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        polite = [
            _behave(channel, audios, expected, tally, number=i, end=end) for i in range(n_streams)
        ]
        rude = [_misbehave(address, audios, tally, seed=i, end=end) for i in range(n_rude)]
        await asyncio.gather(*polite, *rude, _watch(process, tally, end=end))


async def _behave(
    channel: grpc.aio.Channel,
    audios: Sequence[Sequence[bytes]],
    expected: Sequence[Sequence[str]],
    tally: Tally,
    *,
    number: int,
    end: float,
) -> None:
    """Stream one recording after another and compare."""
    await asyncio.sleep(number * _RECORDING_S / 40 % _RECORDING_S)
    stub = speech_pb2_grpc.SpeechStub(channel)
    while time.monotonic() + _RECORDING_S < end:
        which = number % len(audios)
        number += 7
        try:
            finals = [
                result.alternatives[0].transcript
                async for response in stub.StreamingRecognize(_paced(audios[which]))
                for result in response.results
                if result.is_final
            ]
        except grpc.aio.AioRpcError as error:
            tally.wrong.append(f"{error.code().name}: {error.details()}")
            continue
        tally.n_finals += len(finals)
        if finals == list(expected[which]):
            tally.n_right += 1
        else:
            tally.wrong.append(_difference(expected[which], finals))


def _difference(expected: Sequence[str], finals: Sequence[str]) -> str:
    pairs = [(a, b) for a, b in zip(expected, finals, strict=False) if a != b]
    return f"{len(expected)} results expected, {len(finals)} came; differing: {pairs[:2]}"


async def _paced(pieces: Sequence[bytes]) -> AsyncIterator[pb.StreamingRecognizeRequest]:
    yield pb.StreamingRecognizeRequest(streaming_config=_CONFIG)
    start = time.monotonic()
    for number, piece in enumerate(pieces):
        await asyncio.sleep(max(0.0, start + number * PIECE_S - time.monotonic()))
        yield pb.StreamingRecognizeRequest(audio_content=piece)


async def _misbehave(
    address: str, audios: Sequence[Sequence[bytes]], tally: Tally, *, seed: int, end: float
) -> None:
    """Vanish, stall, send garbage or cancel, again and again."""
    draw = random.Random(seed)
    while time.monotonic() + 10.0 < end:
        how = draw.choice(["vanish", "stall", "garbage", "cancel"])
        pieces = draw.choice(audios)[: draw.randrange(1, 60)]
        channel = grpc.aio.insecure_channel(
            address, options=[("grpc.use_local_subchannel_pool", 1)]
        )
        call = speech_pb2_grpc.SpeechStub(channel).StreamingRecognize()
        try:
            await call.write(pb.StreamingRecognizeRequest(streaming_config=_CONFIG))
            for piece in pieces:
                sent = draw.randbytes(len(piece)) if how == "garbage" else piece
                await call.write(pb.StreamingRecognizeRequest(audio_content=sent))
                await asyncio.sleep(PIECE_S / 2)
            if how == "stall":
                async for _ in call:
                    pass
            elif how == "garbage":
                await call.write(pb.StreamingRecognizeRequest(streaming_config=_CONFIG))
                async for _ in call:
                    pass
            elif how == "cancel":
                call.cancel()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass
        tally.rude[how] += 1
        await channel.close()  # without half-closing what is open


async def _watch(process: psutil.Process, tally: Tally, *, end: float) -> None:
    start = time.monotonic()
    with tqdm(total=round(end - start), desc="soaking", unit="s") as bar:
        while time.monotonic() < end:
            await asyncio.sleep(_LOOK_EVERY_S)
            passed_s = time.monotonic() - start
            tally.memory_mb.append((passed_s, process.memory_info().rss / 1e6))
            bar.update(round(passed_s) - bar.n)
            bar.set_postfix(right=tally.n_right, wrong=len(tally.wrong))


def open_streams(metrics_url: str) -> int:
    """Streams that the server holds open."""
    with urllib.request.urlopen(f"{metrics_url}/metrics") as answer:  # noqa: S310
        lines = answer.read().decode().splitlines()
    (line,) = [x for x in lines if x.startswith('voxgate_open_calls{kind="stream"}')]
    return int(float(line.split()[-1]))


def report(tally: Tally, n_open: int, *, seconds: float) -> bool:
    """Print the figures; whether all is well."""
    warm = [mb for passed_s, mb in tally.memory_mb if passed_s > _WARM_UP_SHARE * seconds]
    third = max(1, len(warm) // 3)
    first_mb, last_mb = (sum(part) / len(part) for part in (warm[:third], warm[-third:]))
    print(f"{tally.n_right} streams right, {len(tally.wrong)} wrong; {tally.n_finals} results")
    for text in tally.wrong[:10]:
        print(f"  {text}")
    print("others: " + ", ".join(f"{n} {how}" for how, n in sorted(tally.rude.items())))
    print(f"streams left open: {n_open}")
    print(
        f"resident memory after the warm-up {warm[0]:.0f} MB, at the end {warm[-1]:.0f} MB; mean "
        f"of its first third {first_mb:.1f} MB, of its last {last_mb:.1f} MB"
    )
    return not tally.wrong and n_open == 0 and last_mb - first_mb <= 20


if __name__ == "__main__":
    main()
