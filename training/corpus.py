"""What a run of an acoustic model trains and is evaluated on: cuts, labels and features."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from lhotse import CutSet

from service.errors import TrainingError
from service.g2p import Pronouncer
from service.manifest import read_manifest
from service.text import CHARACTERS, normalise
from training.config import DataSettings, TrainingSettings
from training.data import BatchStream, Labels, make_labels, read_cuts
from training.distributed import World
from training.feature_store import FeatureStore, store_features
from training.lexicon import Dictionary, find_variants, load_dictionary, make_lexicon
from training.pronunciations import Variants, choose_all, replace_phones
from training.tokens import choose_tokens

logger = logging.getLogger(__name__)

EVALUATED_BATCH_S: Final = 200.0
"""Seconds of audio in a batch that is not trained on."""
_ALONE: Final = World(rank=0, size=1, device=torch.device("cpu"))


@dataclass(frozen=True)
class Corpus:
    """Utterances, their labels, and their features at each speed (the first is normal speed)."""

    cuts: CutSet
    labels: Mapping[str, Labels]
    """By utterance id; those that cannot be used are left out."""
    stores: Sequence[FeatureStore]
    dictionary: Dictionary
    """Pronunciations of the words of the transcripts, where one is known."""
    tokens: Sequence[str]
    """Token list, blank first."""

    @property
    def hours(self) -> float:
        """Of the utterances that are used."""
        durations_s = (float(cut.duration) for cut in self.cuts if cut.id in self.labels)
        return sum(durations_s) / 3600

    @property
    def texts(self) -> dict[str, str]:
        """Normalised transcripts by utterance id."""
        return {cut.id: cut.supervisions[0].text for cut in self.cuts}

    @property
    def names(self) -> dict[str, str]:
        """Name of the corpus that each utterance comes from."""
        return {cut.id: cut.supervisions[0].custom["corpus"] for cut in self.cuts}

    @property
    def variants(self) -> dict[str, Sequence[Variants]]:
        """Pronunciations of the words of each utterance whose phones are known."""
        texts = self.texts
        said = (i for i, labels in self.labels.items() if labels.phones)
        return {i: find_variants(texts[i], self.dictionary) for i in said}

    def open_stream(
        self,
        *,
        batch_s: float,
        seed: int = 0,
        epoch: int = 0,
        first_batch: int = 0,
        shortest_first: bool = False,
        world: World = _ALONE,
    ) -> BatchStream:
        """The batches of a pass for one process, from any of them on; see `BatchStream`."""
        return BatchStream(
            self.cuts,
            self.labels,
            self.stores,
            batch_s=batch_s,
            seed=seed,
            epoch=epoch,
            first_batch=first_batch,
            shortest_first=shortest_first,
            rank=world.rank,
            world_size=world.size,
        )


def prepare_corpora(
    settings: TrainingSettings, world: World, *, inherited: Sequence[str] = CHARACTERS
) -> tuple[Corpus, Corpus]:
    """The training and the development set of a run.

    Args:
        settings: of the run.
        world: its processes.
        inherited: token list where the settings name no number of pieces.

    Raises:
        TrainingError: the data cannot be trained on, or both sets share a speaker.
    """
    tokens = _choose_tokens(settings.data, inherited)
    dev = _label(settings, settings.data.dev, world, tokens, is_train=False)
    train = _label(settings, settings.data.train, world, tokens, is_train=True)
    _refuse_shared_speakers(train.cuts, dev.cuts)
    speeds = sorted(settings.data.speeds, key=lambda s: s != 1.0)
    dev = _add_features(dev, settings, world, speeds=[1.0])
    train = _add_features(train, settings, world, speeds=speeds)
    return _choose_pronunciations(train, settings, world), dev


def _choose_tokens(data: DataSettings, inherited: Sequence[str]) -> Sequence[str]:
    if data.n_pieces is None:
        return inherited
    rows = (row for manifest in data.train for row in read_manifest(manifest))
    said = (row.text or "" for row in rows if not data.corpora or row.corpus in data.corpora)
    return choose_tokens(map(normalise, said), data.n_pieces)


def _label(
    settings: TrainingSettings,
    manifests: Sequence[Path],
    world: World,
    tokens: Sequence[str],
    *,
    is_train: bool,
) -> Corpus:
    """The utterances that can be used, without their features."""
    data = settings.data
    cuts = read_cuts(manifests, corpora=data.corpora if is_train else ())
    words = sorted({word for cut in cuts for word in cut.supervisions[0].text.split()})
    known = Pronouncer(data.g2p).pronounce if data.g2p else None
    dictionary = make_lexicon(words, load_dictionary(), known)
    labels, report = make_labels(
        cuts,
        tokens=tokens,
        dictionary=dictionary,
        subsampling=settings.model.subsampling,
        frames_per_s=1000 / settings.features.hop_ms,
        fastest=max(data.speeds) if is_train else 1.0,
        shortest_s=data.shortest_s if is_train else 0.0,
        longest_s=data.longest_s if is_train else float("inf"),
        held_out_speakers=data.held_out_speakers if is_train else (),
    )
    if world.is_main:
        logger.info("%s: %s", "train" if is_train else "dev", report)
    if not labels:
        raise TrainingError("no utterance is left to train on or to evaluate; see the counts")
    usable = cuts.filter(lambda cut: cut.id in labels).to_eager()
    return Corpus(usable, labels, (), dictionary, tokens)


def _add_features(
    corpus: Corpus, settings: TrainingSettings, world: World, *, speeds: Sequence[float]
) -> Corpus:
    data = settings.data
    stores = world.find_or_compute(
        lambda: [
            store_features(
                corpus.cuts,
                speed=speed,
                settings=settings.features,
                cache=data.cache,
                n_jobs=data.n_jobs,
            )
            for speed in speeds
        ]
    )
    return replace(corpus, stores=stores)


def _choose_pronunciations(corpus: Corpus, settings: TrainingSettings, world: World) -> Corpus:
    """The corpus with the pronunciations that were said, where there is a model to tell."""
    aligner = settings.data.aligner
    if aligner is None:
        return corpus
    stream = replace(corpus, stores=corpus.stores[:1]).open_stream(batch_s=EVALUATED_BATCH_S)
    path = settings.run.directory / "pronunciations.json"
    said = world.find_or_compute(lambda: choose_all(aligner, stream, corpus.variants, path))
    return replace(corpus, labels=replace_phones(corpus.labels, said))


def _refuse_shared_speakers(train: CutSet, dev: CutSet) -> None:
    trained = {cut.supervisions[0].speaker for cut in train}
    shared = trained & {cut.supervisions[0].speaker for cut in dev} - {""}
    if shared and len(trained) == 1:
        logger.warning(
            "all is said by %s: the error rates hold for this speaker, not for others", *trained
        )
    elif shared:
        raise TrainingError(
            f"speakers {sorted(shared)[:5]} are in the training and the development set; "
            "an error rate on them would be too good: move them to one side"
        )
