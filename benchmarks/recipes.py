r"""Recipes compared at equal cost: short runs that differ in one thing each.

python benchmarks/recipes.py benchmarks/recipes/small.toml --train train.jsonl… --dev dev.jsonl \
    --output runs/recipes [--only base ctc …] [--set optimiser.n_epochs=4 …] \
    [--corpora librispeech-dev-clean] [--every 2]

Trains each variant in a folder of its own and prints its error rates, as `acoustic_checkpoints.py`
does. A run that is done is not run again, one that was stopped goes on, and two commands may work
on different variants at the same time.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import time
from pathlib import Path

from training.config import TrainingSettings, read_tree, validate
from training.precision import processor_name
from training.train import train


def main() -> None:
    """Train what is missing, then score all."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variants", type=Path, help="TOML: [recipe.*] and [variants]")
    parser.add_argument("--train", type=Path, nargs="+", required=True)
    parser.add_argument("--dev", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--only", nargs="+", help="names of variants")
    parser.add_argument("--set", nargs="*", default=[], help="what changes in all of them")
    options, scoring = parser.parse_known_args()
    known = read_tree(options.variants)["variants"]
    names = options.only or list(known)
    if unknown := set(names) - set(known):
        raise SystemExit(f"{options.variants} has no {sorted(unknown)}, only {sorted(known)}")
    print(processor_name(), flush=True)
    for name in names:
        directory = options.output / name
        start = time.monotonic()
        settings = _settings(options, known[name], directory)
        progress = train(settings)
        _note_time(directory, time.monotonic() - start)
        if progress.epoch < settings.optimiser.n_epochs:
            raise SystemExit(f"{name} was stopped; the same command goes on with it")
        script = Path(__file__).with_name("acoustic_checkpoints.py")
        paths = [script, directory / "last.pt", "--dev", options.dev]
        command = [sys.executable, *map(str, paths), *scoring]
        table = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        minutes = sum(json.loads((directory / "seconds.json").read_text())) / 60
        print(f"{name}, {minutes:.0f} minutes\n{table}", flush=True)


def _settings(options: argparse.Namespace, changes: list[str], directory: Path) -> TrainingSettings:
    overrides = [f"recipe.{change}" for change in (*options.set, *changes)]
    tree = read_tree(options.variants, overrides)["recipe"]
    tree["data"] |= {"train": options.train, "dev": [options.dev]}
    tree["run"] = {"n_threads": 1, **tree.get("run", {}), "directory": directory}
    return validate(TrainingSettings, tree, options.variants)


def _note_time(directory: Path, seconds: float) -> None:
    """Add to what the run took so far."""
    path = directory / "seconds.json"
    before = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps([*before, seconds]))


if __name__ == "__main__":
    main()
