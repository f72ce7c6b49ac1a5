"""What boosting is worth for words that neither the language model nor the word list has.

python benchmarks/phrases.py DEV.jsonl LM.arpa.gz [--bundle DIR] [--words 200] [--weights 1,2,4]

Words that occur at most twice in the development set are removed from a copy of the language model
(`voxgate lm build --arpa` wrote it) and of the lexicon, then boosted among 1,000 words that nobody
says; their pronunciations come from the grapheme-to-phone model. The weight is chosen on one half
of the speakers and scored on the other, both ways round: the highest recall with at most 0.2 % of
false insertions.
"""

from __future__ import annotations

import argparse
import gzip
import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import jiwer
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from service.bundle import Bundle, SearchTokens, find_bundle, load_bundle
from service.decoding.beam import BeamDecoder
from service.decoding.hypothesis import Phrase
from service.decoding.ngram import load_ngram
from service.g2p import Pronouncer
from service.tuning import Item, halves_of, read_items
from training.arpa import compile_arpa

MOST_FALSE: Final = 0.002
N_DISTRACTORS: Final = 1000
SHORTEST: Final = 5


@dataclass(frozen=True)
class Counts:
    """Of one utterance."""

    n_words: int
    n_wanted: int
    n_recalled: int
    n_false: int
    n_wrong: int


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("manifest", type=Path)
    parser.add_argument("arpa", type=Path)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--words", type=int, default=200)
    parser.add_argument("--weights", default="1,1.5,2,2.5,3,4,6")
    arguments = parser.parse_args()
    folder = find_bundle(arguments.bundle)
    bundle = load_bundle(folder)
    items = read_items(folder, arguments.manifest)
    wanted, distractors = choose_words(bundle, items, arguments.words)
    print(f"{len(wanted)} words that occur at most twice, {len(distractors)} that nobody says")
    heads: tuple[SearchTokens, ...] = ("phones", "characters")
    decoders = make_decoders(bundle, arguments.arpa, set(wanted))
    weights = [0.0, *map(float, arguments.weights.split(","))]
    for head in heads:
        found = {}
        for weight in tqdm(weights, head):
            phrases = [Phrase(word, weight) for word in (*wanted, *distractors)] if weight else []
            found[weight] = search(decoders[head], items, head, phrases, set(wanted), distractors)
        report(head, found, items)


def choose_words(bundle: Bundle, items: Sequence[Item], n: int) -> tuple[list[str], list[str]]:
    """Words to boost, and distractors."""
    times = Counter(word for item in items for word in item.reference.split())
    assert bundle.ngram is not None
    listed = set(load_ngram(bundle.ngram).vocabulary)
    draw = random.Random(0)
    rare = sorted(w for w, k in times.items() if k <= 2 and len(w) >= SHORTEST and w in listed)
    others = sorted(w for w in listed - times.keys() if len(w) >= SHORTEST)
    return draw.sample(rare, min(n, len(rare))), draw.sample(others, N_DISTRACTORS)


def make_decoders(bundle: Bundle, arpa: Path, removed: set[str]) -> dict[SearchTokens, BeamDecoder]:
    """The bundle's searches without these words."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lm.arpa"
        remove_words(arpa, path, removed)
        lm = compile_arpa(path, quantise=True)
    assert bundle.g2p_graph is not None
    lexicon = {w: spelled for w, spelled in bundle.read_lexicon().items() if w not in removed}
    decoding = bundle.config.decoding
    phones = decoding.phones.model_dump(exclude={"confidence"})
    characters = decoding.characters.model_dump(exclude={"confidence"})
    return {
        "phones": BeamDecoder(
            bundle.config.phones,
            lm=lm,
            lexicon=lexicon,
            pronounce=Pronouncer(bundle.g2p_graph).pronounce,
            **phones,
        ),
        "characters": BeamDecoder(bundle.config.tokens, lm=lm, **characters),
    }


def remove_words(source: Path, target: Path, removed: set[str]) -> None:
    """Copy an ARPA file without the n-grams that hold these words."""
    kept: list[list[str]] = []
    with gzip.open(source, "rt", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("\\") and line.strip().endswith("-grams:"):
                kept.append([])
            elif kept and line.strip() and not line.startswith("\\"):
                words = line.split("\t")[1].split()
                if removed.isdisjoint(words):
                    kept[-1].append(line)
    with target.open("w", encoding="utf-8") as file:
        file.write("\\data\\\n")
        file.writelines(f"ngram {i}={len(section)}\n" for i, section in enumerate(kept, 1))
        for i, section in enumerate(kept, 1):
            file.write(f"\n\\{i}-grams:\n")
            file.writelines(section)
        file.write("\n\\end\\\n")


def search(
    decoder: BeamDecoder,
    items: Sequence[Item],
    head: SearchTokens,
    phrases: Sequence[Phrase],
    wanted: set[str],
    distractors: Sequence[str],
) -> list[Counts]:
    """Search every utterance."""
    boosted = wanted | set(distractors)

    def run(item: Item) -> Counts:
        text = decoder.decode(item.emissions[head], phrases=phrases)[0].text
        return count(item.reference, text, wanted, boosted)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, items))


def count(reference: str, text: str, wanted: set[str], boosted: set[str]) -> Counts:
    """Recalled and falsely inserted boosted words of one utterance."""
    spoken, read = reference.split(), text.split()
    right: Counter[str] = Counter()
    n_wrong = len(spoken)
    if read:
        alignment = jiwer.process_words(reference, text)
        for chunk in alignment.alignments[0]:
            if chunk.type == "equal":
                right.update(read[chunk.hyp_start_idx : chunk.hyp_end_idx])
        n_wrong = alignment.substitutions + alignment.deletions + alignment.insertions
    return Counts(
        n_words=len(spoken),
        n_wanted=sum(word in wanted for word in spoken),
        n_recalled=sum(n for word, n in right.items() if word in wanted),
        n_false=sum(word in boosted for word in read)
        - sum(n for word, n in right.items() if word in boosted),
        n_wrong=n_wrong,
    )


def report(head: str, found: dict[float, list[Counts]], items: Sequence[Item]) -> None:
    """Print every weight, and the cross-fitted choice."""
    for weight, counts in found.items():
        print(f"{head}, weight {weight:g}: {describe(counts)}")
    in_first = halves_of(items)
    chosen: list[Counts] = []
    for half in (in_first, ~in_first):
        best = max(
            (w for w in found if false_rate(_where(found[w], half)) <= MOST_FALSE),
            key=lambda w: recall(_where(found[w], half)),  # used at once
            default=0.0,
        )
        print(f"{head}: one half chooses weight {best:g}")
        chosen += _where(found[best], ~half)
    print(f"{head}, cross-fitted: {describe(chosen)}")


def _where(counts: Sequence[Counts], chosen: npt.NDArray[np.bool_]) -> list[Counts]:
    return [counts[i] for i in np.flatnonzero(chosen)]


def recall(counts: Sequence[Counts]) -> float:
    """Share of the boosted words that were said and read."""
    return sum(c.n_recalled for c in counts) / max(1, sum(c.n_wanted for c in counts))


def false_rate(counts: Sequence[Counts]) -> float:
    """Boosted words that were read and not said, a spoken word."""
    return sum(c.n_false for c in counts) / sum(c.n_words for c in counts)


def describe(counts: Sequence[Counts]) -> str:
    """Recall, false insertions, error rate."""
    wer = sum(c.n_wrong for c in counts) / sum(c.n_words for c in counts)
    return (
        f"recall {recall(counts):.1%} of {sum(c.n_wanted for c in counts)}, false insertions "
        f"{false_rate(counts):.2%} of words, WER {wer:.2%}"
    )


if __name__ == "__main__":
    main()
