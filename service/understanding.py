"""Words to an intent and slots: an ONNX graph, and a linear-chain CRF over BIO labels in numpy.

The graph gives each word a score for every label and the utterance a log probability for every
intent. The CRF adds what it costs to follow one label by another, finds the likeliest labels
(Viterbi) and how sure each of them is (forward-backward, Lafferty et al. 2001). A model without
a CRF is one whose transitions cost nothing. The file brings its words, characters, labels, intents
and transitions, so that it alone is enough.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from service.engine import open_described

FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]
IdArray = npt.NDArray[np.int64]

UNDERSTANDING_INPUTS: Final = ("words", "characters", "lengths")
UNDERSTANDING_OUTPUTS: Final = ("emissions", "intent_log_probs")
OUTSIDE: Final = "O"
"""The label of a word in no slot."""
UNKNOWN_WORD: Final = 0
"""Id of every word that the model does not know, and of padding."""
N_SPECIAL_CHARACTERS: Final = 4
"""Ids before the first character: padding, unknown, a word's begin and its end."""

_UNKNOWN_CHARACTER: Final = 1
_WORD_BEGIN: Final = 2
_WORD_END: Final = 3
_LONGEST_WORD: Final = 24
_BATCH_UTTERANCES: Final = 32
_LOWEST_EMISSION: Final = -600.0
_DIGIT: Final = re.compile(r"\d")


@dataclass(frozen=True)
class Vocabulary:
    """What a model reads and writes."""

    words: tuple[str, ...]
    """Known words as `shape_word` writes them; the first has id 1."""
    characters: tuple[str, ...]
    """Known characters; the first has id `N_SPECIAL_CHARACTERS`."""
    labels: tuple[str, ...]
    """BIO label of each output id."""
    intents: tuple[str, ...]
    """Intent of each output id."""

    def __post_init__(self) -> None:
        if not self.labels or not self.intents:
            raise ValueError(
                f"{len(self.labels)} labels and {len(self.intents)} intents; expected at least one "
                "of each"
            )
        for name in ("words", "characters", "labels", "intents"):
            entries = getattr(self, name)
            if len(set(entries)) < len(entries) or not all(isinstance(e, str) for e in entries):
                raise ValueError(f"its {name} are not different texts")


@dataclass(frozen=True)
class Transitions:
    """What it costs to follow one label by another; minus infinity where BIO forbids it."""

    between: DoubleArray
    """Natural log scores, float64, (label before, label)."""
    first: DoubleArray
    """Natural log scores of the first word's label, float64, (label,)."""

    @cached_property
    def into(self) -> DoubleArray:
        """The scores as Viterbi reads them, (label, label before)."""
        return np.ascontiguousarray(self.between.T)

    @cached_property
    def highest(self) -> float:
        """The highest score between two labels."""
        return float(self.between.max())

    @cached_property
    def factors(self) -> DoubleArray:
        """What the scores multiply, the highest being 1, (label before, label)."""
        return np.asarray(np.exp(self.between - self.highest))


@dataclass(frozen=True)
class Parse:
    """What an utterance means."""

    intent: str
    """The likeliest intent; empty for an empty utterance."""
    intent_confidence: float
    """Its probability, 0 to 1."""
    labels: tuple[str, ...]
    """BIO label of each word."""
    label_confidences: tuple[float, ...]
    """Probability of each of these labels, 0 to 1, over all ways to label the other words."""
    score: float
    """Natural log probability of the intent and all labels together."""


EMPTY_PARSE: Final = Parse(
    intent="", intent_confidence=0.0, labels=(), label_confidences=(), score=0.0
)


class Understander:
    """Tells what utterances mean; safe to share by threads."""

    def __init__(self, graph: Path, *, n_threads: int = 1) -> None:
        """Load the graph.

        Args:
            graph: an ONNX file that `export_understanding` wrote.
            n_threads: threads of one run.

        Raises:
            BundleError: the file is missing, damaged or another graph.
            ProviderError: two onnxruntime packages are installed.
        """
        self._session, (self.vocabulary, self._transitions) = open_described(
            graph, from_metadata, "understanding model", n_threads=n_threads
        )
        self._encoder = Encoder(self.vocabulary)

    def understand(self, words: Sequence[str]) -> Parse:
        """The likeliest intent and labels of one utterance."""
        return self.understand_many([words])[0]

    def understand_many(self, utterances: Sequence[Sequence[str]]) -> list[Parse]:
        """The likeliest intent and labels of utterances; none of them changes another's.

        Args:
            utterances: words of each, written as they were in training; any word is accepted.

        Returns:
            A parse for each; an empty utterance has no intent, no labels and score 0.
        """
        parses = [EMPTY_PARSE] * len(utterances)
        order = sorted(range(len(utterances)), key=lambda place: len(utterances[place]))
        places = [place for place in order if utterances[place]]
        for first in range(0, len(places), _BATCH_UTTERANCES):
            chosen = places[first : first + _BATCH_UTTERANCES]
            words, characters, lengths = self._encoder.encode([utterances[p] for p in chosen])
            emissions, intents = self.scores(words, characters, lengths)
            decoded = decode(
                emissions, intents, lengths, vocabulary=self.vocabulary, costs=self._transitions
            )
            for place, parse in zip(chosen, decoded, strict=True):
                parses[place] = parse
        return parses

    def scores(
        self, words: IdArray, characters: IdArray, lengths: IdArray
    ) -> tuple[FloatArray, FloatArray]:
        """Run the graph on what `Encoder.encode` gives.

        Returns:
            Scores of the labels, float32, (batch, word, label), which mean nothing behind an
            utterance's end, and log probabilities of the intents, float32, (batch, intent).
        """
        inputs = dict(zip(UNDERSTANDING_INPUTS, (words, characters, lengths), strict=True))
        emissions, intents = self._session.run(list(UNDERSTANDING_OUTPUTS), inputs)
        return np.asarray(emissions, np.float32), np.asarray(intents, np.float32)


class Encoder:
    """Turns words into ids."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._words = {word: i for i, word in enumerate(vocabulary.words, 1)}
        self._characters = {
            character: i for i, character in enumerate(vocabulary.characters, N_SPECIAL_CHARACTERS)
        }

    def encode(self, utterances: Sequence[Sequence[str]]) -> tuple[IdArray, IdArray, IdArray]:
        """Ids of a batch of utterances, none of them empty.

        Returns:
            Words, int64, (batch, word); characters, int64, (batch, word, character), 0 behind a
            word's end; and words of each utterance, int64, (batch,).
        """
        lengths = np.array([len(words) for words in utterances], dtype=np.int64)
        spelled = [[self._spell(word) for word in words] for words in utterances]
        n_words, n_characters = lengths.max(), max(len(ids) for row in spelled for ids in row)
        words = np.full((len(utterances), n_words), UNKNOWN_WORD, dtype=np.int64)
        characters = np.zeros((len(utterances), n_words, n_characters), dtype=np.int64)
        for row, utterance in enumerate(utterances):
            for place, word in enumerate(utterance):
                words[row, place] = self._words.get(shape_word(word), UNKNOWN_WORD)
                ids = spelled[row][place]
                characters[row, place, : len(ids)] = ids
        return words, characters, lengths

    def _spell(self, word: str) -> list[int]:
        ids = [self._characters.get(c, _UNKNOWN_CHARACTER) for c in word.lower()[:_LONGEST_WORD]]
        return [_WORD_BEGIN, *ids, _WORD_END]


def shape_word(word: str) -> str:
    """A word as the word embedding knows it: lower case, every digit a 0."""
    return _DIGIT.sub("0", word.lower())


def spans(labels: Sequence[str]) -> list[tuple[str, int, int]]:
    """The chunks that BIO labels mark, as `conlleval` reads them.

    Args:
        labels: `O`, `B-name` or `I-name`, one a word. An `I-` that continues no chunk of its name
            begins one.

    Returns:
        Name, first word and the word behind the last one, of each chunk.
    """
    found: list[tuple[str, int, int]] = []
    for place, label in enumerate(labels):
        mark, _, name = label.partition("-")
        if mark == OUTSIDE:
            continue
        if mark == "I" and found and found[-1][0] == name and found[-1][2] == place:
            found[-1] = (name, found[-1][1], place + 1)
        else:
            found.append((name, place, place + 1))
    return found


def may_follow(label: str, before: str | None) -> bool:
    """Whether BIO allows a label behind another; None is the begin of the utterance."""
    mark, _, name = label.partition("-")
    return mark != "I" or before in (f"B-{name}", f"I-{name}")


def to_metadata(vocabulary: Vocabulary, costs: Transitions) -> dict[str, str]:
    """What explains a graph, as JSON texts; a forbidden transition is null."""
    texts = {
        field.name: json.dumps(getattr(vocabulary, field.name)) for field in fields(vocabulary)
    }
    return {
        **texts,
        "transitions": json.dumps([_to_json(row) for row in costs.between]),
        "first_transitions": json.dumps(_to_json(costs.first)),
    }


def from_metadata(metadata: Mapping[str, str]) -> tuple[Vocabulary, Transitions]:
    """Read what `to_metadata` wrote.

    Raises:
        TypeError: an entry is of another kind.
        ValueError: an entry is missing or makes no sense.
    """
    names = [field.name for field in fields(Vocabulary)]
    missing = {*names, "transitions", "first_transitions"} - set(metadata)
    if missing:
        raise ValueError(f"its metadata lacks {sorted(missing)}")
    vocabulary = Vocabulary(**{name: tuple(json.loads(metadata[name])) for name in names})
    between = _from_json(json.loads(metadata["transitions"]))
    first = _from_json(json.loads(metadata["first_transitions"]))
    n_labels = len(vocabulary.labels)
    if between.shape != (n_labels, n_labels) or first.shape != (n_labels,):
        raise ValueError(
            f"its transitions have the shapes {between.shape} and {first.shape}, expected "
            f"{(n_labels, n_labels)} and {(n_labels,)}"
        )
    return vocabulary, Transitions(between=between, first=first)


def decode(
    emissions: FloatArray,
    intent_log_probs: FloatArray,
    lengths: IdArray,
    *,
    vocabulary: Vocabulary,
    costs: Transitions,
) -> list[Parse]:
    """The likeliest parse of each utterance of a batch.

    Args:
        emissions: scores of the labels, float32, (batch, word, label); padding is ignored.
        intent_log_probs: natural log, float32, (batch, intent).
        lengths: words of each utterance, int64, (batch,), at least 1.
        vocabulary: names of labels and intents.
        costs: of the CRF.
    """
    intents = intent_log_probs.argmax(-1)
    parses = []
    for row, n_words in enumerate(lengths.tolist()):
        emission = emissions[row, :n_words].astype(np.float64)
        path = find_best_path(emission, costs)
        marginals, log_normaliser = sum_paths(emission, costs)
        intent_log_prob = float(intent_log_probs[row, intents[row]])
        score = intent_log_prob + score_path(emission, path, costs) - log_normaliser
        parses.append(
            Parse(
                intent=vocabulary.intents[intents[row]],
                intent_confidence=_to_share(np.exp(intent_log_prob)),
                labels=tuple(vocabulary.labels[label] for label in path),
                label_confidences=tuple(
                    _to_share(marginals[place, label]) for place, label in enumerate(path)
                ),
                score=min(0.0, score),
            )
        )
    return parses


def find_best_path(emission: DoubleArray, costs: Transitions) -> list[int]:
    """Viterbi: the label ids whose scores have the largest sum.

    Args:
        emission: scores of one utterance, float64, (word, label), at least one word.
        costs: of the CRF.
    """
    best = emission[0] + costs.first
    came_from = np.zeros(emission.shape, dtype=np.int64)
    every = np.arange(emission.shape[1])
    for place in range(1, len(emission)):
        totals = costs.into + best
        came_from[place] = totals.argmax(1)
        best = totals[every, came_from[place]] + emission[place]
    path = [int(best.argmax())]
    for place in range(len(emission) - 1, 0, -1):
        path.append(int(came_from[place, path[-1]]))
    return path[::-1]


def score_path(emission: DoubleArray, path: Sequence[int], costs: Transitions) -> float:
    """Sum of the scores of one labelling: emissions and transitions."""
    labels = np.asarray(path)
    total = emission[np.arange(len(labels)), labels].sum() + costs.first[labels[0]]
    return float(total + costs.between[labels[:-1], labels[1:]].sum())


def sum_paths(emission: DoubleArray, costs: Transitions) -> tuple[DoubleArray, float]:
    """Forward-backward over all labellings, in probabilities scaled word by word.

    Args:
        emission: scores of one utterance, float64, (word, label), at least one word.
        costs: of the CRF.

    Returns:
        Probability of each label of each word, float64, (word, label), and the natural log of the
        sum over all labellings.
    """
    peaks = emission.max(1, keepdims=True)
    likelihood = np.exp(np.maximum(emission - peaks, _LOWEST_EMISSION))
    ahead, back, scales = np.empty_like(emission), np.ones_like(emission), np.empty(len(emission))
    reached = np.exp(costs.first)
    for place, likely in enumerate(likelihood):
        weights = likely * reached
        scales[place] = weights.sum()
        ahead[place] = weights / scales[place]
        reached = ahead[place] @ costs.factors
    for place in range(len(emission) - 1, 0, -1):
        back[place - 1] = costs.factors @ (likelihood[place] * back[place]) / scales[place]
    marginals = ahead * back  # each row sums to 1 but for rounding
    log_sum = float(np.log(scales).sum() + peaks.sum()) + (len(emission) - 1) * costs.highest
    return marginals / marginals.sum(1, keepdims=True), log_sum


def _to_share(probability: float | np.floating[Any]) -> float:
    """A probability without the rounding that takes it out of 0 to 1."""
    return min(1.0, max(0.0, float(probability)))


def _to_json(scores: DoubleArray) -> list[float | None]:
    return [round(float(s), 5) if np.isfinite(s) else None for s in scores]


def _from_json(scores: Sequence[Any]) -> DoubleArray:
    """Numbers in lists; null is minus infinity."""
    array = np.array(scores, dtype=np.float64)  # None becomes nan
    if np.isposinf(array).any():
        raise ValueError("a transition is infinite")
    return np.where(np.isnan(array), -np.inf, array)
