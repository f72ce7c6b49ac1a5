"""The stability of interim words: a probability that follows what is known of the word."""

from __future__ import annotations

import math

import pytest

from service.bundle import Survival
from service.decoding.hypothesis import Word
from service.stability import survival_inputs, survival_probability


def _word(text: str = "speech", *, end_frame: int = 10, confidence: float = 0.8) -> Word:
    return Word(text, start_frame=2, end_frame=end_frame, confidence=confidence)


def _probability(word: Word, weights: Survival, *, n_settled: int = 16, n_known: int = 24) -> float:
    return survival_probability(word, weights, n_settled=n_settled, n_known=n_known)


@pytest.mark.parametrize("confidence", [0.01, 0.5, 0.9])
def test_survival_is_the_confidence_where_nothing_was_fitted(confidence: float) -> None:
    word = _word(confidence=confidence)
    assert _probability(word, Survival()) == pytest.approx(confidence)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 1.0000001])
def test_survival_is_a_probability_for_extreme_confidences(confidence: float) -> None:
    assert 0 < _probability(_word(confidence=confidence), Survival()) < 1


def test_survival_inputs_are_in_the_order_of_the_weights() -> None:
    inputs = survival_inputs(_word("four", confidence=0.5), n_settled=10, n_known=24)
    assert inputs == pytest.approx((1.0, 0.0, 1.0, math.log(15), math.log(4)))
    assert len(inputs) == len(Survival.model_fields)
    for name, value in zip(Survival.model_fields, inputs, strict=True):
        weights = Survival(**{**dict.fromkeys(Survival.model_fields, 0.0), name: 2.0})
        probability = _probability(_word("four", confidence=0.5), weights, n_settled=10)
        assert probability == pytest.approx(1 / (1 + math.exp(-2 * value)))


def test_word_counts_as_settled_once_all_its_frames_are() -> None:
    weights = Survival(settled=3.0)
    settled = _probability(_word(end_frame=16), weights)
    assert settled > _probability(_word(end_frame=17), weights)
    assert settled == _probability(_word(end_frame=3), weights)


def test_distance_is_zero_for_a_word_that_ends_with_what_is_known() -> None:
    inputs = survival_inputs(_word(end_frame=30), n_settled=16, n_known=24)
    assert inputs[3] == 0.0
