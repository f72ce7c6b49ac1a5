"""Our beam search beside pyctcdecode and flashlight-text: same emissions, words, language model.

python benchmarks/decoders.py DEV.jsonl [--bundle DIR] [--corpus NAME] [--utterances N]

One thread, one process, one run. The decoders take turns on each utterance, so that a noisy machine
is noisy for all. flashlight-text searches the same lexicon; its weights are fitted for it at beam
50 on a fifth of the utterances, and its beam is the smallest within 0.1 WER of its best there. Ours
and pyctcdecode take their weights from the bundle, where `voxgate tune` put them; ours runs with a
smaller beam, too.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Final

import numpy as np
from flashlight.lib.text.decoder import (
    CriterionType,
    KenLM,
    LexiconDecoder,
    LexiconDecoderOptions,
    SmearingMode,
)
from flashlight.lib.text.decoder import Trie as FlashlightTrie
from flashlight.lib.text.dictionary import Dictionary
from tqdm import tqdm

from service.bundle import Bundle, SearchTokens, find_bundle, load_bundle
from service.decoding.beam import BeamDecoder
from service.decoding.hypothesis import FloatArray, Phrase
from service.decoding.ngram import NgramModel, load_ngram
from service.recogniser import make_beam_decoder, make_decoders
from service.scoring import ErrorCounts, count_errors
from service.text import BLANK, SPACE
from service.tuning import Item, read_items
from training.precision import processor_name

SMALL_BEAMS: Final = (10, 30)
BEAMS: Final = (50, 100, 250, 500, 1500)
CLOSE: Final = 0.001
WEIGHTS: Final = tuple(product((0.6, 0.8, 1.0), (-0.5, 0.5, 1.5)))
LN_10: Final = float(np.log(10))
HEADS: Final[tuple[SearchTokens, ...]] = ("characters", "phones")
Read = Callable[[FloatArray], str]


@dataclass
class Row:
    """One decoder's figures."""

    head: SearchTokens
    read: Read
    errors: ErrorCounts = field(default_factory=ErrorCounts)
    seconds: float = 0.0

    def run(self, item: Item) -> None:
        """Search one utterance and count."""
        start = time.perf_counter()
        text = self.read(item.emissions[self.head])
        self.seconds += time.perf_counter() - start
        self.errors += count_errors([item.reference], [text])


class Flashlight:
    """The lexicon decoder of flashlight-text over one head."""

    def __init__(self, bundle: Bundle, head: SearchTokens) -> None:
        tokens = bundle.config.phones if head == "phones" else bundle.config.tokens
        ids = {token: i for i, token in enumerate(tokens)}
        lexicon = spell_words(bundle, head)
        self._words = Dictionary()
        for word in (*lexicon, "<unk>"):
            self._words.add_entry(word)
        with tempfile.TemporaryDirectory() as temporary:
            arpa = Path(temporary) / "lm.arpa"
            open_lm(bundle).save_arpa(arpa)
            self._lm = KenLM(str(arpa), self._words)
        self._separator = ids.get(SPACE, BLANK) if head == "characters" else BLANK
        self._has_separator = head == "characters"
        self._n_tokens = len(tokens)
        self._trie = FlashlightTrie(len(tokens), self._separator)
        start = self._lm.start(False)
        for word, spellings in lexicon.items():
            index = self._words.get_index(word)
            _, score = self._lm.score(start, index)
            for spelling in spellings:
                self._trie.insert([ids[token] for token in spelling], index, score)
        self._trie.smear(SmearingMode.MAX)

    def reader(self, *, beam: int, alpha: float, beta: float) -> Read:
        """What searches an emission with these settings."""
        options = LexiconDecoderOptions(
            beam_size=beam,
            beam_size_token=self._n_tokens,
            beam_threshold=50.0,
            lm_weight=alpha * LN_10,
            word_score=beta,
            unk_score=-np.inf,
            sil_score=0.0,
            log_add=False,
            criterion_type=CriterionType.CTC,
        )
        unknown = self._words.get_index("<unk>")
        decoder = LexiconDecoder(
            options, self._trie, self._lm, self._separator, BLANK, unknown, [], False
        )

        def read(emission: FloatArray) -> str:
            if self._has_separator:  # a word ends with it: so must the last one
                last = np.full((1, emission.shape[1]), -50.0, np.float32)
                last[0, self._separator] = 0.0
                emission = np.concatenate([emission, last])
            emission = np.ascontiguousarray(emission)
            found = decoder.decode(emission.ctypes.data, *emission.shape)
            words = [self._words.get_entry(i) for i in found[0].words if i >= 0] if found else []
            return " ".join(words)

        return read


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--corpus", default="librispeech-dev-clean")
    parser.add_argument("--utterances", type=int, help="take this many, evenly spread")
    parser.add_argument("--beams", default=",".join(map(str, BEAMS)))
    arguments = parser.parse_args()
    folder = find_bundle(arguments.bundle)
    bundle = load_bundle(folder)
    items = [i for i in read_items(folder, arguments.manifest) if i.corpus == arguments.corpus]
    if arguments.utterances:
        items = items[:: max(1, len(items) // arguments.utterances)]
    audio_s = sum(len(item.emissions["characters"]) for item in items) * bundle.config.frame_s
    print(f"{processor_name()}; {arguments.corpus}: {len(items)} utterances, {audio_s:.0f} s")
    beams = [int(beam) for beam in arguments.beams.split(",")]
    rows = make_rows(bundle, items, beams)
    for item in tqdm(items, "decoders in turn"):
        for row in rows.values():
            row.run(item)
    print_table(rows, audio_s)
    measure_lm_load(bundle)
    measure_threads(bundle, items)
    measure_phrases(bundle, items)


def _read_best(decoder: BeamDecoder, emission: FloatArray) -> str:
    return decoder.decode(emission)[0].text


def spell_words(bundle: Bundle, head: SearchTokens) -> dict[str, tuple[tuple[str, ...], ...]]:
    """The words of the language model as flashlight-text wants them: letters end with a space."""
    if head == "phones":
        return bundle.read_lexicon()
    return {word: ((*word, SPACE),) for word in open_lm(bundle).vocabulary}


def open_lm(bundle: Bundle) -> NgramModel:
    """The bundle's language model."""
    assert bundle.ngram is not None
    return load_ngram(bundle.ngram)


def make_rows(bundle: Bundle, items: Sequence[Item], beams: Sequence[int]) -> dict[str, Row]:
    """The decoders to compare, flashlight-text with its fitted weights and smallest good beam."""
    ours = make_decoders(bundle, ("beam-characters", "beam-phones", "reference"))
    rows = {
        "ours, characters": Row("characters", lambda e: ours["beam-characters"].decode(e)[0].text),
        "ours, phones": Row("phones", lambda e: ours["beam-phones"].decode(e)[0].text),
        "pyctcdecode, characters": Row("characters", lambda e: ours["reference"].decode(e)[0].text),
    }
    lm = open_lm(bundle)
    for head, beam in product(HEADS, SMALL_BEAMS):
        settings = bundle.config.decoding.of(head).model_copy(update={"beam_width": beam})
        small = make_beam_decoder(bundle, lm, head, settings)
        rows[f"ours, {head}, beam {beam}"] = Row(head, functools.partial(_read_best, small))
    for row in rows.values():
        row.read(items[0].emissions[row.head])  # nothing is measured the first time
    for head in HEADS:
        flashlight = Flashlight(bundle, head)
        fitting = items[::5]
        found = {}
        for alpha, beta in tqdm(WEIGHTS, f"fitting flashlight-text, {head}"):
            row = Row(head, flashlight.reader(beam=50, alpha=alpha, beta=beta))
            for item in fitting:
                row.run(item)
            found[alpha, beta] = row.errors.wer
        alpha, beta = min(found, key=found.__getitem__)
        rates: dict[int, float] = {}
        for beam in tqdm(beams, f"beams of flashlight-text, {head}"):
            row = Row(head, flashlight.reader(beam=beam, alpha=alpha, beta=beta))
            for item in fitting:
                row.run(item)
            rates[beam] = row.errors.wer
        chosen = min(beam for beam in rates if rates[beam] <= min(rates.values()) + CLOSE)
        print(
            f"flashlight-text, {head}: alpha {alpha:g}, beta {beta:g}; WER by beam on a fifth: "
            + ", ".join(f"{beam}: {rate:.2%}" for beam, rate in rates.items())
        )
        name = f"flashlight-text, {head}, beam {chosen}"
        rows[name] = Row(head, flashlight.reader(beam=chosen, alpha=alpha, beta=beta))
    return rows


def print_table(rows: Mapping[str, Row], audio_s: float) -> None:
    """Error rates, real-time factors, and how much faster ours are."""
    print(f"{'decoder':38} {'WER':>8} {'RTF':>9}  ours, same head, is faster by")
    for name, row in rows.items():
        ours = rows[f"ours, {row.head}"]
        print(
            f"{name:38} {row.errors.wer:8.2%} {row.seconds / audio_s:9.5f}  "
            f"{row.seconds / ours.seconds:.1f}"
        )
    characters, phones = rows["ours, characters"], rows["ours, phones"]
    print(
        f"phones against characters: WER {phones.errors.wer / characters.errors.wer - 1:+.1%} "
        f"relative, {phones.seconds / characters.seconds:.2f} times the time"
    )


def measure_lm_load(bundle: Bundle) -> None:
    """How long the language model takes to open, the best of five."""
    assert bundle.ngram is not None
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        load_ngram(bundle.ngram)
        seconds.append(time.perf_counter() - start)
    n_bytes = bundle.ngram.stat().st_size
    print(f"opening the language model ({n_bytes / 1e6:.0f} MB): {1000 * min(seconds):.1f} ms")


def measure_threads(bundle: Bundle, items: Sequence[Item]) -> None:
    """Batch decoding over two threads against one, the median of five rounds in turn."""
    decoder = make_decoders(bundle, ("beam-phones",))["beam-phones"]
    emissions = [item.emissions["phones"] for item in items]
    ratios = []
    for _ in range(5):
        seconds = []
        for n_threads in (1, 2):
            with ThreadPoolExecutor(n_threads) as pool:
                start = time.perf_counter()
                list(pool.map(decoder.decode, emissions))
                seconds.append(time.perf_counter() - start)
        ratios.append(seconds[0] / seconds[1])
    print(f"two threads against one: {np.median(ratios):.2f} times as fast")


def measure_phrases(bundle: Bundle, items: Sequence[Item]) -> None:
    """1,000 boosted phrases against none, in turn."""
    decoder = make_decoders(bundle, ("beam-phones",))["beam-phones"]
    assert isinstance(decoder, BeamDecoder)
    words = sorted(bundle.read_lexicon())
    draw = np.random.default_rng(0)
    pairs = draw.choice(len(words), size=(1000, 2), replace=False)
    phrases = [Phrase(f"{words[a]} {words[b]}", 5.0) for a, b in pairs]
    decoder.open(phrases=phrases)  # the automaton is kept for the requests that follow
    seconds = [0.0, 0.0]
    for item in items:
        for i, chosen in enumerate(((), phrases)):
            start = time.perf_counter()
            decoder.decode(item.emissions["phones"], phrases=chosen)
            seconds[i] += time.perf_counter() - start
    print(f"1,000 phrases against none: {seconds[1] / seconds[0]:.2f} times the time")


if __name__ == "__main__":
    main()
