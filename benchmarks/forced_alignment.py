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

from pocketsphinx import Decoder
from tqdm import tqdm

from service.audio import load_audio, to_pcm
from service.manifest import Utterance, read_manifest
from service.text import normalise

SAMPLE_RATE: Final = 16_000
_FRAMES_PER_S: Final = 100

Words = list[tuple[str, float, float]]
Phones = list[tuple[str, int, int]]
"""Name, first frame of 10 ms, frames."""

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
    text = normalise(utterance.text or "")
    try:
        segments = list(_hear(utterance, text)[0].seg() or [])
    except RuntimeError:
        return []
    words = [
        (s.word.split("(")[0], s.start_frame / _FRAMES_PER_S, (s.end_frame + 1) / _FRAMES_PER_S)
        for s in segments
        if s.word[0] not in "<["
    ]
    return words if [word for word, _, _ in words] == text.split() else []


def align_phones(utterance: Utterance) -> Phones:
    """The phones of one utterance, none where it cannot be aligned."""
    try:
        decoder, pcm = _hear(utterance, normalise(utterance.text or ""))
        decoder.set_alignment()  # what was heard once more, with what is in the words
        _process(decoder, pcm)
        if not (alignment := decoder.get_alignment()):
            return []
        return [(phone.name, phone.start, phone.duration) for word in alignment for phone in word]
    except RuntimeError:
        return []


def _hear(utterance: Utterance, text: str) -> tuple[Decoder, bytes]:
    """The decoder after it heard an utterance and looked for the words of a text, and the audio."""
    global _decoder  # noqa: PLW0603  # one model a process
    if _decoder is None:
        _decoder = Decoder(samprate=SAMPLE_RATE, loglevel="FATAL")
    pcm = to_pcm(load_audio(utterance.audio_path, target_rate=SAMPLE_RATE))
    _decoder.set_align_text(text)
    _process(_decoder, pcm)
    return _decoder, pcm


def _process(decoder: Decoder, pcm: bytes) -> None:
    decoder.start_utt()
    decoder.process_raw(pcm, full_utt=True)
    decoder.end_utt()


if __name__ == "__main__":
    main()
