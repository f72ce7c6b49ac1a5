"""Training of the acoustic model: one loop, from manifests to checkpoints.

A run lives in one folder: `last.pt` (everything an exact continuation needs), `best.pt` (lowest
development character error rate), `settings.json`, `dev.jsonl` (a line an evaluation) and
TensorBoard events. Started again, it goes on where it stopped; the dropout and masks of a step
depend on the seed and the step alone, so the continuation equals an uninterrupted run.
"""

from __future__ import annotations

import json
import logging
import random
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from lhotse import CutSet
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter

from service.errors import TrainingError
from service.features import FeatureSettings, mel_centres_hz
from service.g2p import Pronouncer
from service.scoring import ErrorCounts
from service.text import CHARACTERS
from training.augment import shift_level, spec_augment
from training.checkpoint import (
    Checkpoint,
    Progress,
    load_checkpoint,
    save_checkpoint,
)
from training.config import (
    AugmentSettings,
    ModelSettings,
    StreamingSettings,
    TrainingSettings,
)
from training.crf import estimate_trigram
from training.data import Batch, BatchStream, Labels, load_batches, make_labels, read_cuts
from training.distributed import World, join_world
from training.evaluation import errors_by_corpus, greedy_transcripts
from training.feature_store import FeatureStore, store_features
from training.lexicon import (
    PHONES,
    Dictionary,
    find_variants,
    load_dictionary,
    make_lexicon,
)
from training.loss import Losses, compute_losses
from training.model import AcousticModel, Chunking
from training.noise import add_noise, narrow, reverberate
from training.precision import choose_precision, device_name
from training.pronunciations import choose_all, replace_phones
from training.schedule import learning_rate

logger = logging.getLogger(__name__)

_LOG_EVERY_S: Final = 10.0
_DEV_BATCH_S: Final = 200.0
_TELEPHONE_HZ: Final = (300.0, 3700.0)


def train(settings: TrainingSettings) -> Progress:
    """Train, or go on training, until the last pass is done or the process is asked to stop.

    Raises:
        TrainingError: the data or settings cannot be trained on, or the folder holds another run.
    """
    with join_world() as world:
        if settings.run.n_threads:
            torch.set_num_threads(settings.run.n_threads)
        return TrainingRun(settings, world).train()


@dataclass(frozen=True)
class _Corpus:
    """Cuts, their labels, and their features at each speed (the first is normal speed)."""

    cuts: CutSet
    labels: Mapping[str, Labels]
    stores: Sequence[FeatureStore]

    @property
    def hours(self) -> float:
        durations_s = (float(cut.duration) for cut in self.cuts if cut.id in self.labels)
        return sum(durations_s) / 3600


class TrainingRun:
    """One run in its folder."""

    def __init__(self, settings: TrainingSettings, world: World) -> None:
        """Prepare the data and the model, or go on with those of the folder."""
        self.settings = settings
        self.world = world
        self.directory = settings.run.directory
        self.directory.mkdir(parents=True, exist_ok=True)
        self.dev = self._prepare(settings.data.dev, is_train=False)
        self.corpus = self._prepare(settings.data.train, is_train=True)
        _refuse_shared_speakers(self.corpus.cuts, self.dev.cuts)
        torch.manual_seed(settings.run.seed)
        self.model = self._new_model().to(world.device)
        self.averaged = AveragedModel(
            self.model, multi_avg_fn=get_ema_multi_avg_fn(settings.optimiser.average_decay)
        )
        self.optimiser = _new_optimiser(self.model, settings)
        self.progress = self._restore()
        self.augment = _Augmentation(
            settings.augment, settings.features, self.model.feature_mean.cpu()
        )
        self.trigram = self._estimate_trigram()
        self.dtype = world.broadcast(self._choose_precision())
        self.parallel: nn.Module = (
            DistributedDataParallel(self.model) if world.size > 1 else self.model
        )
        self.stop = threading.Event()

    def train(self) -> Progress:
        """Make the steps that are left; see `train`."""
        options = self.settings.optimiser
        writer = SummaryWriter(str(self.directory)) if self.world.is_main else None
        for sign in (signal.SIGTERM, signal.SIGINT):
            signal.signal(sign, lambda *_: self.stop.set())
        n_parameters = sum(p.numel() for p in self.model.parameters())
        self._say(
            f"{n_parameters / 1e6:.1f} M parameters, {self.corpus.hours:.1f} hours, "
            f"{options.n_epochs} passes, {self.world.size} process(es) on {device_name()}"
        )
        last_saved = time.monotonic()
        while self.progress.epoch < options.n_epochs:
            stream = self.open_stream(first_batch=self.progress.batch)
            n_batches = len(stream.plan())
            meter = _Meter(n_batches=n_batches, n_epochs=options.n_epochs)
            with load_batches(stream) as batches:
                for batch in batches:
                    losses, norm = self.step(batch, n_batches=n_batches)
                    audio_s = float(batch.feature_lengths.sum()) * self.frame_s * self.world.size
                    self.progress = replace(
                        self.progress,
                        batch=self.progress.batch + 1,
                        step=self.progress.step + 1,
                        audio_s=self.progress.audio_s + audio_s,
                    )
                    meter.add(losses, norm=norm, audio_s=audio_s)
                    if meter.is_due() and writer is not None:
                        self._say(meter.report(self.progress, writer))
                    if self._agreed_to_stop():
                        self._save("last.pt")
                        self._say(f"stopped at step {self.progress.step}; start again to go on")
                        return self.progress
                    if time.monotonic() - last_saved > self.settings.run.checkpoint_every_s:
                        self._save("last.pt")
                        last_saved = time.monotonic()
            self.progress = replace(self.progress, epoch=self.progress.epoch + 1, batch=0)
            if self._evaluation_is_due():
                self._evaluate(writer)
            self._save("last.pt")
        return self.progress

    def step(self, batch: Batch, *, n_batches: int) -> tuple[Losses, float]:
        """One optimiser step on this process's batch; gradients are averaged over processes."""
        options = self.settings.optimiser
        done = self.progress.epoch + self.progress.batch / n_batches
        rate = learning_rate(
            self.progress.step,
            progress=done / options.n_epochs,
            n_warmup_steps=options.n_warmup_steps,
            highest=options.learning_rate,
            final=options.final_learning_rate,
        )
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        seed = self.settings.run.seed * 1_000_003 + self.progress.step
        torch.manual_seed(seed * self.world.size + self.world.rank)
        self.parallel.train()
        chunking = draw_chunking(self.settings.streaming, seed=seed)
        losses = self._forward(batch, self.parallel, self.dtype, chunking)
        shared = replace(
            losses,
            n_tokens=self.world.sum(losses.n_tokens) / self.world.size,
            n_phones=self.world.sum(losses.n_phones) / self.world.size,
        )
        self.optimiser.zero_grad()
        shared.combine(options.phone_weight).backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), options.clip_norm)
        if torch.isfinite(norm):
            self.optimiser.step()
            self.averaged.update_parameters(self.model)
        else:
            self._say(f"step {self.progress.step}: the gradient is not finite; step left out")
        return losses, float(norm)

    def _forward(
        self,
        batch: Batch,
        model: nn.Module,
        dtype: torch.dtype,
        chunking: Chunking | None = None,
    ) -> Losses:
        device = self.world.device
        features = self.augment(batch)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            token_logits, phone_logits, lengths = model(
                features.to(device), batch.feature_lengths.to(device), chunking
            )
        return compute_losses(
            token_logits,
            phone_logits,
            lengths,
            tokens=batch.tokens.to(device),
            token_lengths=batch.token_lengths.to(device),
            phones=batch.phones.to(device),
            phone_lengths=batch.phone_lengths.to(device),
            trigram=self.trigram,
            ctc_share=self.settings.optimiser.ctc_share,
        )

    def _evaluate(self, writer: SummaryWriter | None) -> None:
        """Score the averaged weights on the development set; keep them if they are the best."""
        averaged = self.averaged.module
        assert isinstance(averaged, AcousticModel)
        batches = BatchStream(
            self.dev.cuts, self.dev.labels, self.dev.stores, batch_s=_DEV_BATCH_S, seed=0, epoch=0
        )
        streaming = self.settings.streaming
        chunkings = [Chunking(*c) for c in streaming.chunkings] if streaming.share else []
        counts = self._count_errors(averaged, batches, None)
        streamed = {
            f"{c.n_chunk}+{c.n_right} frames": self._count_errors(averaged, batches, c)[""]
            for c in chunkings
        }
        total = counts[""]
        if total.cer < self.progress.best_cer:
            self.progress = replace(self.progress, best_cer=total.cer)
            self._save("best.pt")
        if writer is None:
            return
        counts.update(streamed)
        row = {
            "epoch": self.progress.epoch,
            "audio_h": round(self.progress.audio_s / 3600, 2),
            **{corpus or "total": {"wer": c.wer, "cer": c.cer} for corpus, c in counts.items()},
        }
        with (self.directory / "dev.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")
        for corpus, c in counts.items():
            writer.add_scalar(f"dev/wer/{corpus or 'total'}", c.wer, self.progress.step)
            writer.add_scalar(f"dev/cer/{corpus or 'total'}", c.cer, self.progress.step)
        table = ", ".join(
            f"{corpus or 'total'} {c.wer:.1%} / {c.cer:.1%}" for corpus, c in counts.items()
        )
        self._say(f"pass {self.progress.epoch}: dev greedy WER / CER: {table}")

    def _count_errors(
        self, model: AcousticModel, batches: BatchStream, chunking: Chunking | None
    ) -> dict[str, ErrorCounts]:
        """Errors on the development set by corpus, and of all under the empty name."""
        transcripts = greedy_transcripts(
            model, batches, tokens=CHARACTERS, world=self.world, chunking=chunking
        )
        return errors_by_corpus(
            transcripts,
            references={cut.id: cut.supervisions[0].text for cut in self.dev.cuts},
            corpora={cut.id: cut.supervisions[0].custom["corpus"] for cut in self.dev.cuts},
        )

    def _prepare(self, manifests: Sequence[Path], *, is_train: bool) -> _Corpus:
        data = self.settings.data
        cuts = read_cuts(manifests, corpora=data.corpora if is_train else ())
        dictionary = self._pronounce_words(cuts)
        labels, report = make_labels(
            cuts,
            tokens=CHARACTERS,
            dictionary=dictionary,
            subsampling=self.settings.model.subsampling,
            frames_per_s=1 / self.frame_s,
            fastest=max(data.speeds) if is_train else 1.0,
            shortest_s=data.shortest_s if is_train else 0.0,
            longest_s=data.longest_s if is_train else float("inf"),
            held_out_speakers=data.held_out_speakers if is_train else (),
        )
        self._say(f"{'train' if is_train else 'dev'}: {report}")
        if not labels:
            raise TrainingError("no utterance is left to train on or to evaluate; see the counts")
        speeds = sorted(data.speeds, key=lambda s: s != 1.0) if is_train else [1.0]
        stores = self.world.find_or_compute(
            lambda: [
                store_features(
                    cuts,
                    speed=speed,
                    settings=self.settings.features,
                    cache=data.cache,
                    n_jobs=data.n_jobs,
                )
                for speed in speeds
            ]
        )
        corpus = _Corpus(cuts, labels, stores)
        return self._align(corpus, dictionary) if is_train else corpus

    def _align(self, corpus: _Corpus, dictionary: Dictionary) -> _Corpus:
        """The corpus with the pronunciations that were said, where there is a model to tell."""
        aligner = self.settings.data.aligner
        if aligner is None:
            return corpus
        variants = {
            cut.id: find_variants(cut.supervisions[0].text, dictionary)
            for cut in corpus.cuts
            if cut.id in corpus.labels and corpus.labels[cut.id].phones
        }
        stream = BatchStream(
            corpus.cuts, corpus.labels, corpus.stores[:1], batch_s=_DEV_BATCH_S, seed=0, epoch=0
        )
        path = self.directory / "pronunciations.json"
        said = self.world.find_or_compute(lambda: choose_all(aligner, stream, variants, path))
        return replace(corpus, labels=replace_phones(corpus.labels, said))

    def _pronounce_words(self, cuts: CutSet) -> Dictionary:
        """The pronunciations of all words of the transcripts that one is known for."""
        words = sorted({word for cut in cuts for word in cut.supervisions[0].text.split()})
        g2p = self.settings.data.g2p
        return make_lexicon(words, load_dictionary(), Pronouncer(g2p).pronounce if g2p else None)

    def _new_model(self) -> AcousticModel:
        model = AcousticModel(
            n_mels=self.settings.features.n_mels,
            n_tokens=len(CHARACTERS),
            n_phones=len(PHONES),
            **self.settings.model.model_dump(),
        )
        mean, std = self.corpus.stores[0].statistics(sorted(self.corpus.labels))
        model.feature_mean.copy_(mean)
        model.feature_std.copy_(std)
        initial = self.settings.run.initial_checkpoint
        if initial is not None:
            try:
                model.adopt(load_checkpoint(initial).averaged)
            except RuntimeError as error:
                raise TrainingError(
                    f"{initial} holds another model than [model] describes: {error}"
                ) from error
        return model

    def _estimate_trigram(self) -> Tensor | None:
        """What the phone head's label sequences compete under; None trains it by CTC."""
        if self.settings.optimiser.phone_criterion == "ctc":
            return None
        said = (labels.phones for labels in self.corpus.labels.values() if labels.phones)
        return estimate_trigram(said, len(PHONES)).to(self.world.device)

    def _restore(self) -> Progress:
        """Continue from `last.pt` where there is one."""
        plain = self.settings.model_dump(mode="json")
        path = self.directory / "last.pt"
        if not path.exists():
            if self.world.is_main:
                (self.directory / "settings.json").write_text(json.dumps(plain, indent=2) + "\n")
            return Progress()
        checkpoint = load_checkpoint(path)
        held = ModelSettings.model_validate(checkpoint.settings["model"])
        if held.model_copy(update={"dropout": self.settings.model.dropout}) != self.settings.model:
            raise TrainingError(
                f"{self.directory} holds a run of another model; "
                "choose another run.directory or delete it"
            )
        assert checkpoint.model is not None
        assert checkpoint.optimiser is not None
        self.model.load_state_dict(checkpoint.model)
        self.averaged.module.load_state_dict(checkpoint.averaged)
        self.averaged.n_averaged.fill_(checkpoint.progress.step)
        self.optimiser.load_state_dict(checkpoint.optimiser)
        self._say(f"going on at pass {checkpoint.progress.epoch}, step {checkpoint.progress.step}")
        return checkpoint.progress

    def _save(self, name: str) -> None:
        if not self.world.is_main:
            return
        checkpoint = Checkpoint(
            settings=self.settings.model_dump(mode="json"),
            tokens=list(CHARACTERS),
            phones=list(PHONES),
            averaged=self.averaged.module.state_dict(),
            progress=self.progress,
            model=self.model.state_dict(),
            optimiser=self.optimiser.state_dict(),
        )
        save_checkpoint(checkpoint, self.directory / name)

    def open_stream(self, *, first_batch: int) -> BatchStream:
        """The training batches of this pass, from one of them on."""
        options = self.settings.optimiser
        return BatchStream(
            self.corpus.cuts,
            self.corpus.labels,
            self.corpus.stores,
            batch_s=options.batch_s,
            seed=self.settings.run.seed,
            epoch=self.progress.epoch,
            first_batch=first_batch,
            shortest_first=self.progress.epoch < options.n_sorted_epochs,
            rank=self.world.rank,
            world_size=self.world.size,
        )

    def _choose_precision(self) -> torch.dtype:
        batch = next(iter(self.open_stream(first_batch=0)))
        self.model.train()

        def step(dtype: torch.dtype) -> None:
            losses = self._forward(batch, self.model, dtype)
            losses.combine(0.5).backward()
            self.optimiser.zero_grad()

        return choose_precision(step, self.settings.run.precision)

    def _evaluation_is_due(self) -> bool:
        every = self.settings.run.evaluate_every_epochs
        is_last = self.progress.epoch == self.settings.optimiser.n_epochs
        return is_last or self.progress.epoch % every == 0

    def _agreed_to_stop(self) -> bool:
        """Whether any process was asked to stop; all must stop at the same step."""
        if self.world.size == 1:
            return self.stop.is_set()
        asked = torch.tensor(float(self.stop.is_set()), device=self.world.device)
        return bool(self.world.sum(asked) > 0)

    def _say(self, message: str) -> None:
        if self.world.is_main:
            logger.info(message)

    @property
    def frame_s(self) -> float:
        """Seconds of a feature frame."""
        return self.settings.features.hop_ms / 1000


class _Meter:
    """Averages since the last report, and the pace of this pass."""

    def __init__(self, *, n_batches: int, n_epochs: int) -> None:
        self._n_batches = n_batches
        self._n_epochs = n_epochs
        self._reported = time.monotonic()
        self._reset()

    def _reset(self) -> None:
        self._n_steps = 0
        self._audio_s = 0.0
        self._sums = dict.fromkeys(("loss/token", "loss/phone", "blank", "gradient norm"), 0.0)

    def add(self, losses: Losses, *, norm: float, audio_s: float) -> None:
        self._n_steps += 1
        self._audio_s += audio_s
        token_nll, phone_nll = losses.token_nll.detach(), losses.phone_nll.detach()
        self._sums["loss/token"] += float(token_nll / losses.n_tokens.clamp(min=1))
        self._sums["loss/phone"] += float(phone_nll / losses.n_phones.clamp(min=1))
        self._sums["blank"] += float(losses.blank_share)
        self._sums["gradient norm"] += norm

    def is_due(self) -> bool:
        return time.monotonic() - self._reported > _LOG_EVERY_S

    def report(self, progress: Progress, writer: SummaryWriter) -> str:
        """The progress line; also written to TensorBoard."""
        now = time.monotonic()
        elapsed_s = now - self._reported
        means = {name: value / self._n_steps for name, value in self._sums.items()}
        for name, value in means.items():
            writer.add_scalar(f"train/{name}", value, progress.step)
        pace = self._audio_s / elapsed_s
        writer.add_scalar("train/audio seconds per second", pace, progress.step)
        passes_left = self._n_epochs - progress.epoch - progress.batch / self._n_batches
        left_s = passes_left * self._n_batches * elapsed_s / self._n_steps
        self._reported = now
        self._reset()
        return (
            f"pass {progress.epoch + 1}/{self._n_epochs} "
            f"batch {progress.batch}/{self._n_batches} "
            f"loss {means['loss/token']:.3f} tokens {means['loss/phone']:.3f} phones, "
            f"blank {means['blank']:.0%}, gradient {means['gradient norm']:.2f}, "
            f"{pace:.0f} s of audio/s, {_clock(left_s)} left"
        )


def draw_chunking(settings: StreamingSettings, *, seed: int) -> Chunking | None:
    """How a batch is read: window by window, or (None) with full context."""
    draw = random.Random(seed)
    if draw.random() >= settings.share:
        return None
    return Chunking(*draw.choice(settings.chunkings))


class _Augmentation:
    """What happens to the features of a training batch before the model sees them."""

    def __init__(self, options: AugmentSettings, features: FeatureSettings, fill: Tensor) -> None:
        """Take the settings; `fill` is what a masked value becomes, float32, (mel,)."""
        self._options = options
        self._fill = fill
        self._frames_per_s = 1000 / features.hop_ms
        centres_hz = mel_centres_hz(features)
        self._n_bands_kept = int((centres_hz < _TELEPHONE_HZ[1]).sum())
        self._n_bands_cut = int((centres_hz < _TELEPHONE_HZ[0]).sum())

    def __call__(self, batch: Batch) -> Tensor:
        options, lengths = self._options, batch.feature_lengths
        x = shift_level(batch.features, level_db=options.level_db, tilt_db=options.tilt_db)
        if options.room_share:
            x = reverberate(
                x,
                share=options.room_share,
                longest_s=options.longest_room_s,
                frames_per_s=self._frames_per_s,
            )
        if options.noise_share:
            x = add_noise(
                x,
                lengths,
                share=options.noise_share,
                lowest_snr_db=options.lowest_snr_db,
                highest_snr_db=options.highest_snr_db,
                most_voices=options.most_voices,
            )
        if options.telephone_share:
            x = narrow(
                x,
                share=options.telephone_share,
                n_bands_kept=self._n_bands_kept,
                n_bands_cut=self._n_bands_cut,
            )
        return spec_augment(
            x,
            lengths,
            fill=self._fill,
            n_frequency_masks=options.n_frequency_masks,
            frequency_width=options.frequency_width,
            time_masks_per_s=options.time_masks_per_s,
            time_width_frames=options.time_width_frames,
            time_share=options.time_share,
            frames_per_s=self._frames_per_s,
        )


def _new_optimiser(model: AcousticModel, settings: TrainingSettings) -> torch.optim.AdamW:
    """AdamW that decays weight matrices only, not biases or norms."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.optimiser.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.optimiser.learning_rate, betas=(0.9, 0.98))


def _refuse_shared_speakers(train: CutSet, dev: CutSet) -> None:
    shared = {c.supervisions[0].speaker for c in train} & {c.supervisions[0].speaker for c in dev}
    shared.discard("")
    if shared:
        raise TrainingError(
            f"speakers {sorted(shared)[:5]} are in the training and the development set; "
            "an error rate on them would be too good: move them to one side"
        )


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
