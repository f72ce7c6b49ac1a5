"""One stream for hours, on a simulated clock: does memory or the time of a step grow?

python benchmarks/stream_soak.py DEV.jsonl WORDS.jsonl [--hours 4] [--bundle DIR] [--decoder greedy]

Dev utterances joined by their room tone are sent again and again as one stream, in pieces of
100 ms. Printed: resident memory after five minutes and after each hour, and the 95th percentile of
the time of a step (a push that brings a result) in each hour.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import Final

import numpy as np
import psutil
from joined import join_utterances
from tqdm import tqdm

from service.audio import to_pcm
from service.bundle import find_bundle
from service.recogniser import load_recogniser
from service.request import StreamRequest
from service.session import Session

_PIECE_S: Final = 0.1
_SETTLED_S: Final = 300.0


def main() -> None:
    """Stream and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("words", type=Path)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--decoder", choices=("greedy", "beam"), default="greedy")
    parser.add_argument("--hours", type=float, default=4.0)
    arguments = parser.parse_args()
    recogniser = load_recogniser(find_bundle(arguments.bundle))
    joined = join_utterances(
        arguments.manifest,
        arguments.words,
        sample_rate=recogniser.sample_rate,
    )
    recordings = [to_pcm(j.waveform) for j in joined]
    session = Session(recogniser, StreamRequest(interim_results=True), decoder=arguments.decoder)
    process = psutil.Process()
    n_bytes = int(_PIECE_S * recogniser.sample_rate) * 2
    steps_s: list[list[float]] = [[] for _ in range(int(np.ceil(arguments.hours)))]
    sent_s, n_finals, last_end_s = 0.0, 0, 0.0
    resident_mb: list[float] = []  # after five minutes, then every hour
    with tqdm(total=round(arguments.hours * 3600), unit="s") as bar:
        for pcm in itertools.cycle(recordings):
            for start in range(0, len(pcm), n_bytes):
                began = time.perf_counter()
                updates = session.push(pcm[start : start + n_bytes])
                taken_s = time.perf_counter() - began
                if updates:
                    steps_s[int(sent_s / 3600)].append(taken_s)
                for update in updates:
                    for result in update.results:
                        if result.is_final:
                            assert result.segment.end_s >= last_end_s, "time went backwards"
                            last_end_s = result.segment.end_s
                            n_finals += 1
                piece = pcm[start : start + n_bytes]
                sent_s += len(piece) / 2 / recogniser.sample_rate
                if sent_s >= (_SETTLED_S if not resident_mb else 3600.0 * len(resident_mb)):
                    resident_mb.append(process.memory_info().rss / 1e6)
                if sent_s >= arguments.hours * 3600:
                    break
            bar.update(round(sent_s) - bar.n)
            if sent_s >= arguments.hours * 3600:
                break
    p95_ms = [1000 * float(np.percentile(steps, 95)) for steps in steps_s if steps]
    print(f"{sent_s / 3600:.2f} hours in one stream, {n_finals} finals, last at {last_end_s:.1f} s")
    sizes = ", ".join(f"{mb:.1f} MB" for mb in resident_mb)
    print(f"resident memory after five minutes and after each hour: {sizes}")
    print("p95 of a step by hour: " + ", ".join(f"{ms:.1f} ms" for ms in p95_ms))
    print(f"last hour / first hour: {p95_ms[-1] / p95_ms[0]:.2f}")


if __name__ == "__main__":
    main()
