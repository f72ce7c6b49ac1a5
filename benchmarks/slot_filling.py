"""How well, how fast and from how large a file intents and slots are found.

python benchmarks/slot_filling.py DATA [--recipe RECIPE.toml] [--seeds 1 2 3] [--directory RUNS]
    [--set SECTION.KEY=VALUE]

Trains a model a seed on the folder DATA (train, valid, test; see training/slot_data.py), each on
one thread, exports it and parses the test part with the exported file. Passes are chosen on valid;
test is read once, at the end. What a seed cost is kept in its folder, so that the benchmark goes on
where it stopped. Training time is processor time; the time of an utterance is taken anew.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from export.understanding import export_understanding
from service.understanding import Understander
from training.config import read_tree, validate
from training.precision import processor_name
from training.slot_data import LabelledSentence, read_parts
from training.understanding import (
    UnderstandingScores,
    UnderstandingSettings,
    score_parses,
    train_understanding,
)

_N_TIMED_ROUNDS: Final = 3


@dataclass(frozen=True)
class Measured:
    """What one seed gives."""

    seed: int
    scores: UnderstandingScores
    """On the test part, from the exported file."""
    training_s: float
    """Processor time of the training, seconds."""
    size_bytes: int
    """Of the exported file."""
    utterance_ms: float
    """Mean time of an utterance, one thread, milliseconds; the best of some rounds."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--recipe", type=Path, default=Path("training/recipes/snips.toml"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--directory", type=Path, default=Path("runs/slot-filling"))
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    trained = []
    for seed in arguments.seeds:
        directory = arguments.directory / f"seed-{seed}"
        overrides = [
            *arguments.set,
            f"data.folder={arguments.data}",
            f"run.directory={directory}",
            f"run.seed={seed}",
            "run.n_threads=1",
        ]
        tree = read_tree(arguments.recipe, overrides)
        trained.append(_train(validate(UnderstandingSettings, tree, arguments.recipe)))
    test = read_parts(arguments.data).test
    print_table(
        [
            _measure(test, graph=graph, seed=seed, training_s=training_s)
            for seed, (graph, training_s) in zip(arguments.seeds, trained, strict=True)
        ]
    )


def print_table(rows: Sequence[Measured]) -> None:
    """A line a seed, and their means."""
    print(f"{processor_name()}, one thread; {rows[0].scores.n_sentences} test sentences")
    print("seed  slot F1  intent  sentence  training min  file MB  ms an utterance")
    columns = [
        (
            100 * row.scores.slot_f1,
            100 * row.scores.intent_accuracy,
            100 * row.scores.sentence_accuracy,
            row.training_s / 60,
            row.size_bytes / 1e6,
            row.utterance_ms,
        )
        for row in rows
    ]
    means = tuple(statistics.mean(column) for column in zip(*columns, strict=True))
    for name, values in [
        *zip((str(row.seed) for row in rows), columns, strict=True),
        ("mean", means),
    ]:
        f1, intent, sentence, minutes, megabytes, milliseconds = values
        print(
            f"{name:4}  {f1:7.2f}  {intent:6.2f}  {sentence:8.2f}  {minutes:12.1f}  "
            f"{megabytes:7.2f}  {milliseconds:15.2f}"
        )


def _train(settings: UnderstandingSettings) -> tuple[Path, float]:
    """Train and export; the graph, and the processor time of the training, seconds."""
    directory = settings.run.directory
    costs = directory / "training.json"
    before_s = json.loads(costs.read_text())["training_s"] if costs.exists() else 0.0
    began = time.process_time()
    try:
        best = train_understanding(settings)
    finally:
        training_s = before_s + time.process_time() - began
        directory.mkdir(parents=True, exist_ok=True)
        costs.write_text(json.dumps({"training_s": training_s}))
    graph = directory / "understanding.onnx"
    export_understanding(best, graph)
    return graph, training_s


def _measure(
    test: Sequence[LabelledSentence], *, graph: Path, seed: int, training_s: float
) -> Measured:
    understander = Understander(graph)
    parses = understander.understand_many([sentence.words for sentence in test])
    return Measured(
        seed=seed,
        scores=score_parses(parses, test),
        training_s=training_s,
        size_bytes=graph.stat().st_size,
        utterance_ms=min(_time_utterances(understander, test) for _ in range(_N_TIMED_ROUNDS)),
    )


def _time_utterances(understander: Understander, sentences: Sequence[LabelledSentence]) -> float:
    """Mean time of an utterance that arrives alone, milliseconds."""
    began = time.perf_counter()
    for sentence in sentences:
        understander.understand(sentence.words)
    return (time.perf_counter() - began) / len(sentences) * 1000


if __name__ == "__main__":
    main()
