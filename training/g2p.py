"""Letters to phones: a BiLSTM-CTC model trained on the pronouncing dictionary.

Each letter is read several times over, so that CTC has frames enough for letters that stand for two
phones; the phones come out as they do from the acoustic model.
"""

from __future__ import annotations

import json
import logging
import random
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from tqdm import tqdm

from service.errors import TrainingError
from service.text import collapse
from training.lexicon import PHONES, Dictionary
from training.model import RecurrentLayer, reversal_index
from training.precision import choose_precision
from training.schedule import learning_rate

logger = logging.getLogger(__name__)

LETTERS: Final = "'abcdefghijklmnopqrstuvwxyz"
_PADDING: Final = len(LETTERS)
_PERCENT_TEST: Final = 5
_PERCENT_DEV: Final = 2
_POOL_BATCHES: Final = 50
_CHECKPOINT_S: Final = 120.0


@dataclass(frozen=True)
class G2pShape:
    """Size of the model."""

    n_layers: int = 2
    """Bidirectional LSTM layers."""
    hidden_size: int = 160
    """Cells of each direction."""
    n_repeats: int = 2
    """Frames of a letter."""
    dropout: float = 0.2
    """Share of activations dropped in training."""


@dataclass(frozen=True)
class G2pErrors:
    """How often the model is wrong."""

    words: float
    """Share of words whose pronunciation is none of the dictionary's."""
    phones: float
    """Edit distance to the nearest pronunciation, over its length."""


class G2pModel(nn.Module):
    """Letters to the log_probs of phones."""

    def __init__(self, shape: G2pShape) -> None:
        super().__init__()
        self.shape = shape
        width = 2 * shape.hidden_size
        self.embedding = nn.Embedding(len(LETTERS) + 1, width)
        self.place = nn.Embedding(shape.n_repeats, width)
        self.layers = nn.ModuleList(
            RecurrentLayer(width, shape.hidden_size, cell="lstm", bidirectional=True)
            for _ in range(shape.n_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(shape.dropout)
        self.head = nn.Linear(width, len(PHONES))

    def forward(self, letters: Tensor, lengths: Tensor) -> Tensor:
        """Compute log_probs.

        Args:
            letters: places in `LETTERS`, padded, int64, (batch, letter).
            lengths: letters of each word, int64, (batch,).

        Returns:
            Log probabilities, float32, (batch, letter * repeats, phone).
        """
        n_repeats = self.shape.n_repeats
        x = self.embedding(letters).unsqueeze(2) + self.place.weight
        x = self.dropout(x.flatten(1, 2))  # (batch, frames, width)
        reverse = reversal_index(lengths * n_repeats, x.shape[1])
        for layer in self.layers:
            x = x + self.dropout(layer(x, reverse))
        logits: Tensor = self.head(self.dropout(self.norm(x)))
        return logits.float().log_softmax(-1)


@dataclass(frozen=True)
class Split:
    """Words of a dictionary for training, for choosing and for reporting."""

    train: tuple[str, ...]
    dev: tuple[str, ...]
    test: tuple[str, ...]


def split_words(dictionary: Dictionary) -> Split:
    """Split the words that letters spell; a word's place depends on the word alone."""
    parts: dict[str, list[str]] = {"train": [], "dev": [], "test": []}
    for word in sorted(dictionary):
        if set(word) <= set(LETTERS) and word.strip("'"):
            percent = zlib.crc32(word.encode()) % 100
            held_out = "dev" if percent < _PERCENT_TEST + _PERCENT_DEV else "train"
            parts["test" if percent < _PERCENT_TEST else held_out].append(word)
    return Split(*(tuple(parts[name]) for name in ("train", "dev", "test")))


def train_g2p(
    dictionary: Dictionary,
    directory: Path,
    *,
    shape: G2pShape = G2pShape(),  # it is frozen
    n_epochs: int = 20,
    batch_size: int = 256,
    highest_rate: float = 3e-3,
    averaging: float = 0.999,
    seed: int = 0,
    precision: str = "auto",
) -> G2pModel:
    """Train a model, or go on with the one in the directory.

    Args:
        dictionary: words and their pronunciations.
        directory: gets `last.pt`, with which a stopped run goes on, and `figures.jsonl`.
        shape: size of the model.
        n_epochs: passes over the training words; one pronunciation of each is drawn every time.
        batch_size: words of a batch, of similar length.
        highest_rate: learning rate at the start of the cosine.
        averaging: share of the averaged weights that a step keeps.
        seed: of everything that is drawn.
        precision: `auto`, `bfloat16` or `float32`.

    Returns:
        The model with averaged weights, in evaluation mode.

    Raises:
        TrainingError: the dictionary has too few words, or the directory holds another run.
    """
    split = split_words(dictionary)
    if not (split.train and split.dev):
        raise TrainingError(
            f"{len(split.train)} words to train and {len(split.dev)} to choose by are too few; "
            "expected a dictionary of some hundred words of a-z"
        )
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = G2pModel(shape)
    averaged = G2pModel(shape)
    averaged.load_state_dict(model.state_dict())
    optimiser = torch.optim.AdamW(model.parameters(), lr=highest_rate, weight_decay=0.01)
    examples = _fitting(split.train, dictionary, shape.n_repeats)
    n_steps = n_epochs * -(-len(examples) // batch_size)
    dtype = choose_precision(
        lambda kind: _step(model, _first(examples, batch_size), dictionary, random.Random(0), kind),
        precision,
    )
    settings = {"shape": asdict(shape), "n_epochs": n_epochs, "batch_size": batch_size}
    step, epoch, done = _resume(directory, settings, model, averaged, optimiser)
    saved_at = time.monotonic()
    while epoch < n_epochs:
        draw = random.Random(f"{seed} {epoch}")
        batches = _batches(examples, batch_size, draw)
        for i, batch in enumerate(tqdm(batches, f"pass {epoch + 1}", mininterval=5.0)):
            if i < done:
                continue
            rate = learning_rate(
                step, progress=step / n_steps, n_warmup_steps=500, highest=highest_rate, final=1e-5
            )
            for group in optimiser.param_groups:
                group["lr"] = rate
            torch.manual_seed(seed + step)
            chosen = random.Random(f"{seed} {epoch} {i}")
            _step(model, batch, dictionary, chosen, dtype)
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimiser.step()
            optimiser.zero_grad()
            kept = min(averaging, step / (step + 10))
            with torch.no_grad():
                for ours, theirs in zip(averaged.parameters(), model.parameters(), strict=True):
                    ours.lerp_(theirs, 1 - kept)
            step += 1
            if time.monotonic() - saved_at > _CHECKPOINT_S:
                _save(directory, settings, model, averaged, optimiser, step, epoch, i + 1)
                saved_at = time.monotonic()
        epoch, done = epoch + 1, 0
        _save(directory, settings, model, averaged, optimiser, step, epoch, 0)
        errors = evaluate_g2p(averaged, split.dev, dictionary)
        logger.info(
            "pass %d: word error %.2f %%, phone error %.2f %% on held-out words",
            epoch, 100 * errors.words, 100 * errors.phones,
        )  # fmt: skip
        with (directory / "figures.jsonl").open("a", encoding="utf-8") as figures:
            figures.write(json.dumps({"pass": epoch, **asdict(errors)}) + "\n")
    return averaged.eval()


def evaluate_g2p(model: G2pModel, words: Sequence[str], dictionary: Dictionary) -> G2pErrors:
    """How often greedy pronunciations are none of the dictionary's."""
    n_wrong, n_edits, n_phones = 0, 0, 0
    for phones, word in zip(pronounce_greedily(model, words), words, strict=True):
        edits, length = min(
            (edit_distance(phones, known), len(known)) for known in dictionary[word]
        )
        n_wrong += edits > 0
        n_edits += edits
        n_phones += length
    return G2pErrors(words=n_wrong / len(words), phones=n_edits / n_phones)


def pronounce_greedily(model: G2pModel, words: Sequence[str]) -> list[tuple[str, ...]]:
    """The best path of each word."""
    model.eval()
    found = []
    with torch.inference_mode():
        for start in range(0, len(words), 512):
            batch = words[start : start + 512]
            letters, lengths = _pad(batch)
            best = model(letters, lengths).argmax(-1)
            for row, word in zip(best.tolist(), batch, strict=True):
                path = row[: len(word) * model.shape.n_repeats]
                found.append(tuple(PHONES[i] for i in collapse(path)))
    return found


def edit_distance(one: Sequence[str], other: Sequence[str]) -> int:
    """Insertions, deletions and substitutions between two sequences."""
    row = list(range(len(other) + 1))
    for i, left in enumerate(one, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(other, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def _fitting(words: Sequence[str], dictionary: Dictionary, n_repeats: int) -> list[str]:
    """The words with a pronunciation that CTC can spell in their frames."""
    return [
        word
        for word in words
        if any(_n_frames(phones) <= len(word) * n_repeats for phones in dictionary[word])
    ]


def _n_frames(phones: Sequence[str]) -> int:
    """Frames that CTC needs: one a phone, and one between equal ones."""
    return len(phones) + sum(one == other for one, other in pairwise(phones))


def _first(examples: Sequence[str], batch_size: int) -> list[str]:
    return list(examples[:batch_size])


def _batches(words: Sequence[str], batch_size: int, draw: random.Random) -> list[list[str]]:
    """Shuffled batches of words of similar length."""
    shuffled = list(words)
    draw.shuffle(shuffled)
    batches = []
    pool_size = batch_size * _POOL_BATCHES
    for start in range(0, len(shuffled), pool_size):
        pool = sorted(shuffled[start : start + pool_size], key=len)
        batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    draw.shuffle(batches)
    return batches


def _step(
    model: G2pModel,
    words: Sequence[str],
    dictionary: Dictionary,
    draw: random.Random,
    dtype: torch.dtype,
) -> None:
    """Add the gradient of one batch."""
    model.train()
    n_repeats = model.shape.n_repeats
    ids = {phone: i for i, phone in enumerate(PHONES)}
    targets = []
    for word in words:
        fitting = [p for p in dictionary[word] if _n_frames(p) <= len(word) * n_repeats]
        targets.append([ids[phone] for phone in draw.choice(fitting)])
    letters, lengths = _pad(words)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        log_probs = model(letters, lengths)
    loss = nn.functional.ctc_loss(
        log_probs.transpose(0, 1),
        torch.tensor([i for target in targets for i in target]),
        lengths * n_repeats,
        torch.tensor([len(target) for target in targets]),
        reduction="sum",
    )
    (loss / sum(map(len, targets))).backward()


def _pad(words: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Letters as (batch, letter) and their number."""
    lengths = torch.tensor([len(word) for word in words])
    letters = torch.full((len(words), int(lengths.max())), _PADDING)
    for row, word in enumerate(words):
        letters[row, : len(word)] = torch.tensor([LETTERS.index(letter) for letter in word])
    return letters, lengths


def _save(
    directory: Path,
    settings: Mapping[str, Any],
    model: G2pModel,
    averaged: G2pModel,
    optimiser: torch.optim.Optimizer,
    step: int,
    epoch: int,
    done: int,
) -> None:
    path = directory / "last.pt"
    unfinished = path.with_suffix(".unfinished")
    state = {
        "settings": settings,
        "model": model.state_dict(),
        "averaged": averaged.state_dict(),
        "optimiser": optimiser.state_dict(),
        "place": (step, epoch, done),
    }
    torch.save(state, unfinished)
    unfinished.replace(path)


def _resume(
    directory: Path,
    settings: Mapping[str, Any],
    model: G2pModel,
    averaged: G2pModel,
    optimiser: torch.optim.Optimizer,
) -> tuple[int, int, int]:
    """Load what the directory holds; return step, pass and batches of the pass that are done."""
    optimiser.zero_grad()
    path = directory / "last.pt"
    if not path.exists():
        return 0, 0, 0
    state = torch.load(path, weights_only=True)
    if state["settings"] != settings:
        raise TrainingError(
            f"{path} was trained with {state['settings']}, not {settings}; "
            "name another directory or the same settings"
        )
    model.load_state_dict(state["model"])
    averaged.load_state_dict(state["averaged"])
    optimiser.load_state_dict(state["optimiser"])
    step, epoch, done = state["place"]
    return step, epoch, done
