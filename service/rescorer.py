"""Second-pass rescoring: what a recurrent language model says of whole hypotheses.

The model reads pieces of words. Hypotheses of one utterance share most of what they say, so they
form a lattice: beginnings of equal length that end in the same pieces are one node, which goes on
from the first of them. Its nodes are scored depth by depth, all nodes of a depth in one run of the
graph. The graph brings its pieces, so that the file alone is enough.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from service.decoding.ngram import SENTENCE_END, UNKNOWN
from service.engine import open_described
from service.errors import BundleError, InputError

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

RESCORER_INPUTS: Final = ("tokens", "parents", "rows", "wanted")
RESCORER_OUTPUT: Final = "log_probs"
N_HISTORY: Final = 8
"""Pieces in which beginnings of a list must agree to be read as one: five or six words."""
BOUNDARY_ID: Final = 0
"""The piece that ends a sentence, and that is read before its first word."""
UNKNOWN_ID: Final = 1
WORD_START: Final = "\u2581"
"""The sign that begins the first piece of a word, as sentencepiece writes it."""

_LONGEST_WORD: Final = 100
_CACHED_WORDS: Final = 100_000
_UNKNOWN_PENALTY: Final = 10.0


@dataclass(frozen=True)
class Pieces:
    """What a language model reads and predicts: whole words, or pieces of them."""

    names: tuple[str, ...]
    """The pieces by id: the sentence end, the unknown piece, then all others."""
    scores: tuple[float, ...] = ()
    """Natural log probability of each piece alone, which decides how a word is cut (Kudo 2018);
    empty where every piece is a whole word."""

    def __post_init__(self) -> None:
        if self.names[:2] != (SENTENCE_END, UNKNOWN):
            raise ValueError(
                f"the pieces begin with {self.names[:2]}, expected {(SENTENCE_END, UNKNOWN)}"
            )
        if self.scores and len(self.scores) != len(self.names):
            raise ValueError(f"{len(self.scores)} scores for {len(self.names)} pieces")

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """Id of each piece."""
        return {name: i for i, name in enumerate(self.names)}

    @cached_property
    def starts_word(self) -> npt.NDArray[np.bool_]:
        """Whether a piece is the first of a word, bool, (piece,)."""
        starts = [not self.scores or name.startswith(WORD_START) for name in self.names]
        starts[BOUNDARY_ID] = False
        return np.array(starts)

    def encode(self, word: str) -> tuple[int, ...]:
        """The likeliest pieces of a word; of equally likely ways the one of longer first pieces."""
        if not self.scores:
            return (self.ids.get(word, UNKNOWN_ID),)
        return self._cut(WORD_START + word[:_LONGEST_WORD])

    def _cut(self, text: str) -> tuple[int, ...]:
        """Viterbi from the end: `best[i]` is the score of `text[i:]` and its first piece's end."""
        best = [(-math.inf, 0, UNKNOWN_ID)] * len(text) + [(0.0, 0, BOUNDARY_ID)]
        for start in range(len(text) - 1, -1, -1):
            unknown = self._lowest_score - _UNKNOWN_PENALTY
            best[start] = (unknown + best[start + 1][0], start + 1, UNKNOWN_ID)
            for end in range(min(len(text), start + self._longest), start, -1):
                piece = self.ids.get(text[start:end])
                if piece is not None and self.scores[piece] + best[end][0] > best[start][0]:
                    best[start] = (self.scores[piece] + best[end][0], end, piece)
        found, at = [], 0
        while at < len(text):
            _, at, piece = best[at]
            found.append(piece)
        return tuple(found)

    @cached_property
    def _longest(self) -> int:
        return max(len(name) for name in self.names)

    @cached_property
    def _lowest_score(self) -> float:
        return min(self.scores)

    def to_metadata(self) -> dict[str, str]:
        """As JSON texts, an entry a field."""
        return {"pieces": json.dumps(self.names), "piece_scores": json.dumps(self.scores)}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Pieces:
        """Read what `to_metadata` wrote.

        Raises:
            ValueError: an entry is missing or makes no sense.
        """
        missing = {"pieces", "piece_scores"} - set(metadata)
        if missing:
            raise ValueError(f"its metadata lacks {sorted(missing)}")
        return cls(
            names=tuple(json.loads(metadata["pieces"])),
            scores=tuple(map(float, json.loads(metadata["piece_scores"]))),
        )


class Level(NamedTuple):
    """The nodes of one depth, and the edges that leave them; named as the graph's inputs."""

    tokens: IntArray
    """Piece that leads to each node, int64, (node,)."""
    parents: IntArray
    """Place among the nodes one level up of the one that each goes on from, int64, (node,)."""
    rows: IntArray
    """The node that each edge leaves, int64, (edge,)."""
    wanted: IntArray
    """The piece that each edge adds, int64, (edge,)."""


class Rescorer:
    """A recurrent language model of whole sentences; safe to share by threads."""

    def __init__(
        self, graph: Path, *, n_threads: int = 1, n_history: int | None = N_HISTORY
    ) -> None:
        """Load the graph.

        Args:
            graph: an ONNX file that `export_rescorer` wrote.
            n_threads: threads of one run.
            n_history: beginnings of a list that agree in so many pieces at their end are read as
                one; None reads each.

        Raises:
            BundleError: the file is missing, damaged or another graph.
            ProviderError: two onnxruntime packages are installed.
        """
        self._n_history = n_history
        self._session, self.pieces = open_described(
            graph, Pieces.from_metadata, "rescorer", n_threads=n_threads, keeps_memory=True
        )
        inputs = {i.name: i.shape for i in self._session.get_inputs()}
        if missing := set(RESCORER_INPUTS) - set(inputs):
            raise BundleError(
                f"{graph} is no rescorer: it has no inputs {sorted(missing)}; export it again"
            )
        self._state_names = [name for name in inputs if name not in RESCORER_INPUTS]
        self._outputs = [RESCORER_OUTPUT, *(f"next_{name}" for name in self._state_names)]
        self._start = [np.zeros((1, inputs[name][1]), np.float32) for name in self._state_names]
        self._encode = lru_cache(maxsize=_CACHED_WORDS)(self.pieces.encode)

    def score(self, hypotheses: Sequence[Sequence[str]]) -> npt.NDArray[np.float64]:
        """Natural log probability of each hypothesis, the end of the sentence included.

        An empty hypothesis is a sentence without words; a word outside the model's pieces is read
        as its unknown piece.

        Args:
            hypotheses: words as `normalise` writes them, of each hypothesis, the likeliest first:
                where beginnings are read as one, it is as the first of them.

        Returns:
            float64, (hypothesis,).

        Raises:
            InputError: a word is empty or holds a space.
        """
        return self.score_tokens([self._encode_sentence(words) for words in hypotheses])

    def score_tokens(self, sentences: Sequence[Sequence[int]]) -> npt.NDArray[np.float64]:
        """Natural log probability of sentences as pieces, each ended by the boundary; see `score`.

        Returns:
            float64, (sentence,).
        """
        levels, paths = build_levels(sentences, self._n_history)
        scores = np.zeros(len(sentences))
        states = self._start
        for level, path in zip(levels, paths, strict=True):
            log_probs, *states = self._run(level, states)
            scores += np.where(path >= 0, log_probs[path], 0.0)
        return scores

    def _encode_sentence(self, words: Sequence[str]) -> tuple[int, ...]:
        strange = [word for word in words if not word or any(c.isspace() for c in word)]
        if strange:
            raise InputError(
                f"{strange[0]!r} is no word; expected the words of a hypothesis one by one"
            )
        return (*(piece for word in words for piece in self._encode(word)), BOUNDARY_ID)

    def _run(self, level: Level, states: Sequence[FloatArray]) -> list[npt.NDArray[np.float32]]:
        """The log_probs of a level's edges, float32, (edge,), and the states of its nodes."""
        inputs: dict[str, npt.NDArray[Any]] = level._asdict()
        inputs.update(zip(self._state_names, states, strict=True))
        found: list[npt.NDArray[np.float32]] = self._session.run(self._outputs, inputs)
        return found


def build_levels(
    sequences: Sequence[Sequence[int]], n_history: int | None
) -> tuple[list[Level], list[IntArray]]:
    """Share what sequences have in common.

    Args:
        sequences: pieces of each; the boundary ends every one and is nowhere else.
        n_history: see `Rescorer`.

    Returns:
        The levels, and at each level the edge that each sequence takes, int64, (sequence,), -1
        behind its end.
    """
    levels: list[Level] = []
    paths: list[IntArray] = []
    edge_of = [0] * len(sequences)  # which one each sequence took last
    for depth in range(max(map(len, sequences), default=0)):
        nodes: dict[Sequence[int] | int, int] = {}
        edges: dict[tuple[int, int], int] = {}  # node and piece -> edge
        firsts: list[int] = []  # the sequence that each node goes on from
        path = np.full(len(sequences), -1)
        for i, sequence in enumerate(sequences):
            if depth >= len(sequence):
                continue
            key: Sequence[int] | int = edge_of[i]
            if n_history is not None and depth > n_history:
                key = tuple(sequence[depth - n_history : depth])
            node = nodes.setdefault(key, len(nodes))
            if node == len(firsts):
                firsts.append(i)
            path[i] = edges.setdefault((node, sequence[depth]), len(edges))
        parents = levels[-1].rows[paths[-1][firsts]] if levels else np.zeros(1, np.int64)
        tokens = [sequences[i][depth - 1] if depth else BOUNDARY_ID for i in firsts]
        rows, wanted = np.array(list(edges), dtype=np.int64).T
        levels.append(Level(np.array(tokens, dtype=np.int64), parents, rows, wanted))
        paths.append(path)
        edge_of = path.tolist()
    return levels, paths
