"""Words to an intent and slots: one recurrent model for both, trained together.

Word and character embeddings → residual bidirectional LSTM or GRU layers → for each word a score a
label, under a CRF, and for the utterance an intent by attention pooling. The intent's probabilities
in turn raise or lower the labels.

A run lives in one folder: `last.pt` (everything an exact continuation needs), `best.pt` (the best
pass on the development sentences) and `dev.jsonl` (a line a pass). Started again, it goes on where
it stopped; every draw depends on the seed, the step and the pass alone, so the continuation equals
an uninterrupted run.
"""

from __future__ import annotations

import logging
import random
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from service.errors import TrainingError
from service.understanding import (
    N_SPECIAL_CHARACTERS,
    OUTSIDE,
    UNKNOWN_WORD,
    Encoder,
    Parse,
    Transitions,
    Vocabulary,
    decode,
    may_follow,
    shape_word,
    spans,
)
from training.checkpoint import load_checkpoint
from training.config import RunSettings, Settings
from training.lexicon import load_dictionary
from training.model import RecurrentLayer, reversal_index
from training.schedule import learning_rate as rate_of_step
from training.slot_data import (
    Confusions,
    LabelledSentence,
    collect_values,
    find_confusions,
    mishear,
    read_confusions,
    read_parts,
    read_sentences,
    swap_values,
)
from training.weights import BEST, LAST, Weights, draw_batches

logger = logging.getLogger(__name__)

_WARMUP_SHARE: Final = 0.04
_POOLED_BATCHES: Final = 20
_EVALUATED_SENTENCES: Final = 128
_SMALLEST_SUM: Final = 1e-290


class UnderstandingData(Settings):
    """What is trained on: a folder with all parts, or each part by itself."""

    folder: Path | None = None
    """Folder with `train` and `valid` (or `dev`); see `training.slot_data`."""
    train: tuple[Path, ...] = ()
    """Training sentences: folders or JSON-lines files."""
    dev: tuple[Path, ...] = ()
    """Sentences that choose the pass that is kept; never those that are reported on."""
    confusions: Path | None = None
    """JSON file of words and what is heard instead, for `augment.noise`; without one, words of the
    pronouncing dictionary that sound alike."""

    @model_validator(mode="after")
    def _parts_are_named(self) -> UnderstandingData:
        if bool(self.train) != bool(self.dev) or (self.folder is None) != bool(self.train):
            raise ValueError("name either folder, or both train and dev")
        return self


class UnderstandingShape(Settings):
    """The model; the fields are the arguments of `UnderstandingModel`."""

    cell: Literal["lstm", "gru"] = "lstm"
    """Kind of recurrent cell."""
    n_layers: int = Field(default=2, ge=1)
    """Bidirectional layers."""
    hidden_size: int = Field(default=200, ge=1)
    """Units of one direction of a layer."""
    word_size: int = Field(default=200, ge=1)
    """Width of a word's embedding."""
    character_size: int = Field(default=32, ge=1)
    """Width of a character's embedding."""
    n_filters: int = Field(default=100, ge=1)
    """Filters of each of the two character convolutions, 3 and 5 characters wide."""
    crf: bool = True
    """Whether labels are chosen together, by a CRF, or each by itself."""
    dropout: float = Field(default=0.4, ge=0, lt=1)
    """Share of activations dropped, the same ones for every word of an utterance."""


class UnderstandingAugment(Settings):
    """How the training sentences vary from pass to pass; all are probabilities."""

    word_dropout: float = Field(default=0.1, ge=0, le=1)
    """A word is taken for unknown; its characters stay."""
    rare_dropout: float = Field(default=0.5, ge=0, le=1)
    """A word that was seen only once is taken for unknown."""
    swap: float = Field(default=0.3, ge=0, le=1)
    """A slot's value is replaced by another value of the same slot."""
    noise: float = Field(default=0.0, ge=0, le=1)
    """A word is misheard: replaced, lost, or followed by another."""


class UnderstandingOptimiser(Settings):
    """AdamW and its schedule: a short warm-up, then half a cosine to zero."""

    n_epochs: int = Field(default=25, ge=1)
    """Passes over the training sentences; the schedule ends with the last one."""
    batch_size: int = Field(default=64, ge=1)
    """Sentences of a step."""
    learning_rate: float = Field(default=2e-3, gt=0)
    """The highest learning rate."""
    weight_decay: float = Field(default=1e-2, ge=0)
    """Decoupled weight decay."""
    clip_norm: float = Field(default=5.0, gt=0)
    """Gradients are scaled down to this global norm."""
    consistency: float = Field(default=0.0, ge=0)
    """Weight of the divergence between two readings of each sentence that differ in what dropout
    takes away (R-Drop, Liang et al. 2021); 0 reads each once."""
    average_decay: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the exponential moving average of the weights, per step."""


class UnderstandingRun(RunSettings):
    """Where a run lives and how it proceeds."""

    directory: Path = Path("runs/understanding")
    """Folder of the checkpoints and logs."""
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    """`auto` times one step in each type and takes the faster."""
    checkpoint_every_s: float = Field(default=60.0, ge=0)
    """Seconds between two checkpoints inside a pass."""


class UnderstandingSettings(Settings):
    """Everything a run needs to know."""

    task: Literal["understanding"] = "understanding"
    """Tells this recipe from that of an acoustic model."""
    data: UnderstandingData
    model: UnderstandingShape = UnderstandingShape()
    augment: UnderstandingAugment = UnderstandingAugment()
    optimiser: UnderstandingOptimiser = UnderstandingOptimiser()
    run: UnderstandingRun = UnderstandingRun()


SMALL_MODEL: Final = UnderstandingShape(hidden_size=96, word_size=96, n_filters=48, dropout=0.3)
"""For sets of some thousand short sentences."""
SMALL_OPTIMISER: Final = UnderstandingOptimiser(n_epochs=12, batch_size=32, average_decay=0.995)
"""Goes with `SMALL_MODEL`."""


@dataclass(frozen=True)
class UnderstandingScores:
    """How well sentences were understood; labels unseen in training count like any other."""

    n_sentences: int
    """Sentences parsed."""
    n_right_intents: int
    """Sentences with the right intent."""
    n_right_sentences: int
    """Sentences with the right intent and exactly the right slots."""
    n_slots: int
    """Slots of the references."""
    n_found_slots: int
    """Slots of the parses."""
    n_right_slots: int
    """Slots of the parses whose name, begin and end are right."""

    @property
    def slot_f1(self) -> float:
        """Micro-averaged F1 of slots, as `conlleval` computes it; 1 where there are none."""
        n_both = self.n_slots + self.n_found_slots
        return 2 * self.n_right_slots / n_both if n_both else 1.0

    @property
    def intent_accuracy(self) -> float:
        """Share of sentences with the right intent."""
        return self.n_right_intents / max(1, self.n_sentences)

    @property
    def sentence_accuracy(self) -> float:
        """Share of sentences with the right intent and exactly the right slots."""
        return self.n_right_sentences / max(1, self.n_sentences)


def train_understanding(settings: UnderstandingSettings) -> Path:
    """Train as a recipe says, or go on training; returns the path of `best.pt`.

    Raises:
        TrainingError: the data cannot be read or trained on, or the folder holds another run.
    """
    train, dev = _read_data(settings.data)
    if settings.run.n_threads:
        torch.set_num_threads(settings.run.n_threads)
    confusions = settings.data.confusions
    return fit(
        train,
        dev,
        directory=settings.run.directory,
        model=settings.model,
        augment=settings.augment,
        optimiser=settings.optimiser,
        confusions=None if confusions is None else read_confusions(confusions),
        seed=settings.run.seed,
        precision=settings.run.precision,
        checkpoint_every_s=settings.run.checkpoint_every_s,
    )


def fit(
    train: Sequence[LabelledSentence],
    dev: Sequence[LabelledSentence],
    *,
    directory: Path,
    model: UnderstandingShape = SMALL_MODEL,
    augment: UnderstandingAugment | None = None,
    optimiser: UnderstandingOptimiser = SMALL_OPTIMISER,
    confusions: Confusions | None = None,
    seed: int = 1,
    precision: str = "float32",
    checkpoint_every_s: float = 60.0,
) -> Path:
    """Train a model, or go on training, until the last pass is done.

    Args:
        train: sentences to learn from.
        dev: sentences that choose the pass that is kept.
        directory: of the run; see above for its files.
        model: sizes; those of `SMALL_MODEL` suit generated sentences of a domain.
        augment: how the training sentences vary; None takes the usual values.
        optimiser: passes, batches and rates.
        confusions: what is heard instead of words, for `augment.noise`; None takes words of the
            pronouncing dictionary that sound alike.
        seed: of weights, batches and draws.
        precision: `auto`, `bfloat16` or `float32`.
        checkpoint_every_s: seconds between checkpoints inside a pass.

    Returns:
        The path of `best.pt`.

    Raises:
        TrainingError: no sentences to train on, or the folder holds another run.
    """
    if not train or not dev:
        raise TrainingError(
            f"{len(train)} sentences to train on and {len(dev)} to choose by; expected some of each"
        )
    augment = UnderstandingAugment() if augment is None else augment
    if augment.noise and confusions is None:
        words = {word for sentence in train for word in sentence.words}
        confusions = find_confusions(words, load_dictionary())
    run = _Run(
        directory,
        train=train,
        dev=dev,
        model=model,
        augment=augment,
        optimiser=optimiser,
        confusions=confusions or {},
        seed=seed,
        checkpoint_every_s=checkpoint_every_s,
    )
    run.train(precision)
    return directory / BEST


def load_understanding(path: Path) -> UnderstandingModel:
    """Load the averaged weights of a checkpoint, ready to evaluate.

    Raises:
        TrainingError: the file is missing, damaged or a checkpoint of another model.
    """
    checkpoint = load_checkpoint(path)
    if checkpoint.settings.get("task") != "understanding":
        raise TrainingError(
            f"{path} is no checkpoint of an understanding model; name one that "
            "train_understanding wrote"
        )
    model = UnderstandingModel(
        _to_vocabulary(checkpoint.settings["vocabulary"]), **checkpoint.settings["model"]
    )
    model.load_state_dict(checkpoint.averaged)
    return model.eval()


def predict(model: UnderstandingModel, utterances: Sequence[Sequence[str]]) -> list[Parse]:
    """Parse utterances, none of them empty, with the model as torch runs it."""
    model.eval()
    encoder, costs = Encoder(model.vocabulary), model.crf.costs()
    parses: dict[int, Parse] = {}
    order = sorted(range(len(utterances)), key=lambda place: len(utterances[place]))
    for first in range(0, len(order), _EVALUATED_SENTENCES):
        places = order[first : first + _EVALUATED_SENTENCES]
        words, characters, lengths = encoder.encode([utterances[place] for place in places])
        with torch.inference_mode():
            emissions, intents = model(*map(torch.from_numpy, (words, characters, lengths)))
        found = decode(
            emissions.numpy(), intents.numpy(), lengths, vocabulary=model.vocabulary, costs=costs
        )
        parses.update(zip(places, found, strict=True))
    return [parses[place] for place in range(len(utterances))]


def score_parses(
    parses: Sequence[Parse], references: Sequence[LabelledSentence]
) -> UnderstandingScores:
    """Compare parses with what the sentences mean."""
    n_intents = n_sentences = n_slots = n_found = n_right = 0
    for parse, reference in zip(parses, references, strict=True):
        found, wanted = set(spans(parse.labels)), set(spans(reference.labels))
        right_intent = parse.intent == reference.intent
        n_intents += right_intent
        n_sentences += right_intent and found == wanted
        n_slots += len(wanted)
        n_found += len(found)
        n_right += len(found & wanted)
    return UnderstandingScores(
        n_sentences=len(references),
        n_right_intents=n_intents,
        n_right_sentences=n_sentences,
        n_slots=n_slots,
        n_found_slots=n_found,
        n_right_slots=n_right,
    )


def make_vocabulary(sentences: Sequence[LabelledSentence]) -> Vocabulary:
    """What a model of these sentences reads and writes; every `I-` has its `B-`."""
    words = {shape_word(word) for sentence in sentences for word in sentence.words}
    characters = {c for sentence in sentences for word in sentence.words for c in word.lower()}
    labels = {label for sentence in sentences for label in sentence.labels}
    labels |= {f"B-{label[2:]}" for label in labels if label.startswith("I-")}
    return Vocabulary(
        words=tuple(sorted(words)),
        characters=tuple(sorted(characters)),
        labels=(OUTSIDE, *sorted(labels - {OUTSIDE})),
        intents=tuple(sorted({sentence.intent for sentence in sentences})),
    )


# The model


class UnderstandingModel(nn.Module):
    """Maps words to scores of labels and log probabilities of intents."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        cell: Literal["lstm", "gru"] = "lstm",
        n_layers: int = 2,
        hidden_size: int = 200,
        word_size: int = 200,
        character_size: int = 32,
        n_filters: int = 100,
        crf: bool = True,
        dropout: float = 0.4,
    ) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        width = 2 * hidden_size
        n_labels, n_intents = len(vocabulary.labels), len(vocabulary.intents)
        self.word_embedding = nn.Embedding(len(vocabulary.words) + 1, word_size)
        nn.init.normal_(self.word_embedding.weight, std=0.3)
        self.spelling = Spelling(
            len(vocabulary.characters) + N_SPECIAL_CHARACTERS,
            character_size=character_size,
            n_filters=n_filters,
        )
        self.layers = nn.ModuleList(
            RecurrentLayer(n_inputs, hidden_size, cell=cell, bidirectional=True)
            for n_inputs in (word_size + 2 * n_filters, *[width] * (n_layers - 1))
        )
        self.dropout = LockedDropout(dropout)
        self.norm = nn.LayerNorm(width)
        self.attention = nn.Linear(width, 1)
        self.intent_head = nn.Linear(width, n_intents)
        self.label_head = nn.Linear(width, n_labels)
        self.labels_of_intent = nn.Linear(n_intents, n_labels, bias=False)
        self.crf = Crf(vocabulary.labels, learned=crf)

    def forward(self, words: Tensor, characters: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Compute scores of labels and log_probs of intents.

        Args:
            words: word ids, int64, (batch, word).
            characters: character ids, int64, (batch, word, character), 0 behind a word's end.
            lengths: words of each utterance, int64, (batch,), at least 1; what lies behind is
                ignored.

        Returns:
            Scores, float32, (batch, word, label), raw, and natural log probabilities, float32,
            (batch, intent).
        """
        x = torch.cat([self.word_embedding(words), self.spelling(characters)], -1)
        x = self.dropout(x)  # (batch, word, word_size + 2 * n_filters)
        reverse = reversal_index(lengths, words.shape[1])
        for i, layer in enumerate(self.layers):
            y = self.dropout(layer(x, reverse))
            x = y if i == 0 else x + y  # (batch, word, width)
        x = self.norm(x)
        intents = self._pool(x, lengths)
        intents = self.intent_head(self.dropout(intents).squeeze(1)).float().log_softmax(-1)
        hint = self.labels_of_intent(intents.exp()).unsqueeze(1)  # (batch, 1, label)
        return (self.label_head(self.dropout(x)) + hint).float(), intents

    def _pool(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Attention over the words of each utterance: (batch, word, width) → (batch, 1, width)."""
        place = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
        behind = (place >= lengths.unsqueeze(1)).unsqueeze(-1)
        weights = self.attention(x).float().masked_fill(behind, -torch.inf).softmax(1)
        pooled: Tensor = (weights * x).sum(1, keepdim=True)
        return pooled


class Spelling(nn.Module):
    """Characters of words to vectors: two convolutions, and the maximum over each word."""

    def __init__(self, n_characters: int, *, character_size: int, n_filters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_characters, character_size, padding_idx=0)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(character_size, n_filters, kernel, padding=kernel // 2) for kernel in (3, 5)
        )

    def forward(self, characters: Tensor) -> Tensor:
        """Character ids, (batch, word, character), 0 is padding → (batch, word, 2 * n_filters)."""
        flat = characters.flatten(0, 1)  # (batch * word, character)
        inside = (flat != 0).unsqueeze(1)
        x = self.embedding(flat).transpose(1, 2)  # (batch * word, size, character), padding is 0
        found = [(torch.relu(c(x)) * inside).amax(-1) for c in self.convolutions]
        vectors = torch.cat(found, -1)  # (batch * word, 2 * n_filters)
        return vectors.reshape(characters.shape[0], characters.shape[1], vectors.shape[-1])


class LockedDropout(nn.Module):
    """Dropout that drops the same features of every word (Gal and Ghahramani 2016)."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """(batch, word, width) → the same."""
        if not self.training or not self.probability:
            return x
        kept = x.new_empty(x.shape[0], 1, x.shape[2]).bernoulli_(1 - self.probability)
        return x * kept / (1 - self.probability)


class Crf(nn.Module):
    """A linear chain over labels; what BIO forbids has no probability.

    Sums run over probabilities in float64, scaled word by word, so that they are matrix products.
    """

    allowed: Tensor
    allowed_first: Tensor

    def __init__(self, labels: Sequence[str], *, learned: bool) -> None:
        super().__init__()
        n_labels = len(labels)
        self.between = nn.Parameter(torch.zeros(n_labels, n_labels), requires_grad=learned)
        self.first = nn.Parameter(torch.zeros(n_labels), requires_grad=learned)
        allowed = [[not learned or may_follow(b, a) for b in labels] for a in labels]
        first = [not learned or may_follow(label, None) for label in labels]
        self.register_buffer("allowed", torch.tensor(allowed))
        self.register_buffer("allowed_first", torch.tensor(first))

    def costs(self) -> Transitions:
        """The transitions as decoding takes them."""
        between, first = (x.detach().double() for x in (self.between, self.first))
        return Transitions(
            between=between.masked_fill(~self.allowed, -torch.inf).numpy(),
            first=first.masked_fill(~self.allowed_first, -torch.inf).numpy(),
        )

    def log_prob(self, emissions: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
        """Log probability of the labels of each utterance.

        Args:
            emissions: scores, float32, (batch, word, label).
            labels: label ids, int64, (batch, word), as BIO allows them; padding may hold any id.
            lengths: words of each utterance, int64, (batch,), at least 1.

        Returns:
            Natural log, float64, (batch,).
        """
        emissions = emissions.double()
        return self._score(emissions, labels, lengths) - self._log_sum(emissions, lengths)

    def _score(self, emissions: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
        """Sum of the scores of one labelling, (batch,)."""
        inside = torch.arange(labels.shape[1]).unsqueeze(0) < lengths.unsqueeze(1)
        own = emissions.gather(2, labels.unsqueeze(-1)).squeeze(-1)  # (batch, word)
        moves = self.between.double()[labels[:, :-1], labels[:, 1:]]
        total = (own * inside).sum(1) + (moves * inside[:, 1:]).sum(1)
        return total + self.first.double()[labels[:, 0]]

    def _log_sum(self, emissions: Tensor, lengths: Tensor) -> Tensor:
        """Log of the sum over all labellings, (batch,): the forward algorithm."""
        step = self.between.double().exp() * self.allowed
        first = self.first.double().masked_fill(~self.allowed_first, -torch.inf)
        ahead = emissions[:, 0] + first  # (batch, label)
        for place in range(1, emissions.shape[1]):
            peak = ahead.detach().amax(1, keepdim=True)
            reached = ((ahead - peak).exp() @ step).clamp_min(_SMALLEST_SUM).log() + peak
            goes_on = (place < lengths).unsqueeze(1)
            ahead = torch.where(goes_on, reached + emissions[:, place], ahead)
        return ahead.logsumexp(1)


# The run


class _Run:
    def __init__(
        self,
        directory: Path,
        *,
        train: Sequence[LabelledSentence],
        dev: Sequence[LabelledSentence],
        model: UnderstandingShape,
        augment: UnderstandingAugment,
        optimiser: UnderstandingOptimiser,
        confusions: Confusions,
        seed: int,
        checkpoint_every_s: float,
    ) -> None:
        self.train_sentences, self.dev_sentences = train, dev
        self.augment, self.options, self.seed = augment, optimiser, seed
        self.confusions = confusions
        self.values = collect_values(train)
        vocabulary = make_vocabulary(train)
        self.encoder = Encoder(vocabulary)
        self.label_ids = {label: i for i, label in enumerate(vocabulary.labels)}
        self.intent_ids = {intent: i for i, intent in enumerate(vocabulary.intents)}
        self.rare = _find_rare(train, vocabulary)
        self.settings = {
            "task": "understanding",
            "model": model.model_dump(),
            "augment": augment.model_dump(),
            "optimiser": {**optimiser.model_dump(), "seed": seed},
            "data_checksum": _checksum(train, dev, confusions),
            "vocabulary": {name: list(entries) for name, entries in asdict(vocabulary).items()},
        }
        torch.manual_seed(seed)
        network = UnderstandingModel(vocabulary, **model.model_dump())
        self.weights = Weights(
            directory,
            network,
            torch.optim.AdamW(
                network.parameters(),
                betas=(0.9, 0.98),
                weight_decay=optimiser.weight_decay,
                fused=True,
            ),
            settings=self.settings,
            seed=seed,
            clip_norm=optimiser.clip_norm,
            average_decay=optimiser.average_decay,
            checkpoint_every_s=checkpoint_every_s,
        )
        self.weights.restore(self._refuse_another)

    def train(self, precision: str) -> None:
        first = self._make_batches()[0]
        dtype = self.weights.choose_precision(
            lambda dtype: self._compute_loss(first, dtype), precision
        )
        n_parameters = sum(p.numel() for p in self.weights.model.parameters())
        logger.info(
            "%.1f M parameters, %d sentences", n_parameters / 1e6, len(self.train_sentences)
        )
        while self.weights.progress.epoch < self.options.n_epochs:
            self._train_pass(dtype)
            self._evaluate()
            self.weights.save(LAST)

    def _train_pass(self, dtype: torch.dtype) -> None:
        """What is left of one pass over the training sentences."""
        batches = self._make_batches()
        self.weights.train_pass(
            batches,
            lambda batch: self._step(batch, dtype, n_batches=len(batches)),
            n_passes=self.options.n_epochs,
        )

    def _step(
        self, batch: Sequence[LabelledSentence], dtype: torch.dtype, *, n_batches: int
    ) -> float:
        """One optimiser step; returns the loss a sentence."""
        n_steps = n_batches * self.options.n_epochs
        rate = rate_of_step(
            self.weights.progress.step,
            progress=self.weights.progress.step / n_steps,
            n_warmup_steps=round(_WARMUP_SHARE * n_steps),
            highest=self.options.learning_rate,
            final=0.0,
        )
        return self.weights.step(lambda: self._compute_loss(batch, dtype), rate=rate)

    def _compute_loss(self, batch: Sequence[LabelledSentence], dtype: torch.dtype) -> Tensor:
        """Negative log probability of labels and intent, a sentence."""
        draw = random.Random(f"{self.seed} step {self.weights.progress.step}")
        varied = [self._vary(sentence, draw) for sentence in batch]
        if self.options.consistency:
            varied *= 2
        encoded = self.encoder.encode([sentence.words for sentence in varied])
        words, characters, lengths = map(torch.from_numpy, encoded)
        labels = torch.zeros_like(words)
        for row, sentence in enumerate(varied):
            ids = [self.label_ids[label] for label in sentence.labels]
            labels[row, : len(ids)] = torch.tensor(ids)
        intents = torch.tensor([self.intent_ids[sentence.intent] for sentence in varied])
        model = self.weights.model
        model.train()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            emissions, log_probs = model(self._hide(words), characters, lengths)
        loss = nn.functional.nll_loss(log_probs, intents)
        loss = loss - model.crf.log_prob(emissions, labels, lengths).mean()
        if self.options.consistency:
            inside = torch.arange(words.shape[1]).unsqueeze(0) < lengths.unsqueeze(1)
            apart = _divergence(log_probs) + _divergence(emissions.log_softmax(-1), inside)
            loss = loss + self.options.consistency * apart
        return loss

    def _vary(self, sentence: LabelledSentence, draw: random.Random) -> LabelledSentence:
        sentence = swap_values(sentence, self.values, probability=self.augment.swap, draw=draw)
        if not self.augment.noise:
            return sentence
        return mishear(
            sentence,
            self.confusions,
            probability=self.augment.noise,
            vocabulary=self.weights.model.vocabulary.words,
            draw=draw,
        )

    def _hide(self, words: Tensor) -> Tensor:
        """Take some words for unknown, rare ones more often: (batch, word) → the same."""
        probability = torch.where(
            self.rare[words], self.augment.rare_dropout, self.augment.word_dropout
        )
        return words.masked_fill(torch.rand(words.shape) < probability, UNKNOWN_WORD)

    def _make_batches(self) -> list[list[LabelledSentence]]:
        """The batches of this pass, each of sentences of similar length."""
        return draw_batches(
            self.train_sentences,
            size=self.options.batch_size,
            n_pooled=_POOLED_BATCHES,
            length=lambda sentence: len(sentence.words),
            draw=random.Random(f"{self.seed} pass {self.weights.progress.epoch}"),
        )

    def _evaluate(self) -> None:
        """Score the averaged weights on the development sentences; keep the best, late ones first.

        What counts is the mean of slot F1 and of the share of sentences that are all right.
        """
        parses = predict(self.weights.averaged, [s.words for s in self.dev_sentences])
        scores = score_parses(parses, self.dev_sentences)
        error = 1 - (scores.slot_f1 + scores.sentence_accuracy) / 2
        self.weights.keep_if_best(error, or_equal=True)
        row = {
            "epoch": self.weights.progress.epoch,
            "slot_f1": round(scores.slot_f1, 4),
            "intent": round(scores.intent_accuracy, 4),
            "sentence": round(scores.sentence_accuracy, 4),
        }
        self.weights.log(row)
        logger.info(
            "pass %(epoch)d: slot F1 %(slot_f1).4f, intent %(intent).4f, sentence %(sentence).4f",
            row,
        )

    def _refuse_another(self, settings: Mapping[str, Any]) -> None:
        different = [name for name in self.settings if settings.get(name) != self.settings[name]]
        if not different:
            return
        shown = [name for name in different if name != "vocabulary"] or different
        raise TrainingError(
            f"{self.weights.directory} holds a run with { {n: settings.get(n) for n in shown} }, "
            f"asked for was { {n: self.settings[n] for n in shown} }; choose another directory or "
            "delete it"
        )


def _read_data(
    data: UnderstandingData,
) -> tuple[list[LabelledSentence], list[LabelledSentence]]:
    if data.folder is not None:
        parts = read_parts(data.folder)
        return list(parts.train), list(parts.dev)
    train = [sentence for path in data.train for sentence in read_sentences(path)]
    return train, [sentence for path in data.dev for sentence in read_sentences(path)]


def _divergence(log_probs: Tensor, inside: Tensor | None = None) -> Tensor:
    """How far the second half of a batch departs from the first, a sentence of the half, ().

    The mean of the Kullback-Leibler divergences of both directions.

    Args:
        log_probs: natural log, float32, (batch, ..., class), the two readings one after the other.
        inside: what counts, bool, (batch, ...); None counts everything.
    """
    one, other = log_probs.chunk(2)
    both = 0.5 * ((one.exp() - other.exp()) * (one - other)).sum(-1)  # (batch / 2, ...)
    if inside is not None:
        both = both * inside.chunk(2)[0]
    return both.sum() / len(one)


def _find_rare(sentences: Sequence[LabelledSentence], vocabulary: Vocabulary) -> Tensor:
    """Whether each word id was seen once, bool, (word,)."""
    counts = Counter(shape_word(word) for sentence in sentences for word in sentence.words)
    return torch.tensor([False, *(counts[word] == 1 for word in vocabulary.words)])


def _checksum(
    train: Sequence[LabelledSentence], dev: Sequence[LabelledSentence], confusions: Confusions
) -> int:
    """Tells one data set from another."""
    return zlib.crc32(repr((list(train), list(dev), sorted(confusions.items()))).encode())


def _to_vocabulary(fields: Mapping[str, Sequence[str]]) -> Vocabulary:
    return Vocabulary(**{name: tuple(entries) for name, entries in fields.items()})
