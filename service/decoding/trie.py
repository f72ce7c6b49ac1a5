"""A word list as a trie of token spellings, in flat arrays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]


class Trie(NamedTuple):
    """Nodes in breadth-first order, 0 the root; the children of a node follow each other.

    `n` is the number of nodes.
    """

    child_start: IntArray
    """First child of each node and the end of the last's, int32, (n + 1,)."""
    token: IntArray
    """Token that leads to each node, ascending among siblings, int32, (n,); −1 at the root."""
    word_start: IntArray
    """Place in `words` of the first word that ends at each node, int32, (n + 1,)."""
    words: IntArray
    """Words by the node at which they end, int32."""
    look_ahead: FloatArray
    """Highest score of a word at or below each node, float32, (n,); 0 at the root."""


def build_trie(spellings: Iterable[tuple[Sequence[int], int]], scores: FloatArray) -> Trie:
    """Build a trie.

    Args:
        spellings: tokens and number of each word; a word may have several spellings, and several
            words the same.
        scores: log score of each word by number, float32.
    """
    rows = sorted({(tuple(tokens), word) for tokens, word in spellings if len(tokens) > 0})
    n_tokens = np.array([len(tokens) for tokens, _ in rows], np.int64)
    words = np.array([word for _, word in rows], np.int32)
    spelled = np.full((len(rows), n_tokens.max(initial=0) + 1), -1, np.int32)
    for row, (tokens, _) in enumerate(rows):
        spelled[row, : len(tokens)] = tokens
    node_of = np.zeros(len(rows), np.int64)  # node of each row at the current depth
    end_node = np.zeros(len(rows), np.int64)
    tokens_of, parents_of, looks = [np.array([-1])], [np.zeros(0, np.int64)], [np.zeros(1)]
    n_nodes = 1
    for depth in range(spelled.shape[1]):
        inside = np.flatnonzero(n_tokens > depth)
        if len(inside) == 0:
            break
        parents, tokens = node_of[inside], spelled[inside, depth]
        is_first = np.ones(len(inside), bool)
        is_first[1:] = (parents[1:] != parents[:-1]) | (tokens[1:] != tokens[:-1])
        first = np.flatnonzero(is_first)
        node_of[inside] = n_nodes + np.cumsum(is_first) - 1
        tokens_of.append(tokens[first])
        parents_of.append(parents[first])
        looks.append(np.maximum.reduceat(scores[words[inside]], first))
        ends = inside[n_tokens[inside] == depth + 1]
        end_node[ends] = node_of[ends]
        n_nodes += len(first)
    by_node = np.argsort(end_node, kind="stable")
    return Trie(
        child_start=_offsets(np.concatenate(parents_of), n_nodes, first=1),
        token=np.concatenate(tokens_of).astype(np.int32),
        word_start=_offsets(end_node, n_nodes, first=0),
        words=words[by_node],
        look_ahead=np.concatenate(looks).astype(np.float32),
    )


def _offsets(nodes: npt.NDArray[np.int64], n_nodes: int, *, first: int) -> IntArray:
    counts = np.bincount(nodes, minlength=n_nodes)
    return np.concatenate([[first], first + np.cumsum(counts)]).astype(np.int32)
