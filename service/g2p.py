"""Words as phones: an ONNX graph from letters to CTC log_probs, and a beam search over phones.

For words that no dictionary has. The graph brings its letters, its phones and how many frames it
gives a letter, so that the file alone is enough.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from service.engine import open_described
from service.errors import InputError
from service.text import BLANK

FloatArray = npt.NDArray[np.float32]
Pronunciation = tuple[str, ...]
_Beams = dict[tuple[int, ...], tuple[float, float]]

G2P_INPUTS: Final = ("letters", "lengths")
G2P_OUTPUT: Final = "phone_log_probs"
BEAM_WIDTH: Final = 8
"""Prefixes that the search keeps, and so the most pronunciations of a word."""

_BATCH_WORDS: Final = 64
_LOWEST_LOG_PROB: Final = math.log(1e-4)
_IMPOSSIBLE: Final = (-math.inf, -math.inf)


@dataclass(frozen=True)
class Alphabets:
    """What a graph reads and writes; an ONNX file carries it in its metadata."""

    letters: tuple[str, ...]
    """Letter of each input id."""
    phones: tuple[str, ...]
    """Phone of each output id, the CTC blank first."""
    n_repeats: int
    """Frames of a letter."""

    def __post_init__(self) -> None:
        if not self.letters or len(self.phones) < 2 or self.n_repeats < 1:
            raise ValueError(
                f"{len(self.letters)} letters, {len(self.phones)} phones and {self.n_repeats} "
                "frames a letter; expected at least 1, 2 and 1"
            )

    def to_metadata(self) -> dict[str, str]:
        """As JSON texts, an entry a field."""
        return {
            "letters": json.dumps(self.letters),
            "phones": json.dumps(self.phones),
            "n_repeats": str(self.n_repeats),
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Alphabets:
        """Read what `to_metadata` wrote.

        Raises:
            ValueError: an entry is missing or makes no sense.
        """
        missing = {"letters", "phones", "n_repeats"} - set(metadata)
        if missing:
            raise ValueError(f"its metadata lacks {sorted(missing)}")
        return cls(
            letters=tuple(json.loads(metadata["letters"])),
            phones=tuple(json.loads(metadata["phones"])),
            n_repeats=int(metadata["n_repeats"]),
        )


class Pronouncer:
    """Tells how words are said that no dictionary has; safe to share by threads."""

    def __init__(self, graph: Path, *, n_threads: int = 1) -> None:
        """Load the graph.

        Args:
            graph: an ONNX file that `export_g2p` wrote.
            n_threads: threads of one run.

        Raises:
            BundleError: the file is missing, damaged or another graph.
            ProviderError: two onnxruntime packages are installed.
        """
        self._session, self._alphabets = open_described(
            graph, Alphabets.from_metadata, "pronunciation model", n_threads=n_threads
        )
        self._ids = {letter: i for i, letter in enumerate(self._alphabets.letters)}

    def pronounce(self, words: Sequence[str]) -> list[Pronunciation]:
        """The likeliest pronunciation of each word; see `pronounce_n_best`."""
        return [best for (best,) in self.pronounce_n_best(words, n_best=1)]

    def pronounce_n_best(self, words: Sequence[str], *, n_best: int) -> list[list[Pronunciation]]:
        """The likeliest pronunciations of words; what else is in the batch changes none of them.

        Args:
            words: single words as `normalise` writes them, a-z and the apostrophe.
            n_best: pronunciations wanted of each, 1 to `BEAM_WIDTH`.

        Returns:
            For each word 1 to `n_best` different pronunciations, the likeliest first, each at
            least one phone long.

        Raises:
            InputError: a word has no letter, or a sign that is none.
            ValueError: `n_best` is out of range.
        """
        if not 1 <= n_best <= BEAM_WIDTH:
            raise ValueError(f"n_best is {n_best}, expected 1 to {BEAM_WIDTH}")
        encoded = [self._encode(word) for word in words]
        found: list[list[Pronunciation]] = [[] for _ in words]
        for place, emission in self._emissions(encoded):
            found[place] = [
                tuple(self._alphabets.phones[i] for i in phones)
                for phones in search(emission, beam_width=BEAM_WIDTH)[:n_best]
            ]
        return found

    def log_probs(
        self, letters: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
    ) -> FloatArray:
        """Compute the phone log_probs of a batch.

        Args:
            letters: letter ids, int64, (batch, letter); padding is ignored.
            lengths: letters of each word, int64, (batch,), at least 1.

        Returns:
            Log probabilities, float32, (batch, letter * n_repeats, phone); frames behind a word's
            end mean nothing.
        """
        inputs = dict(zip(G2P_INPUTS, (letters, lengths), strict=True))
        return np.asarray(self._session.run(None, inputs)[0], dtype=np.float32)

    def _encode(self, word: str) -> npt.NDArray[np.int64]:
        strange = sorted(set(word) - set(self._ids))
        if strange or not any(letter.isalpha() for letter in word):
            problem = f"contains {strange}" if strange else "has no letter"
            raise InputError(
                f"{word!r} {problem}; expected one word of {''.join(self._alphabets.letters)}: "
                "pass the text through normalise() and split it first"
            )
        return np.array([self._ids[letter] for letter in word], dtype=np.int64)

    def _emissions(
        self, encoded: Sequence[npt.NDArray[np.int64]]
    ) -> Iterator[tuple[int, FloatArray]]:
        """The place of each word and its log_probs, (frames, phone); short words come first."""
        order = sorted(range(len(encoded)), key=lambda place: len(encoded[place]))
        for first in range(0, len(order), _BATCH_WORDS):
            places = order[first : first + _BATCH_WORDS]
            lengths = np.array([len(encoded[place]) for place in places], dtype=np.int64)
            letters = np.zeros((len(places), lengths.max()), dtype=np.int64)
            for row, place in enumerate(places):
                letters[row, : lengths[row]] = encoded[place]
            log_probs = self.log_probs(letters, lengths)
            for row, place in enumerate(places):
                yield place, log_probs[row, : lengths[row] * self._alphabets.n_repeats]


def search(
    emission: FloatArray, *, beam_width: int, lowest_log_prob: float = _LOWEST_LOG_PROB
) -> list[tuple[int, ...]]:
    """CTC prefix beam search without a language model (Hannun et al. 2014).

    Args:
        emission: log_probs of one word, float32, (frames, phone), at least one frame.
        beam_width: prefixes kept after a frame, at least 2.
        lowest_log_prob: phones less likely in a frame are not tried there, the likeliest always is.

    Returns:
        Phone ids of each hypothesis found, the likeliest first, none of them empty.
    """
    beams: _Beams = {(): (0.0, -math.inf)}
    for frame in emission:
        advanced = _advance(beams, frame, lowest_log_prob)
        possible = [beam for beam in advanced.items() if beam[1] != _IMPOSSIBLE]
        beams = dict(sorted(possible, key=lambda beam: -_total(beam[1]))[:beam_width])
    return [phones for phones in beams if phones]


def _advance(beams: _Beams, frame: FloatArray, lowest_log_prob: float) -> _Beams:
    """Prefixes after one more frame.

    A prefix has two log_probs: of its paths that end in the blank, and in its last phone.
    """
    advanced: _Beams = {}
    tried = np.flatnonzero(frame[1:] >= min(lowest_log_prob, frame[1:].max())) + 1
    for prefix, (in_blank, in_phone) in beams.items():
        _add(advanced, prefix, in_blank=_total((in_blank, in_phone)) + float(frame[BLANK]))
        for phone in tried.tolist():
            log_prob = float(frame[phone])
            if prefix and prefix[-1] == phone:
                _add(advanced, prefix, in_phone=in_phone + log_prob)
                _add(advanced, (*prefix, phone), in_phone=in_blank + log_prob)
            else:
                _add(advanced, (*prefix, phone), in_phone=_total((in_blank, in_phone)) + log_prob)
    return advanced


def _add(
    beams: _Beams,
    prefix: tuple[int, ...],
    *,
    in_blank: float = -math.inf,
    in_phone: float = -math.inf,
) -> None:
    before = beams.get(prefix, _IMPOSSIBLE)
    beams[prefix] = (_total((before[0], in_blank)), _total((before[1], in_phone)))


def _total(log_probs: tuple[float, float]) -> float:
    """The log of the sum of two probabilities."""
    low, high = sorted(log_probs)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))
