"""Word error rate against look-ahead: what a first pass costs, and what a second one mends.

python benchmarks/streaming_curve.py DEV.jsonl [--bundle DIR] [--json FILE] [--plot FILE.svg]

Every utterance is read as the first pass of a stream reads it, for several chunks and right
contexts, and decoded greedily and by the beam search. The second pass reads with full context, so
its row is the offline one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from service.bundle import Profile, find_bundle, load_bundle
from service.evaluation import evaluate
from service.manifest import read_manifest
from service.recogniser import DecoderName, Recogniser, load_recogniser

CHUNKINGS_MS: Final = ((160, 160), (320, 160), (320, 320), (640, 320), (640, 640), (1280, 640))
"""Chunk and right context, milliseconds; read are as many whole output frames."""
DECODERS: Final[tuple[DecoderName, ...]] = ("greedy", "beam")
_FULL: Final = "full context"

Task = tuple[Path, Path, str, DecoderName]


def main() -> None:
    """Measure, print, plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    folder = find_bundle(arguments.bundle)
    frame_ms = 1000 * load_bundle(folder).config.frame_s
    names = [
        *(f"{int(chunk / frame_ms)}+{int(right / frame_ms)}" for chunk, right in CHUNKINGS_MS),
        _FULL,
    ]
    tasks: list[Task] = [
        (folder, arguments.manifest, name, decoder) for name in names for decoder in DECODERS
    ]
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as processes:
        measured = list(tqdm(processes.imap(measure, tasks, chunksize=1), total=len(tasks)))
    rows = []
    for name in names:
        of_name = [m for m in measured if m["name"] == name]
        row: dict[str, Any] = {"name": name, "latency_s": of_name[0]["latency_s"]}
        row |= {m["decoder"]: m["wer"] for m in of_name}
        rows.append(row)
        latency = "  -  " if row["latency_s"] is None else f"{row['latency_s']:.3f}"
        print(f"{name:13} {latency} s  greedy {row['greedy']:.2%}  beam {row['beam']:.2%}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    if arguments.plot is not None:
        plot(rows, arguments.plot)


def measure(task: Task) -> dict[str, Any]:
    """One point of the curve."""
    folder, manifest, name, decoder = task
    recogniser = load_recogniser(folder, decoders=(decoder,))
    if name != _FULL:
        chunk, right = map(int, name.split("+"))
        recogniser = with_chunking(recogniser, name, chunk, right)
    evaluation = evaluate(
        recogniser,
        read_manifest(manifest),
        decoder=decoder,
        profile=None if name == _FULL else name,
    )
    return {
        "name": name,
        "decoder": decoder,
        "latency_s": None if name == _FULL else recogniser.latency_s(name),
        "wer": evaluation.total.wer,
    }


def with_chunking(recogniser: Recogniser, name: str, chunk: int, right: int) -> Recogniser:
    """The recogniser with one more profile."""
    known = next(iter(recogniser.profiles.values()))
    n_ahead = known.window_feature_frames - recogniser.subsampling * (
        known.chunk_frames + known.right_frames
    )
    profile = Profile(
        chunk_frames=chunk,
        right_frames=right,
        window_feature_frames=recogniser.subsampling * (chunk + right) + n_ahead,
    )
    return replace(recogniser, profiles={**recogniser.profiles, name: profile})


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the curve."""
    import matplotlib.pyplot as plt  # noqa: PLC0415  # an extra

    figure, axes = plt.subplots(figsize=(7, 4.2))
    points = [row for row in rows if row["latency_s"] is not None]
    full = next(row for row in rows if row["latency_s"] is None)
    for decoder, colour in (("greedy", "tab:blue"), ("beam", "tab:orange")):
        axes.plot(
            [row["latency_s"] for row in points],
            [100 * row[decoder] for row in points],
            "o-",
            color=colour,
            label=f"{decoder}, first pass",
        )
        axes.axhline(
            100 * full[decoder], color=colour, linestyle="--", label=f"{decoder}, second pass"
        )
    for row in points:
        axes.annotate(
            row["name"],
            (row["latency_s"], 100 * row["greedy"]),
            xytext=(4, 6),
            textcoords="offset points",
            fontsize=8,
        )
    axes.set_xlabel("look-ahead of the profile: chunk + right context + front end, s")
    axes.set_ylabel("word error rate on the development set, %")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
