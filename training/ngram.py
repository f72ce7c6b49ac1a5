"""Word n-gram language models: text in, a compiled model, a KenLM binary and a word list out."""

from __future__ import annotations

import gzip
import lzma
import math
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat, takewhile
from pathlib import Path
from typing import Final

from tqdm import tqdm

from service.decoding.ngram import SENTENCE_START, UNKNOWN
from service.errors import InputError, MissingExtraError, TrainingError
from service.manifest import read_transcripts
from service.text import normalise
from training.arpa import compile_arpa
from training.lexicon import load_dictionary
from training.lm_text import open_text

NGRAM_NAME: Final = "lm.ngram"
BINARY_NAME: Final = "lm.binary"
WORDS_NAME: Final = "words.txt"
HIGHEST_ORDER: Final = 6
_NO_WORDS: Final = frozenset({SENTENCE_START, UNKNOWN})


@dataclass(frozen=True)
class NgramReport:
    """What was built."""

    n_lines: int
    """Sentences read."""
    n_words: int
    """Running words."""
    n_types: int
    """Words in the word list."""
    coverage: float
    """Share of the running words that the word list covers."""
    n_bytes: int
    """Size of `lm.ngram`."""

    def __str__(self) -> str:
        return (
            f"{self.n_lines:,} sentences, {self.n_words:,} words; word list of {self.n_types:,} "
            f"covers {self.coverage:.2%}; {NGRAM_NAME} of {self.n_bytes / 1e6:.1f} MB"
        )


def build_ngram(
    texts: Sequence[Path],
    output: Path,
    *,
    order: int,
    transcripts: Sequence[Path] = (),
    transcripts_count: int = 10,
    prune: Sequence[int] = (0,),
    n_words: int | None = None,
    min_count: int = 1,
    more_words: Collection[str] = (),
    quantise_bits: int | None = None,
    keep_arpa: bool = False,
) -> NgramReport:
    """Estimate a modified Kneser-Ney model; write it for our decoder, for KenLM, and its words.

    Args:
        texts: plain, gzip or xz files, one sentence a line; normalised as the tokens are.
        output: folder that gets `lm.ngram` (memory-mapped by the beam search), `lm.binary` (KenLM,
            for the reference decoder) and `words.txt`; made if it does not exist.
        order: longest n-gram, 2 to 6.
        transcripts: manifests whose different transcripts are read as well: what is said in the
            training speech is nearer to what will be said than most text.
        transcripts_count: how often each of them counts.
        prune: for each order from 1, n-grams that occur this often or less are dropped; the last
            value holds for all higher orders.
        n_words: the most words in the word list, the frequent ones first; None takes all.
        min_count: a word that occurs less often is left out of the word list.
        more_words: normalised words that belong into the list whether the text has them or not;
            those that it lacks get the probability of its rarest word.
        quantise_bits: bits of a stored probability and back-off in KenLM's file; our own takes
            8 where this is given. None keeps float32 in both.
        keep_arpa: also write `lm.arpa.gz`.

    Raises:
        MissingExtraError: lmplz or build_binary is not installed.
        InputError: a text cannot be read or holds no word.
        TrainingError: the tools failed; the message ends with what they printed.
    """
    if not 2 <= order <= HIGHEST_ORDER:
        raise InputError(f"order is {order}, expected 2 to {HIGHEST_ORDER}")
    if n_words is not None and n_words < 1:
        raise InputError(f"the word list would have {n_words} words, expected at least 1")
    lmplz, build_binary = _find_tool("lmplz"), _find_tool("build_binary")
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output) as folder:
        corpus = Path(folder) / "corpus.txt"
        known = [line for manifest in transcripts for line in read_transcripts(manifest)]
        said = chain.from_iterable(repeat(known, transcripts_count))
        counts, n_lines = _write_corpus(chain(_read_lines(texts), said), corpus)
        if not counts:
            read = [str(path) for path in (*texts, *transcripts)]
            raise InputError(f"no words in {read}; expected a sentence a line")
        words = _choose_words(counts, n_words=n_words, min_count=max(min_count, prune[0] + 1))
        (Path(folder) / WORDS_NAME).write_text("\n".join(words) + "\n", encoding="utf-8")
        arpa = Path(folder) / "lm.arpa"
        # words are pruned by the list: lmplz would count the contexts of a word, not the word
        pruning = ["0", *(str(n) for n in (*prune[1:], *[prune[-1]] * order)[: order - 1])]
        estimate = [lmplz, "-o", str(order), "--prune", *pruning, "-S", "2G", "-T", folder]
        estimate += ["--limit_vocab_file", f"{folder}/{WORDS_NAME}", "--discount_fallback"]
        _run([*estimate, "--text", str(corpus), "--arpa", str(arpa)])
        unseen = sorted(set(more_words) - set(words))
        if unseen:
            _add_words(arpa, unseen)
            words = sorted([*words, *unseen])
            (Path(folder) / WORDS_NAME).write_text("\n".join(words) + "\n", encoding="utf-8")
        binary = Path(folder) / BINARY_NAME
        quantise = ["-q", str(quantise_bits), "-b", str(quantise_bits)] if quantise_bits else []
        _run([build_binary, *quantise, "-a", "255", "trie", str(arpa), str(binary)])
        compile_arpa(arpa, quantise=quantise_bits is not None).save(Path(folder) / NGRAM_NAME)
        if keep_arpa:
            with arpa.open("rb") as source, gzip.open(output / "lm.arpa.gz", "wb") as target:
                shutil.copyfileobj(source, target)
        for name in (NGRAM_NAME, BINARY_NAME, WORDS_NAME):
            (Path(folder) / name).replace(output / name)
    total = sum(counts.values())
    return NgramReport(
        n_lines=n_lines,
        n_words=total,
        n_types=len(words),
        coverage=sum(counts[word] for word in words) / total,
        n_bytes=(output / NGRAM_NAME).stat().st_size,
    )


def read_words(path: Path | None, *, dictionary: bool) -> set[str]:
    """Words that are to be added to a word list.

    Args:
        path: of a text with them; None adds none.
        dictionary: whether to add those of the pronouncing dictionary.

    Returns:
        The words, normalised; what is not written in letters alone is left out.

    Raises:
        InputError: the text cannot be read.
        MissingExtraError: the dictionary is not installed.
    """
    words = set[str]()
    if path is not None:
        for line in _read_lines([path]):
            words.update(normalise(line).split())
    if dictionary:
        words.update(word for word in load_dictionary() if normalise(word) == word)
    return words


def _write_corpus(lines: Iterable[str], corpus: Path) -> tuple[Counter[str], int]:
    """Write the normalised sentences to one file and count their words."""
    counts: Counter[str] = Counter()
    n_lines = 0
    with corpus.open("w", encoding="utf-8") as target:
        for line in tqdm(lines, "reading text", unit=" lines", mininterval=1.0):
            sentence = normalise(line)
            if sentence:
                target.write(sentence + "\n")
                counts.update(sentence.split())
                n_lines += 1
    return counts, n_lines


def _read_lines(texts: Sequence[Path]) -> Iterator[str]:
    for path in texts:
        try:
            with open_text(path) as lines:
                yield from lines
        except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error) as error:
            raise InputError(f"cannot read the text {path}: {error}") from error


def _choose_words(counts: Counter[str], *, n_words: int | None, min_count: int) -> list[str]:
    """The frequent words, in alphabetical order; equal counts are chosen alphabetically."""
    ranked = sorted((-n, word) for word, n in counts.items() if n >= min_count)
    if not ranked:
        raise InputError(f"no word occurs {min_count} times; lower the minimum count")
    return sorted(word for _, word in ranked[:n_words])


def _add_words(arpa: Path, words: Sequence[str]) -> None:
    """Give words that the text lacks the probability of its rarest one; the others make room."""
    changed = arpa.with_suffix(".more")
    with arpa.open(encoding="utf-8") as source, changed.open("w", encoding="utf-8") as target:
        for line in source:
            name, _, n = line.partition("=")
            target.write(f"{name}={int(n) + len(words)}\n" if name == "ngram 1" else line)
            if line.startswith("\\1-grams"):
                break
        unigrams = [line.rstrip("\n").split("\t") for line in takewhile(str.strip, source)]
        log_probs = [float(row[0]) for row in unigrams if row[1] not in _NO_WORDS]
        rarest = min(log_probs)
        room = math.log10(1 + len(words) * 10**rarest)
        for log_prob, *rest in unigrams:
            target.write("\t".join([f"{float(log_prob) - room:.6g}", *rest]) + "\n")
        target.writelines(f"{rarest - room:.6g}\t{word}\t0\n" for word in words)
        target.write("\n")
        target.writelines(source)
    changed.replace(arpa)


def _find_tool(name: str) -> str:
    beside_python = shutil.which(name, path=str(Path(sys.prefix) / "bin"))
    found = beside_python or shutil.which(name)
    if found is None:
        raise MissingExtraError(
            f"{name} is not installed; build it from the checkout with: "
            f"training/install_lmplz.sh {sys.executable}"
        )
    return found


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise TrainingError(f"{command[0]} failed: {result.stderr.strip()[-2000:]}")
