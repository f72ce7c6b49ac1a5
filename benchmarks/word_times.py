"""Word times against an independent aligner, and the shifts that make up for CTC's late spikes.

python benchmarks/word_times.py DEV.jsonl WORDS.jsonl [--bundle DIR] [--decoder beam]

WORDS.jsonl comes from `benchmarks/forced_alignment.py`. Recognised words that are right are
compared with where the aligner hears them. The shifts are fitted on one half of the speakers and
scored on the other, both ways round; the last lines give those fitted on all.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from forced_alignment import Words, read_words
from tqdm import tqdm

from service.audio import load_audio
from service.bundle import find_bundle
from service.features import log_mel
from service.manifest import read_manifest
from service.recogniser import DecoderName, Recogniser, TimedWord, load_recogniser
from service.tuning import mark_right

DoubleArray = npt.NDArray[np.float64]
CLOSE_S = 0.1


@dataclass(frozen=True)
class Edge:
    """One edge of a word that was recognised right."""

    speaker: str
    kind: str
    late_s: float
    """How much later it was placed than the aligner has it."""


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("manifest", type=Path)
    parser.add_argument("words", type=Path)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--decoder", default="beam")
    arguments = parser.parse_args()
    decoder: DecoderName = arguments.decoder
    recogniser = load_recogniser(find_bundle(arguments.bundle), decoders=(decoder,))
    aligned = read_words(arguments.words)
    utterances = read_manifest(arguments.manifest)
    edges: list[Edge] = []
    for utterance in tqdm([u for u in utterances if u.name in aligned]):
        waveform = load_audio(utterance.audio_path, target_rate=recogniser.sample_rate)
        found = recognise(recogniser, waveform, decoder)
        edges += compare(utterance.speaker or "", aligned[utterance.name], found)
    print(f"{len(utterances) - len(aligned)} of {len(utterances)} utterances were not aligned")
    report(edges, frame_s=recogniser.frame_s)


def recognise(
    recogniser: Recogniser, waveform: npt.NDArray[np.float32], decoder: DecoderName
) -> tuple[TimedWord, ...]:
    """The words of a recording, read as one segment."""
    emission = recogniser.emission(log_mel(waveform, recogniser.features))
    segment = recogniser.segment(emission, first_frame=0, decoder=decoder)
    return segment.alternatives[0].words


def compare(speaker: str, reference: Words, found: tuple[TimedWord, ...]) -> list[Edge]:
    """The edges of the words that are right, in order."""
    is_found = mark_right(" ".join(w for w, _, _ in reference), [w.text for w in found])
    is_heard = mark_right(" ".join(w.text for w in found), [w for w, _, _ in reference])
    right = [word for word, yes in zip(found, is_found, strict=True) if yes]
    heard = [word for word, yes in zip(reference, is_heard, strict=True) if yes]
    edges = []
    if [w.text for w in right] == [w for w, _, _ in heard]:
        for word, (_, start_s, end_s) in zip(right, heard, strict=True):
            edges.append(Edge(speaker, "start", word.start_s - start_s))
            edges.append(Edge(speaker, "end", word.end_s - end_s))
    return edges


def report(edges: list[Edge], *, frame_s: float) -> None:
    """Print errors as they are, cross-fitted, and the shifts to ship."""
    late = np.array([edge.late_s for edge in edges])
    kinds = np.array([edge.kind for edge in edges])
    first = set(sorted({edge.speaker for edge in edges})[0::2])
    half = np.array([edge.speaker in first for edge in edges])
    shifted = late.copy()
    for kind in ("start", "end"):
        of_kind = kinds == kind
        for fitted_on in (half, ~half):
            shifted[of_kind & ~fitted_on] -= np.median(late[of_kind & fitted_on])
        print(
            f"{kind}: {describe(late[of_kind])}; cross-fitted shift: {describe(shifted[of_kind])}"
        )
    print(f"all boundaries: {describe(late)}; cross-fitted shift: {describe(shifted)}")
    for kind in ("start", "end"):
        shift = -np.median(late[kinds == kind]) / frame_s
        print(f"to ship: {kind}_shift_frames {shift:+.2f} beside the bundle's")


def describe(late_s: DoubleArray) -> str:
    """Median error and the share of small ones."""
    error_s = np.abs(late_s)
    return (
        f"{len(late_s)}, median error {1000 * np.median(error_s):.0f} ms, "
        f"{np.mean(error_s <= CLOSE_S):.1%} within {1000 * CLOSE_S:.0f} ms"
    )


if __name__ == "__main__":
    main()
