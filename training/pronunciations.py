"""Which of a word's pronunciations was said, and when: the likeliest one by a trained model.

The dictionary has several for many words ("the", "a", "and", "route"). A phone head that is trained
on the usual one everywhere is trained on mistakes; one that has learned enough to hear the
difference can say which it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from service.text import BLANK
from training.checkpoint import load_acoustic_checkpoint, load_model
from training.data import BatchStream, Labels

Variants = Sequence[tuple[int, ...]]
"""Phone ids of each pronunciation of a word."""

_BETWEEN: Final = -1
"""Owner of what lies between phones."""
_IMPOSSIBLE: Final = -1e30


def choose_all(
    aligner: Path,
    stream: BatchStream,
    variants: Mapping[str, Sequence[Variants]],
    path: Path,
) -> dict[str, tuple[int, ...]]:
    """Phones of utterances as they were said; written to `path`, and read there the next time.

    Args:
        aligner: checkpoint of the model whose phone head decides.
        stream: all batches of the utterances, at normal speed.
        variants: for each utterance the pronunciations of its words.
        path: JSON file of the result; worked out anew where it is of other words or weights.

    Returns:
        Phone ids by utterance; one that does not fit into its frames is left out.

    Raises:
        TrainingError: the checkpoint cannot be read.
    """
    asked = {"words": hashlib.sha256(repr(sorted(variants.items())).encode()).hexdigest()}
    if aligner.is_file():  # a run can go on without it
        asked["aligner"] = hashlib.sha256(aligner.read_bytes()).hexdigest()
    found = json.loads(path.read_text()) if path.exists() else {}
    if asked.items() <= found.items():
        return {i: tuple(phones) for i, phones in found["phones"].items()}
    model = load_model(load_acoustic_checkpoint(aligner))
    said: dict[str, tuple[int, ...]] = {}
    batches = tqdm(stream, "pronunciations", len(stream.plan()), unit="batch", mininterval=5.0)
    for batch in batches:
        wanted = [n for n, i in enumerate(batch.utterance_ids) if i in variants]
        with torch.inference_mode():
            _, logits, lengths = model(batch.features[wanted], batch.feature_lengths[wanted])
        for n, row, length in zip(wanted, logits.log_softmax(-1), lengths.tolist(), strict=True):
            utterance = batch.utterance_ids[n]
            words = variants[utterance]
            spoken = align(row[:length], words)
            if spoken is not None:
                said[utterance] = tuple(phone for word in spoken for phone in word.phones)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps({**asked, "phones": said}))
    unfinished.rename(path)
    return said


def replace_phones(
    labels: Mapping[str, Labels], said: Mapping[str, tuple[int, ...]]
) -> dict[str, Labels]:
    """The labels with the phones that were said, where that is known."""
    return {i: Labels(label.tokens, said.get(i, label.phones)) for i, label in labels.items()}


@dataclass(frozen=True)
class SpokenWord:
    """How a word was said."""

    variant: int
    """Which of its pronunciations it was."""
    phones: tuple[int, ...]
    """Phone ids of that pronunciation."""
    first_frames: tuple[int, ...]
    """Frame in which each phone begins."""


def align(log_probs: Tensor, words: Sequence[Variants]) -> list[SpokenWord] | None:
    """The likeliest pronunciation of each word, and where, by the best CTC path (Viterbi).

    Args:
        log_probs: of the phones, float32, (frames, phone), blank first.
        words: pronunciations of each word, none of them empty.

    Returns:
        How each word was said; None if there are too few frames for any way.
    """
    graph = _Graph(words)
    emitted = log_probs.numpy().astype(np.float64)[:, graph.units]  # (frames, state)
    n_frames, n_states = emitted.shape
    if n_frames == 0:
        return None
    scores = np.full(n_states + 1, _IMPOSSIBLE)  # the last one stands for no state
    scores[graph.first] = emitted[0, graph.first]
    came_from = np.zeros((n_frames, n_states), np.int64)
    rows = np.arange(n_states)
    for t in range(1, n_frames):
        reached = scores[graph.predecessors]  # (state, predecessor)
        best = reached.argmax(1)
        came_from[t] = graph.predecessors[rows, best]
        scores[:-1] = reached[rows, best] + emitted[t]
    state = max(graph.last, key=lambda s: float(scores[s]))
    if scores[state] < _IMPOSSIBLE / 2:
        return None
    variants = [0] * len(words)
    begins: list[list[int]] = [[] for _ in words]
    for t in range(n_frames - 1, -1, -1):
        before = int(came_from[t, state]) if t > 0 else None
        word, variant = graph.owners[state]
        if variant != _BETWEEN:
            variants[word] = variant
            if before != state:
                begins[word].append(t)
        state = before if before is not None else state
    return [
        SpokenWord(variant, known[variant], tuple(reversed(frames)))
        for variant, known, frames in zip(variants, words, begins, strict=True)
    ]


class _Graph:
    """CTC states of words that may be said in several ways; blanks between words are shared."""

    def __init__(self, words: Sequence[Variants]) -> None:
        units: list[int] = []
        owners: list[tuple[int, int]] = []
        before: list[list[int]] = []

        def add(unit: int, owner: tuple[int, int], predecessors: Sequence[int]) -> int:
            state = len(units)
            units.append(unit)
            owners.append(owner)
            before.append([state, *predecessors])
            return state

        ends: list[int] = []  # of the word before
        self.first: list[int] = []
        for number, variants in enumerate(words):
            pause = add(BLANK, (number, _BETWEEN), ends)
            heads, tails = [], []
            for i, phones in enumerate(variants):
                sources = [pause, *(s for s in ends if units[s] != phones[0])]
                state = add(phones[0], (number, i), sources)
                heads.append(state)
                for last, phone in pairwise(phones):
                    gap = add(BLANK, (number, _BETWEEN), [state])
                    state = add(phone, (number, i), [gap, *([state] if phone != last else [])])
                tails.append(state)
            if number == 0:
                self.first = [pause, *heads]
            ends = tails
        pause = add(BLANK, (len(words), _BETWEEN), ends)
        self.last = [pause, *ends]
        self.units = np.array(units)
        self.owners = owners
        width = max(map(len, before))
        self.predecessors: npt.NDArray[np.int64] = np.array(
            [row + [len(units)] * (width - len(row)) for row in before]
        )
