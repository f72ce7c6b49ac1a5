"""Greedy decoding: the best token of every frame, repeats merged, blanks dropped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from service.decoding.beam import BeamDecoder
from service.decoding.hypothesis import FloatArray, Hypothesis, Phrase, Search, Word
from service.text import BLANK, SPACE, WORD_MARK


@dataclass(frozen=True)
class _Label:
    """One token of the best path after collapsing."""

    token: str
    start_frame: int
    end_frame: int
    log_prob: float


class GreedyDecoder:
    """Best path over characters or pieces of words."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self._tokens = tuple(tokens)
        self._search = BeamDecoder(tokens, beta=0.0)

    def decode(
        self, emission: FloatArray, *, n_best: int = 1, phrases: Sequence[Phrase] = ()
    ) -> list[Hypothesis]:
        """Return the best path as the only hypothesis; with phrases, search; see `Decoder`."""
        if phrases:
            return self._search.decode(emission, n_best=n_best, phrases=phrases)
        best = emission.argmax(axis=1)
        path_log_probs = emission[np.arange(len(best)), best]
        labels = self._collapse(best.tolist(), path_log_probs.tolist())
        words = tuple(_join(word) for word in _split(labels))
        return [Hypothesis(words=words, score=float(path_log_probs.sum()))]

    def open(self, *, phrases: Sequence[Phrase] = ()) -> Search | None:
        """Begin a search where there are phrases; the best path itself needs none."""
        return self._search.open(phrases=phrases) if phrases else None

    def _collapse(self, path: list[int], log_probs: list[float]) -> list[_Label]:
        labels = []
        frame = 0
        for token, group in groupby(path):
            n_frames = len(list(group))
            if token != BLANK:
                peak = max(log_probs[frame : frame + n_frames])
                labels.append(_Label(self._tokens[token], frame, frame + n_frames, peak))
            frame += n_frames
        return labels


def _split(labels: Iterable[_Label]) -> list[list[_Label]]:
    """The labels of each word: behind a space, or from a piece with a mark on."""
    words: list[list[_Label]] = [[]]
    for label in labels:
        if label.token.startswith((SPACE, WORD_MARK)):
            words.append([])
        if label.token not in (SPACE, WORD_MARK):
            words[-1].append(label)
    return [word for word in words if word]


def _join(labels: list[_Label]) -> Word:
    return Word(
        text="".join(label.token for label in labels).replace(WORD_MARK, ""),
        start_frame=labels[0].start_frame,
        end_frame=labels[-1].end_frame,
        confidence=float(np.exp(np.mean([label.log_prob for label in labels]))),
    )
