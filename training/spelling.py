"""Spelling: what a recogniser writes when it has heard phones, learned from text as well as speech.

Some hours of speech teach a network sounds, but not how a language is written. Here the phone head
stays as it is, and the layers behind it (`AcousticModel.spell`) learn to write what it hears:

- every training utterance is heard by the model, and each phone is cut out of the phone head's
  probabilities with the frames up to the next one: its confusions, its duration, its pauses;
- sentences of any text are pronounced and put together from such cuts, drawn at random;
- the layers learn by CTC from both, the utterances as they were heard and the sentences.

Text is cheap, so the layers see far more words than were ever recorded. A run lives in one folder:
`heard-*.npz`, `last.pt`, `best.pt` and `dev.jsonl`; started again, it goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import logging
import random
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from service.bundle import read_lexicon
from service.errors import TrainingError
from service.scoring import ErrorCounts
from service.text import BLANK, CHARACTERS, collapse, decode, encode
from training.augment import Augmentation
from training.checkpoint import (
    Checkpoint,
    Progress,
    describe_difference,
    load_acoustic_checkpoint,
    load_model,
)
from training.config import ModelSettings, Settings, TrainingSettings
from training.corpus import EVALUATED_BATCH_S, Corpus, prepare_corpora
from training.data import Batch
from training.distributed import join_world
from training.evaluation import errors_by_corpus
from training.lexicon import PHONES, find_variants
from training.lm_text import read_sentences
from training.loss import ctc_nll
from training.model import AcousticModel, Chunking
from training.precision import choose_precision, processor_name
from training.pronunciations import SpokenWord, Variants, align
from training.rnn_lm import TextSettings
from training.schedule import learning_rate
from training.weights import BEST, LAST, Weights

logger = logging.getLogger(__name__)

_FRAMES_A_PHONE: Final = 2.2
"""About as many as a phone takes; only batches depend on it."""


class SpellingText(Settings):
    """Text to learn from, and how much of it."""

    train: tuple[TextSettings, ...] = Field(min_length=1)
    """Files of sentences."""
    lexicon: Path
    """Pronunciations, lines of `word PHONE PHONE …`; sentences with other words are left out."""
    sentences_an_utterance: float = Field(default=2.0, ge=0)
    """Sentences of a pass, as many times the utterances."""
    longest_words: int = Field(default=30, ge=1)
    """Of longer sentences a stretch of so many words is taken, drawn anew each time."""


class SpellingSettings(TrainingSettings):
    """A run: what an acoustic model is trained with, and text.

    `model` must be the shape of `run.initial_checkpoint` with spelling layers. Everything is heard
    plainly and disturbed as `augment` says; with a `streaming.share` above 0, also window by window
    in the first of the chunkings, which then is half of all hearings.
    """

    text: SpellingText

    @model_validator(mode="after")
    def _has_layers_to_train(self) -> SpellingSettings:
        if self.run.initial_checkpoint is None or not self.model.n_spelling_layers:
            raise ValueError(
                "expected run.initial_checkpoint, a trained acoustic model, "
                "and model.n_spelling_layers of at least 1"
            )
        return self


@dataclass(frozen=True)
class Heard:
    """What the phone head makes of utterances, and where their phones are."""

    probabilities: npt.NDArray[np.float16]
    """Of phones, (frame, phone), all utterances one behind another."""
    starts: npt.NDArray[np.int64]
    """First frame of each utterance, and the end of the last, (utterance + 1,)."""
    names: npt.NDArray[np.str_]
    """Utterance ids, (utterance,)."""
    cuts: npt.NDArray[np.int64]
    """A row a phone, (cut, 5): its id, that of the next phone (the blank behind the last), whether
    it ends a word, its first frame and its end. What is in front of an utterance's first phone is a
    cut of the blank."""

    def of(self, utterance: int) -> npt.NDArray[np.float16]:
        """The probabilities of one utterance, (frames, phone)."""
        return self.probabilities[self.starts[utterance] : self.starts[utterance + 1]]


def hear(
    model: AcousticModel,
    batches: Iterable[Batch],
    variants: Mapping[str, Sequence[Variants]],
    *,
    augment: Callable[[Batch], Tensor] | None = None,
    chunking: Chunking | None = None,
    dtype: torch.dtype = torch.float32,
) -> Heard:
    """Let a model hear utterances, and cut out their phones.

    Args:
        model: what hears.
        batches: of the utterances.
        variants: pronunciations of the words of each utterance; where there are none, or too many
            phones for its frames, the utterance is heard but not cut.
        augment: disturbs the features of a batch.
        chunking: how the model reads; None is with full context.
        dtype: in which it computes.
    """
    names: list[str] = []
    rows: list[npt.NDArray[np.float16]] = []
    cuts: list[tuple[int, int, int, int, int]] = []
    n_frames = 0
    for batch in batches:
        features = batch.features if augment is None else augment(batch)
        enabled = dtype != torch.float32
        with torch.inference_mode(), torch.autocast("cpu", dtype=dtype, enabled=enabled):
            _, logits, lengths = model(features, batch.feature_lengths, chunking)
        log_probs = logits.float().log_softmax(-1)
        for name, row, length in zip(batch.utterance_ids, log_probs, lengths.tolist(), strict=True):
            spoken = align(row[:length], variants[name]) if name in variants else None
            if spoken is not None:
                cuts += _cut(spoken, n_frames, n_frames + length)
            names.append(name)
            rows.append(row[:length].exp().half().numpy())
            n_frames += length
    return Heard(
        probabilities=np.concatenate(rows),
        starts=np.cumsum([0, *(len(row) for row in rows)]),
        names=np.array(names),
        cuts=np.array(cuts, np.int64).reshape(-1, 5),
    )


def _cut(
    spoken: Sequence[SpokenWord], begin: int, end: int
) -> list[tuple[int, int, int, int, int]]:
    """The cuts of an utterance that has the frames from `begin` to `end`."""
    phones = [phone for word in spoken for phone in word.phones]
    firsts = [begin + frame for word in spoken for frame in word.first_frames]
    finals = [i == len(word.phones) - 1 for word in spoken for i in range(len(word.phones))]
    return [
        (phone, following, int(final), first, until)
        for phone, following, final, first, until in zip(
            [BLANK, *phones],
            [*phones, BLANK],
            [False, *finals],
            [begin, *firsts],
            [*firsts, end],
            strict=True,
        )
    ]


class Voice:
    """Says sentences with the phones of utterances that were heard."""

    def __init__(self, heard: Heard) -> None:
        """Sort the cuts, by phone, the next phone and the place in the word."""
        self._probabilities = heard.probabilities
        self._cuts = heard.cuts
        phones, following, finals = heard.cuts[:, :3].T
        self._near = _Index((phones * len(PHONES) + following) * 2 + finals)
        self._far = _Index(phones * 2 + finals)

    def can_say(self, word: Sequence[int]) -> bool:
        """Whether all phones of a word were heard, the last one at the end of a word."""
        keys = np.array(word) * 2
        keys[-1] += 1
        return bool((self._far.draw(keys, np.zeros(len(keys))) >= 0).all())

    def say(
        self, words: Sequence[Sequence[int]], draw: np.random.Generator
    ) -> npt.NDArray[np.float16]:
        """Say words: probabilities of phones, (frames, phone).

        Args:
            words: phone ids of each word; `can_say` is true of all of them.
            draw: the chance.
        """
        said = [phone for word in words for phone in word]
        phones = np.array([BLANK, *said])
        following = np.array([*said, BLANK])
        finals = np.zeros(len(phones), np.int64)
        finals[np.cumsum([len(word) for word in words])] = 1
        chance = draw.random(len(phones))
        near = self._near.draw((phones * len(PHONES) + following) * 2 + finals, chance)
        far = self._far.draw(phones * 2 + finals, chance)
        firsts, ends = self._cuts[np.where(near < 0, far, near), 3:].T
        lengths = ends - firsts
        before = np.cumsum(lengths) - lengths
        return self._probabilities[np.repeat(firsts - before, lengths) + np.arange(lengths.sum())]


class _Index:
    """Finds the places where a key occurs."""

    def __init__(self, keys: npt.NDArray[np.int64]) -> None:
        self._order = np.argsort(keys, kind="stable")
        self._starts = np.concatenate([[0], np.cumsum(np.bincount(keys)), [len(keys)]])

    def draw(
        self, keys: npt.NDArray[np.int64], chance: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.int64]:
        """One place of each key, where `chance`, from 0 to 1, says which; -1 if there is none."""
        keys = np.minimum(keys, len(self._starts) - 2)  # the last one does not occur
        n = self._starts[keys + 1] - self._starts[keys]
        places = self._starts[keys] + (chance * n).astype(np.int64)
        return np.where(n > 0, self._order[np.minimum(places, len(self._order) - 1)], -1)


@dataclass(frozen=True)
class _Example:
    hearing: int
    """Which of the hearings it is, or is put together from."""
    utterance: int | None
    """One that was heard; None is a sentence."""
    text: str
    n_frames: int
    """About as many."""


@dataclass(frozen=True)
class _Hearing:
    """The training utterances as they were heard once."""

    heard: Heard
    voice: Voice
    chunking: Chunking | None


def train_spelling(settings: SpellingSettings) -> Path:
    """Train the spelling layers, or go on training, until the last pass is done.

    Returns:
        The checkpoint with the lowest character error rate on the development set.

    Raises:
        TrainingError: the data or settings cannot be trained on, or the folder holds another run.
    """
    if settings.run.n_threads:
        torch.set_num_threads(settings.run.n_threads)
    with join_world() as world:
        if world.size > 1:
            raise TrainingError("spelling layers are trained by one process; leave out torchrun")
        assert settings.run.initial_checkpoint is not None
        initial = load_acoustic_checkpoint(settings.run.initial_checkpoint)
        _refuse_another_shape(settings, initial)
        train, dev = prepare_corpora(settings, world)
    run = _Run(settings, initial, train, dev)
    while run.weights.progress.epoch < settings.optimiser.n_epochs:
        run.train_pass()
        run.evaluate()
        run.weights.save(LAST)
    return settings.run.directory / BEST


def _refuse_another_shape(settings: SpellingSettings, initial: Checkpoint) -> None:
    held = ModelSettings.model_validate(initial.settings["model"])
    free = {name: getattr(settings.model, name) for name in ("n_spelling_layers", "dropout")}
    if held.model_copy(update=free) != settings.model:
        differing = describe_difference(initial, settings.model)
        raise TrainingError(
            f"{settings.run.initial_checkpoint} has another shape than [model]: {differing}; only "
            "n_spelling_layers and dropout may differ"
        )


class _Run:
    def __init__(
        self, settings: SpellingSettings, initial: Checkpoint, train: Corpus, dev: Corpus
    ) -> None:
        self.settings, self.dev = settings, dev
        options = settings.optimiser
        listener = load_model(initial)
        augment = Augmentation(settings.augment, settings.features, listener.feature_mean)
        readings: list[Chunking | None] = [None]
        if settings.streaming.share:
            readings.append(Chunking(*settings.streaming.chunkings[0]))
        hear_once = partial(
            _hear_once,
            settings.run.directory,
            listener,
            precision=settings.run.precision,
            key=_describe_hearing(initial, settings),
        )
        self.hearings = [
            _Hearing(heard, Voice(heard), chunking)
            for chunking in readings
            for disturb in (None, augment)
            for heard in [hear_once("train", train, augment=disturb, chunking=chunking)]
        ]
        self.dev_heard = hear_once("dev", dev, augment=None, chunking=None)
        self.texts = train.texts
        lexicon = read_lexicon(settings.text.lexicon)
        voices = [hearing.voice for hearing in self.hearings]
        variants = ((word, find_variants(word, lexicon)[0]) for word in lexicon)
        self.lexicon = {
            word: ways
            for word, ways in variants
            if all(voice.can_say(way) for way in ways for voice in voices)
        }
        self.sentences = [
            sentence
            for sentence in read_sentences([text.part for text in settings.text.train])
            if all(word in self.lexicon for word in sentence.split())
        ]
        if settings.text.sentences_an_utterance and not self.sentences:
            raise TrainingError(
                f"{[str(text.path) for text in settings.text.train]} have no sentence whose words "
                f"are all in {settings.text.lexicon} and made of phones that were heard; "
                "name another lexicon or other text"
            )
        torch.manual_seed(settings.run.seed)
        model = AcousticModel(
            n_mels=settings.features.n_mels,
            n_tokens=len(CHARACTERS),
            n_phones=len(PHONES),
            **settings.model.model_dump(),
        )
        model.adopt(initial.averaged)
        assert model.spelling is not None
        trained = [*model.spelling.parameters(), *model.token_head.parameters()]
        model.requires_grad_(requires_grad=False)
        for parameter in trained:
            parameter.requires_grad_()
        self.weights = Weights(
            settings.run.directory,
            model,
            torch.optim.AdamW(
                trained, betas=(0.9, 0.98), weight_decay=options.weight_decay, fused=True
            ),
            settings=settings.model_dump(mode="json"),
            tokens=CHARACTERS,
            phones=PHONES,
            seed=settings.run.seed,
            clip_norm=options.clip_norm,
            average_decay=options.average_decay,
            checkpoint_every_s=settings.run.checkpoint_every_s,
        )
        self.weights.progress = Progress(audio_s=initial.progress.audio_s)
        self.weights.restore(self._refuse_another)
        logger.info(
            "%.1f M parameters are trained, %d sentences of text, %s",
            sum(p.numel() for p in trained) / 1e6,
            len(self.sentences),
            processor_name(),
        )
        first = self._make_batches()[0]
        self.dtype = self.weights.choose_precision(
            lambda dtype: self._compute_loss(first, dtype), settings.run.precision
        )

    def train_pass(self) -> None:
        """What is left of one pass over the utterances, and as many sentences."""
        batches = self._make_batches()
        self.weights.train_pass(
            batches,
            lambda batch: self._step(batch, n_batches=len(batches)),
            n_passes=self.settings.optimiser.n_epochs,
        )

    def evaluate(self) -> None:
        """Score the averaged weights on the development set; keep the best."""
        model = self.weights.averaged.eval()
        heard, transcripts = self.dev_heard, {}
        for utterance, name in enumerate(heard.names):
            rows = torch.from_numpy(heard.of(utterance)).float().unsqueeze(0)
            with torch.inference_mode():
                path = model.spell(rows, torch.tensor([rows.shape[1]]))[0].argmax(-1)
            transcripts[str(name)] = decode(collapse(path.tolist()), CHARACTERS)
        counts: dict[str, ErrorCounts] = errors_by_corpus(
            transcripts, references=self.dev.texts, corpora=self.dev.names
        )
        row = {
            "epoch": self.weights.progress.epoch,
            **{corpus or "total": {"wer": c.wer, "cer": c.cer} for corpus, c in counts.items()},
        }
        self.weights.keep_if_best(counts[""].cer)
        self.weights.log(row)
        table = ", ".join(f"{n or 'total'} {c.wer:.1%} / {c.cer:.1%}" for n, c in counts.items())
        logger.info("pass %d: dev greedy WER / CER: %s", self.weights.progress.epoch, table)

    def _make_batches(self) -> list[list[_Example]]:
        """The batches of this pass: each of one hearing, and of similar lengths."""
        epoch, text = self.weights.progress.epoch, self.settings.text
        draw = random.Random(f"{self.settings.run.seed} pass {epoch}")
        examples = []
        n_utterances = len(self.hearings[0].heard.names)
        places = [
            {str(name): i for i, name in enumerate(hearing.heard.names)}
            for hearing in self.hearings
        ]
        for name in sorted(places[0]):
            number = draw.randrange(len(self.hearings))
            utterance = places[number][name]
            n_frames = len(self.hearings[number].heard.of(utterance))
            examples.append(_Example(number, utterance, self.texts[name], n_frames))
        for _ in range(round(text.sentences_an_utterance * n_utterances)):
            words = draw.choice(self.sentences).split()
            first = draw.randrange(max(1, len(words) - text.longest_words + 1))
            words = words[first : first + text.longest_words]
            n_phones = sum(len(self.lexicon[word][0]) for word in words)
            n_frames = round(_FRAMES_A_PHONE * n_phones)
            number = draw.randrange(len(self.hearings))
            examples.append(_Example(number, None, " ".join(words), n_frames))
        most = self.settings.optimiser.batch_s * 1000 / self.settings.features.hop_ms
        most /= self.settings.model.subsampling
        batches: list[list[_Example]] = [[]]
        for example in sorted(examples, key=lambda e: (e.hearing, e.n_frames, e.text)):
            full = (len(batches[-1]) + 1) * example.n_frames > most
            if batches[-1] and (full or batches[-1][0].hearing != example.hearing):
                batches.append([])
            batches[-1].append(example)
        draw.shuffle(batches)
        return batches

    def _step(self, batch: Sequence[_Example], *, n_batches: int) -> float:
        """One optimiser step; returns the loss a character."""
        options, progress = self.settings.optimiser, self.weights.progress
        rate = learning_rate(
            progress.step,
            progress=(progress.epoch + progress.batch / n_batches) / options.n_epochs,
            n_warmup_steps=options.n_warmup_steps,
            highest=options.learning_rate,
            final=options.final_learning_rate,
        )
        return self.weights.step(lambda: self._compute_loss(batch, self.dtype), rate=rate)

    def _compute_loss(self, batch: Sequence[_Example], dtype: torch.dtype) -> Tensor:
        """Negative log likelihood a character."""
        hearing = self.hearings[batch[0].hearing]
        draw = np.random.default_rng([self.settings.run.seed, self.weights.progress.step])
        rows = [torch.from_numpy(self._present(e, hearing, draw)).float() for e in batch]
        labels = [torch.tensor(encode(example.text, CHARACTERS)) for example in batch]
        lengths = torch.tensor([len(row) for row in rows])
        n_labels = torch.tensor([len(label) for label in labels])
        model = self.weights.model
        model.train()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            logits = model.spell(pad_sequence(rows, batch_first=True), lengths, hearing.chunking)
        nll = ctc_nll(logits, lengths, pad_sequence(labels, batch_first=True), n_labels)
        return nll / n_labels.sum()

    def _present(
        self, example: _Example, hearing: _Hearing, draw: np.random.Generator
    ) -> npt.NDArray[np.float16]:
        """What the phone head says, or would say."""
        if example.utterance is not None:
            return hearing.heard.of(example.utterance)
        variants = [self.lexicon[word] for word in example.text.split()]
        said = [v[draw.integers(len(v))] for v in variants]
        return hearing.voice.say(said, draw)

    def _refuse_another(self, settings: Mapping[str, object]) -> None:
        if settings["model"] != self.settings.model_dump(mode="json")["model"]:
            raise TrainingError(
                f"{self.weights.directory} holds a run of another model; "
                "choose another run.directory or delete it"
            )


def _describe_hearing(listener: Checkpoint, settings: SpellingSettings) -> str:
    weights = hashlib.sha256()
    for name, value in sorted(listener.averaged.items()):
        weights.update(name.encode() + value.numpy().tobytes())
    how = settings.augment.model_dump_json() + settings.features.model_dump_json()
    return f"{weights.hexdigest()} {settings.data.speeds} {how}"


def _hear_once(
    folder: Path,
    listener: AcousticModel,
    part: str,
    corpus: Corpus,
    *,
    augment: Augmentation | None,
    chunking: Chunking | None,
    precision: str,
    key: str,
) -> Heard:
    """Hear a corpus; what was heard is kept in the folder, and found there the next time.

    `key` says who listens and how; it and the utterances are in the file's name.
    """
    way = "plain" if augment is None else "disturbed"
    reading = "whole" if chunking is None else f"{chunking.n_chunk}+{chunking.n_right}"
    name = f"heard-{part}-{way}-{reading}"
    words = hashlib.sha256(f"{key} {sorted(corpus.variants.items())}".encode())
    path = folder / f"{name}-{words.hexdigest()[:12]}.npz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        seed = zlib.crc32(name.encode())  # each way has speeds of its own
        stream = corpus.open_stream(batch_s=EVALUATED_BATCH_S, seed=seed)
        batch = next(iter(stream))

        def try_in(dtype: torch.dtype) -> None:
            hear(listener, [batch], {}, dtype=dtype)

        dtype = choose_precision(try_in, precision)
        torch.manual_seed(seed)
        heard = hear(
            listener,
            tqdm(stream, name, len(stream.plan()), unit="batch", mininterval=5.0),
            corpus.variants,
            augment=augment,
            chunking=chunking,
            dtype=dtype,
        )
        unfinished = path.with_suffix(".unfinished.npz")
        np.savez(unfinished, **vars(heard))
        unfinished.rename(path)
    with np.load(path) as fields:
        return Heard(**fields)
