"""Long recordings against the same utterances one by one.

python benchmarks/long_recordings.py DEV.jsonl WORDS.jsonl [--minutes 10] [--decoder beam]
python benchmarks/long_recordings.py DEV.jsonl WORDS.jsonl --write FILE.wav --minutes 180

Utterances of all speakers are joined by 0.3 to 3 s of their own room tone until a recording has the
length asked for. With --write, one recording is written instead, for measuring memory from outside.
"""

from __future__ import annotations

import argparse
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import soundfile
from joined import FloatArray, Joined, join_utterances
from tqdm import tqdm

from service.bundle import find_bundle
from service.recogniser import DecoderName, Recogniser, load_recogniser
from service.scoring import ErrorCounts, count_errors


def main() -> None:
    """Measure and print, or write a recording."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("words", type=Path)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--decoder", choices=("greedy", "beam"), default="beam")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--write", type=Path, metavar="FILE.wav")
    arguments = parser.parse_args()
    recogniser = load_recogniser(find_bundle(arguments.bundle))
    parts = list(
        join_utterances(
            arguments.manifest,
            arguments.words,
            sample_rate=recogniser.sample_rate,
        )
    )
    n_samples = round(arguments.minutes * 60 * recogniser.sample_rate)
    if arguments.write is not None:
        write_recording(arguments.write, parts, n_samples, sample_rate=recogniser.sample_rate)
        return
    joined, alone = ErrorCounts(), ErrorCounts()
    for recording in tqdm(group_parts(parts, n_samples), unit="recording"):
        reference = " ".join(text for part in recording for text in part.texts)
        waveform = np.concatenate([part.waveform for part in recording])
        joined += count_errors([reference], [transcribe(recogniser, waveform, arguments.decoder)])
        texts = [
            transcribe(recogniser, utterance, arguments.decoder)
            for part in recording
            for utterance in part.waveforms
        ]
        alone += count_errors([reference], [" ".join(texts)])
    print(f"{arguments.decoder}, recordings of {arguments.minutes:g} minutes: WER {joined.wer:.2%}")
    print(f"the same utterances one by one: WER {alone.wer:.2%}")


def group_parts(parts: list[Joined], n_samples: int) -> list[list[Joined]]:
    """Consecutive parts, until each group has `n_samples`; the last one may be shorter."""
    groups: list[list[Joined]] = [[]]
    for part in parts:
        if sum(len(p.waveform) for p in groups[-1]) >= n_samples:
            groups.append([])
        groups[-1].append(part)
    return groups


def transcribe(recogniser: Recogniser, waveform: FloatArray, decoder: DecoderName) -> str:
    """The words of a recording."""
    segments = recogniser.recognise(waveform, decoder=decoder)
    return " ".join(segment.alternatives[0].transcript for segment in segments)


def write_recording(path: Path, parts: list[Joined], n_samples: int, *, sample_rate: int) -> None:
    """Write parts, again and again, until the file has `n_samples`."""
    with soundfile.SoundFile(path, "w", samplerate=sample_rate, channels=1) as file:
        n_parts = n_samples // max(1, min(len(part.waveform) for part in parts)) + 1
        for part in islice(cycle(parts), n_parts):
            if file.frames >= n_samples:
                break
            file.write(part.waveform)


if __name__ == "__main__":
    main()
