"""Evaluation of a bundle on a manifest: error rates by corpus and real-time factors by stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from service.audio import Stopwatch, load_blocks
from service.errors import AudioError, ManifestError
from service.manifest import Utterance
from service.recogniser import DecoderName, Recogniser
from service.scoring import ErrorCounts, count_errors, pool, wer_interval


@dataclass
class Evaluation:
    """What was measured; filled utterance by utterance."""

    speakers: dict[tuple[str, str], ErrorCounts] = field(default_factory=dict)
    """Errors of each speaker, by the names of corpus and speaker."""
    audio_s: float = 0.0
    """Audio recognised, seconds."""
    rtf: dict[str, float] = field(default_factory=dict)
    """Real-time factor of features, segmentation, acoustic_model, decoding, and total."""
    failures: list[str] = field(default_factory=list)
    """A message for each recording that could not be recognised; it is not scored."""

    def add(self, corpus: str, speaker: str, counts: ErrorCounts) -> None:
        """Count an utterance."""
        key = corpus, speaker
        self.speakers[key] = self.speakers.get(key, ErrorCounts()) + counts

    @property
    def corpora(self) -> dict[str, list[ErrorCounts]]:
        """Errors of the speakers of each corpus, the corpora in order."""
        names = sorted({corpus for corpus, _ in self.speakers})
        return {n: [c for key, c in self.speakers.items() if key[0] == n] for n in names}

    @property
    def total(self) -> ErrorCounts:
        """Errors of all corpora."""
        return pool(self.speakers.values())

    def as_json(self) -> dict[str, Any]:
        """The object of `voxgate evaluate --json`."""
        return {
            "total": _figures(list(self.speakers.values())),
            "corpora": {name: _figures(counts) for name, counts in self.corpora.items()},
            "rtf": self.rtf,
            "failures": self.failures,
        }


def evaluate(
    recogniser: Recogniser,
    utterances: Sequence[Utterance],
    *,
    decoder: DecoderName,
    profile: str | None = None,
    on_done: Callable[[], object] = lambda: None,
) -> Evaluation:
    """Recognise utterances and score them against their transcripts.

    Args:
        recogniser: the loaded bundle.
        utterances: recordings with transcripts.
        decoder: how emissions are searched.
        profile: read each utterance as the first pass of a stream with this profile does; None
            reads it with full context.
        on_done: called after each utterance.

    Raises:
        ManifestError: an utterance has no transcript.
    """
    without = [u.name for u in utterances if u.text is None]
    if without:
        raise ManifestError(f'{without[0]} has no "text"; evaluation needs a transcript for each')
    evaluation = Evaluation()
    before = _stages(recogniser)
    for utterance in utterances:
        duration = Stopwatch(recogniser.sample_rate)
        blocks = duration.measure(
            load_blocks(utterance.audio_path, target_rate=recogniser.sample_rate)
        )
        try:
            segments = list(
                recogniser.recognise_blocks(blocks, decoder=decoder)
                if profile is None
                else recogniser.recognise_first_pass(blocks, decoder=decoder, profile=profile)
            )
        except AudioError as error:
            evaluation.failures.append(f"{utterance.name}: {error}")
        else:
            transcript = " ".join(s.alternatives[0].transcript for s in segments)
            counts = count_errors([utterance.text or ""], [transcript])
            evaluation.add(utterance.corpus, utterance.speaker, counts)
            evaluation.audio_s += duration.seconds
        on_done()
    if evaluation.audio_s > 0:
        spent = {name: s - before[name] for name, s in _stages(recogniser).items()}
        evaluation.rtf = {name: s / evaluation.audio_s for name, s in spent.items()}
    return evaluation


def _figures(by_speaker: Sequence[ErrorCounts]) -> dict[str, Any]:
    counts = pool(by_speaker)
    if counts.n_words == 0:  # nothing was said, or nothing could be read
        return {**counts.as_json(), "wer": None, "cer": None, "wer_interval": None}
    return {**counts.as_json(), "wer_interval": wer_interval(by_speaker)}


def _stages(recogniser: Recogniser) -> dict[str, float]:
    timings = recogniser.timings
    return {
        "features": timings.features_s,
        "segmentation": timings.segmentation_s,
        "acoustic_model": timings.acoustic_model_s,
        "decoding": timings.decoding_s,
        "total": timings.total_s,
    }
