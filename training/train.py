"""Training of the acoustic model: one loop, from manifests to checkpoints.

A run lives in one folder: `last.pt` (everything an exact continuation needs), `best.pt` (lowest
development character error rate), `settings.json`, `dev.jsonl` (a line an evaluation) and
TensorBoard events. Started again, it goes on where it stopped; the dropout and masks of a step
depend on the seed and the step alone, so the continuation equals an uninterrupted run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import signal
import threading
import time
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

from service.errors import TrainingError
from service.scoring import ErrorCounts
from service.text import CHARACTERS
from training.augment import Augmentation
from training.checkpoint import (
    Checkpoint,
    Progress,
    State,
    describe_difference,
    load_acoustic_checkpoint,
    save_checkpoint,
)
from training.config import ModelSettings, StreamingSettings, TrainingSettings
from training.corpus import EVALUATED_BATCH_S, prepare_corpora
from training.crf import estimate_trigram
from training.data import Batch, BatchStream, load_batches
from training.distributed import World, join_world
from training.evaluation import errors_by_corpus, greedy_transcripts
from training.lexicon import PHONES
from training.loss import Losses, compute_losses
from training.model import AcousticModel, Chunking
from training.optimiser import Optimiser
from training.precision import choose_precision, device_name
from training.schedule import learning_rate
from training.weights import GradientGuard, average_model

logger = logging.getLogger(__name__)

_LOG_EVERY_S: Final = 10.0


def train(settings: TrainingSettings) -> Progress:
    """Train, or go on training, until the last pass is done or the process is asked to stop.

    Raises:
        TrainingError: the data or settings cannot be trained on, or the folder holds another run.
    """
    with join_world() as world:
        if settings.run.n_threads:
            torch.set_num_threads(settings.run.n_threads)
        return TrainingRun(settings, world).train()


class TrainingRun:
    """One run in its folder."""

    def __init__(self, settings: TrainingSettings, world: World) -> None:
        """Prepare the data and the model, or go on with those of the folder."""
        self.settings = settings
        self.world = world
        self.directory = settings.run.directory
        self.directory.mkdir(parents=True, exist_ok=True)
        initial = settings.run.initial_checkpoint
        self.initial = None if initial is None else load_acoustic_checkpoint(initial)
        inherited = self.initial.tokens if self.initial else CHARACTERS
        self.corpus, self.dev = prepare_corpora(settings, world, inherited=inherited)
        torch.manual_seed(settings.run.seed)
        self.model = self._new_model().to(world.device)
        self.averaged = average_model(self.model, settings.optimiser.average_decay)
        self.guard = GradientGuard()
        self.optimiser = Optimiser(self.model, settings.optimiser)
        self.data = self._describe_data()
        self.progress = self._restore()
        self.augment = Augmentation(
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
        if self.progress.epoch >= options.n_epochs:
            self._say(
                f"{self.directory} holds a run that has made its {options.n_epochs} passes; raise "
                "optimiser.n_epochs to go on, or choose another run.directory"
            )
        last_saved = time.monotonic()
        meter = _Meter(n_epochs=options.n_epochs)
        while self.progress.epoch < options.n_epochs:
            stream = self.open_stream(first_batch=self.progress.batch)
            n_batches = len(stream.plan())
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
                        self._say(meter.report(self.progress, writer, n_batches=n_batches))
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
        if self.guard.allows(norm, step=self.progress.step):
            self.optimiser.step(rate)
            self.averaged.update_parameters(self.model)
        return losses, float(norm)

    def _forward(
        self,
        batch: Batch,
        model: nn.Module,
        dtype: torch.dtype,
        chunking: Chunking | None = None,
    ) -> Losses:
        device, options = self.world.device, self.settings.optimiser
        if options.consistency:
            batch = batch.twice()
        features = self.augment(batch)
        intermediate: list[Tensor] = []
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            token_logits, phone_logits, lengths = model(
                features.to(device), batch.feature_lengths.to(device), chunking, intermediate
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
            ctc_share=options.ctc_share,
            consistency=options.consistency,
            intermediate=intermediate,
            intermediate_weight=options.intermediate_weight,
        )

    def _evaluate(self, writer: SummaryWriter | None) -> None:
        """Score the averaged weights on the development set; keep them if they are the best."""
        averaged = self.averaged.module
        assert isinstance(averaged, AcousticModel)
        batches = self.dev.open_stream(batch_s=EVALUATED_BATCH_S)
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
            model, batches, tokens=self.corpus.tokens, world=self.world, chunking=chunking
        )
        return errors_by_corpus(
            transcripts,
            references=self.dev.texts,
            corpora=self.dev.names,
        )

    def _new_model(self) -> AcousticModel:
        model = AcousticModel(
            n_mels=self.settings.features.n_mels,
            n_tokens=len(self.corpus.tokens),
            n_phones=len(PHONES),
            **self.settings.model.model_dump(),
        )
        mean, std = self.corpus.stores[0].statistics(sorted(self.corpus.labels))
        model.feature_mean.copy_(mean)
        model.feature_std.copy_(std)
        if self.initial is not None:
            try:
                keep_head = tuple(self.initial.tokens) == tuple(self.corpus.tokens)
                model.adopt(self.initial.averaged, keep_token_head=keep_head)
            except RuntimeError as error:
                raise TrainingError(
                    f"{self.settings.run.initial_checkpoint} holds another model than [model] "
                    f"describes: {describe_difference(self.initial, self.settings.model)}; leave "
                    "[model] out to take its shape"
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
            return Progress(audio_s=self.initial.progress.audio_s if self.initial else 0.0)
        checkpoint = load_acoustic_checkpoint(path)
        held = ModelSettings.model_validate(checkpoint.settings["model"])
        held = held.model_copy(update={"dropout": self.settings.model.dropout})
        same_tokens = tuple(checkpoint.tokens) == tuple(self.corpus.tokens)
        if held != self.settings.model or not same_tokens:
            raise TrainingError(
                f"{self.directory} holds a run of another model; "
                "choose another run.directory or delete it"
            )
        self._refuse_other_data(checkpoint)
        assert checkpoint.model is not None
        assert checkpoint.optimiser is not None
        self.model.load_state_dict(checkpoint.model)
        self.averaged.module.load_state_dict(checkpoint.averaged)
        self.averaged.n_averaged.fill_(checkpoint.progress.step)
        self.optimiser.load_state_dict(checkpoint.optimiser)
        self._say(f"going on at pass {checkpoint.progress.epoch}, step {checkpoint.progress.step}")
        return checkpoint.progress

    def _refuse_other_data(self, checkpoint: Checkpoint) -> None:
        """Let a run go on with its own data only; within a pass also with the same batches."""
        held, asked = checkpoint.data, self.data
        differing = [name for name in asked if held and held[name] != asked[name]]
        if "utterances" in differing:
            raise TrainingError(
                f"{self.directory} holds a run on other utterances or transcripts; choose another "
                "run.directory (run.initial_checkpoint can be that run's best.pt), or delete it"
            )
        if differing and checkpoint.progress.batch:
            was = ", ".join(f"{name} {held[name]}" for name in differing)
            raise TrainingError(
                f"{self.directory} stopped inside a pass that was made with {was}; go on with "
                "the same, it may change between passes"
            )

    def _describe_data(self) -> State:
        """What decides which batches a pass has."""
        labels = sorted((i, label.tokens) for i, label in self.corpus.labels.items())
        return {
            "utterances": hashlib.sha256(repr(labels).encode()).hexdigest(),
            "optimiser.batch_s": self.settings.optimiser.batch_s,
            "run.seed": self.settings.run.seed,
            "processes": self.world.size,
        }

    def _save(self, name: str) -> None:
        if not self.world.is_main:
            return
        checkpoint = Checkpoint(
            settings=self.settings.model_dump(mode="json"),
            tokens=list(self.corpus.tokens),
            phones=list(PHONES),
            averaged=self.averaged.module.state_dict(),
            progress=self.progress,
            model=self.model.state_dict(),
            optimiser=self.optimiser.state_dict(),
            data=self.data,
        )
        save_checkpoint(checkpoint, self.directory / name)

    def open_stream(self, *, first_batch: int) -> BatchStream:
        """The training batches of this pass, from one of them on."""
        options = self.settings.optimiser
        return self.corpus.open_stream(
            batch_s=options.batch_s,
            seed=self.settings.run.seed,
            epoch=self.progress.epoch,
            first_batch=first_batch,
            shortest_first=self.progress.epoch < options.n_sorted_epochs,
            world=self.world,
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
    """Averages since the last report, and the pace."""

    def __init__(self, *, n_epochs: int) -> None:
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

    def report(self, progress: Progress, writer: SummaryWriter, *, n_batches: int) -> str:
        """The progress line; also written to TensorBoard."""
        now = time.monotonic()
        elapsed_s = now - self._reported
        means = {name: value / self._n_steps for name, value in self._sums.items()}
        for name, value in means.items():
            writer.add_scalar(f"train/{name}", value, progress.step)
        pace = self._audio_s / elapsed_s
        writer.add_scalar("train/audio seconds per second", pace, progress.step)
        passes_left = self._n_epochs - progress.epoch - progress.batch / n_batches
        left_s = passes_left * n_batches * elapsed_s / self._n_steps
        self._reported = now
        self._reset()
        return (
            f"pass {progress.epoch + 1}/{self._n_epochs} "
            f"batch {progress.batch}/{n_batches} "
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


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
