"""How soon utterances end, and what endpoints cut, on utterances joined by 0.3 to 3 s of room tone.

python benchmarks/endpointing.py DEV.jsonl WORDS.jsonl   (WORDS from benchmarks/forced_alignment.py)

A word is cut when an endpoint falls inside it, or when it is right where the whole recording is
decoded unsegmented and wrong next to an endpoint.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import jiwer
import numpy as np
from joined import Joined, join_utterances
from tqdm import tqdm

from service.audio import to_pcm
from service.bundle import find_bundle
from service.endpointing import EndpointSettings
from service.features import log_mel
from service.recogniser import DecoderName, Recogniser, load_recogniser
from service.request import StreamRequest
from service.scoring import ErrorCounts, count_errors
from service.session import Session

_PIECE_S: Final = 0.02
_SHORT_PAUSE_S: Final = 0.5


@dataclass
class Report:
    """What was counted over all recordings."""

    delays_s: list[float] = field(default_factory=list)
    """From the end of the last word to the arrival of the sample that ends the utterance."""
    n_words: int = 0
    n_inside: int = 0
    """Words that an endpoint falls into."""
    n_harmed: int = 0
    """Words next to an endpoint that are right without endpoints and wrong with them."""
    n_mended: int = 0
    """The other way round."""
    pauses_s: list[float] = field(default_factory=list)
    """Length of every pause between two words."""
    split_s: list[float] = field(default_factory=list)
    """Length of every pause that has an endpoint."""
    segmented: ErrorCounts = field(default_factory=ErrorCounts)
    whole: ErrorCounts = field(default_factory=ErrorCounts)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("words", type=Path)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--decoder", choices=("greedy", "beam"), default="beam")
    parser.add_argument("--profile", default="balanced")
    parser.add_argument("--no-second-pass", action="store_true")
    parser.add_argument("--longest", type=float, default=60.0, help="seconds of a recording")
    parser.add_argument("--corpus", help="only this corpus")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    arguments = parser.parse_args()
    settings = EndpointSettings(
        **{name: json.loads(value) for name, value in (pair.split("=") for pair in arguments.set)}
    )
    folder = find_bundle(arguments.bundle)
    recogniser = load_recogniser(folder)
    joined = list(
        join_utterances(
            arguments.manifest,
            arguments.words,
            sample_rate=recogniser.sample_rate,
            corpus=arguments.corpus,
            longest_s=arguments.longest,
        )
    )
    report = Report()
    for recording in tqdm(joined, unit="recording"):
        measure_recording(
            recogniser,
            recording,
            report=report,
            decoder=arguments.decoder,
            profile=arguments.profile,
            second_pass=not arguments.no_second_pass,
            settings=settings,
        )
    print_report(report)


def measure_recording(
    recogniser: Recogniser,
    recording: Joined,
    *,
    report: Report,
    decoder: DecoderName,
    profile: str,
    second_pass: bool,
    settings: EndpointSettings,
) -> None:
    """Stream one recording and count what its endpoints do."""
    session = Session(
        recogniser,
        StreamRequest(profile=profile, second_pass=second_pass, endpointing=settings),
        decoder=decoder,
    )
    pcm = to_pcm(recording.waveform)
    n_bytes = int(_PIECE_S * recogniser.sample_rate) * 2
    transcript, endpoints_s, sent_s = [], [], []
    for start in range(0, len(pcm), n_bytes):
        for update in session.push(pcm[start : start + n_bytes]):
            for result in update.results:
                transcript.append(result.segment.alternatives[0].transcript)
                endpoints_s.append(result.segment.end_s)
                sent_s.append((start + n_bytes) / 2 / recogniser.sample_rate)
    for update in session.finish():
        transcript += [r.segment.alternatives[0].transcript for r in update.results]
    features = log_mel(recording.waveform, recogniser.features)
    whole = recogniser.segment(recogniser.emission(features), first_frame=0, decoder=decoder)
    reference = " ".join(word for word, _, _ in recording.words)
    report.segmented += count_errors([reference], [" ".join(transcript)])
    report.whole += count_errors([reference], [whole.alternatives[0].transcript])
    with_endpoints = find_right_words(reference, " ".join(transcript))
    without = find_right_words(reference, whole.alternatives[0].transcript)
    count_endpoints(recording, endpoints_s, sent_s, report)
    starts = np.array([start for _, start, _ in recording.words])
    ends = np.array([end for _, _, end in recording.words])
    near = set()
    for endpoint_s in endpoints_s:
        after = int(np.searchsorted(starts, endpoint_s))
        before = int(np.searchsorted(ends, endpoint_s)) - 1
        near |= {before, after}
    near &= set(range(len(starts)))
    report.n_words += len(starts)
    report.n_harmed += len(near & (without - with_endpoints))
    report.n_mended += len(near & (with_endpoints - without))


def count_endpoints(
    recording: Joined, endpoints_s: list[float], sent_s: list[float], report: Report
) -> None:
    """Add delays, words hit and pauses split to the report."""
    for endpoint_s, final_s in zip(endpoints_s, sent_s, strict=True):
        report.n_inside += sum(s < endpoint_s < e for _, s, e in recording.words)
        before = [end for _, _, end in recording.words if end <= endpoint_s]
        if before:
            report.delays_s.append(final_s - before[-1])
    for (_, _, end), (_, start, _) in zip(recording.words, recording.words[1:], strict=False):
        if start > end:
            report.pauses_s.append(start - end)
            if any(end <= endpoint_s <= start for endpoint_s in endpoints_s):
                report.split_s.append(start - end)


def find_right_words(reference: str, hypothesis: str) -> set[int]:
    """Positions of the reference words that the hypothesis has right."""
    chunks = jiwer.process_words(reference, hypothesis or "-").alignments[0]
    return {i for c in chunks if c.type == "equal" for i in range(c.ref_start_idx, c.ref_end_idx)}


def print_report(report: Report) -> None:
    """Print the figures."""
    delays = np.array(report.delays_s)
    n_short = sum(p < _SHORT_PAUSE_S for p in report.pauses_s)
    n_split = sum(p < _SHORT_PAUSE_S for p in report.split_s)
    n_long = sum(p >= 1.0 for p in report.pauses_s)
    n_found = sum(p >= 1.0 for p in report.split_s)
    p50, p95 = np.percentile(delays, [50, 95])
    n_cut = report.n_inside + report.n_harmed
    print(f"endpoints {len(delays)}, delay median {p50:.2f} s, 95 % {p95:.2f} s")
    print(
        f"words cut {n_cut} of {report.n_words} ({n_cut / report.n_words:.2%}): {report.n_inside} "
        f"hit, {report.n_harmed} wrong beside an endpoint (and {report.n_mended} right there)"
    )
    print(f"pauses under {_SHORT_PAUSE_S} s split: {n_split} of {n_short}")
    print(f"pauses of a second or more found: {n_found} of {n_long}")
    print(f"WER with endpoints {report.segmented.wer:.2%}, without {report.whole.wer:.2%}")


if __name__ == "__main__":
    main()
