"""Greedy decoding: the best token of every frame, repeats merged, blanks dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from service.decoding.beam import BeamDecoder
from service.decoding.hypothesis import FloatArray, Hypothesis, Phrase, Search, Word
from service.text import BLANK, SPACE


@dataclass(frozen=True)
class _Label:
    """One token of the best path after collapsing."""

    token: str
    start_frame: int
    end_frame: int
    log_prob: float


class GreedyDecoder:
    """Best path over a character token list."""

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
        is_word = [(label.token != SPACE, label) for label in labels]
        words = tuple(
            _join([label for _, label in group])
            for inside, group in groupby(is_word, key=lambda pair: pair[0])
            if inside
        )
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


def _join(labels: list[_Label]) -> Word:
    return Word(
        text="".join(label.token for label in labels),
        start_frame=labels[0].start_frame,
        end_frame=labels[-1].end_frame,
        confidence=float(np.exp(np.mean([label.log_prob for label in labels]))),
    )
