"""A domain file → a domain folder: sentences, their n-gram, the model that parses them."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch

from export.understanding import export_understanding
from service.bundle import CONFIG_NAME, Bundle, hash_file, load_bundle, write_lexicon
from service.decoding.ngram import SENTENCE_END, SENTENCE_START, UNKNOWN, load_ngram
from service.domain import (
    DOMAIN_LEXICON,
    DOMAIN_LM,
    DOMAINS_FOLDER,
    FORMAT_VERSION,
    UNDERSTANDING_GRAPH,
    DomainConfig,
    load_domain,
)
from service.errors import ExportError
from service.g2p import Pronouncer
from training.arpa import compile_arpa
from training.domain_lm import write_domain_arpa
from training.grammar import OUTSIDE, Grammar, load_grammar
from training.slot_data import LabelledSentence
from training.understanding import UnderstandingOptimiser, fit

NO_INTENT: Final = ""
"""Intent of what does not belong to the domain."""
_GENERAL_WORDS: Final = 5_000
_TRAINED_ON: Final = 3_000
_DEV_SHARE: Final = 0.05
_STRANGE_SHARE: Final = 0.4
_LONGEST_STRANGE: Final = 14

_OPTIMISER: Final = UnderstandingOptimiser(n_epochs=4, batch_size=32, average_decay=0.99)
"""Templates are learned in a few passes."""

OnStep = Callable[[str], object]


@dataclass(frozen=True)
class DomainReport:
    """What was built."""

    folder: Path
    """Where it is."""
    n_sentences: int
    """Distinct sentences of the domain."""
    n_words: int
    """Words of the domain."""
    n_bytes: int
    """Of the folder."""

    def __str__(self) -> str:
        return (
            f"{self.n_sentences:,} sentences of {self.n_words:,} words; {self.n_bytes / 1e6:.1f} MB"
        )


def build_domain(
    source: Path, folder: Path | None, bundle_folder: Path, *, on_step: OnStep = lambda _: None
) -> DomainReport:
    """Build a domain; nothing is written unless everything is.

    Args:
        source: the domain file.
        folder: the folder to write; an older domain is replaced. None: among the bundle's own.
        bundle_folder: whose words and pronunciations are used.
        on_step: told what is being done.

    Raises:
        TrainingError: the file cannot be read or used.
        BundleError: the bundle cannot be used.
        ExportError: a word cannot be pronounced, or the folder holds something else.
    """
    grammar = load_grammar(source)
    bundle = load_bundle(bundle_folder)
    folder = folder or bundle_folder / DOMAINS_FOLDER / grammar.spec.name
    _refuse_foreign(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        work = Path(temporary) / folder.name
        work.mkdir()
        on_step("drawing sentences")
        sentences = [*grammar.sample(grammar.spec.n_samples), *grammar.annotated]
        general = _general_words(bundle)
        on_step("language model")
        words = _write_lm(sentences, general, work, general_weight=grammar.spec.general_weight)
        if bundle.has_lexicon:
            write_lexicon(_pronounce(words, bundle), work / DOMAIN_LEXICON)
        on_step("slot filling")
        checkpoint = _fit(sentences, tuple(general), Path(temporary) / "run")
        export_understanding(checkpoint, work / UNDERSTANDING_GRAPH)
        _write_config(grammar, work)
        load_domain(work)
        if folder.exists():
            shutil.rmtree(folder)
        work.replace(folder)
    own = {word for sentence in sentences for word in sentence.words}
    n_bytes = sum(path.stat().st_size for path in folder.iterdir())
    return DomainReport(folder, len({sentence.words for sentence in sentences}), len(own), n_bytes)


def _refuse_foreign(folder: Path) -> None:
    """Only what was a domain is replaced."""
    if folder.exists() and any(folder.iterdir()) and not (folder / CONFIG_NAME).is_file():
        raise ExportError(f"{folder} exists and is no domain; name another folder, or empty it")


def _general_words(bundle: Bundle) -> dict[str, float]:
    """The frequent words of the bundle and their probabilities; none without a language model."""
    if bundle.ngram is None:
        return {}
    lm = load_ngram(bundle.ngram)
    log_probs = lm.unigram_log_probs().astype(np.float64)
    best = np.argsort(-log_probs, kind="stable")[: _GENERAL_WORDS + 3]
    marks = (SENTENCE_START, SENTENCE_END, UNKNOWN)
    return {lm.words[i]: 10.0 ** log_probs[i] for i in best if lm.words[i] not in marks}


def _write_lm(
    sentences: Sequence[LabelledSentence],
    general: Mapping[str, float],
    work: Path,
    *,
    general_weight: float,
) -> tuple[str, ...]:
    """Write the language model; its words."""
    arpa = work / "lm.arpa"
    write_domain_arpa(
        [sentence.words for sentence in sentences], general, arpa, general_weight=general_weight
    )
    lm = compile_arpa(arpa)
    lm.save(work / DOMAIN_LM)
    arpa.unlink()
    return tuple(w for w in lm.words if w not in (SENTENCE_START, SENTENCE_END, UNKNOWN))


def _pronounce(words: Sequence[str], bundle: Bundle) -> dict[str, tuple[tuple[str, ...], ...]]:
    """Pronunciations of the words: the bundle's, and for others those that its model gives.

    Raises:
        ExportError: a word has none.
    """
    known = bundle.read_lexicon()
    unknown = [word for word in words if word not in known]
    guessed: list[tuple[str, ...]] = [() for _ in unknown]
    if unknown and bundle.g2p_graph is not None:
        guessed = Pronouncer(bundle.g2p_graph).pronounce(unknown)
    silent = [word for word, phones in zip(unknown, guessed, strict=True) if not phones]
    if silent:
        raise ExportError(
            f"no pronunciation of {', '.join(silent)} is known; add them to the bundle's lexicon, "
            "or use a bundle with a letters-to-phones model"
        )
    found = {word: (phones,) for word, phones in zip(unknown, guessed, strict=True)}
    return {word: known.get(word) or found[word] for word in words}


def _fit(sentences: Sequence[LabelledSentence], general: Sequence[str], directory: Path) -> Path:
    """Train the slot filling; the checkpoint."""
    draw = random.Random(1)
    distinct = sorted(set(sentences), key=lambda sentence: sentence.words)
    draw.shuffle(distinct)
    repeats = -(-_TRAINED_ON // len(distinct))  # few sentences are seen more often
    chosen = (distinct * repeats)[:_TRAINED_ON]
    chosen += list(_strangers(chosen, general, int(_STRANGE_SHARE * len(chosen)), draw))
    draw.shuffle(chosen)
    n_dev = max(1, int(_DEV_SHARE * len(chosen)))
    torch.set_num_threads(1)  # batches are so small that threads only wait for each other
    return fit(chosen[n_dev:], chosen[:n_dev], directory=directory, optimiser=_OPTIMISER)


def _strangers(
    sentences: Sequence[LabelledSentence], general: Sequence[str], n: int, draw: random.Random
) -> Iterator[LabelledSentence]:
    """Sentences that mean nothing: other words, alone or in the place of most of a sentence's."""
    if not general:
        return
    for i in range(n):
        if i % 2:
            words = tuple(draw.choices(general, k=draw.randint(1, _LONGEST_STRANGE)))
        else:
            words = tuple(
                word if draw.random() < 1 / 3 else draw.choice(general)
                for word in draw.choice(sentences).words
            )
        yield LabelledSentence(words, (OUTSIDE,) * len(words), NO_INTENT)


def _write_config(grammar: Grammar, work: Path) -> None:
    config = DomainConfig(
        format_version=FORMAT_VERSION,
        name=grammar.spec.name,
        values={
            name: {" ".join(way.words): way.value for way in ways}
            for name, ways in grammar.values.items()
        },
        files={path.name: hash_file(path) for path in sorted(work.iterdir())},
    )
    (work / CONFIG_NAME).write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
