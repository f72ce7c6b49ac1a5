"""A tiny corpus of tones, its settings and a tiny model: learned in seconds, by a real run.

Each letter sounds as a tone of its own and a space is silence, so that text can be learned from
audio; the words are in the dictionary, so that the phone head learns too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import soundfile
import torch

from service.rescorer import WORD_START, Pieces
from service.text import CHARACTERS
from training.checkpoint import Checkpoint, Progress, save_checkpoint
from training.config import TrainingSettings, load_settings
from training.lexicon import PHONES
from training.model import AcousticModel, Cell
from training.rnn_lm import LanguageModel

torch.set_num_threads(1)  # sums in one order: results repeat bit for bit

SAMPLE_RATE: Final = 16_000
N_MELS: Final = 20
FRAMES_PER_S: Final = 100.0
TEXTS: Final = ("bad cab", "a bead", "add", "dead bee", "ace", "cab", "bead add", "a dab bad")

LETTERS: Final = "abcdefghij'"
PIECES: Final = Pieces(
    names=(
        "</s>",
        "<unk>",
        WORD_START,
        *LETTERS,
        *(WORD_START + letter for letter in LETTERS),
        "ab",
        f"{WORD_START}bad",
        "ge",
    ),
    scores=(-9.0, -9.0, *(-3.0 - i / 10 for i in range(2 * len(LETTERS) + 4))),
)

_TONES_HZ: Final = {letter: 350.0 * 1.6**i for i, letter in enumerate("abcde")}
_TONE_S: Final = 0.09
_GAP_S: Final = 0.03
_LEVEL: Final = 0.2
_NOISE: Final = 1e-3


def say(
    text: str, *, pitch: float = 1.0, sample_rate: int = SAMPLE_RATE, seed: int = 0
) -> npt.NDArray[np.float32]:
    """Text of the letters a to e and spaces as tones in faint noise, float32, (time,).

    Args:
        text: what is said, 0.12 s a character.
        pitch: factor on every tone: another voice.
        sample_rate: Hz.
        seed: of the noise.
    """
    time_s = np.arange(round(_TONE_S * sample_rate)) / sample_rate
    gap = np.zeros(round(_GAP_S * sample_rate))
    pieces = []
    for letter in text:
        tone_hz = _TONES_HZ.get(letter, 0.0) * pitch  # a space has no tone: its sine is silence
        pieces += [_LEVEL * np.sin(2 * np.pi * tone_hz * time_s) * np.hanning(len(time_s)), gap]
    samples = np.concatenate(pieces)
    samples += np.random.default_rng(seed).normal(scale=_NOISE, size=len(samples))
    return np.asarray(samples, dtype=np.float32)


def write_manifest(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write a manifest, a row a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_recordings(
    folder: Path,
    texts: Sequence[str],
    *,
    speaker: str,
    corpus: str = "tones",
    pitch: float = 1.0,
    sample_rate: int = SAMPLE_RATE,
) -> list[dict[str, Any]]:
    """Say each text into a WAV file of `folder`; return the manifest's rows."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, text in enumerate(texts):
        name = f"{speaker}-{number}.wav"
        waveform = say(text, pitch=pitch, sample_rate=sample_rate, seed=number)
        soundfile.write(folder / name, waveform, sample_rate, subtype="PCM_16")
        rows.append(
            {
                "audio_filepath": name,
                "duration": len(waveform) / sample_rate,
                "text": text,
                "speaker": speaker,
                "corpus": corpus,
            }
        )
    return rows


@dataclass(frozen=True)
class TinyCorpus:
    """Manifests of recordings by different speakers, and the cache of their features."""

    train: Path
    dev: Path
    cache: Path


def write_corpus(folder: Path, *, n_repeats: int = 1) -> TinyCorpus:
    """Two training speakers who say `TEXTS` `n_repeats` times, and a third who says half of it."""
    rows = [
        row
        for speaker, pitch in (("anna", 1.0), ("bela", 1.06))
        for row in write_recordings(folder, TEXTS * n_repeats, speaker=speaker, pitch=pitch)
    ]
    dev = write_recordings(folder, TEXTS[::2], speaker="cleo", pitch=1.03)
    return TinyCorpus(
        train=write_manifest(folder / "train.jsonl", rows),
        dev=write_manifest(folder / "dev.jsonl", dev),
        cache=folder / "features",
    )


def write_settings(corpus: TinyCorpus, path: Path) -> Path:
    """The settings file of a tiny run without augmentation; features at normal speed only."""
    path.write_text(
        f"""
[data]
train = ["{corpus.train}"]
dev = ["{corpus.dev}"]
cache = "{corpus.cache}"
speeds = [1.0]
n_jobs = 1

[features]
n_mels = {N_MELS}

[model]
n_layers = 1
hidden_size = 32
n_channels = 4
dropout = 0.0

[augment]
n_frequency_masks = 0
time_masks_per_s = 0
level_db = 0
tilt_db = 0

[optimiser]
n_epochs = 2
batch_s = 3.0
learning_rate = 1e-2
n_warmup_steps = 5
average_decay = 0.5

[run]
precision = "float32"
n_threads = 1
directory = "{path.with_suffix("")}"
""",
        encoding="utf-8",
    )
    return path


def make_settings(corpus: TinyCorpus, directory: Path, *overrides: str) -> TrainingSettings:
    """The settings of a tiny run in `directory`, changed as on the command line."""
    return load_settings(write_settings(corpus, directory.with_suffix(".toml")), overrides)


def make_model(seed: int = 1, **arguments: Any) -> AcousticModel:
    """A tiny model that is ready to evaluate, its weights drawn from `seed`."""
    sizes = {"n_layers": 2, "hidden_size": 16, "n_channels": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AcousticModel(
            n_mels=N_MELS,
            n_tokens=len(CHARACTERS),
            n_phones=len(PHONES),
            **{**sizes, **arguments},
        )
    return model.eval()


def make_checkpoint(model: AcousticModel, settings: TrainingSettings) -> Checkpoint:
    """A weights-only checkpoint of a model that was made with the model settings of a run."""
    return Checkpoint(
        settings=settings.model_dump(mode="json"),
        tokens=list(CHARACTERS),
        phones=list(PHONES),
        averaged=model.state_dict(),
        progress=Progress(epoch=2, step=7, audio_s=7200.0),
    )


@contextmanager
def one_weight_changed(model: AcousticModel) -> Iterator[AcousticModel]:
    """The model with another bias in its token head, inside the block."""
    bias = model.token_head.bias.data
    before = bias.clone()
    bias[1] += 1.0
    try:
        yield model
    finally:
        bias.copy_(before)


def save_language_model(path: Path, *, cell: Cell = "lstm", hidden_size: int = 20) -> LanguageModel:
    """Write a checkpoint of a language model of no training; its weights are large."""
    torch.manual_seed(1)
    options = {"cell": cell, "n_layers": 2, "embedding_size": 24, "hidden_size": hidden_size}
    model = LanguageModel(len(PIECES.names), **options)  # type: ignore[arg-type]  # mixed values
    torch.nn.init.normal_(model.embedding.weight)
    for layer in model.layers:
        for weight in layer.parameters():
            torch.nn.init.normal_(weight, std=0.5)
    save_checkpoint(
        Checkpoint(
            settings={"model": options, "piece_scores": list(PIECES.scores)},
            tokens=list(PIECES.names),
            phones=[],
            averaged=model.state_dict(),
            progress=Progress(),
        ),
        path,
    )
    return model.eval()
