"""A word n-gram language model in one memory-mapped file.

The n-grams form a trie by their words from first to last: the children of an n-gram are its
continuations, sorted by word. Node numbers run through the orders, so a word is its own unigram
node, and the tables of all orders are one array. What a hypothesis carries is the chain of nodes of
its last words: one word, two words, … up to order − 1.

Back-off follows Katz as ARPA files define it; scores are base 10 logarithms.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from service.decoding.compiled import allocating, compiled
from service.errors import InputError

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]

HIGHEST_ORDER: Final = 6
UNKNOWN: Final = "<unk>"
SENTENCE_START: Final = "<s>"
SENTENCE_END: Final = "</s>"

_MAGIC: Final = b"voxgate n-gram 1\n"
_ALIGNMENT: Final = 64
_KENLM_MAGIC: Final = b"mmap lm http://kheafield.com/code"


class NgramTables(NamedTuple):
    """The arrays that compiled code reads; `n` stands for the number of n-grams of all orders.

    An n-gram of the highest order has neither back-off nor children.
    """

    order: int
    """Longest n-gram."""
    n_words: int
    """Words, with the unknown one and the sentence marks: the nodes of order 1."""
    order_start: npt.NDArray[np.int64]
    """First node of each order and the end of the last, int64, (order + 1,)."""
    last_word: npt.NDArray[np.uint8]
    """Last word of each n-gram from order 2 on, low byte first, uint8, ((n − n_words) × 3,)."""
    log_probs: FloatArray
    """Base 10, float32, (n,); empty where quantised."""
    backoffs: FloatArray
    """Base 10, float32, (n below the highest order,); empty where quantised."""
    log_prob_codes: npt.NDArray[np.uint8]
    """Place of each log_prob in its order's table, uint8, (n,); empty where not quantised."""
    backoff_codes: npt.NDArray[np.uint8]
    """Likewise of each back-off."""
    log_prob_table: FloatArray
    """The quantised values, float32, (order, 256)."""
    backoff_table: FloatArray
    """Likewise of back-offs."""
    word_child: npt.NDArray[np.uint32]
    """First child of each node of order 1 and the end of the last's, uint32, (n_words + 1,)."""
    child_block: npt.NDArray[np.uint32]
    """First child of every 2^`child_shift`-th node from order 2 on, uint32."""
    child_offset: npt.NDArray[np.uint16]
    """First child of each node from order 2 on, counted from that of its block, uint16."""
    child_shift: int
    """How many nodes share a block, as a power of two."""


@dataclass(frozen=True)
class NgramModel:
    """An opened model; processes that open the same file share its memory."""

    tables: NgramTables
    word_bytes: npt.NDArray[np.uint8]
    """The words by number, UTF-8, each followed by a line feed."""

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The words by number, with `<unk>`, `<s>` and `</s>`."""
        return tuple(self.word_bytes.tobytes().decode("utf-8").split("\n")[:-1])

    @cached_property
    def word_ids(self) -> Mapping[str, int]:
        """Number of each word."""
        return {word: i for i, word in enumerate(self.words)}

    @property
    def unknown(self) -> int:
        """Number of the word that stands for all others."""
        return self.word_ids[UNKNOWN]

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The words that can be said: without `<unk>`, `<s>` and `</s>`."""
        marks = {UNKNOWN, SENTENCE_START, SENTENCE_END}
        return tuple(word for word in self.words if word not in marks)

    def start_state(self) -> IntArray:
        """The nodes of a sentence's beginning, int32, (order − 1,), −1 where there is none."""
        state = np.full(max(1, self.tables.order - 1), -1, np.int32)
        if self.tables.order > 1:
            state[0] = self.word_ids[SENTENCE_START]
        return state

    def score(self, words: Iterable[str]) -> list[float]:
        """Base 10 log probability of each word of a sentence and of its end."""
        numbers = [self.word_ids.get(word, self.unknown) for word in (*words, SENTENCE_END)]
        scores = np.empty(len(numbers))
        score_words(self.tables, self.start_state(), np.array(numbers), scores)
        return [float(score) for score in scores]

    def unigram_log_probs(self) -> FloatArray:
        """Base 10 log probability of each word without context, float32, (n_words,)."""
        return self._log_probs(1)

    def save_arpa(self, path: Path) -> None:
        """Write the model as text, for tools that do not read this form."""
        tables = self.tables
        last_words = np.zeros((len(tables.last_word) // 3, 4), np.uint8)
        last_words[:, :3] = tables.last_word.reshape(-1, 3)
        following = last_words.view("<u4").ravel()
        with path.open("w", encoding="utf-8") as file:
            file.write("\\data\\\n")
            for order, n in enumerate(np.diff(tables.order_start), start=1):
                file.write(f"ngram {order}={n}\n")
            ngrams: Sequence[str] = self.words
            for order in range(1, tables.order + 1):
                begin = tables.order_start[order - 1]
                file.write(f"\n\\{order}-grams:\n")
                if order > 1:
                    words = (self.words[i] for i in following[begin - tables.n_words :])
                    shorter = _parents(tables, order)
                    ngrams = [
                        f"{ngrams[parent]} {word}"
                        for parent, word in zip(shorter, words, strict=False)
                    ]
                values = [f"{value:.6g}" for value in self._log_probs(order)]
                if order == 1:
                    values[self.word_ids[SENTENCE_START]] = "-99"
                rows: Iterable[str] = map("\t".join, zip(values, ngrams, strict=True))
                if order < tables.order:
                    backoffs = self._backoffs(order)
                    rows = (f"{row}\t{b:.6g}" for row, b in zip(rows, backoffs, strict=True))
                file.writelines(f"{row}\n" for row in rows)
            file.write("\n\\end\\\n")

    def _log_probs(self, order: int) -> FloatArray:
        """Base 10 log probability of each n-gram of an order."""
        tables = self.tables
        nodes = slice(*tables.order_start[order - 1 : order + 1])
        if len(tables.log_probs):
            return tables.log_probs[nodes]
        return tables.log_prob_table[order - 1][tables.log_prob_codes[nodes]]

    def _backoffs(self, order: int) -> FloatArray:
        """Base 10 back-off of each n-gram of an order below the highest."""
        tables = self.tables
        nodes = slice(*tables.order_start[order - 1 : order + 1])
        if len(tables.backoffs):
            return tables.backoffs[nodes]
        return tables.backoff_table[order - 1][tables.backoff_codes[nodes]]

    def save(self, path: Path) -> None:
        """Write the file that `load_ngram` maps."""
        arrays = {"word_bytes": self.word_bytes}
        numbers = {}
        for name, value in self.tables._asdict().items():
            if isinstance(value, np.ndarray):
                arrays[name] = value
            else:
                numbers[name] = int(value)
        layout: dict[str, Any] = {}
        position = 0
        for name, array in arrays.items():
            layout[name] = [array.dtype.str, array.shape, position]
            position += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        header = json.dumps({"numbers": numbers, "arrays": layout}).encode() + b"\n"
        with path.open("wb") as file:
            file.write(_MAGIC + header)
            file.write(b"\0" * (-file.tell() % _ALIGNMENT))
            for array in arrays.values():
                file.write(np.ascontiguousarray(array).tobytes())
                file.write(b"\0" * (-file.tell() % _ALIGNMENT))


def load_ngram(path: Path) -> NgramModel:
    """Map a model into memory.

    Raises:
        InputError: the file cannot be read or is of another kind.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(_MAGIC))
            if start != _MAGIC:
                raise InputError(_describe_foreign(path, start))
            header = json.loads(file.readline())
            origin = file.tell() + -file.tell() % _ALIGNMENT
        mapped = np.memmap(path, np.uint8, mode="c")  # writable for numba, shared until written
        arrays = {
            name: _view(mapped, np.dtype(kind), tuple(shape), origin + position)
            for name, (kind, shape, position) in header["arrays"].items()
        }
        word_bytes = arrays.pop("word_bytes")
        tables = NgramTables(**header["numbers"], **arrays)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"cannot read the language model {path}: {error}; build it again with "
            "`voxgate lm build`"
        ) from error
    return NgramModel(tables, word_bytes)


def _view(
    mapped: npt.NDArray[np.uint8], kind: np.dtype[Any], shape: Sequence[int], position: int
) -> npt.NDArray[Any]:
    n_bytes = int(np.prod(shape)) * kind.itemsize
    if position + n_bytes > len(mapped):
        raise ValueError(f"the file ends at byte {len(mapped)}, expected {position + n_bytes}")
    return np.asarray(mapped)[position : position + n_bytes].view(kind).reshape(shape)


def _describe_foreign(path: Path, start: bytes) -> str:
    if start.startswith(_KENLM_MAGIC[: len(start)]):
        return (
            f"{path} is a KenLM binary, which does not give back its n-grams; "
            "compile the ARPA file it was made from: voxgate lm compile MODEL.arpa"
        )
    if start.startswith((b"\\data\\", b"\x1f\x8b", b"\xfd7zXZ")):
        return f"{path} is no compiled language model; compile it: voxgate lm compile {path}"
    return (
        f"{path} is no compiled language model, it begins with {start[:8]!r}; "
        "build one with `voxgate lm build`"
    )


def _parents(lm: NgramTables, order: int) -> Iterator[int]:
    """Place among the n-grams one shorter of the beginning of each n-gram of an order above 1."""
    begin, end = lm.order_start[order - 2 : order]
    for node in range(begin, end):
        first, last = child_range(lm, node)
        yield from repeat(node - begin, last - first)


@compiled
def child_range(lm: NgramTables, node: int) -> tuple[int, int]:
    """The nodes from the first child to behind the last."""
    if node < lm.n_words:
        return np.int64(lm.word_child[node]), np.int64(lm.word_child[node + 1])
    at = node - lm.n_words
    begin = np.int64(lm.child_block[at >> lm.child_shift]) + lm.child_offset[at]
    at += 1
    return begin, np.int64(lm.child_block[at >> lm.child_shift]) + lm.child_offset[at]


@compiled
def find_child(lm: NgramTables, node: int, word: int) -> int:
    """The n-gram that continues `node` by `word`, −1 where there is none."""
    low, high = child_range(lm, node)
    end = high
    while low < high:
        middle = (low + high) >> 1
        if _last_word(lm, middle) < word:
            low = middle + 1
        else:
            high = middle
    if low < end and _last_word(lm, low) == word:
        return low
    return -1


@compiled
def _last_word(lm: NgramTables, node: int) -> int:
    at = (node - lm.n_words) * 3
    words = lm.last_word
    return np.int64(words[at]) | (np.int64(words[at + 1]) << 8) | (np.int64(words[at + 2]) << 16)


@compiled
def _log_prob(lm: NgramTables, node: int, order: int) -> float:
    if len(lm.log_probs) > 0:
        return lm.log_probs[node]
    return lm.log_prob_table[order - 1, lm.log_prob_codes[node]]


@compiled
def _backoff(lm: NgramTables, node: int, order: int) -> float:
    if len(lm.backoffs) > 0:
        return lm.backoffs[node]
    return lm.backoff_table[order - 1, lm.backoff_codes[node]]


@compiled
def score_word(lm: NgramTables, state: IntArray, word: int, following: IntArray) -> float:
    """Base 10 log probability of a word after a state.

    Args:
        lm: the model.
        state: nodes of the last words, int32, at least (order − 1,), −1 where there is none.
        word: number of the word.
        following: gets the state after the word, of the same shape.
    """
    longest = lm.order - 1
    log_prob = _log_prob(lm, word, 1)
    following[:] = -1
    if longest > 0:
        following[0] = word
    matched = 0
    while matched < longest and state[matched] >= 0:
        child = find_child(lm, state[matched], word)
        if child < 0:
            break
        matched += 1
        log_prob = _log_prob(lm, child, matched + 1)
        if matched < longest:
            following[matched] = child
    for length in range(matched, longest):
        if state[length] < 0:
            break
        log_prob += _backoff(lm, state[length], length + 1)
    return log_prob


@allocating
def score_words(
    lm: NgramTables, state: IntArray, words: npt.NDArray[np.int64], scores: npt.NDArray[np.float64]
) -> None:
    """Base 10 log probability of each word after those before it; see `score_word`."""
    before, after = state.copy(), state.copy()
    for i in range(len(words)):
        scores[i] = score_word(lm, before, words[i], after)
        before, after = after, before
