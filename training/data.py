"""Training data: manifests become lhotse cuts, cuts become batches of features and labels.

The features of every speed are in a store; each pass draws one speed an utterance. Every draw
depends on the seed, the pass and the utterance alone, so a run that stops inside a pass goes on
with exactly the batches it would have seen.
"""

from __future__ import annotations

import random
import signal
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Final

import soundfile
import torch
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment
from lhotse.audio import AudioSource
from lhotse.dataset import DynamicBucketingSampler, SimpleCutSampler
from lhotse.dataset.sampling.base import CutSampler
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset

from service.errors import TrainingError
from service.manifest import Utterance, read_manifest
from service.text import encode, normalise
from training.feature_store import FeatureStore
from training.lexicon import Dictionary, pronounce, unknown_words
from training.model import output_lengths

_N_BUCKETS: Final = 30
_FEWEST_BUCKETED: Final = 10 * _N_BUCKETS


@dataclass(frozen=True)
class Labels:
    """What the two heads learn to say for one utterance."""

    tokens: tuple[int, ...]
    """Token ids of the transcript."""
    phones: tuple[int, ...]
    """Phone ids; empty where a word has no known pronunciation, which masks the phone head."""


@dataclass(frozen=True)
class LabelReport:
    """What was kept, masked and left out when labels were made; print it."""

    n_utterances: int = 0
    """Utterances in the manifests, after the choice of corpora."""
    n_held_out: int = 0
    """Left out as their speaker is kept for other tests."""
    n_outside_duration: int = 0
    """Left out as shorter or longer than the settings allow."""
    n_empty: int = 0
    """Left out as their transcript is empty after normalisation."""
    n_too_dense: int = 0
    """Left out as CTC cannot align them: fewer frames than tokens and repeats need."""
    n_without_phones: int = 0
    """Kept, with the phone head masked, as a word is not in the dictionary."""
    unknown_words: Mapping[str, int] = field(default_factory=dict)
    """The words the dictionary lacks, with how often they occur."""

    def __str__(self) -> str:
        left_out = {
            "held out": self.n_held_out,
            "outside the durations": self.n_outside_duration,
            "without text": self.n_empty,
            "too dense for CTC": self.n_too_dense,
        }
        reasons = ", ".join(f"{n} {reason}" for reason, n in left_out.items())
        return (
            f"{self.n_utterances} utterances: {self.n_utterances - sum(left_out.values())} kept; "
            f"left out {reasons}; phone head masked for {self.n_without_phones} "
            f"({len(self.unknown_words)} words not in the dictionary)"
        )


@dataclass(frozen=True)
class Batch:
    """Utterances of similar length, padded to the longest."""

    utterance_ids: tuple[str, ...]
    features: Tensor
    """Log-mel energies, float32, (batch, time, mel)."""
    feature_lengths: Tensor
    """Frames of each utterance, int64, (batch,)."""
    tokens: Tensor
    """Token ids, int64, (batch, token)."""
    token_lengths: Tensor
    """int64, (batch,)."""
    phones: Tensor
    """Phone ids, int64, (batch, phone)."""
    phone_lengths: Tensor
    """int64, (batch,); 0 masks the phone head."""

    def twice(self) -> Batch:
        """The utterances, and behind them the same once more."""
        rows = {name: torch.cat([x, x]) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, utterance_ids=self.utterance_ids * 2, **rows)


def read_cuts(manifests: Sequence[Path], *, corpora: Sequence[str] = ()) -> CutSet:
    """Read manifests as lhotse cuts, each with one supervision.

    An id is the `audio_filepath`, and where two manifests have the same one, the whole path.

    Raises:
        TrainingError: no utterance is left, one is listed twice, or a recording cannot be opened.
    """
    utterances = [u for manifest in manifests for u in read_manifest(manifest)]
    chosen = [u for u in utterances if not corpora or u.corpus in corpora]
    if not chosen:
        raise TrainingError(
            f"no utterances of the corpora {list(corpora) or 'any'} in "
            f"{[str(m) for m in manifests]}; they have {sorted({u.corpus for u in utterances})}"
        )
    n_named = Counter(u.name for u in chosen)
    ids = [u.name if n_named[u.name] == 1 else str(u.audio_path) for u in chosen]
    for utterance_id, n in Counter(ids).items():
        if n > 1:
            raise TrainingError(
                f"{utterance_id} is listed {n} times in {[str(m) for m in manifests]}; list each "
                "recording once"
            )
    return CutSet.from_cuts(_to_cut(u, i) for u, i in zip(chosen, ids, strict=True))


def _to_cut(utterance: Utterance, utterance_id: str) -> MonoCut:
    if utterance.text is None:
        raise TrainingError(f"{utterance.name} has no text; training needs a transcript")
    try:
        info = soundfile.info(str(utterance.audio_path))
    except (soundfile.LibsndfileError, TypeError) as error:  # the latter for raw samples
        raise TrainingError(
            f"cannot open {utterance.audio_path}: {error} Paths are relative to the manifest; "
            "`voxgate prepare folder` leaves out what cannot be read."
        ) from error
    recording = Recording(
        id=utterance_id,
        sources=[AudioSource(type="file", channels=[0], source=str(utterance.audio_path))],
        sampling_rate=info.samplerate,
        num_samples=info.frames,
        duration=info.frames / info.samplerate,
    )
    supervision = SupervisionSegment(
        id=utterance_id,
        recording_id=utterance_id,
        start=0.0,
        duration=recording.duration,
        text=normalise(utterance.text),
        speaker=utterance.speaker,
        custom={"corpus": utterance.corpus},
    )
    return MonoCut(
        id=utterance_id,
        start=0.0,
        duration=recording.duration,
        channel=0,
        supervisions=[supervision],
        recording=recording,
    )


def make_labels(
    cuts: CutSet,
    *,
    tokens: Sequence[str],
    dictionary: Dictionary,
    subsampling: int,
    frames_per_s: float,
    fastest: float,
    shortest_s: float,
    longest_s: float,
    held_out_speakers: Collection[str] = (),
) -> tuple[dict[str, Labels], LabelReport]:
    """Make the labels of every cut that CTC can learn from, and count what was left out.

    CTC needs a frame for every token and one more between two equal ones; the frames are counted
    at the fastest speed, after subsampling.
    """
    labels: dict[str, Labels] = {}
    counts = dict.fromkeys(("held out", "outside", "empty", "dense", "phoneless"), 0)
    unknown: dict[str, int] = {}
    for cut in cuts:
        text = cut.supervisions[0].text
        n_frames = int(
            output_lengths(
                torch.tensor(int(cut.duration / fastest * frames_per_s) - 2), subsampling
            )
        )
        if cut.supervisions[0].speaker in held_out_speakers:
            counts["held out"] += 1
            continue
        if not shortest_s <= cut.duration <= longest_s:
            counts["outside"] += 1
            continue
        if not text:
            counts["empty"] += 1
            continue
        token_ids = encode(text, tokens)
        if frames_needed(token_ids) > n_frames:
            counts["dense"] += 1
            continue
        phones = pronounce(text, dictionary)
        if phones is None:
            counts["phoneless"] += 1
            for word in unknown_words(text, dictionary):
                unknown[word] = unknown.get(word, 0) + 1
        fitting = phones if phones is not None and frames_needed(phones) <= n_frames else []
        labels[cut.id] = Labels(tokens=tuple(token_ids), phones=tuple(fitting))
    report = LabelReport(
        n_utterances=len(cuts),
        n_held_out=counts["held out"],
        n_outside_duration=counts["outside"],
        n_empty=counts["empty"],
        n_too_dense=counts["dense"],
        n_without_phones=counts["phoneless"],
        unknown_words=unknown,
    )
    return labels, report


def frames_needed(label_ids: Sequence[object]) -> int:
    """Fewest frames in which CTC can emit the labels: one each, one more between equal ones."""
    return len(label_ids) + sum(a == b for a, b in pairwise(label_ids))


class BatchStream(IterableDataset[Batch]):
    """The batches of one pass, from any position, for one of several processes."""

    def __init__(
        self,
        cuts: CutSet,
        labels: Mapping[str, Labels],
        stores: Sequence[FeatureStore],
        *,
        batch_s: float,
        seed: int,
        epoch: int,
        first_batch: int = 0,
        shortest_first: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__()
        self._cuts = cuts.filter(lambda cut: cut.id in labels).to_eager()
        self._durations_s: dict[str, float] = {cut.id: cut.duration for cut in self._cuts}
        self._labels = labels
        self._stores = stores
        self._batch_s = batch_s
        self._seed = seed
        self._epoch = epoch
        self._first_batch = first_batch
        self._shortest_first = shortest_first
        self._rank = rank
        self._world_size = world_size

    def plan(self) -> list[list[str]]:
        """Utterance ids of every batch of this pass and process, the seen ones included."""
        sampler = self._new_sampler()
        sampler.set_epoch(self._epoch)
        batches = [[cut.id for cut in batch] for batch in sampler]
        if self._shortest_first:
            batches.sort(key=self._mean_duration_s)
        n_missing = -len(batches) % self._world_size
        batches += list(islice(cycle(batches), n_missing))  # every process makes every step
        return batches[self._rank :: self._world_size]

    def __iter__(self) -> Iterator[Batch]:
        """Load the batches that have not been seen yet."""
        for utterance_ids in islice(self.plan(), self._first_batch, None):
            features = [self._load_features(i) for i in utterance_ids]
            yield collate(utterance_ids, features, [self._labels[i] for i in utterance_ids])

    def _new_sampler(self) -> CutSampler:
        """Buckets of similar durations, or none where there are too few utterances to fill them."""
        options = {
            "max_duration": self._batch_s / self._world_size,
            "shuffle": True,
            "seed": self._seed,
            "world_size": 1,
            "rank": 0,
        }
        if len(self._cuts) < _FEWEST_BUCKETED:
            return SimpleCutSampler(self._cuts, **options)
        return DynamicBucketingSampler(self._cuts, num_buckets=_N_BUCKETS, **options)

    def _load_features(self, utterance_id: str) -> Tensor:
        draw = random.Random(f"{self._seed} {self._epoch} {utterance_id}")
        return draw.choice(self._stores).load(utterance_id)

    def _mean_duration_s(self, utterance_ids: Sequence[str]) -> float:
        return sum(self._durations_s[i] for i in utterance_ids) / len(utterance_ids)


@contextmanager
def load_batches(stream: BatchStream) -> Iterator[Iterator[Batch]]:
    """Load the batches of a stream ahead of time, in a process that ends with the block.

    The process is started with the stop signals blocked: it is for the training process to stop
    it, after its checkpoint, also when a signal goes to all processes of the run.
    """
    loader = DataLoader(stream, batch_size=None, num_workers=1, prefetch_factor=8)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        batches = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        yield batches
    finally:
        batches._shutdown_workers()  # type: ignore[attr-defined]  # noqa: SLF001  # no public way


def collate(
    utterance_ids: Sequence[str], features: Sequence[Tensor], labels: Sequence[Labels]
) -> Batch:
    """Pad features, each (time, mel), and labels to the longest."""
    tokens = [torch.tensor(label.tokens, dtype=torch.int64) for label in labels]
    phones = [torch.tensor(label.phones, dtype=torch.int64) for label in labels]
    return Batch(
        utterance_ids=tuple(utterance_ids),
        features=pad_sequence(list(features), batch_first=True),
        feature_lengths=_lengths(features),
        tokens=pad_sequence(tokens, batch_first=True),
        token_lengths=_lengths(tokens),
        phones=pad_sequence(phones, batch_first=True),
        phone_lengths=_lengths(phones),
    )


def _lengths(rows: Sequence[Tensor]) -> Tensor:
    return torch.tensor([len(row) for row in rows], dtype=torch.int64)
