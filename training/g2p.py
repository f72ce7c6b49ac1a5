"""Letters to phones: a BiLSTM-CTC model trained on the pronouncing dictionary.

Each letter gives several frames, so that CTC has room for a letter of two phones (Rao et al. 2015).
The recurrent layers read the letters once; the head tells a letter's frames apart.

A run lives in one folder: `last.pt` (everything an exact continuation needs), `best.pt` (lowest
word error on the development words) and `dev.jsonl` (a line a pass). Started again, it goes on
where it stopped; the dropout of a step and the batches of a pass depend on the seed, the step and
the pass alone, so the continuation equals an uninterrupted run.
"""

from __future__ import annotations

import logging
import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from service.errors import TrainingError
from service.g2p import Pronouncer
from service.text import LETTERS, collapse
from training.checkpoint import load_checkpoint
from training.data import frames_needed
from training.lexicon import PHONES, Dictionary, load_dictionary
from training.model import RecurrentLayer, reversal_index
from training.schedule import learning_rate as rate_of_step
from training.weights import BEST, LAST, Weights, draw_batches

logger = logging.getLogger(__name__)

_TEST_PERCENT: Final = 5
_DEV_PERCENT: Final = 2
_WARMUP_SHARE: Final = 0.04
_AVERAGE_DECAY: Final = 0.999
_CLIP_NORM: Final = 1.0
_POOLED_BATCHES: Final = 50
_EVALUATED_WORDS: Final = 512


class G2pModel(nn.Module):
    """Maps the letters of words to CTC log_probs of phones."""

    def __init__(
        self, *, n_layers: int = 4, hidden_size: int = 168, n_repeats: int = 3, dropout: float = 0.2
    ) -> None:
        super().__init__()
        width = 2 * hidden_size
        self.n_repeats = n_repeats
        self.embedding = nn.Embedding(len(LETTERS), width)
        self.layers = nn.ModuleList(
            RecurrentLayer(width, hidden_size, cell="lstm", bidirectional=True)
            for _ in range(n_layers)
        )
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, n_repeats * len(PHONES))

    def forward(self, letters: Tensor, lengths: Tensor) -> Tensor:
        """Compute log_probs.

        Args:
            letters: ids in `LETTERS`, int64, (batch, letter); padding may hold any number.
            lengths: letters of each word, int64, (batch,).

        Returns:
            Log probabilities, float32, (batch, letter * n_repeats, phone).
        """
        letters = letters.clamp(0, len(LETTERS) - 1)
        x = self.dropout(self.embedding(letters))  # (batch, letter, width)
        reverse = reversal_index(lengths, letters.shape[1])
        for layer in self.layers:
            x = x + self.dropout(layer(x, reverse))
        logits = self.head(self.dropout(self.norm(x)))  # (batch, letter, n_repeats * phone)
        logits = logits.unflatten(2, (self.n_repeats, len(PHONES))).flatten(1, 2)
        log_probs: Tensor = logits.float().log_softmax(-1)
        return log_probs


@dataclass(frozen=True)
class Split:
    """The words of a dictionary, by use; a word is in one part with all its pronunciations."""

    train: tuple[str, ...]
    """Trained on."""
    dev: tuple[str, ...]
    """Choose the pass that is kept."""
    test: tuple[str, ...]
    """Measure what is reported."""


@dataclass(frozen=True)
class G2pErrors:
    """Errors of the pronunciations of a list of words."""

    n_words: int
    """Words pronounced."""
    n_wrong_words: int
    """Words whose pronunciation the dictionary lacks."""
    n_phones: int
    """Phones of the dictionary's nearest pronunciations."""
    n_phone_errors: int
    """Substitutions, deletions and insertions against these."""

    @property
    def word_error(self) -> float:
        """Share of wrong words."""
        return self.n_wrong_words / max(1, self.n_words)

    @property
    def phone_error(self) -> float:
        """Phone errors over the phones of the dictionary."""
        return self.n_phone_errors / max(1, self.n_phones)


@dataclass(frozen=True)
class Example:
    """A word and one of its pronunciations, as ids."""

    letters: Tensor
    """Ids in `LETTERS`, int64, (letter,)."""
    phones: Tensor
    """Ids in `PHONES`, int64, (phone,)."""


def split_words(dictionary: Dictionary) -> Split:
    """Split the words that consist of letters and apostrophes: 5 % test, 2 % dev, by their hash."""
    words = sorted(w for w in dictionary if set(w) <= set(LETTERS) and w.strip("'"))
    places = {word: zlib.crc32(word.encode()) % 100 for word in words}
    dev_end = _TEST_PERCENT + _DEV_PERCENT
    return Split(
        train=tuple(w for w in words if places[w] >= dev_end),
        dev=tuple(w for w in words if _TEST_PERCENT <= places[w] < dev_end),
        test=tuple(w for w in words if places[w] < _TEST_PERCENT),
    )


def make_examples(words: Sequence[str], *, dictionary: Dictionary, n_repeats: int) -> list[Example]:
    """Every pronunciation of every word, but those with more phones than CTC has frames for."""
    phone_ids = {phone: i for i, phone in enumerate(PHONES)}
    return [
        Example(_encode(word), torch.tensor([phone_ids[phone] for phone in phones]))
        for word in words
        for phones in dictionary[word]
        if frames_needed(phones) <= n_repeats * len(word)
    ]


def train_g2p(
    directory: Path,
    *,
    dictionary: Dictionary | None = None,
    n_layers: int = 4,
    hidden_size: int = 168,
    n_repeats: int = 3,
    dropout: float = 0.2,
    n_epochs: int = 20,
    batch_size: int = 256,
    learning_rate: float = 3e-3,
    precision: str = "auto",
    checkpoint_every_s: float = 60.0,
    seed: int = 1,
) -> G2pErrors:
    """Train a model, or go on training, until the last pass is done.

    Args:
        directory: of the run; see above for its files.
        dictionary: words and their pronunciations; None takes the CMU dictionary.
        n_layers: bidirectional LSTM layers.
        hidden_size: cells of a direction.
        n_repeats: frames of a letter.
        dropout: share of activations dropped.
        n_epochs: passes over the training words.
        batch_size: pronunciations in a batch.
        learning_rate: highest, at the end of the warm-up; half a cosine leads to zero.
        precision: `auto`, `bfloat16` or `float32`.
        checkpoint_every_s: seconds between checkpoints inside a pass.
        seed: of weights, batches and dropout.

    Returns:
        The errors of the best pass on the development words, greedily decoded.

    Raises:
        TrainingError: no words to train on, or the folder holds another run.
    """
    run = _Run(
        directory,
        dictionary=load_dictionary() if dictionary is None else dictionary,
        settings={
            "model": {
                "n_layers": n_layers,
                "hidden_size": hidden_size,
                "n_repeats": n_repeats,
                "dropout": dropout,
            },
            "optimiser": {
                "n_epochs": n_epochs,
                "batch_size": batch_size,
                "learning_rate": learning_rate,
                "seed": seed,
            },
        },
        checkpoint_every_s=checkpoint_every_s,
    )
    return run.train(precision)


def evaluate_g2p(graph: Path, *, dictionary: Dictionary | None = None) -> G2pErrors:
    """Errors of an exported graph on the test words, which no training run has seen.

    Args:
        graph: an ONNX file that `export_g2p` wrote.
        dictionary: what the model was trained on; None is the CMU dictionary.

    Raises:
        BundleError: the file is missing, damaged or another graph.
    """
    dictionary = load_dictionary() if dictionary is None else dictionary
    words = split_words(dictionary).test
    return count_errors(Pronouncer(graph).pronounce(words), words=words, dictionary=dictionary)


def count_errors(
    pronounced: Sequence[Sequence[str]], *, words: Sequence[str], dictionary: Dictionary
) -> G2pErrors:
    """Compare each word's pronunciation with the dictionary's nearest one."""
    nearest = [
        min((edit_distance(phones, known), len(known)) for known in dictionary[word])
        for phones, word in zip(pronounced, words, strict=True)
    ]
    return G2pErrors(
        n_words=len(words),
        n_wrong_words=sum(n_edits > 0 for n_edits, _ in nearest),
        n_phones=sum(n_phones for _, n_phones in nearest),
        n_phone_errors=sum(n_edits for n_edits, _ in nearest),
    )


def edit_distance(hypothesis: Sequence[str], reference: Sequence[str]) -> int:
    """Substitutions, deletions and insertions between two sequences (Levenshtein)."""
    costs = list(range(len(reference) + 1))
    for i, heard in enumerate(hypothesis, 1):
        diagonal, costs[0] = costs[0], i
        for j, said in enumerate(reference, 1):
            cost = min(costs[j] + 1, costs[j - 1] + 1, diagonal + (heard != said))
            diagonal, costs[j] = costs[j], cost
    return costs[-1]


def pronounce_greedily(model: G2pModel, words: Sequence[str]) -> list[tuple[str, ...]]:
    """Phones of each word: the best path, collapsed."""
    model.eval()
    pronounced = []
    for first in range(0, len(words), _EVALUATED_WORDS):
        letters = [_encode(word) for word in words[first : first + _EVALUATED_WORDS]]
        with torch.inference_mode():
            paths = model(*_pad(letters)).argmax(-1)
        for path, word in zip(paths.tolist(), letters, strict=True):
            labels = collapse(path[: model.n_repeats * len(word)])
            pronounced.append(tuple(PHONES[label] for label in labels))
    return pronounced


def load_g2p(path: Path) -> G2pModel:
    """Load the averaged weights of a checkpoint, ready to evaluate.

    Raises:
        TrainingError: the file is missing, damaged or no checkpoint of letters to phones.
    """
    checkpoint = load_checkpoint(path)
    if tuple(checkpoint.tokens) != LETTERS or tuple(checkpoint.phones) != PHONES:
        raise TrainingError(
            f"{path} is no checkpoint of a pronunciation model; name one that train_g2p wrote"
        )
    model = G2pModel(**checkpoint.settings["model"])
    model.load_state_dict(checkpoint.averaged)
    return model.eval()


class _Run:
    def __init__(
        self,
        directory: Path,
        *,
        dictionary: Dictionary,
        settings: Mapping[str, Any],
        checkpoint_every_s: float,
    ) -> None:
        self.dictionary = dictionary
        self.settings = settings
        self.options: Mapping[str, Any] = settings["optimiser"]
        torch.manual_seed(self.options["seed"])
        model = G2pModel(**settings["model"])
        split = split_words(dictionary)
        self.dev = split.dev
        self.examples = make_examples(split.train, dictionary=dictionary, n_repeats=model.n_repeats)
        if not self.examples or not self.dev:
            raise TrainingError(
                f"{len(self.examples)} pronunciations to train on and {len(self.dev)} words to "
                "choose by; expected a dictionary of more words of a-z"
            )
        self.weights = Weights(
            directory,
            model,
            torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01),
            settings=settings,
            tokens=LETTERS,
            phones=PHONES,
            seed=self.options["seed"],
            clip_norm=_CLIP_NORM,
            average_decay=_AVERAGE_DECAY,
            checkpoint_every_s=checkpoint_every_s,
        )
        self.weights.restore(self._refuse_another)

    def train(self, precision: str) -> G2pErrors:
        first = self._make_batches()[0]
        dtype = self.weights.choose_precision(
            lambda dtype: self._compute_loss(first, dtype), precision
        )
        n_parameters = sum(p.numel() for p in self.weights.model.parameters())
        logger.info("%.1f M parameters, %d pronunciations", n_parameters / 1e6, len(self.examples))
        while self.weights.progress.epoch < self.options["n_epochs"]:
            self._train_pass(dtype)
            self._evaluate()
            self.weights.save(LAST)
        return self._count_errors(load_g2p(self.weights.directory / BEST))

    def _train_pass(self, dtype: torch.dtype) -> None:
        """What is left of one pass over the training words."""
        batches = self._make_batches()
        self.weights.train_pass(
            batches,
            lambda batch: self._step(batch, dtype, n_batches=len(batches)),
            n_passes=self.options["n_epochs"],
        )

    def _step(self, batch: Sequence[Example], dtype: torch.dtype, *, n_batches: int) -> float:
        """One optimiser step; returns the loss a phone."""
        n_steps = n_batches * self.options["n_epochs"]
        rate = rate_of_step(
            self.weights.progress.step,
            progress=self.weights.progress.step / n_steps,
            n_warmup_steps=round(_WARMUP_SHARE * n_steps),
            highest=self.options["learning_rate"],
            final=0.0,
        )
        return self.weights.step(lambda: self._compute_loss(batch, dtype), rate=rate)

    def _compute_loss(self, batch: Sequence[Example], dtype: torch.dtype) -> Tensor:
        """CTC loss of a batch, a phone."""
        letters, lengths = _pad([example.letters for example in batch])
        phones = torch.cat([example.phones for example in batch])
        phone_lengths = torch.tensor([len(example.phones) for example in batch])
        model = self.weights.model
        model.train()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            log_probs = model(letters, lengths)
        loss = nn.functional.ctc_loss(
            log_probs.transpose(0, 1),  # time first, as torch wants it
            phones,
            lengths * model.n_repeats,
            phone_lengths,
            reduction="sum",
        )
        return loss / len(phones)

    def _make_batches(self) -> list[list[Example]]:
        """The batches of this pass, each of words of similar length."""
        return draw_batches(
            self.examples,
            size=self.options["batch_size"],
            n_pooled=_POOLED_BATCHES,
            length=lambda example: len(example.letters),
            draw=random.Random(f"{self.options['seed']} {self.weights.progress.epoch}"),
        )

    def _evaluate(self) -> None:
        """Score the averaged weights on the development words; keep them if they are the best."""
        errors = self._count_errors(self.weights.averaged)
        self.weights.keep_if_best(errors.word_error)
        row = {
            "epoch": self.weights.progress.epoch,
            "word_error": round(errors.word_error, 4),
            "phone_error": round(errors.phone_error, 4),
        }
        self.weights.log(row)
        logger.info(
            "pass %(epoch)d: word error %(word_error).4f, phone error %(phone_error).4f", row
        )

    def _count_errors(self, model: G2pModel) -> G2pErrors:
        pronounced = pronounce_greedily(model, self.dev)
        return count_errors(pronounced, words=self.dev, dictionary=self.dictionary)

    def _refuse_another(self, settings: Mapping[str, Any]) -> None:
        if settings != self.settings:
            raise TrainingError(
                f"{self.weights.directory} holds a run with {settings}, asked for was "
                f"{self.settings}; choose another directory or delete it"
            )


def _encode(word: str) -> Tensor:
    return torch.tensor([LETTERS.index(letter) for letter in word])


def _pad(letters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Words as (batch, letter), and their lengths, (batch,)."""
    lengths = torch.tensor([len(word) for word in letters])
    return pad_sequence(list(letters), batch_first=True), lengths
