"""What int8 changes when utterances share a batch: dynamic scales are taken over the whole batch.

python benchmarks/batching.py DEV.jsonl [--bundle DIR] [--batch 8] [--decoder beam]

Every utterance is read alone, and padded in a batch with strangers drawn at random. Printed: how
many transcripts differ, and both word error rates.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from tqdm import tqdm

from service.audio import load_audio
from service.bundle import find_bundle
from service.features import log_mel
from service.manifest import read_manifest
from service.recogniser import load_recogniser
from service.scoring import count_errors


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--decoder", choices=("greedy", "beam"), default="beam")
    arguments = parser.parse_args()
    recogniser = load_recogniser(find_bundle(arguments.bundle), decoders=(arguments.decoder,))
    utterances = read_manifest(arguments.manifest)
    random.Random(1).shuffle(utterances)
    references: list[str] = []
    alone: list[str] = []
    batched: list[str] = []
    for first in tqdm(range(0, len(utterances), arguments.batch), unit="batch"):
        batch = utterances[first : first + arguments.batch]
        features = [
            log_mel(
                load_audio(u.audio_path, target_rate=recogniser.sample_rate), recogniser.features
            )
            for u in batch
        ]
        references += [u.text or "" for u in batch]
        for texts, emissions in (
            (alone, [recogniser.emission(f) for f in features]),
            (batched, recogniser.emissions(features)),
        ):
            segments = [
                recogniser.segment(e, first_frame=0, decoder=arguments.decoder) for e in emissions
            ]
            texts += [segment.alternatives[0].transcript for segment in segments]
    n_changed = sum(a != b for a, b in zip(alone, batched, strict=True))
    print(f"{n_changed} of {len(alone)} transcripts differ ({n_changed / len(alone):.1%})")
    print(f"WER alone {count_errors(references, alone).wer:.2%}", end=", ")
    print(f"in batches of {arguments.batch} {count_errors(references, batched).wer:.2%}")


if __name__ == "__main__":
    main()
