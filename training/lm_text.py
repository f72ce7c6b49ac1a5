"""Text for a recurrent language model: sentences as pieces, and batches of them.

A sentence is its words' pieces and the boundary. Every passage that is trained on begins with the
boundary in the start state, as an utterance does when it is scored. A passage is one sentence, or
neighbours in a book, whose state is then carried from one to the next.
"""

from __future__ import annotations

import gzip
import io
import lzma
import random
import re
import zlib
from array import array
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import IO, Final, Literal

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from service.decoding.ngram import SENTENCE_END, UNKNOWN
from service.errors import InputError
from service.manifest import read_transcripts
from service.rescorer import BOUNDARY_ID, Pieces
from service.text import normalise
from training.tokens import learn_pieces

IntArray = npt.NDArray[np.int64]
PieceKind = Literal["subword", "word"]

# what `normalise` would leave as it is, told faster
_NORMALISED: Final = re.compile(r"[a-z]+(?:'[a-z]+)*(?: [a-z]+(?:'[a-z]+)*)*")
_POOLED_BATCHES: Final = 100
_LENGTH_STEP: Final = 4  # lengths are rounded up to it, so that few shapes occur


@dataclass(frozen=True)
class TextPart:
    """Some lines of a text file."""

    path: Path
    """Plain, gzip or xz, one sentence a line; or a manifest (`.jsonl`), whose different transcripts
    are the lines."""
    first_line: int = 1
    """Counted from 1."""
    last_line: int | None = None
    """The last line that is read; None reads to the end."""


@dataclass(frozen=True)
class EncodedText:
    """Sentences one behind another."""

    tokens: npt.NDArray[np.int32]
    """Pieces; every sentence ends with the boundary, int32, (token,)."""
    starts: IntArray
    """First token of each sentence and the end of the last, int64, (sentence + 1,)."""
    counted: npt.NDArray[np.bool_]
    """Whether a token counts in the perplexity: not in a word outside the list, bool, (token,)."""
    n_counted: int
    """Words of the list and sentence ends: what the perplexity is a share of."""


def read_sentences(parts: Sequence[TextPart]) -> Iterator[str]:
    """Normalised sentences, empty ones left out.

    Raises:
        InputError: a file cannot be read.
    """
    for part in parts:
        try:
            with open_text(part.path) as lines:
                for line in islice(lines, part.first_line - 1, part.last_line):
                    sentence = line.rstrip("\n")
                    if not _NORMALISED.fullmatch(sentence):
                        sentence = normalise(line)
                    if sentence:
                        yield sentence
        except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error) as error:
            raise InputError(f"cannot read the text {part.path}: {error}") from error


def count_words(parts: Sequence[TextPart]) -> Counter[str]:
    """How often each word occurs."""
    counts: Counter[str] = Counter()
    for sentence in tqdm(read_sentences(parts), "counting words", unit=" lines", mininterval=5.0):
        counts.update(sentence.split())
    return counts


def make_pieces(counts: Counter[str], *, kind: PieceKind, n_pieces: int) -> Pieces:
    """Choose the pieces: a unigram model of subwords (Kudo 2018), or the frequent words.

    Args:
        counts: words of the text.
        kind: pieces of words, or words.
        n_pieces: pieces wanted; fewer where the text has too few.

    Raises:
        InputError: there are too few words, or too few pieces for their letters.
    """
    if kind == "word":
        ranked = sorted((-n, word) for word, n in counts.items())
        return Pieces((SENTENCE_END, UNKNOWN, *(word for _, word in ranked[: n_pieces - 2])))
    rows = (f"{word}\t{n}" for word, n in sorted(counts.items()))
    try:
        trained = learn_pieces(
            rows, kind="unigram", n_pieces=n_pieces - 2, are_counts=True, may_be_fewer=True
        )
    except RuntimeError as error:
        raise InputError(
            f"{len(counts)} different words cannot be cut into {n_pieces} pieces; set "
            f"data.n_pieces to another number, or train on more text: {error}"
        ) from error
    ids = range(1, trained.get_piece_size())
    scores = [round(float(trained.get_score(i)), 5) for i in ids]
    return Pieces(
        names=(SENTENCE_END, UNKNOWN, *(trained.id_to_piece(i) for i in ids)),
        scores=(min(scores), min(scores), *scores),
    )


def encode_text(
    parts: Sequence[TextPart], pieces: Pieces, words: Container[str] | None = None
) -> EncodedText:
    """Read and encode text.

    Args:
        parts: files and lines.
        pieces: what words are cut into.
        words: the word list of the perplexity; None counts every word.

    Raises:
        InputError: a file cannot be read, or there are no words.
    """
    encode = cache(pieces.encode)
    tokens, left_out, starts, n_counted = array("i"), [], [0], 0
    for sentence in tqdm(read_sentences(parts), "reading text", unit=" lines", mininterval=5.0):
        for word in sentence.split():
            begin = len(tokens)
            tokens.extend(encode(word))
            if words is None or word in words:
                n_counted += 1
            else:
                left_out.append((begin, len(tokens)))
        tokens.append(BOUNDARY_ID)
        n_counted += 1
        starts.append(len(tokens))
    if len(starts) == 1:
        raise InputError(f"no words in {[str(p.path) for p in parts]}; expected a sentence a line")
    counted = np.ones(len(tokens), np.bool_)
    for begin, end in left_out:
        counted[begin:end] = False
    return EncodedText(
        tokens=np.array(tokens, dtype=np.int32),
        starts=np.array(starts, dtype=np.int64),
        counted=counted,
        n_counted=n_counted,
    )


def make_passages(text: EncodedText, *, alone_share: float, longest: int, seed: str) -> IntArray:
    """Cut a text into passages.

    Args:
        text: sentences in the order of their book.
        alone_share: the share of sentences that begin a passage; each of the others follows the
            sentence before it, whose state it gets, where both fit.
        longest: tokens of a passage at most; what is left of a longer sentence is a passage too.
        seed: of the draw.

    Returns:
        First token and end of each passage, int64, (passage, 2).
    """
    draw = random.Random(seed)
    passages: list[tuple[int, int]] = []
    begin = end = 0
    for sentence_end in text.starts[1:].tolist():
        joins = alone_share < 1 and draw.random() >= alone_share
        if not joins or sentence_end - begin > longest:
            passages += _cut(begin, end, longest)
            begin = end
        end = sentence_end
    passages += _cut(begin, end, longest)
    return np.array(passages, dtype=np.int64)


def make_batches(passages: IntArray, *, n_tokens: int, seed: str) -> list[IntArray]:
    """Batches of passages of similar length, in random order; a pass uses each passage once.

    Args:
        passages: first token and end of each, int64, (passage, 2).
        n_tokens: of a batch, padding included.
        seed: of the order.

    Returns:
        The passages of each batch, int64, (row, 2).
    """
    draw = np.random.default_rng(list(seed.encode()))
    shuffled = passages[draw.permutation(len(passages))]
    lengths = np.cumsum(shuffled[:, 1] - shuffled[:, 0])
    n_pools = max(1, int(lengths[-1]) // (n_tokens * _POOLED_BATCHES))
    batches: list[IntArray] = []
    for pool in np.array_split(shuffled, n_pools):
        batches += _split_pool(pool, n_tokens)
    return [batches[i] for i in draw.permutation(len(batches))]


def pad_batch(
    text: EncodedText, passages: IntArray
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The tokens that are read and those that are to be predicted.

    Returns:
        Both int64, (row, time): the boundary and all tokens but the last; all tokens, −1 behind
        the end.
    """
    lengths = passages[:, 1] - passages[:, 0]
    n_steps = _round_up(int(lengths.max()))
    wanted = np.full((len(passages), n_steps), -1, np.int64)
    for row, (begin, end) in enumerate(passages.tolist()):
        wanted[row, : end - begin] = text.tokens[begin:end]
    read = np.full_like(wanted, BOUNDARY_ID)
    read[:, 1:] = np.maximum(wanted[:, :-1], BOUNDARY_ID)
    return read, wanted


def _split_pool(pool: IntArray, n_tokens: int) -> list[IntArray]:
    """Batches of a pool: the longest passage of each decides how many rows it has."""
    lengths = pool[:, 1] - pool[:, 0]
    pool = pool[np.argsort(-lengths, kind="stable")]
    batches = []
    while len(pool):
        n_rows = max(1, n_tokens // _round_up(int(pool[0, 1] - pool[0, 0])))
        batches.append(pool[:n_rows])
        pool = pool[n_rows:]
    return batches


def _cut(begin: int, end: int, longest: int) -> list[tuple[int, int]]:
    return [(at, min(end, at + longest)) for at in range(begin, end, longest)]


def _round_up(length: int) -> int:
    return -(-length // _LENGTH_STEP) * _LENGTH_STEP


def open_text(path: Path) -> IO[str]:
    """The lines of a text: plain, .gz, .xz, or the different transcripts of a .jsonl manifest."""
    if path.suffix == ".jsonl":
        return io.StringIO("\n".join(read_transcripts(path)))
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8")
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")
