"""Beam search with a KenLM word n-gram by pyctcdecode: the reference decoder."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import kenlm
import numpy as np
from pyctcdecode.alphabet import Alphabet
from pyctcdecode.decoder import BeamSearchDecoderCTC, OutputBeam
from pyctcdecode.language_model import LOG_BASE_CHANGE_FACTOR, LanguageModel

from service.decoding.hypothesis import FloatArray, Hypothesis, Phrase, Search, Word
from service.decoding.ngram import NgramModel
from service.errors import RequestError
from service.text import BLANK_TOKEN

logging.getLogger("pyctcdecode").setLevel(logging.ERROR)  # it warns of what is meant here


class _LanguageModel(LanguageModel):  # type: ignore[misc]  # pyctcdecode is not annotated
    """pyctcdecode's, but a space at the end is no word.

    pyctcdecode 0.5 scores what follows such a space as one more, unknown word, and gives this
    score to every reading with the same text.
    """

    def score(
        self, prev_state: kenlm.State, word: str, is_last_word: bool = False
    ) -> tuple[float, kenlm.State]:
        if word:
            score: tuple[float, kenlm.State] = super().score(prev_state, word, is_last_word)
            return score
        end_score = self._get_raw_end_score(prev_state) if is_last_word else 0.0
        return self.alpha * end_score * LOG_BASE_CHANGE_FACTOR, prev_state


def load_kenlm(lm: NgramModel) -> kenlm.Model:
    """The same model in KenLM's hands; reading the text takes some seconds a million n-grams."""
    with tempfile.TemporaryDirectory() as folder:
        arpa = Path(folder) / "lm.arpa"
        lm.save_arpa(arpa)
        return kenlm.Model(str(arpa))


class ReferenceDecoder:
    """CTC prefix beam search with shallow fusion."""

    def __init__(
        self,
        tokens: Sequence[str],
        *,
        lm: kenlm.Model | None = None,
        words: Sequence[str] = (),
        beam_width: int = 100,
        alpha: float = 0.5,
        beta: float = 1.0,
        unknown_score: float = -10.0,
        beam_prune_log_prob: float = -10.0,
        token_min_log_prob: float = -5.0,
    ) -> None:
        """Load the language model.

        Args:
            tokens: token list, blank first.
            lm: word language model; None searches without one.
            words: its word list, which KenLM does not tell.
            beam_width: hypotheses kept after each frame.
            alpha: weight of the language model's log probability.
            beta: added for each word.
            unknown_score: added for a word outside the word list, log10.
            beam_prune_log_prob: beams this far below the best are dropped, natural log.
            token_min_log_prob: tokens below this in a frame are not followed, natural log.
        """
        labels = ["" if token == BLANK_TOKEN else token for token in tokens]
        language_model = None
        if lm is not None:
            language_model = _LanguageModel(
                lm,
                unigrams=words,
                alpha=alpha,
                beta=beta,
                unk_score_offset=unknown_score,
            )
        self._tokens = {token: i for i, token in enumerate(tokens)}
        self._search = BeamSearchDecoderCTC(Alphabet(labels, False), language_model)
        self._beam_width = beam_width
        self._beam_prune_log_prob = beam_prune_log_prob
        self._token_min_log_prob = token_min_log_prob

    def open(self, *, phrases: Sequence[Phrase] = ()) -> Search | None:
        """None: pyctcdecode searches whole emissions only."""
        _refuse(phrases)
        return None

    def decode(
        self, emission: FloatArray, *, n_best: int = 1, phrases: Sequence[Phrase] = ()
    ) -> list[Hypothesis]:
        """Return the best beams with distinct texts, best first; see `Decoder`."""
        _refuse(phrases)
        if len(emission) == 0:
            return [Hypothesis(words=(), score=0.0)]
        beams: list[OutputBeam] = self._search.decode_beams(
            emission,
            beam_width=self._beam_width,
            beam_prune_logp=self._beam_prune_log_prob,
            token_min_logp=self._token_min_log_prob,
        )
        return [self._to_hypothesis(beam, emission) for beam in beams[:n_best]]

    def _to_hypothesis(self, beam: OutputBeam, emission: FloatArray) -> Hypothesis:
        _, _, text_frames, _, score = beam
        words = tuple(
            Word(
                text=text,
                start_frame=start,
                end_frame=end,
                confidence=self._confidence(text, emission[start:end]),
            )
            for text, (start, end) in text_frames
        )
        return Hypothesis(words=words, score=float(score))

    def _confidence(self, text: str, frames: FloatArray) -> float:
        """Geometric mean, over the word's characters, of the best probability in its frames."""
        peaks = frames.max(axis=0) if len(frames) else np.full(len(self._tokens), -np.inf)
        return float(np.exp(np.mean([peaks[self._tokens[character]] for character in text])))


def _refuse(phrases: Sequence[Phrase]) -> None:
    if phrases:
        raise RequestError("the reference decoder boosts no phrases; ask for the decoder beam")
