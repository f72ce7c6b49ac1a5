"""How long results take beyond a profile's look-ahead: one stream, one thread.

python benchmarks/streaming_latency.py DEV.jsonl WORDS.jsonl [--bundle DIR] [--decoder greedy]

Recordings of joined utterances are pushed in pieces of 20 ms. A result is there when the push that
completed its window, or its endpoint, returns; the time of that push is the latency beyond the
look-ahead.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Final

import numpy as np
from joined import join_utterances
from tqdm import tqdm

from service.audio import to_pcm
from service.bundle import find_bundle
from service.recogniser import load_recogniser
from service.request import StreamRequest
from service.session import Session

_PIECE_S: Final = 0.02


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("words", type=Path)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--decoder", choices=("greedy", "beam", "rescored"), default="greedy")
    parser.add_argument("--recordings", type=int, default=30)
    arguments = parser.parse_args()
    recogniser = load_recogniser(find_bundle(arguments.bundle))
    joined = list(
        join_utterances(
            arguments.manifest,
            arguments.words,
            sample_rate=recogniser.sample_rate,
        )
    )
    step = max(1, len(joined) // arguments.recordings)
    n_bytes = int(_PIECE_S * recogniser.sample_rate) * 2
    for profile in recogniser.profiles:
        interim_ms: list[float] = []
        final_ms: list[float] = []
        busy_s, audio_s = 0.0, 0.0
        for recording in tqdm(joined[::step], desc=profile, unit="recording"):
            session = Session(
                recogniser,
                StreamRequest(profile=profile, interim_results=True),
                decoder=arguments.decoder,
            )
            pcm = to_pcm(recording.waveform)
            audio_s += len(recording.waveform) / recogniser.sample_rate
            for start in range(0, len(pcm), n_bytes):
                began = time.perf_counter()
                updates = session.push(pcm[start : start + n_bytes])
                taken_s = time.perf_counter() - began
                busy_s += taken_s
                for update in updates:
                    is_final = any(result.is_final for result in update.results)
                    (final_ms if is_final else interim_ms).append(1000 * taken_s)
        print(f"{profile}: look-ahead {recogniser.latency_s(profile):.3f} s")
        for name, values in (
            ("interim", interim_ms),
            ("final", final_ms),
            ("all", interim_ms + final_ms),
        ):
            p50, p95, p99 = np.percentile(values, [50, 95, 99])
            print(f"  {name:8} {len(values):5}  p50 {p50:.1f}  p95 {p95:.1f}  p99 {p99:.1f} ms")
        print(f"  {audio_s / busy_s:.0f} times real time")


if __name__ == "__main__":
    main()
