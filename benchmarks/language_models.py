"""Perplexity of language models on held-out text: n-grams and recurrent models, the same words.

python benchmarks/language_models.py --text BOOKS.xz:1:1182287 --text TRANSCRIPTS.xz \
    --held-out BOOKS.xz:1182288 --manifest DEV.jsonl --corpus librispeech-dev-clean \
    --ngrams DIR --orders 2 3 4 5 --checkpoint runs/rescorer/best.pt

Texts are FILE, FILE:FIRST or FILE:FIRST:LAST, lines counted from 1. The n-grams are built from the
texts (modified Kneser-Ney, `--prune 0` keeps all) where the folder does not hold them already.
Every model is scored sentence by sentence from its start, and the perplexity is that of the words
in the n-grams' list and of the sentence ends; other words are read, but not scored, by all models.
A recurrent model also gives probability to words outside the list, which counts against it.

With `--train DIR`, a recurrent model of each `--cells` is first trained on `--train-lines` lines of
the texts, all with about as many parameters as an LSTM of `--size` units a layer.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

import torch

from service.decoding.ngram import NgramModel, load_ngram
from service.manifest import read_manifest
from service.text import normalise
from training.lm_text import TextPart, encode_text, read_sentences
from training.model import Cell
from training.ngram import NGRAM_NAME, WORDS_NAME, build_ngram
from training.precision import processor_name
from training.rnn_lm import (
    LanguageModel,
    LanguageModelSettings,
    load_language_model,
    perplexity,
    train_language_model,
)

_DEV_LINES: Final = 500
_SIZE_STEP: Final = 8


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    size: str
    perplexities: list[float]
    """On each held-out text."""
    seconds: float
    """Of scoring all of them."""


def main() -> None:
    """Build what is missing, measure and print."""
    arguments = _read_arguments()
    torch.set_num_threads(1)
    folder: Path = arguments.ngrams
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "text.txt"
    if not text.exists():
        _write_lines(list(read_sentences(arguments.text)), text)
    held_out = {f"{p.path.name}:{p.first_line}": [p] for p in arguments.held_out}
    if arguments.manifest is not None:
        held_out[arguments.corpus or arguments.manifest.name] = [_write_references(arguments)]
    print(f"on {processor_name()}, one thread")
    words = _build_ngrams(text, folder, arguments.orders, arguments.prune)
    rows = [
        _measure_ngram(path, words, list(held_out.values()))
        for path in sorted(folder.glob(f"*/{NGRAM_NAME}"))
    ]
    checkpoints = list(arguments.checkpoint)
    if arguments.train is not None:
        checkpoints += [_train_cell(cell, text, arguments) for cell in arguments.cells]
    rows += [_measure_recurrent(path, words, list(held_out.values())) for path in checkpoints]
    print("| model | size | " + " | ".join(held_out) + " | scoring |")
    print("| --- " * (3 + len(held_out)) + "|")
    for row in rows:
        figures = " | ".join(f"{value:.1f}" for value in row.perplexities)
        print(f"| {row.name} | {row.size} | {figures} | {row.seconds:.0f} s |")


def _read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=_parse_part, action="append", required=True)
    parser.add_argument("--held-out", type=_parse_part, action="append", default=[])
    parser.add_argument("--manifest", type=Path, help="its transcripts are held-out text too")
    parser.add_argument("--corpus", default="", help="only these lines of the manifest")
    parser.add_argument("--ngrams", type=Path, required=True, help="folder of the n-grams")
    parser.add_argument("--orders", type=int, nargs="*", default=[2, 3, 4, 5])
    parser.add_argument("--prune", nargs="*", default=["0", "0 1 1 2"])
    parser.add_argument("--checkpoint", type=Path, action="append", default=[])
    parser.add_argument("--train", type=Path, help="folder of the runs of `--cells`")
    parser.add_argument("--cells", nargs="*", default=["rnn", "lstm", "gru"])
    parser.add_argument("--train-lines", type=int, default=200_000)
    parser.add_argument("--size", type=int, default=256)
    return parser.parse_args()


def _parse_part(text: str) -> TextPart:
    path, *numbers = text.split(":")
    first, last = [*(int(n) if n else None for n in numbers), None, None][:2]
    return TextPart(Path(path), first or 1, last)


def _write_lines(lines: Sequence[str], path: Path) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _write_references(arguments: argparse.Namespace) -> TextPart:
    """The transcripts of the manifest as a text file."""
    path: Path = arguments.ngrams / "references.txt"
    wanted = arguments.corpus
    utterances = read_manifest(arguments.manifest)
    texts = [normalise(u.text or "") for u in utterances if wanted in ("", u.corpus)]
    _write_lines([text for text in texts if text], path)
    return TextPart(path)


def _build_ngrams(
    text: Path, folder: Path, orders: Sequence[int], prunes: Sequence[str]
) -> set[str]:
    """Build the n-grams that are missing; the words of their list."""
    output = folder
    for order in orders:
        for prune in prunes:
            counts = [int(n) for n in prune.split()][:order]
            output = folder / f"{order}-gram, pruned {prune}".replace(" ", "_")
            if not (output / NGRAM_NAME).exists():
                start = time.perf_counter()
                report = build_ngram([text], output, order=order, prune=counts, min_count=2)
                print(f"{output.name}: {report}; {time.perf_counter() - start:.0f} s")
    found = next(iter(sorted(folder.glob(f"*/{WORDS_NAME}"))))
    return set(found.read_text(encoding="utf-8").split())


def _measure_ngram(path: Path, words: set[str], texts: Sequence[Sequence[TextPart]]) -> Row:
    model = load_ngram(path)
    start = time.perf_counter()
    found = [ngram_perplexity(model, parts, words) for parts in texts]
    seconds = time.perf_counter() - start
    name = path.parent.name.replace("_", " ")
    return Row(name, f"{path.stat().st_size / 1e6:.0f} MB", found, seconds)


def ngram_perplexity(model: NgramModel, parts: Sequence[TextPart], words: set[str]) -> float:
    """Perplexity a word of an n-gram; see `training.rnn_lm.perplexity`."""
    total, n_counted = 0.0, 0
    for sentence in read_sentences(parts):
        spoken = sentence.split()
        *scores, end = model.score(spoken)
        known = [score for word, score in zip(spoken, scores, strict=True) if word in words]
        total += sum(known) + end
        n_counted += len(known) + 1
    return math.exp(-math.log(10) * total / n_counted)


def _measure_recurrent(path: Path, words: set[str], texts: Sequence[Sequence[TextPart]]) -> Row:
    model, pieces = load_language_model(path)
    encoded = [encode_text(parts, pieces, words) for parts in texts]
    start = time.perf_counter()
    found = [perplexity(model, text) for text in encoded]
    seconds = time.perf_counter() - start
    n_parameters = sum(p.numel() for p in model.parameters())
    name = f"{model.cell}, {path.parent.name}"
    return Row(name, f"{n_parameters / 1e6:.1f} M weights", found, seconds)


def _train_cell(cell: Cell, text: Path, arguments: argparse.Namespace) -> Path:
    """Train a model on the first lines of the text; its checkpoint."""
    size = _equal_size(cell, arguments.size)
    lines = arguments.train_lines
    with text.open(encoding="utf-8") as source:
        n_lines = sum(1 for _ in islice(source, lines + _DEV_LINES))
    settings = {
        "data": {
            "train": [{"path": text, "last_line": n_lines - _DEV_LINES}],
            "dev": [{"path": text, "first_line": n_lines - _DEV_LINES + 1, "last_line": n_lines}],
        },
        "model": {"cell": cell, "embedding_size": size, "hidden_size": size},
        "optimiser": {"n_passes": 1, "batch_tokens": 2048},
        "run": {"directory": arguments.train / f"{cell}-{size}", "n_threads": 1},
    }
    return train_language_model(LanguageModelSettings.model_validate(settings))


def _equal_size(cell: Cell, size: int, n_pieces: int = 4000) -> int:
    """Units a layer with which a cell has as many weights as an LSTM of `size` units."""
    wanted = _count_weights("lstm", size, n_pieces)
    sizes = range(_SIZE_STEP, 4 * size, _SIZE_STEP)
    return min(sizes, key=lambda units: abs(_count_weights(cell, units, n_pieces) - wanted))


def _count_weights(cell: Cell, size: int, n_pieces: int) -> int:
    with torch.device("meta"):
        model = LanguageModel(n_pieces, cell=cell, embedding_size=size, hidden_size=size)
    return sum(p.numel() for p in model.parameters())


if __name__ == "__main__":
    main()
