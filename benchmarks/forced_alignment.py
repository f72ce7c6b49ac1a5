"""Word times of a manifest from an independent aligner, pocketsphinx with its US English model.

python benchmarks/forced_alignment.py MANIFEST.jsonl WORDS.jsonl

Writes a line for each utterance that could be aligned: its name and its words with start and end in
seconds. Utterances with words the dictionary lacks are left out; the counts are printed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from pathlib import Path
from typing import Final

import numpy as np
from pocketsphinx import Decoder
from tqdm import tqdm

from service.audio import load_audio
from service.manifest import Utterance, read_manifest
from service.text import normalise

SAMPLE_RATE: Final = 16_000
_FRAMES_PER_S: Final = 100
_LARGEST_SAMPLE: Final = 32_767

Words = list[tuple[str, float, float]]

_decoder: Decoder | None = None


def main() -> None:
    """Align and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    utterances = read_manifest(arguments.manifest)
    with multiprocessing.Pool(arguments.jobs) as processes:
        aligned = list(tqdm(processes.imap(align, utterances), total=len(utterances)))
    rows = [
        {"audio_filepath": utterance.name, "words": words}
        for utterance, words in zip(utterances, aligned, strict=True)
        if words
    ]
    arguments.output.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} of {len(utterances)} utterances aligned")


def read_words(path: Path) -> dict[str, Words]:
    """What `main` wrote: words with start and end in seconds, by utterance name."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {row["audio_filepath"]: [tuple(word) for word in row["words"]] for row in rows}


def align(utterance: Utterance) -> Words:
    """The words of one utterance, none where it cannot be aligned."""
    global _decoder  # noqa: PLW0603  # one model a process
    if _decoder is None:
        _decoder = Decoder(samprate=SAMPLE_RATE, loglevel="FATAL")
    text = normalise(utterance.text or "")
    waveform = load_audio(utterance.audio_path, target_rate=SAMPLE_RATE)
    pcm = (np.clip(waveform, -1, 1) * _LARGEST_SAMPLE).astype("<i2").tobytes()
    try:
        _decoder.set_align_text(text)
        _decoder.start_utt()
        _decoder.process_raw(pcm, full_utt=True)
        _decoder.end_utt()
        segments = list(_decoder.seg() or [])
    except RuntimeError:
        return []
    words = [
        (s.word.split("(")[0], s.start_frame / _FRAMES_PER_S, (s.end_frame + 1) / _FRAMES_PER_S)
        for s in segments
        if s.word[0] not in "<["
    ]
    return words if [word for word, _, _ in words] == text.split() else []


if __name__ == "__main__":
    main()
