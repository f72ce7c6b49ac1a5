"""How often a domain's commands are understood whole, and how often other speech is taken for one.

python benchmarks/domains.py DOMAIN.yaml [--domain DIR] [--commands 200] [--snr 6,12,18,24]
    [--foreign DEV.jsonl] [--spoken COMMANDS.jsonl]

Commands are drawn from the file with a seed that building a domain does not use, and spoken by
whichever of espeak-ng and flite is installed, each by the next of their voices; a command is right
when its intent and all its slots are. Noise is babble: six voices at once. `--foreign` names
recordings that belong to no domain: any intent is a false one. `--spoken` names recordings of
commands instead: lines with `audio_filepath`, `intent` and `slots`, an object of names and values.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from conditions import add_noise, make_babble
from speaking import speak_all
from tqdm import tqdm

from service.audio import load_audio
from service.bundle import find_bundle
from service.domain import find_domain, load_domain
from service.manifest import read_manifest
from service.recogniser import FloatArray, Recogniser, Segment, load_recogniser
from service.understanding import spans
from training.grammar import Grammar, load_grammar
from training.precision import processor_name
from training.slot_data import LabelledSentence

_SEED: Final = 2_718


@dataclass(frozen=True)
class Command:
    """What is said and what it means."""

    voice: str
    waveform: FloatArray
    intent: str
    slots: frozenset[tuple[str, str]]
    text: str = ""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--domain", default="", help="name or folder; default the file's name")
    parser.add_argument("--commands", type=int, default=200)
    parser.add_argument("--snr", default="6,12,18,24", help="decibels, noise beside clean")
    parser.add_argument("--foreign", type=Path, action="append", default=[])
    parser.add_argument("--spoken", type=Path)
    parser.add_argument("--verbose", action="store_true", help="print what was not understood")
    arguments = parser.parse_args()
    grammar = load_grammar(arguments.source)
    bundle = find_bundle(arguments.bundle)
    folder = find_domain(arguments.domain or grammar.spec.name, bundle)
    name = load_domain(folder).config.name
    recogniser = load_recogniser(bundle, decoders=("beam",), domains=[folder]).in_domain(name)
    print(f"{processor_name()}; domain {name}")
    commands = (
        list(read_commands(arguments.spoken, recogniser.sample_rate))
        if arguments.spoken
        else speak_commands(grammar, arguments.commands, recogniser.sample_rate)
    )
    babble = make_babble([command.waveform for command in commands])
    conditions: list[float | None] = [None, *map(float, filter(None, arguments.snr.split(",")))]
    for snr_db in conditions:
        report(recogniser, commands, babble, snr_db, is_verbose=arguments.verbose)
    for manifest in arguments.foreign:
        report_foreign(recogniser, manifest, is_verbose=arguments.verbose)


def read_commands(manifest: Path, sample_rate: int) -> Iterator[Command]:
    """Recorded commands."""
    for line in manifest.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        path = manifest.parent / row["audio_filepath"]
        waveform = load_audio(path, target_rate=sample_rate)
        slots = frozenset(row["slots"].items())
        yield Command(row.get("speaker", ""), waveform, row["intent"], slots)


def speak_commands(grammar: Grammar, n: int, sample_rate: int) -> list[Command]:
    """Commands from speech synthesis."""
    sentences = list(grammar.sample(n, seed=_SEED))
    texts = [" ".join(sentence.words) for sentence in sentences]
    return [
        Command(s.engine, s.waveform, sentence.intent, slots_of(sentence, grammar), s.text)
        for sentence, s in zip(sentences, speak_all(texts, sample_rate), strict=True)
    ]


def slots_of(sentence: LabelledSentence, grammar: Grammar) -> frozenset[tuple[str, str]]:
    """Names and values, as results should have them."""
    values: Mapping[str, Mapping[tuple[str, ...], str]] = {
        name: {way.words: way.value for way in ways} for name, ways in grammar.values.items()
    }
    return frozenset(
        (name, values[name][sentence.words[begin:end]])
        for name, begin, end in spans(sentence.labels)
    )


def understand(recogniser: Recogniser, waveform: FloatArray) -> Segment:
    """The first segment of a recording that asks for something, or the first."""
    segments = recogniser.recognise(waveform, decoder="beam")
    return next((s for s in segments if s.intent is not None and s.intent.name), segments[0])


def report(
    recogniser: Recogniser,
    commands: Sequence[Command],
    babble: FloatArray,
    snr_db: float | None,
    *,
    is_verbose: bool,
) -> None:
    """Share of the commands that are understood whole, under one condition."""
    draw = np.random.default_rng(_SEED)
    n_right: dict[str, list[bool]] = {}
    label = "clean" if snr_db is None else f"babble at {snr_db:g} dB"
    for command in tqdm(commands, label, leave=False, disable=None):
        segment = understand(recogniser, add_noise(command.waveform, babble, snr_db, draw))
        intent = segment.intent.name if segment.intent is not None else ""
        slots = frozenset((slot.name, slot.value) for slot in segment.slots)
        is_right = (intent, slots) == (command.intent, command.slots)
        n_right.setdefault(command.voice, []).append(is_right)
        if is_verbose and not is_right:
            confidence = segment.intent.confidence if segment.intent is not None else 0.0
            heard = segment.alternatives[0]
            print(
                f"  {command.voice}: said {command.text!r}, heard {heard.transcript!r} "
                f"({heard.confidence:.2f}) → {intent} {confidence:.2f} {sorted(slots)}"
            )
    right = [is_right for some in n_right.values() for is_right in some]
    by_voice = ", ".join(f"{v}: {np.mean(some):.1%}" for v, some in sorted(n_right.items()))
    print(f"{label}: {np.mean(right):.1%} of {len(right)} commands right ({by_voice})", flush=True)


def report_foreign(recogniser: Recogniser, manifest: Path, *, is_verbose: bool) -> None:
    """Share of foreign recordings that are taken for a command, by corpus."""
    false: dict[str, list[bool]] = {}
    for utterance in tqdm(read_manifest(manifest), manifest.name, leave=False, disable=None):
        waveform = load_audio(utterance.audio_path, target_rate=recogniser.sample_rate)
        segment = understand(recogniser, waveform)
        is_taken = segment.intent is not None and bool(segment.intent.name)
        false.setdefault(utterance.corpus or "-", []).append(is_taken)
        if is_verbose and is_taken:
            print(f"  {utterance.text!r}: {segment.alternatives[0].transcript!r} {segment.intent}")
    for corpus, taken in sorted(false.items()):
        print(f"{corpus}: {np.mean(taken):.2%} of {len(taken)} recordings taken for a command")


if __name__ == "__main__":
    main()
