"""Boosted phrases as one automaton (Aho and Corasick, 1975), in flat arrays.

A phrase is spelled in symbols: the tokens of its words and, after each word, a symbol that says
which word ended. Phrases begin where words begin, so a word that no phrase can contain leads to
`DEAD` until it ends. A phrase that is under way is given credit for what was heard of it; the
credit is taken back when the phrase breaks off, and kept when it is complete.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from service.decoding.compiled import compiled

DoubleArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int32]

ROOT: Final = 0
DEAD: Final = 1


class PhraseAutomaton(NamedTuple):
    """`n` is the number of states; state 0 is between words, 1 in a word of no phrase."""

    child_start: IntArray
    """First child of each state and the end of the last's, int32, (n + 1,)."""
    symbol: IntArray
    """Symbol that leads to each state, ascending among siblings, int32, (n,)."""
    fail: IntArray
    """The state of the longest shorter match, int32, (n,)."""
    credit: DoubleArray
    """What the phrases under way multiply the mass by, float64, (n,)."""
    reward: DoubleArray
    """What the phrases that are complete here multiply it by, float64, (n,)."""


def build_automaton(phrases: Iterable[tuple[Sequence[Sequence[int]], float]]) -> PhraseAutomaton:
    """Build the automaton.

    Args:
        phrases: the words of each phrase, each as its tokens and the symbol of its end; and what a
            complete phrase adds to the log score.
    """
    children: list[dict[int, int]] = [{}, {}]
    in_word = [False, True]
    credit, reward = [0.0, 0.0], [0.0, 0.0]
    for words, weight in phrases:
        n_symbols = sum(map(len, words))
        state, depth = ROOT, 0
        for word in words:
            for place, symbol in enumerate(word, 1):
                depth += 1
                following = children[state].get(symbol)
                if following is None:
                    following = children[state][symbol] = len(children)
                    children.append({})
                    in_word.append(place < len(word))
                    credit.append(0.0)
                    reward.append(0.0)
                state = following
                if depth < n_symbols:
                    credit[state] = max(credit[state], weight * depth / n_symbols)
        if state != ROOT:
            reward[state] += weight
    return _flatten(children, in_word, credit, reward)


def _flatten(
    children: list[dict[int, int]], in_word: list[bool], credit: list[float], reward: list[float]
) -> PhraseAutomaton:
    """Number the states breadth first and link each to its longest shorter match."""
    order, symbols = [ROOT, DEAD], [-1, -1]
    number_of = {ROOT: ROOT, DEAD: DEAD}
    fails = {ROOT: ROOT, DEAD: DEAD}
    queue = deque([ROOT])
    while queue:
        state = queue.popleft()
        for symbol, child in sorted(children[state].items()):
            fail = _longest_match(children, fails, state, symbol, in_word=in_word[child])
            fails[child] = fail
            credit[child] = max(credit[child], credit[fail])
            reward[child] += reward[fail]
            number_of[child] = len(order)
            order.append(child)
            symbols.append(symbol)
            queue.append(child)
    n_children = [len(children[state]) for state in order]
    return PhraseAutomaton(
        child_start=np.cumsum([2, *n_children]).astype(np.int32),
        symbol=np.array(symbols, np.int32),
        fail=np.array([number_of[fails[state]] for state in order], np.int32),
        credit=np.exp([credit[state] for state in order]),
        reward=np.exp([reward[state] for state in order]),
    )


def _longest_match(
    children: list[dict[int, int]], fails: dict[int, int], state: int, symbol: int, *, in_word: bool
) -> int:
    while state not in (ROOT, DEAD):
        state = fails[state]
        if symbol in children[state]:
            return children[state][symbol]
    return DEAD if in_word else ROOT


@compiled
def follow(automaton: PhraseAutomaton, state: int, symbol: int, ends_word: bool) -> int:
    """The state after one more symbol."""
    while True:
        low, high = automaton.child_start[state], automaton.child_start[state + 1]
        end = high
        while low < high:
            middle = (low + high) >> 1
            if automaton.symbol[middle] < symbol:
                low = middle + 1
            else:
                high = middle
        if low < end and automaton.symbol[low] == symbol:
            return low
        if state <= DEAD:
            return ROOT if ends_word else DEAD
        state = automaton.fail[state]


@compiled
def completes(automaton: PhraseAutomaton, state: int, symbol: int) -> bool:
    """Whether a word of a phrase under way ends with this symbol."""
    while state > DEAD:
        low, high = automaton.child_start[state], automaton.child_start[state + 1]
        for child in range(low, high):
            if automaton.symbol[child] == symbol:
                return True
        state = automaton.fail[state]
    return False
