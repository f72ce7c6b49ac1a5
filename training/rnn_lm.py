"""A recurrent language model for second-pass rescoring.

Words are read and predicted in pieces; the matrix that reads a piece also predicts it. Passages
begin in the start state, as an utterance does when it is scored (see `training.lm_text`).

A run lives in one folder: `pieces.json`, `last.pt` (everything an exact continuation needs),
`best.pt` (lowest perplexity on the development text) and `dev.jsonl` (a line an evaluation).
Started again, it goes on where it stopped; the dropout of a step and the batches of a pass depend
on the seed, the step and the pass alone, so the continuation equals an uninterrupted run.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from tqdm import tqdm

from service.errors import TrainingError
from service.rescorer import Pieces
from training.checkpoint import Checkpoint, State, load_checkpoint
from training.config import RunSettings, Settings
from training.lm_text import (
    EncodedText,
    IntArray,
    PieceKind,
    TextPart,
    count_words,
    encode_text,
    make_batches,
    make_passages,
    make_pieces,
    pad_batch,
)
from training.model import CELLS, Cell
from training.schedule import learning_rate as rate_of_step
from training.weights import BEST, LAST, Weights

logger = logging.getLogger(__name__)

_EVALUATED_TOKENS: Final = 8192
_LOSS_DECAY: Final = 0.98


class TextSettings(Settings):
    """Some lines of a text file."""

    path: Path
    """Plain, gzip or xz, one sentence a line."""
    first_line: int = Field(default=1, ge=1)
    """Counted from 1."""
    last_line: int | None = Field(default=None, ge=1)
    """The last line that is read; left out, all to the end."""
    n_repeats: int = Field(default=1, ge=1)
    """How often a pass reads it."""

    @property
    def part(self) -> TextPart:
        """The lines as the reader wants them."""
        return TextPart(self.path, self.first_line, self.last_line)


class DataSettings(Settings):
    """What is trained on."""

    train: tuple[TextSettings, ...] = Field(min_length=1)
    """Training text, in the order of its books."""
    dev: tuple[TextSettings, ...] = Field(min_length=1)
    """Text that chooses the checkpoint; none of it may be in the training text."""
    pieces: PieceKind = "subword"
    """Pieces of words, or whole words."""
    n_pieces: int = Field(default=4000, ge=3)
    """Pieces, with the sentence end and the unknown piece."""
    min_count: int = Field(default=2, ge=1)
    """Words that the training text has less often are left out of the perplexity, as an n-gram
    with this minimum count leaves them out of its list."""
    alone_share: float = Field(default=1.0, ge=0, le=1)
    """Share of sentences that begin in the start state; the others get the state of the sentence
    before them."""
    longest_tokens: int = Field(default=128, ge=2)
    """Tokens over which gradients are carried at most; longer passages are cut."""


class ModelSettings(Settings):
    """The model; the fields are the arguments of `LanguageModel`."""

    cell: Cell = "lstm"
    """Kind of recurrent cell."""
    n_layers: int = Field(default=2, ge=1)
    """Recurrent layers."""
    embedding_size: int = Field(default=512, ge=1)
    """Numbers that stand for a piece, and units of the last layer."""
    hidden_size: int = Field(default=512, ge=1)
    """Units of the other layers."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout between layers; one mask for all steps of a passage (Gal and Ghahramani 2016)."""
    embedding_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of pieces whose embedding is zero for a step (Merity et al. 2018)."""


class OptimiserSettings(Settings):
    """AdamW, its schedule, and what a step is."""

    n_passes: int = Field(default=3, ge=1)
    """Passes over the training text; the schedule ends with the last one."""
    batch_tokens: int = Field(default=4096, ge=2)
    """Tokens in one step, padding included."""
    learning_rate: float = Field(default=2e-3, gt=0)
    """The highest learning rate."""
    final_learning_rate: float = Field(default=1e-5, ge=0)
    """The learning rate at the end of the cosine."""
    n_warmup_steps: int = Field(default=400, ge=0)
    """Steps over which the learning rate rises from zero."""
    weight_decay: float = Field(default=1e-2, ge=0)
    """Decoupled weight decay."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm."""
    average_decay: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the exponential moving average of the weights, per step."""


class LanguageModelRun(RunSettings):
    """Where a run lives and how it proceeds."""

    directory: Path = Path("runs/rescorer")
    """Folder of the checkpoints and logs."""
    evaluate_every_steps: int = Field(default=500, ge=1)
    """Steps between two evaluations on the development text."""
    initial_checkpoint: Path | None = None
    """Checkpoint whose weights and pieces the run starts from (fine-tuning)."""


class LanguageModelSettings(Settings):
    """Everything a run needs to know."""

    task: Literal["language-model"] = "language-model"
    """What the recipe trains."""
    data: DataSettings
    model: ModelSettings = ModelSettings()
    optimiser: OptimiserSettings = OptimiserSettings()
    run: LanguageModelRun = LanguageModelRun()


class LanguageModel(nn.Module):
    """Predicts each piece from those before it."""

    def __init__(
        self,
        n_pieces: int,
        *,
        cell: Cell = "lstm",
        n_layers: int = 2,
        embedding_size: int = 512,
        hidden_size: int = 512,
        dropout: float = 0.0,
        embedding_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.cell = cell
        self.dropout = dropout
        self.embedding_dropout = embedding_dropout
        self.embedding = nn.Embedding(n_pieces, embedding_size)
        nn.init.normal_(self.embedding.weight, std=0.05)
        self.bias = nn.Parameter(torch.zeros(n_pieces))
        sizes = [embedding_size, *[hidden_size] * (n_layers - 1), embedding_size]
        self.layers = nn.ModuleList(
            CELLS[cell](n_inputs, n_units, batch_first=True)
            for n_inputs, n_units in pairwise(sizes)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Read passages from the start state.

        Args:
            tokens: pieces read, int64, (batch, time).

        Returns:
            Logits of the piece that follows each, (batch, time, piece).
        """
        x = self._lock_dropout(self._embed(tokens))  # (batch, time, embedding)
        for layer in self.layers:
            x = self._lock_dropout(layer(x)[0])
        return nn.functional.linear(x, self.embedding.weight, self.bias)

    def _embed(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.embedding(tokens)
        if not self.training or not self.embedding_dropout:
            return x
        kept = torch.full((len(self.embedding.weight), 1), 1 - self.embedding_dropout).bernoulli()
        return x * (kept / (1 - self.embedding_dropout))[tokens]

    def _lock_dropout(self, x: Tensor) -> Tensor:
        """Drop the same units at all steps of a passage."""
        if not self.training or not self.dropout:
            return x
        kept = x.new_full((len(x), 1, x.shape[2]), 1 - self.dropout).bernoulli()
        return x * (kept / (1 - self.dropout))


def train_language_model(settings: LanguageModelSettings) -> Path:
    """Train a model, or go on training, until the last pass is done.

    Returns:
        The checkpoint of the lowest perplexity on the development text.

    Raises:
        InputError: a text cannot be read or holds no words.
        TrainingError: the folder holds another run.
    """
    if settings.run.n_threads:
        torch.set_num_threads(settings.run.n_threads)
    return _Run(settings).train()


def load_language_model(path: Path) -> tuple[LanguageModel, Pieces]:
    """Load the averaged weights of a checkpoint, ready to evaluate, and its pieces.

    Raises:
        TrainingError: the file is missing, damaged or no checkpoint of a language model.
    """
    checkpoint = _load(path)
    pieces = _pieces_of(checkpoint)
    model = LanguageModel(len(pieces.names), **checkpoint.settings["model"])
    model.load_state_dict(checkpoint.averaged)
    return model.eval(), pieces


def perplexity(model: LanguageModel, text: EncodedText) -> float:
    """Perplexity a word, each sentence read from the start state.

    The log probability of a word is that of its pieces. Words outside the list are read, but what
    they cost is left out and they are not counted; every sentence end is counted.
    """
    token_log_probs = score_tokens(model, text)
    return math.exp(-float(token_log_probs[text.counted].sum()) / text.n_counted)


def score_tokens(model: LanguageModel, text: EncodedText) -> torch.Tensor:
    """Natural log probability of each token of a text, float64, (token,)."""
    model.eval()
    sentences = np.stack([text.starts[:-1], text.starts[1:]], axis=1)
    scores = torch.zeros(len(text.tokens), dtype=torch.float64)
    for batch in make_batches(sentences, n_tokens=_EVALUATED_TOKENS, seed="0"):
        read, wanted = map(torch.from_numpy, pad_batch(text, batch))
        with torch.inference_mode():
            log_probs = model(read).float().log_softmax(-1)
        found = log_probs.gather(2, wanted.clamp(min=0)[:, :, None])[:, :, 0].double()
        for row, (begin, end) in enumerate(batch.tolist()):
            scores[begin:end] = found[row, : end - begin]
    return scores


class _Run:
    def __init__(self, settings: LanguageModelSettings) -> None:
        self.settings = settings
        settings.run.directory.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(settings.run.seed)
        initial = settings.run.initial_checkpoint
        self.initial = None if initial is None else _load(initial)
        counts = count_words([text.part for text in settings.data.train])
        self.pieces = self._find_pieces(counts)
        words = {word for word, n in counts.items() if n >= settings.data.min_count}
        self.texts = [
            (encode_text([text.part], self.pieces), text.n_repeats) for text in settings.data.train
        ]
        self.text = _join([text for text, _ in self.texts])
        starts_word = self.pieces.starts_word[self.text.tokens]
        self.words_before = np.concatenate([[0], np.cumsum(starts_word)])
        self.tokens_a_word = len(self.text.tokens) / (
            int(self.words_before[-1]) + len(self.text.starts) - 1
        )
        self.dev = encode_text([text.part for text in settings.data.dev], self.pieces, words)
        model = LanguageModel(len(self.pieces.names), **settings.model.model_dump())
        if self.initial is not None:
            model.load_state_dict(self.initial.averaged)
        options = settings.optimiser
        self.weights = Weights(
            settings.run.directory,
            model,
            torch.optim.AdamW(
                model.parameters(), betas=(0.9, 0.99), weight_decay=options.weight_decay
            ),
            settings=self._describe(),
            tokens=self.pieces.names,
            seed=settings.run.seed,
            clip_norm=options.clip_norm,
            average_decay=options.average_decay,
            checkpoint_every_s=settings.run.checkpoint_every_s,
        )
        self.weights.restore(self._refuse_another)
        self.loss = math.nan  # a piece, averaged over the last steps; shown only

    def train(self) -> Path:
        n_parameters = sum(p.numel() for p in self.weights.model.parameters())
        logger.info("%.1f M parameters, %d tokens", n_parameters / 1e6, len(self.text.tokens))
        first = self._make_batches()[0]
        dtype = self.weights.choose_precision(
            lambda dtype: self._compute_loss(first, dtype), self.settings.run.precision
        )
        while self.weights.progress.epoch < self.settings.optimiser.n_passes:
            self._train_pass(dtype)
        return self.weights.directory / BEST

    def _find_pieces(self, counts: Counter[str]) -> Pieces:
        """Those of the initial checkpoint or of this folder's run, else new ones."""
        if self.initial is not None:
            return _pieces_of(self.initial)
        path = self.settings.run.directory / "pieces.json"
        if path.exists() and path.with_name(LAST).exists():
            return Pieces.from_metadata(json.loads(path.read_text(encoding="utf-8")))
        data = self.settings.data
        pieces = make_pieces(counts, kind=data.pieces, n_pieces=data.n_pieces)
        path.write_text(json.dumps(pieces.to_metadata()), encoding="utf-8")
        return pieces

    def _train_pass(self, dtype: torch.dtype) -> None:
        """What is left of one pass over the training text."""
        batches = self._make_batches()
        n_words = [self._count_words(batch) for batch in batches]
        done = self.weights.progress.batch
        label = f"pass {self.weights.progress.epoch + 1}/{self.settings.optimiser.n_passes}"
        with tqdm(
            desc=label,
            total=sum(n_words),
            initial=sum(n_words[:done]),
            unit=" words",
            unit_scale=True,
            mininterval=10.0,
        ) as bar:
            for batch, n in zip(batches[done:], n_words[done:], strict=True):
                self._step(batch, dtype, share=self.weights.progress.batch / len(batches))
                bar.set_postfix(perplexity=f"{self._word_perplexity():.1f}", refresh=False)
                bar.update(n)
                self._advance(ends_pass=self.weights.progress.batch + 1 == len(batches))

    def _advance(self, *, ends_pass: bool) -> None:
        """Count the step; evaluate and save where it is time."""
        self.weights.advance()
        if ends_pass:
            self.weights.end_pass()
        step = self.weights.progress.step
        if ends_pass or step % self.settings.run.evaluate_every_steps == 0:
            self._evaluate()
            self.weights.save(LAST)
        else:
            self.weights.save_if_due()

    def _step(self, batch: IntArray, dtype: torch.dtype, *, share: float) -> None:
        """One optimiser step, `share` of the pass being done."""
        options = self.settings.optimiser
        rate = rate_of_step(
            self.weights.progress.step,
            progress=(self.weights.progress.epoch + share) / options.n_passes,
            n_warmup_steps=options.n_warmup_steps,
            highest=options.learning_rate,
            final=options.final_learning_rate,
        )
        loss = self.weights.step(lambda: self._compute_loss(batch, dtype), rate=rate)
        before = loss if math.isnan(self.loss) else self.loss
        self.loss = _LOSS_DECAY * before + (1 - _LOSS_DECAY) * loss

    def _compute_loss(self, batch: IntArray, dtype: torch.dtype) -> Tensor:
        """Cross entropy of a batch, a token."""
        read, wanted = map(torch.from_numpy, pad_batch(self.text, batch))
        self.weights.model.train()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            logits = self.weights.model(read)
        return nn.functional.cross_entropy(
            logits.float().flatten(0, 1), wanted.flatten(), ignore_index=-1
        )

    def _make_batches(self) -> list[IntArray]:
        """The batches of this pass."""
        data, epoch = self.settings.data, self.weights.progress.epoch
        passages, first = [], 0
        for place, (text, n_repeats) in enumerate(self.texts):
            for repeat in range(n_repeats):
                found = make_passages(
                    text,
                    alone_share=data.alone_share,
                    longest=data.longest_tokens,
                    seed=f"{self.settings.run.seed} {epoch} {place} {repeat}",
                )
                passages.append(found + first)
            first += len(text.tokens)
        return make_batches(
            np.concatenate(passages),
            n_tokens=self.settings.optimiser.batch_tokens,
            seed=f"{self.settings.run.seed} {epoch}",
        )

    def _count_words(self, batch: IntArray) -> int:
        """Words that begin in the passages of a batch."""
        return int((self.words_before[batch[:, 1]] - self.words_before[batch[:, 0]]).sum())

    def _word_perplexity(self) -> float:
        """Of the last steps, all words counted."""
        return math.exp(min(20.0, self.loss * self.tokens_a_word))

    def _evaluate(self) -> None:
        """Score the averaged weights on the development text; keep them if they are the best."""
        found = perplexity(self.weights.averaged, self.dev)
        self.weights.keep_if_best(found)
        row = {
            "epoch": self.weights.progress.epoch,
            "step": self.weights.progress.step,
            "perplexity": round(found, 2),
            "train_perplexity": round(self._word_perplexity(), 2),
        }
        self.weights.log(row)
        logger.info("step %(step)d: perplexity %(perplexity).2f", row)

    def _refuse_another(self, settings: State) -> None:
        asked = self._describe()
        for section in ("data", "model"):
            if settings[section] != asked[section]:
                raise TrainingError(
                    f"{self.weights.directory} holds a run with {settings[section]}, asked for "
                    f"was {asked[section]}; choose another directory or delete it"
                )

    def _describe(self) -> State:
        """The settings as plain data, with what the pieces need besides their names."""
        sections: State = self.settings.model_dump(mode="json", exclude={"run"})
        return {**sections, "piece_scores": list(self.pieces.scores)}


def _load(path: Path) -> Checkpoint:
    checkpoint = load_checkpoint(path)
    if "piece_scores" not in checkpoint.settings:
        raise TrainingError(
            f"{path} is no checkpoint of a language model; name one that train_language_model wrote"
        )
    return checkpoint


def _pieces_of(checkpoint: Checkpoint) -> Pieces:
    return Pieces(tuple(checkpoint.tokens), tuple(checkpoint.settings["piece_scores"]))


def _join(texts: Sequence[EncodedText]) -> EncodedText:
    """Texts one behind another."""
    lengths = np.cumsum([0, *(len(text.tokens) for text in texts)])
    starts = [text.starts[:-1] + first for text, first in zip(texts, lengths, strict=False)]
    return EncodedText(
        tokens=np.concatenate([text.tokens for text in texts]),
        starts=np.concatenate([*starts, lengths[-1:]]),
        counted=np.concatenate([text.counted for text in texts]),
        n_counted=sum(text.n_counted for text in texts),
    )
