"""The phrase automaton against a plain count of the phrases in a text."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from service.decoding.phrases import DEAD, ROOT, build_automaton, completes, follow

A, B, END = 0, 1, 9
Spelled = list[list[int]]


def _phrase(*words: list[int]) -> Spelled:
    return [[*word, END] for word in words]


def _expected(words: Spelled, phrases: list[tuple[Spelled, float]]) -> float:
    """The weights of all phrases in a text of whole words."""
    return sum(
        weight
        for phrase, weight in phrases
        for start in range(len(words))
        if words[start : start + len(phrase)] == phrase
    )


def _follow_all(phrases: list[tuple[Spelled, float]], words: Spelled) -> float:
    """Log score that the automaton gives a text."""
    automaton = build_automaton(phrases)
    state, total = ROOT, 0.0
    for word in words:
        for symbol in word:
            following = follow(automaton, state, symbol, symbol == END)
            total += np.log(automaton.reward[following])
            total += np.log(automaton.credit[following]) - np.log(automaton.credit[state])
            state = following
    return float(total - np.log(automaton.credit[state]))


def test_score_of_a_text_is_that_of_its_phrases() -> None:
    phrases = [
        (_phrase([A]), 1.0),
        (_phrase([A], [A, B]), 4.0),
        (_phrase([A, B], [A]), -2.0),
        (_phrase([A, B, A]), 8.0),
        (_phrase([A], [A], [B]), 0.5),
    ]
    words = [[A, END], [B, END], [A, B, END], [A, B, A, END], [B, A, END]]
    n_scored = 0
    for length in range(5):
        for text in product(words, repeat=length):
            expected = _expected(list(text), phrases)
            assert _follow_all(phrases, list(text)) == pytest.approx(expected)
            n_scored += expected != 0
    assert n_scored > 300


def test_phrase_begins_where_a_word_does() -> None:
    automaton = build_automaton([(_phrase([A, B]), 2.0)])
    state = follow(automaton, ROOT, B, False)
    assert state == DEAD
    assert follow(automaton, state, A, False) == DEAD
    assert follow(automaton, state, END, True) == ROOT


def test_word_of_a_phrase_is_known_at_its_end_only() -> None:
    automaton = build_automaton([(_phrase([A, B]), 2.0)])
    inside = follow(automaton, ROOT, A, False)
    assert not completes(automaton, inside, END)
    assert completes(automaton, follow(automaton, inside, B, False), END)


def test_no_phrases_change_nothing() -> None:
    assert _follow_all([], [[A, END], [B, END]]) == 0.0
