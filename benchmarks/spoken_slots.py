"""What recogniser errors cost the understanding: the same sentences as text and as speech.

python benchmarks/spoken_slots.py DATA understanding.onnx [--bundle DIR] [--sentences 200]

Sentences of the test part of DATA (see training/slot_data.py) are spoken by flite and espeak-ng,
recognised by the bundle, and parsed. A slot is right where a slot of its name has its words; a
sentence, where its intent and all its slots are.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from speaking import speak_all
from tqdm import tqdm

from service.bundle import find_bundle
from service.recogniser import load_recogniser
from service.scoring import count_errors
from service.text import normalise
from service.understanding import Parse, Understander, spans
from training.precision import processor_name
from training.slot_data import LabelledSentence, read_parts

_SEED: Final = 2_718


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("graph", type=Path)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--sentences", type=int, default=200)
    arguments = parser.parse_args()
    sentences = list(read_parts(arguments.data).test)
    random.Random(_SEED).shuffle(sentences)
    sentences = sentences[: arguments.sentences]
    texts = [normalise(" ".join(sentence.words)) for sentence in sentences]
    recogniser = load_recogniser(find_bundle(arguments.bundle), decoders=("beam",))
    heard = [
        recogniser.recognise(spoken.waveform, decoder="beam")[0].alternatives[0].transcript
        for spoken in tqdm(speak_all(texts, recogniser.sample_rate), "recognising", disable=None)
    ]
    understander = Understander(arguments.graph)
    print(f"{processor_name()}; {len(sentences)} sentences")
    print(f"word error rate of the recogniser: {count_errors(texts, heard).wer:.1%}")
    typed = understander.understand_many([sentence.words for sentence in sentences])
    report("as text", sentences, typed, [sentence.words for sentence in sentences])
    words = [tuple(transcript.split()) for transcript in heard]
    report("as speech", sentences, understander.understand_many(words), words)


def report(
    label: str,
    sentences: Sequence[LabelledSentence],
    parses: Sequence[Parse],
    parsed: Sequence[Sequence[str]],
) -> None:
    """Print how well sentences were understood."""
    n_wanted = n_found = n_slots = n_intents = n_right = 0
    for sentence, parse, words in zip(sentences, parses, parsed, strict=True):
        wanted = filled(sentence.words, sentence.labels)
        found = filled(words, parse.labels)
        n_wanted += wanted.total()
        n_found += found.total()
        n_slots += (wanted & found).total()
        n_intents += parse.intent == sentence.intent
        n_right += parse.intent == sentence.intent and wanted == found
    n = len(sentences)
    f1 = 2 * n_slots / max(1, n_wanted + n_found)
    print(f"{label}: slot F1 {f1:.1%}, intent {n_intents / n:.1%}, sentence {n_right / n:.1%}")


def filled(words: Sequence[str], labels: Sequence[str]) -> Counter[tuple[str, str]]:
    """Names and normalised words of the slots."""
    return Counter(
        (name, normalise(" ".join(words[begin:end]))) for name, begin, end in spans(labels)
    )


if __name__ == "__main__":
    main()
