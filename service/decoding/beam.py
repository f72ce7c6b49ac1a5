"""Beam search over a whole emission or chunk by chunk: the compiled search made easy to use."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from service.decoding import readings, search
from service.decoding.hypothesis import FloatArray, Hypothesis, Phrase, Word
from service.decoding.ngram import SENTENCE_END, NgramModel, NgramTables
from service.decoding.phrases import PhraseAutomaton, build_automaton
from service.decoding.search import Knowledge, SearchSettings, SearchState
from service.decoding.trie import build_trie
from service.errors import InputError
from service.text import BLANK, SPACE, WORD_MARK, normalise

Lexicon = Mapping[str, Sequence[Sequence[str]]]
"""Words and their spellings in tokens."""

_NODES: Final = 8192
_NODES_A_PREFIX: Final = 40
_MOST_PHRASES: Final = 5000
_LONGEST_PHRASE: Final = 1000  # characters
_LONGEST_WORD: Final = 100  # letters; to pronounce one takes time with their square
_MOST_SPELLINGS: Final = 16  # of one phrase
_LARGEST_WEIGHT: Final = 100.0
_CERTAIN: Final = 1e-4
_SHORTEST_WORD: Final = 1.0  # frames
_MOST_WAYS: Final = 20  # tried for each reading that is wanted


@dataclass(frozen=True)
class WordCalibration:
    """From what the search knows of a word to the probability that it is right.

    The log odds are the intercept and the sum of weights times features, in the order of
    `WORD_FEATURES`; without weights the confidence is the word's share of the beam.
    """

    intercept: float = 0.0
    weights: tuple[float, ...] = ()


LOWEST_PEAK: Final = "lowest log probability of a token"
WORD_FEATURES: Final = (
    "log odds of the share of the beam that has the word",
    LOWEST_PEAK,
    "mean entropy of the tokens' frames",
    "highest entropy of a token's frame",
    "base 10 log probability of the word",
    "base 10 log probability of the word after it",
    "log of the duration in frames",
    "tokens",
    "the log odds of the word before it",
    "the log odds of the word after it",
    "mean log odds of the utterance",
    "mean entropy of the utterance",
    "mean log probability of the utterance's words",
)


def _no_integers() -> npt.NDArray[np.int64]:
    return np.zeros(0, np.int64)


def _no_numbers() -> npt.NDArray[np.float64]:
    return np.zeros(0)


Rank = Callable[[Sequence[Sequence[str]], npt.NDArray[np.float64]], npt.NDArray[np.float64]]
"""Takes the words of readings and their scores, float64, (reading,), and gives new scores."""


@dataclass(frozen=True)
class _Piece:
    """Words that follow each other in a reading; each array has an entry for each word."""

    words: tuple[str, ...] = ()
    first_frame: npt.NDArray[np.int64] = field(default_factory=_no_integers)
    last_frame: npt.NDArray[np.int64] = field(default_factory=_no_integers)
    share: npt.NDArray[np.float64] = field(default_factory=_no_numbers)
    """Of the beam that has the word."""
    lowest_peak: npt.NDArray[np.float64] = field(default_factory=_no_numbers)
    mean_entropy: npt.NDArray[np.float64] = field(default_factory=_no_numbers)
    highest_entropy: npt.NDArray[np.float64] = field(default_factory=_no_numbers)
    n_tokens: npt.NDArray[np.int64] = field(default_factory=_no_integers)

    def join(self, other: _Piece) -> _Piece:
        """This piece and the one after it."""
        arrays = {
            name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in _ARRAYS
        }
        return _Piece(words=self.words + other.words, **arrays)


_ARRAYS: Final = tuple(field.name for field in fields(_Piece) if field.name != "words")


class BeamDecoder:
    """CTC prefix beam search with a word n-gram, over a lexicon or an open vocabulary.

    Safe to use from several threads; the search runs without the interpreter's lock.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        *,
        lm: NgramModel | None = None,
        lexicon: Lexicon | None = None,
        beam_width: int = 100,
        alpha: float = 0.5,
        beta: float = 1.0,
        unknown_score: float = -10.0,
        beam_prune_log_prob: float = -10.0,
        token_min_log_prob: float = -5.0,
        look_ahead: float = 1.0,
        recombine: bool = True,
        pronounce: Callable[[Sequence[str]], list[tuple[str, ...]]] | None = None,
        start_shift_frames: float = 0.0,
        end_shift_frames: float = 0.0,
        calibration: WordCalibration = WordCalibration(),  # it is frozen
    ) -> None:
        """Prepare the search.

        Args:
            tokens: token list, blank first: characters with a space between words, subwords
                marked as sentencepiece does, or phones.
            lm: word language model; None searches without one.
            lexicon: spellings of the words in tokens, without a space; only words of `lm` are
                used. None spells words by their letters and allows others.
            beam_width: prefixes kept after each frame.
            alpha: weight of the language model's log probability.
            beta: natural log score of each word.
            unknown_score: added for a word outside the vocabulary, base 10, weighted by alpha.
            beam_prune_log_prob: prefixes this far below the best are dropped, natural log.
            token_min_log_prob: tokens below this in a frame are not followed, natural log.
            look_ahead: share of a word's log probability that is charged while it is spelled.
            recombine: whether prefixes that the language model cannot tell apart are searched as
                one; their texts remain apart.
            pronounce: gives spellings of a phrase's words that the lexicon lacks.
            start_shift_frames: added to the frame of a word's first token: CTC is late.
            end_shift_frames: added to the frame after a word's last token.
            calibration: of word confidences.

        Raises:
            InputError: a lexicon without a language model, or a setting outside its range.
        """
        _check_settings(beam_width, beam_prune_log_prob, lexicon=lexicon, lm=lm)
        self._tokens = tuple(tokens)
        self._token_ids = {token: i for i, token in enumerate(tokens)}
        self._lm = lm
        self._lexicon = lexicon
        self._pronounce = pronounce
        self._shifts = (start_shift_frames, end_shift_frames)
        self._calibration = calibration
        self._knowledge = self._prepare(
            beam_width=beam_width,
            alpha=alpha,
            beta=beta,
            unknown_score=unknown_score,
            beam_prune_log_prob=beam_prune_log_prob,
            token_min_log_prob=token_min_log_prob,
            look_ahead=look_ahead,
            recombine=recombine,
        )
        self._automaton_of = lru_cache(maxsize=16)(self._build_automaton)
        self._spare = threading.local()

    def decode(
        self, emission: FloatArray, *, n_best: int = 1, phrases: Sequence[Phrase] = ()
    ) -> list[Hypothesis]:
        """Search a whole emission; see `Decoder`.

        Raises:
            InputError: the emission has another shape, or NaN or a row without any probability.
        """
        run = self.open(phrases=phrases)
        run.push(emission)
        return run.finish(n_best=n_best)

    def decode_ranked(
        self,
        emission: FloatArray,
        rank: Rank,
        *,
        n_read: int,
        n_best: int = 1,
        phrases: Sequence[Phrase] = (),
    ) -> list[Hypothesis]:
        """The best hypotheses after another judge has seen more of them.

        Args:
            emission: log_probs of one utterance, float32, (frames, token).
            rank: gives each reading a new score.
            n_read: how many readings it sees.
            n_best: how many hypotheses are wanted.
            phrases: what is expected or unwanted.

        Raises:
            InputError: see `decode`.
        """
        run = self.open(phrases=phrases)
        run.push(emission)
        found = run.find_pieces(n_read, is_end=True)
        if len(found) > 1:
            pieces, before = zip(*found, strict=True)
            scores = rank([piece.words for piece in pieces], np.array(before))
            order = np.argsort(-scores, kind="stable")
            found = [(pieces[i], float(scores[i])) for i in order]
        return [self.to_hypothesis(piece, score) for piece, score in found[:n_best]]

    def features(self, emission: FloatArray) -> tuple[npt.NDArray[np.float64], tuple[str, ...]]:
        """What the confidences of the best reading are made of, and its words.

        Returns:
            float64, (words, features), by `WORD_FEATURES`; and the words.

        Raises:
            InputError: see `decode`.
        """
        run = self.open()
        run.push(emission)
        piece, _ = run.best_piece()
        if not piece.words:
            return np.zeros((0, len(WORD_FEATURES))), ()
        return self._features(piece), piece.words

    def open(self, *, phrases: Sequence[Phrase] = ()) -> BeamSearch:
        """Begin a search that is fed chunk by chunk.

        Raises:
            InputError: a phrase cannot be spelled, or there are too many.
        """
        knowledge = self._knowledge
        extra_words: tuple[str, ...] = ()
        if phrases:
            automaton, extra_words = self._automaton_of(tuple(phrases))
            gain = float(automaton.reward.max(initial=1.0) * automaton.credit.max(initial=1.0))
            settings = knowledge.settings
            settings = settings._replace(largest_gain=settings.largest_gain * gain)
            knowledge = knowledge._replace(settings=settings, phrases=automaton)
        return BeamSearch(self, knowledge, extra_words)

    def _prepare(
        self,
        *,
        beam_width: int,
        alpha: float,
        beta: float,
        unknown_score: float,
        beam_prune_log_prob: float,
        token_min_log_prob: float,
        look_ahead: float,
        recombine: bool,
    ) -> Knowledge:
        lm, lm_weight = self._lm, alpha * math.log(10)
        words = lm.words if lm else ()
        scores = lm.unigram_log_probs() if lm else np.zeros(0, np.float32)
        spellings = [
            (spelling, i) for i, word in enumerate(words) for spelling in self._spell(word)
        ]
        trie = build_trie(spellings, scores)
        unknown = lm.unknown if lm else 0
        known_share = math.exp(look_ahead * lm_weight * float(scores[unknown])) if lm else 1.0
        marked = np.array([token.startswith(WORD_MARK) for token in self._tokens])
        has_marks = bool(marked.any())
        return Knowledge(
            settings=SearchSettings(
                n_tokens=len(self._tokens),
                blank=BLANK,
                boundary=-1 if self._lexicon is not None else self._token_ids.get(SPACE, -1),
                beam_width=beam_width,
                beam_prune=math.exp(beam_prune_log_prob),
                token_min_log_prob=token_min_log_prob,
                lm_weight=lm_weight,
                word_score=beta,
                has_lm=lm is not None,
                open_vocabulary=self._lexicon is None,
                recombines=recombine and lm is not None,
                unknown_share=math.exp(lm_weight * unknown_score) if lm else 1.0,
                phrase_share=known_share,
                largest_gain=math.exp(beta),
                unknown_word=unknown,
                end_word=lm.word_ids[SENTENCE_END] if lm else 0,
                n_lm_words=max(1, len(words)),
            ),
            trie=trie,
            look_ahead=np.exp(look_ahead * lm_weight * trie.look_ahead.astype(np.float64)),
            may_begin=marked if has_marks else np.ones(len(self._tokens), np.bool_),
            may_continue=~marked if has_marks else np.ones(len(self._tokens), np.bool_),
            lm=lm.tables if lm else _NO_LM,
            phrases=build_automaton([]),
        )

    def _spell(self, word: str) -> list[list[int]]:
        """The spellings of a word in token ids; none where a token is missing."""
        spellings = [word] if self._lexicon is None else self._lexicon.get(word, ())
        return [
            [self._token_ids[token] for token in spelling]
            for spelling in spellings
            if all(token in self._token_ids for token in spelling)
        ]

    def start_state(self) -> npt.NDArray[np.int32]:
        """What the language model knows before the first word."""
        return self._lm.start_state() if self._lm else np.full(1, -1, np.int32)

    def copy_state(self, state: SearchState) -> SearchState:
        """A copy that lasts until this thread asks for the next one."""
        if not hasattr(self._spare, "arrays"):
            self._spare.arrays = [np.empty_like(array) for array in state]
        arrays: list[npt.NDArray[Any]] = list(state)
        for target, source in zip(self._spare.arrays, arrays, strict=True):
            np.copyto(target, source)
        return SearchState(*self._spare.arrays)

    def _build_automaton(
        self, phrases: tuple[Phrase, ...]
    ) -> tuple[PhraseAutomaton, tuple[str, ...]]:
        """The automaton, and its words that the vocabulary lacks."""
        if len(phrases) > _MOST_PHRASES:
            raise InputError(f"{len(phrases)} phrases, expected at most {_MOST_PHRASES}")
        texts = [_words_of(phrase) for phrase in phrases]
        pronounced = self._pronounce_unknown(word for words in texts for word in words)
        extra: dict[str, int] = {}
        spelled: list[tuple[list[list[int]], float]] = []
        for phrase, words in zip(phrases, texts, strict=True):
            ways = self._spell_phrase(phrase.text, words, extra, pronounced)
            spelled += [(way, phrase.weight) for way in ways]
        return build_automaton(spelled), tuple(extra)

    def _pronounce_unknown(self, words: Iterable[str]) -> dict[str, list[list[int]]]:
        """Spellings in phones of the words that have none."""
        if self._pronounce is None:
            return {}
        unknown = sorted({word for word in words if not self._spell(word)})
        return {
            word: [[self._token_ids[phone] for phone in phones]]
            for word, phones in zip(unknown, self._pronounce(unknown), strict=True)
            if phones
        }

    def _spell_phrase(
        self,
        phrase: str,
        words: Sequence[str],
        extra: dict[str, int],
        pronounced: Mapping[str, list[list[int]]],
    ) -> list[list[list[int]]]:
        """Every spelling of a phrase: words as their tokens and the symbol of their end."""
        settings = self._knowledge.settings
        ways: list[list[list[int]]] = [[]]
        for word in words:
            spellings = self._spell(word) or pronounced.get(word)
            if not spellings:
                raise InputError(
                    f"the phrase {phrase!r} cannot be boosted: no pronunciation of {word!r} is "
                    "known; add one to the bundle's lexicon"
                )
            end = settings.boundary
            if end < 0:
                end = settings.n_tokens + self._word_id(word, extra)
            ways = [[*way, [*spelling, end]] for way in ways for spelling in spellings]
            ways = ways[:_MOST_SPELLINGS]
        return ways

    def word_text(
        self, word: int, tokens: npt.NDArray[np.int64], extra_words: Sequence[str]
    ) -> str:
        """A word as it is written: from the list, or from its tokens."""
        settings = self._knowledge.settings
        if word >= settings.n_lm_words:
            return extra_words[word - settings.n_lm_words]
        if self._lm is not None and word != settings.unknown_word:
            return self._lm.words[word]
        return "".join(self._tokens[token] for token in tokens).replace(WORD_MARK, "")

    def to_hypothesis(self, piece: _Piece, score: float) -> Hypothesis:
        """A reading with times and confidences."""
        confidences = self._confidences(piece)
        starts = piece.first_frame + self._shifts[0]
        ends = piece.last_frame + 1 + self._shifts[1]
        words = []
        earliest = 0.0
        for text, start, end, confidence in zip(
            piece.words, starts.tolist(), ends.tolist(), confidences.tolist(), strict=True
        ):
            start_frame = max(start, earliest)
            earliest = max(end, start_frame + _SHORTEST_WORD)
            words.append(Word(text, start_frame, earliest, confidence))
        return Hypothesis(words=tuple(words), score=score)

    def _features(self, piece: _Piece) -> npt.NDArray[np.float64]:
        """What confidences are made of, float64, (words, features); see `WORD_FEATURES`."""
        share = np.clip(piece.share, _CERTAIN, 1 - _CERTAIN)
        log_odds = np.log(share / (1 - share))
        scores = np.zeros(len(piece.words) + 1)
        if self._lm is not None:
            scores = np.array(self._lm.score(piece.words))
        duration = piece.last_frame - piece.first_frame + 1
        whole = [log_odds.mean(), piece.mean_entropy.mean(), scores[:-1].mean()]
        return np.column_stack([
            log_odds,
            piece.lowest_peak,
            piece.mean_entropy,
            piece.highest_entropy,
            scores[:-1],
            scores[1:],
            np.log(duration),
            piece.n_tokens,
            np.concatenate([[0.0], log_odds[:-1]]),
            np.concatenate([log_odds[1:], [0.0]]),
            *(np.full(len(share), mean) for mean in whole),
        ])  # fmt: skip

    def _confidences(self, piece: _Piece) -> npt.NDArray[np.float64]:
        if not (piece.words and self._calibration.weights):
            return np.clip(piece.share, 0.0, 1.0)
        log_odds = self._calibration.intercept + self._features(piece) @ np.array(
            self._calibration.weights
        )
        confidences: npt.NDArray[np.float64] = 1 / (1 + np.exp(-log_odds))
        return confidences

    def _word_id(self, word: str, extra: dict[str, int]) -> int:
        if self._lm is not None and word in self._lm.word_ids and self._spell(word):
            return self._lm.word_ids[word]
        return extra.setdefault(word, self._knowledge.settings.n_lm_words + len(extra))


class BeamSearch:
    """A search under way; use it from one thread at a time."""

    def __init__(
        self, decoder: BeamDecoder, knowledge: Knowledge, extra_words: Sequence[str]
    ) -> None:
        self._decoder = decoder
        self._knowledge = knowledge
        self._extra_words = extra_words
        capacity = max(_NODES, _NODES_A_PREFIX * knowledge.settings.beam_width)
        self._state = search.new_state(knowledge, capacity=capacity, lm_start=decoder.start_state())
        self._scratch = search.new_scratch(knowledge)
        self._settled = _Piece()

    @property
    def n_frames(self) -> int:
        """Frames read so far."""
        return int(self._state.counts[search.N_FRAMES])

    @property
    def n_bytes(self) -> int:
        """Memory of what is carried from frame to frame."""
        return sum(array.nbytes for array in self._state)

    def push(self, log_probs: FloatArray) -> None:
        """Read the next frames.

        Args:
            log_probs: float32, (frames, token); any number of frames.

        Raises:
            InputError: another shape, NaN, +inf, or a frame in which every token is impossible.
        """
        log_probs = _checked(log_probs, self._knowledge.settings.n_tokens, self.n_frames)
        n_read = 0
        while True:
            rest = log_probs[n_read:]
            n_read += search.advance(self._knowledge, self._state, self._scratch, rest)
            if n_read == len(log_probs):
                return
            self._make_room()

    def read(self, log_probs: FloatArray, *, n_settled: int) -> Hypothesis:
        """Read the next frames and tell the best reading, as if its last word ended with them.

        Args:
            log_probs: float32, (frames, token).
            n_settled: frames that the search goes on from; the others are read for this once.

        Raises:
            InputError: see `push`.
        """
        self.push(log_probs[:n_settled])
        ahead = self
        if n_settled < len(log_probs):
            ahead = object.__new__(BeamSearch)
            ahead.__dict__ = dict(self.__dict__)
            ahead._state = self._decoder.copy_state(self._state)
            ahead.push(log_probs[n_settled:])
        return ahead._read(n_best=1, is_end=False)[0]

    def n_shared_words(self) -> int:
        """How many words all prefixes of the beam have in common."""
        nodes = search.shared_way(self._state)
        n_ended = int((self._state.word[nodes[1:]] != search.NO_WORD).sum())
        return len(self._settled.words) + n_ended

    def n_best(self, n: int) -> list[Hypothesis]:
        """The best readings so far with distinct words, best first; the sentence goes on."""
        return self._read(n_best=n, is_end=False)

    def finish(self, *, n_best: int = 1) -> list[Hypothesis]:
        """The best readings with distinct words if the sentence ends here, best first."""
        return self._read(n_best=n_best, is_end=True)

    def best_piece(self, *, is_end: bool = True) -> tuple[_Piece, float]:
        """The words of the best reading, where the sentence ends here if `is_end`; its score."""
        words, score = readings.read_best(self._knowledge, self._state, is_end)
        return self._whole(words), score

    def find_pieces(self, n: int, *, is_end: bool) -> list[tuple[_Piece, float]]:
        """The words of the best readings, and their scores; see `finish` and `n_best`."""
        if n == 1:
            return [self.best_piece(is_end=is_end)]
        knowledge, state = self._knowledge, self._state
        beam = readings.read_beam(knowledge, state, is_end)
        occurrences = readings.find_occurrences(knowledge, state, beam)
        ways = readings.best_ways(knowledge, state, beam, n, _MOST_WAYS * n)
        found: dict[tuple[str, ...], tuple[_Piece, float]] = {}
        begin = 0
        for end, last_word, score in zip(
            ways.end.tolist(), ways.last_word.tolist(), ways.score.tolist(), strict=True
        ):
            nodes = ways.nodes[begin:end]
            begin = end
            words = readings.words_on(knowledge, state, occurrences, nodes, last_word)
            piece = self._whole(words)
            found.setdefault(piece.words, (piece, score))
        return list(found.values())

    def _read(self, *, n_best: int, is_end: bool) -> list[Hypothesis]:
        found = self.find_pieces(n_best, is_end=is_end)
        return [self._decoder.to_hypothesis(piece, score) for piece, score in found]

    def _make_room(self) -> None:
        """Settle the words that all prefixes share; where that is not enough, drop prefixes."""
        state = self._state
        nodes = search.shared_way(state)
        if len(nodes) > 1:
            beam = readings.read_beam(self._knowledge, state, False)
            occurrences = readings.find_occurrences(self._knowledge, state, beam)
            words = readings.words_on(self._knowledge, state, occurrences, nodes, search.NO_WORD)
            self._settled = self._whole(words)
            search.cut(state, int(nodes[-1]))
        needed = max(self._knowledge.settings.beam_width, len(state.free) // search.LEAST_FREE)
        while state.counts[search.N_FREE] < needed and state.counts[search.N_SLOTS] > 1:
            search.halve(state, self._scratch)

    def _whole(self, words: readings.Words) -> _Piece:
        """The words that were settled before, and those behind them."""
        ends = np.cumsum(words.n_tokens)
        spelled = zip(words.word.tolist(), words.n_tokens.tolist(), ends.tolist(), strict=True)
        texts = (
            self._decoder.word_text(word, words.token[end - n : end], self._extra_words)
            for word, n, end in spelled
        )
        arrays = {name: getattr(words, name) for name in _ARRAYS}
        piece = _Piece(words=tuple(texts), **arrays)
        return self._settled.join(piece) if self._settled.words else piece


def _checked(log_probs: FloatArray, n_tokens: int, n_before: int) -> FloatArray:
    log_probs = np.ascontiguousarray(log_probs, np.float32)
    if log_probs.ndim != 2 or log_probs.shape[1] != n_tokens:
        raise InputError(
            f"log_probs have shape {log_probs.shape}, expected (frames, {n_tokens}): "
            "a row for each frame, a column for each token"
        )
    highest = log_probs.max(axis=1)  # NaN where there is one
    bad = np.flatnonzero(~np.isfinite(highest))
    if len(bad) > 0:
        found = {True: "NaN", False: "no possible token"}[bool(np.isnan(highest[bad[0]]))]
        if highest[bad[0]] == np.inf:
            found = "+inf"
        raise InputError(
            f"frame {n_before + bad[0]} has {found}, expected log probabilities, some finite"
        )
    return log_probs


def _check_settings(
    beam_width: int, beam_prune_log_prob: float, *, lexicon: Lexicon | None, lm: NgramModel | None
) -> None:
    if beam_width < 1:
        raise InputError(f"the beam width is {beam_width}, expected at least 1")
    if not beam_prune_log_prob < 0:
        raise InputError(f"beam_prune_log_prob is {beam_prune_log_prob}, expected below 0")
    if lexicon is not None and lm is None:
        raise InputError("a lexicon search needs a language model; it holds the list of words")


def _words_of(phrase: Phrase) -> list[str]:
    """The words of a phrase.

    Raises:
        InputError: it has none, is too long, or its weight is out of range.
    """
    if len(phrase.text) > _LONGEST_PHRASE:
        raise InputError(
            f"a phrase has {len(phrase.text)} characters, expected at most {_LONGEST_PHRASE}"
        )
    words = normalise(phrase.text).split()
    if not words:
        raise InputError(f"the phrase {phrase.text!r} has no word; leave it out")
    longest = max(map(len, words))
    if longest > _LONGEST_WORD:
        raise InputError(
            f"the phrase {phrase.text!r} has a word of {longest} letters, "
            f"expected at most {_LONGEST_WORD}"
        )
    if not abs(phrase.weight) <= _LARGEST_WEIGHT:
        raise InputError(
            f"the phrase {phrase.text!r} has weight {phrase.weight}, "
            f"expected -{_LARGEST_WEIGHT:.0f} to {_LARGEST_WEIGHT:.0f}"
        )
    return words


def _no_lm() -> NgramTables:
    """What stands where there is no language model."""
    no_bytes, no_table = np.zeros(0, np.uint8), np.zeros((0, 256), np.float32)
    return NgramTables(
        order=1,
        n_words=0,
        order_start=np.zeros(2, np.int64),
        last_word=no_bytes,
        log_probs=np.zeros(0, np.float32),
        backoffs=np.zeros(0, np.float32),
        log_prob_codes=no_bytes,
        backoff_codes=no_bytes,
        log_prob_table=no_table,
        backoff_table=no_table,
        word_child=np.zeros(1, np.uint32),
        child_block=np.zeros(1, np.uint32),
        child_offset=np.zeros(1, np.uint16),
        child_shift=0,
    )


_NO_LM: Final = _no_lm()
