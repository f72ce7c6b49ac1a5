"""Long recordings for benchmarks: aligned utterances of a speaker joined by their own room tone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from forced_alignment import Words, read_words

from service.audio import load_audio
from service.manifest import read_manifest
from service.text import normalise

FloatArray = npt.NDArray[np.float32]

_GAP_S: Final = (0.3, 3.0)
_MARGIN_S: Final = 0.05
_SHORTEST_PAUSE_S: Final = 0.2
_FADE_S: Final = 0.01


@dataclass(frozen=True)
class Joined:
    """Utterances of one speaker, one after another."""

    speaker: str
    corpus: str
    waveform: FloatArray
    """Mono samples, float32, (time,)."""
    words: Words
    """Reference words with start and end, seconds from the start."""
    texts: list[str]
    """Transcript of each utterance."""
    waveforms: list[FloatArray]
    """Each utterance by itself."""


def join_utterances(
    manifest: Path,
    words: Path,
    *,
    sample_rate: int,
    corpus: str | None = None,
    longest_s: float = 60.0,
    seed: int = 1,
) -> Iterator[Joined]:
    """Join the aligned utterances of each speaker by 0.3 to 3 s of room tone.

    Args:
        manifest: the utterances.
        words: what `forced_alignment.py` wrote for it; utterances that are not in it are left out.
        sample_rate: Hz.
        corpus: only this one.
        longest_s: a recording ends with the utterance that passes this length.
        seed: of the gaps.
    """
    aligned = read_words(words)
    utterances = [u for u in read_manifest(manifest) if corpus in (None, u.corpus)]
    draw = random.Random(seed)
    known = sorted(
        (u for u in utterances if u.name in aligned), key=lambda u: (u.corpus, u.speaker, u.name)
    )
    for (name, speaker), group in groupby(known, key=lambda u: (u.corpus, u.speaker)):
        waiting = list(group)
        while waiting:
            pieces: list[FloatArray] = []
            reference: Words = []
            texts, waveforms = [], []
            n_samples = 0
            while waiting and n_samples < longest_s * sample_rate:
                utterance = waiting.pop(0)
                waveform = load_audio(utterance.audio_path, target_rate=sample_rate)
                spoken = aligned[utterance.name]
                start_s = n_samples / sample_rate
                reference += [(w, start_s + start, start_s + end) for w, start, end in spoken]
                texts.append(normalise(utterance.text or ""))
                waveforms.append(waveform)
                n_gap = round(draw.uniform(*_GAP_S) * sample_rate)
                tone = _room_tone(waveform, spoken, n_gap, sample_rate=sample_rate, draw=draw)
                pieces += [waveform, tone]
                n_samples += len(waveform) + n_gap
            yield Joined(speaker, name, np.concatenate(pieces), reference, texts, waveforms)


def _room_tone(
    waveform: FloatArray, words: Words, n_samples: int, *, sample_rate: int, draw: random.Random
) -> FloatArray:
    """What the utterance sounds like where nobody speaks, in pieces that fade into each other."""
    edges = [
        0.0,
        *(t for _, start, end in words for t in (start, end)),
        len(waveform) / sample_rate,
    ]
    pauses = [
        waveform[int((start + _MARGIN_S) * sample_rate) : int((end - _MARGIN_S) * sample_rate)]
        for start, end in zip(edges[0::2], edges[1::2], strict=True)
    ]
    pauses = [p for p in pauses if len(p) >= (_SHORTEST_PAUSE_S - 2 * _MARGIN_S) * sample_rate]
    n_fade = int(_FADE_S * sample_rate)
    if not pauses:
        return np.zeros(n_samples, np.float32)
    tone = np.zeros(n_samples + max(map(len, pauses)) + n_fade, np.float32)
    fade = np.linspace(0, 1, n_fade, dtype=np.float32)
    end = 0
    while end < n_samples + n_fade:
        piece = draw.choice(pauses).copy()
        piece[:n_fade] *= fade
        piece[-n_fade:] *= fade[::-1]
        start = max(0, end - n_fade)
        tone[start : start + len(piece)] += piece
        end = start + len(piece)
    return tone[n_fade : n_fade + n_samples]
