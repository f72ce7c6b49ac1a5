"""From an ARPA file to the memory-mapped form that the decoder reads."""

from __future__ import annotations

import gzip
import lzma
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from service.decoding.ngram import (
    HIGHEST_ORDER,
    SENTENCE_END,
    SENTENCE_START,
    UNKNOWN,
    NgramModel,
    NgramTables,
)
from service.errors import InputError

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

_N_CODES: Final = 256
_LARGEST_SHIFT: Final = 6
_LARGEST_OFFSET: Final = np.iinfo(np.uint16).max
_UNKNOWN_LOG_PROB: Final = -100.0  # as KenLM gives a model that says nothing of unknown words


@dataclass(frozen=True)
class _Order:
    """The n-grams of one length, sorted by their words."""

    parents: IntArray
    """Place of the words before the last among the n-grams one shorter, int64, (n,)."""
    last_words: IntArray
    """int64, (n,)."""
    log_probs: FloatArray
    backoffs: FloatArray


@dataclass(frozen=True)
class _Section:
    """The n-grams of one length as a file lists them."""

    words: IntArray
    """Word numbers, int64, (n, order)."""
    log_probs: FloatArray
    backoffs: FloatArray


def compile_arpa(path: Path, *, quantise: bool = False) -> NgramModel:
    """Read an ARPA file: plain, gzip or xz.

    Args:
        path: the file; its n-grams need not be sorted.
        quantise: whether log probabilities and back-offs take a byte each instead of four.

    Raises:
        InputError: the file cannot be read or is no ARPA file; the message names the line.
    """
    try:
        with _open(path) as lines:
            words, sections = _Reader(path, lines).read()
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error) as error:
        raise InputError(f"cannot read the language model {path}: {error}") from error
    return _build(words, _close(sections, n_words=len(words)), quantise=quantise)


def _open(path: Path) -> IO[str]:
    with path.open("rb") as file:
        magic = file.read(6)
    if magic.startswith(b"\x1f\x8b"):
        return gzip.open(path, "rt", encoding="utf-8", newline="\n")
    if magic.startswith(b"\xfd7zXZ"):
        return lzma.open(path, "rt", encoding="utf-8", newline="\n")
    return path.open(encoding="utf-8", newline="\n")


class _Reader:
    """Reads the sections of an ARPA file one after another."""

    def __init__(self, path: Path, lines: IO[str]) -> None:
        self._path = path
        self._lines = enumerate(lines, 1)
        self._number = 0

    def read(self) -> tuple[list[str], list[_Section]]:
        """The words by number, and the n-grams from order 1 on."""
        counts = self._read_counts()
        ids: dict[str, int] = {}
        sections: list[_Section] = []
        with tqdm(total=sum(counts), desc="reading ARPA", unit=" n-grams", unit_scale=True) as bar:
            for order, n_expected in enumerate(counts, 1):
                sections.append(self._read_section(order, n_expected, len(counts), ids))
                bar.update(n_expected)
                if order == 1:
                    sections[0] = self._complete(sections[0], ids)
        return list(ids), sections

    def _next(self) -> str:
        self._number, line = next(self._lines, (self._number, None))
        if line is None:
            raise self._error("the file ends", "\\end\\")
        return line.rstrip("\r\n")

    def _skip_blank(self) -> str:
        while not (line := self._next()).strip():
            pass
        return line

    def _error(self, found: str, expected: str) -> InputError:
        return InputError(f"{self._path}:{self._number}: {found}, expected {expected}")

    def _read_counts(self) -> list[int]:
        while (line := self._next()).strip() != "\\data\\":
            if line.startswith("\\") or self._number > 1000:
                raise self._error(f"{line[:40]!r}", "\\data\\; is this an ARPA file?")
        counts: list[int] = []
        while (line := self._next()).startswith("ngram "):
            order, _, count = line[len("ngram ") :].partition("=")
            if not (order.strip() == str(len(counts) + 1) and count.strip().isdigit()):
                raise self._error(f"{line[:40]!r}", f"ngram {len(counts) + 1}=COUNT")
            counts.append(int(count))
        if not 1 <= len(counts) <= HIGHEST_ORDER:
            raise self._error(f"{len(counts)} orders", f"1 to {HIGHEST_ORDER}")
        return counts

    def _read_section(
        self, order: int, n_expected: int, longest: int, ids: dict[str, int]
    ) -> _Section:
        title = self._skip_blank()
        if title.strip() != f"\\{order}-grams:":
            raise self._error(f"{title[:40]!r}", f"\\{order}-grams:")
        words = np.empty((n_expected, order), np.int64)
        log_probs = np.empty(n_expected, np.float32)
        backoffs = np.zeros(n_expected, np.float32)
        for row in range(n_expected):
            fields = self._next().split()
            if not order + 1 <= len(fields) <= order + 1 + (order < longest):
                raise self._error(f"{len(fields)} fields", f"a log_prob, {order} words, a back-off")
            try:
                log_probs[row] = float(fields[0])
                if len(fields) == order + 2:
                    backoffs[row] = float(fields[-1])
            except ValueError:
                raise self._error(f"{fields[0]!r} and {fields[-1]!r}", "numbers") from None
            if order == 1:
                if ids.setdefault(fields[1], row) != row:
                    raise self._error(f"{fields[1]!r} twice", "each n-gram once")
                words[row] = row
            else:
                try:
                    words[row] = [ids[word] for word in fields[1 : order + 1]]
                except KeyError as error:
                    raise self._error(f"the word {error}", "words of the 1-grams") from None
        if not (np.isfinite(log_probs).all() and np.isfinite(backoffs).all()):
            raise self._error(f"a NaN or infinity among the {order}-grams", "finite numbers")
        return _Section(words, np.minimum(log_probs, 0), backoffs)

    def _complete(self, unigrams: _Section, ids: dict[str, int]) -> _Section:
        """Add the unknown word and the sentence marks where the file lacks them."""
        missing = [w for w in (UNKNOWN, SENTENCE_START, SENTENCE_END) if w not in ids]
        for word in missing:
            ids[word] = len(ids)
        nothing = np.zeros(len(missing), np.float32)
        return _Section(
            np.arange(len(ids))[:, None],
            np.concatenate([unigrams.log_probs, nothing + np.float32(_UNKNOWN_LOG_PROB)]),
            np.concatenate([unigrams.backoffs, nothing]),
        )


def _close(sections: Sequence[_Section], *, n_words: int) -> list[_Order]:
    """Sort the n-grams and find their parents; add the shorter n-grams that pruning left out.

    An n-gram is found by its first words and passed on by its last words, so both must exist. What
    is added has the probability that backing off gives.
    """
    sections = list(sections)
    for order in range(len(sections), 2, -1):
        words = sections[order - 1].words
        needed = np.concatenate([words[:, :-1], words[:, 1:]])
        sections[order - 2] = _add_missing(sections[order - 2], needed)
    orders = [
        _Order(
            parents=np.zeros(n_words, np.int64),
            last_words=np.arange(n_words),
            log_probs=sections[0].log_probs,
            backoffs=sections[0].backoffs,
        )
    ]
    for section in sections[1:]:
        orders.append(_sort(section, orders, n_words=n_words))
    return orders


def _add_missing(section: _Section, needed: IntArray) -> _Section:
    order = section.words.shape[1]
    kind = np.dtype((np.void, order * 8))
    have = np.ascontiguousarray(section.words).view(kind).ravel()
    wanted = np.unique(np.ascontiguousarray(needed).view(kind).ravel())
    missing = wanted[~np.isin(wanted, have)]
    if len(missing) == 0:
        return section
    words = missing.view(np.int64).reshape(-1, order)
    nothing = np.zeros(len(missing), np.float32)
    return _Section(
        np.concatenate([section.words, words]),
        np.concatenate([section.log_probs, nothing + np.float32(np.nan)]),
        np.concatenate([section.backoffs, nothing]),
    )


def _sort(section: _Section, shorter: Sequence[_Order], *, n_words: int) -> _Order:
    places = section.words[:, 0]
    for depth, order in enumerate(shorter[1:], 1):
        places = np.searchsorted(_keys(order, n_words), places * n_words + section.words[:, depth])
    keys = places * n_words + section.words[:, -1]
    by_key = np.argsort(keys, kind="stable")
    sorted_keys = keys[by_key]
    if (sorted_keys[1:] == sorted_keys[:-1]).any():
        raise InputError(f"a {section.words.shape[1]}-gram is listed twice; expected each once")
    log_probs = section.log_probs[by_key].copy()
    for row in np.flatnonzero(np.isnan(log_probs)):
        log_probs[row] = _backed_off(section.words[by_key[row]], shorter, n_words)
    return _Order(places[by_key], section.words[by_key, -1], log_probs, section.backoffs[by_key])


def _keys(order: _Order, n_words: int) -> IntArray:
    return order.parents * n_words + order.last_words


def _backed_off(words: IntArray, shorter: Sequence[_Order], n_words: int) -> float:
    """Log probability of the last word by n-grams shorter than these words."""
    context = _find(words[:-1], shorter, n_words)
    suffix = _find(words[1:], shorter, n_words)
    backoff = 0.0 if context is None else shorter[len(words) - 2].backoffs[context]
    if suffix is not None:
        return float(backoff + shorter[len(words) - 2].log_probs[suffix])
    return float(backoff + _backed_off(words[1:], shorter, n_words))


def _find(words: IntArray, orders: Sequence[_Order], n_words: int) -> int | None:
    place = int(words[0])
    for depth in range(1, len(words)):
        keys = _keys(orders[depth], n_words)
        wanted = place * n_words + int(words[depth])
        place = int(np.searchsorted(keys, wanted))
        if place == len(keys) or keys[place] != wanted:
            return None
    return place


def _build(words: Sequence[str], orders: Sequence[_Order], *, quantise: bool) -> NgramModel:
    order_start = np.cumsum([0, *(len(order.last_words) for order in orders)])
    n_children = [
        np.bincount(longer.parents, minlength=len(order.last_words))
        for order, longer in pairwise(orders)
    ]
    n_children = n_children or [np.zeros(len(words), np.int64)]
    first_child = len(words) + np.concatenate([[0], np.cumsum(np.concatenate(n_children))])
    shift, block, offset = _pack_children(first_child[len(words) :])
    last_words = np.concatenate([order.last_words for order in orders])[len(words) :]
    values = _quantise(orders) if quantise else _keep(orders)
    tables = NgramTables(
        order=len(orders),
        n_words=len(words),
        order_start=order_start.astype(np.int64),
        last_word=np.ascontiguousarray(
            last_words.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :3]
        ).ravel(),
        **values,
        word_child=first_child[: len(words) + 1].astype(np.uint32),
        child_block=block,
        child_offset=offset,
        child_shift=shift,
    )
    text = "".join(word + "\n" for word in words).encode()
    return NgramModel(tables, np.frombuffer(bytearray(text), np.uint8))


def _pack_children(
    first_child: IntArray,
) -> tuple[int, npt.NDArray[np.uint32], npt.NDArray[np.uint16]]:
    """Two bytes a node: the distance from the first node of its block."""
    for shift in range(_LARGEST_SHIFT, -1, -1):
        block = first_child[:: 1 << shift]
        offset = first_child - np.repeat(block, 1 << shift)[: len(first_child)]
        if offset.max(initial=0) <= _LARGEST_OFFSET:
            break
    return shift, block.astype(np.uint32), offset.astype(np.uint16)


def _keep(orders: Sequence[_Order]) -> dict[str, Any]:
    return {
        "log_probs": np.concatenate([order.log_probs for order in orders]),
        "backoffs": np.concatenate([order.backoffs for order in orders[:-1]] or [_EMPTY]),
        "log_prob_codes": np.zeros(0, np.uint8),
        "backoff_codes": np.zeros(0, np.uint8),
        "log_prob_table": np.zeros((0, _N_CODES), np.float32),
        "backoff_table": np.zeros((0, _N_CODES), np.float32),
    }


def _quantise(orders: Sequence[_Order]) -> dict[str, Any]:
    log_probs = [_cluster(order.log_probs) for order in orders]
    backoffs = [_cluster(order.backoffs) for order in orders[:-1]]
    no_table, no_codes = np.zeros((0, _N_CODES), np.float32), np.zeros(0, np.uint8)
    return {
        "log_probs": np.zeros(0, np.float32),
        "backoffs": np.zeros(0, np.float32),
        "log_prob_codes": np.concatenate([codes for codes, _ in log_probs]),
        "backoff_codes": np.concatenate([no_codes, *(codes for codes, _ in backoffs)]),
        "log_prob_table": np.stack([table for _, table in log_probs]),
        "backoff_table": np.concatenate([no_table, *(table[None] for _, table in backoffs)]),
    }


def _cluster(values: FloatArray) -> tuple[npt.NDArray[np.uint8], FloatArray]:
    """Codes, uint8, (n,), and what they stand for, float32, (256,): zero, and 255 equal shares."""
    table = np.zeros(_N_CODES, np.float32)
    others = np.sort(values[values != 0])
    if len(others) > 0:
        shares = np.array_split(others, min(_N_CODES - 1, len(others)))
        means = [share.mean(dtype=np.float64) for share in shares]
        table[: len(means)] = means
    table = np.sort(table)
    edges = (table[1:] + table[:-1]) / 2
    return np.searchsorted(edges, values).astype(np.uint8), table


_EMPTY: Final = np.zeros(0, np.float32)
