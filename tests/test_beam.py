"""The beam search against enumeration and a plain search, and at the edges of its input."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from beam_oracle import FloatArray, Words, enumerate_readings, search_prefixes

from service.decoding.beam import BeamDecoder
from service.decoding.hypothesis import Hypothesis, Phrase
from service.decoding.ngram import NgramModel
from service.errors import InputError
from training.arpa import compile_arpa

LETTERS = ("<blank>", " ", "a", "b")
PHONES = ("<blank>", "A", "B", "C")
LEXICON = {
    "ab": (("A", "B"), ("A",)),
    "abb": (("A", "B"),),
    "c": (("C",),),
    "ca": (("C", "A"),),
    "b": (("B",),),
}
ARPA = r"""
\data\
ngram 1=8
ngram 2=6
ngram 3=2

\1-grams:
-1.5	<unk>
-99	<s>	-0.3
-0.9	</s>
-0.7	ab	-0.2
-0.8	abb	-0.4
-1.0	c	-0.1
-1.2	ca	-0.3
-1.1	b	-0.25

\2-grams:
-0.4	<s> ab	-0.1
-0.9	<s> c
-0.3	ab c	-0.2
-0.6	c abb
-0.5	abb </s>
-0.7	b ab

\3-grams:
-0.2	<s> ab c
-0.4	ab c abb

\end\
"""
EVERYTHING: dict[str, Any] = {
    "beam_prune_log_prob": -700.0,
    "token_min_log_prob": -1e9,
    "recombine": False,
}


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> NgramModel:
    path = tmp_path_factory.mktemp("lm") / "toy.arpa"
    path.write_text(ARPA, encoding="utf-8")
    return compile_arpa(path)


def _emission(seed: int, n_frames: int, n_tokens: int, sharpness: float = 2.0) -> FloatArray:
    logits = np.random.default_rng(seed).normal(size=(n_frames, n_tokens)) * sharpness
    log_probs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    return np.asarray(log_probs, np.float32)


def _spell_letters(labels: Sequence[str]) -> Iterator[Words]:
    yield tuple("".join(labels).split())


def _spell_lexicon(labels: Sequence[str]) -> Iterator[Words]:
    if not labels:
        yield ()
        return
    for word, spellings in LEXICON.items():
        for spelling in spellings:
            if tuple(labels[: len(spelling)]) == spelling:
                for rest in _spell_lexicon(labels[len(spelling) :]):
                    yield (word, *rest)


def _scores(hypotheses: Sequence[Hypothesis]) -> dict[Words, float]:
    return {tuple(word.text for word in h.words): h.score for h in hypotheses}


@pytest.mark.parametrize("seed", range(6))
def test_unbounded_search_without_lm_equals_enumeration(seed: int) -> None:
    emission = _emission(seed, 5, 4)
    expected = enumerate_readings(emission, LETTERS, _spell_letters, lambda _: 0.0)
    decoder = BeamDecoder(LETTERS, beam_width=2000, beta=0.0, **EVERYTHING)
    found = _scores(decoder.decode(emission, n_best=2000))
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("look_ahead", [0.0, 0.6])
def test_unbounded_search_with_lm_equals_enumeration(
    lm: NgramModel, seed: int, look_ahead: float
) -> None:
    emission = _emission(seed, 6, 4)

    def language(words: Words) -> float:
        n_unknown = sum(word not in LEXICON for word in words)
        log_prob = sum(lm.score(words)) - 2.0 * n_unknown
        return 0.7 * math.log(10) * log_prob + 1.5 * len(words)

    expected = enumerate_readings(emission, LETTERS, _spell_letters, language)
    decoder = BeamDecoder(
        LETTERS, lm=lm, beam_width=4000, alpha=0.7, beta=1.5, unknown_score=-2.0,
        look_ahead=look_ahead, **EVERYTHING,
    )  # fmt: skip
    found = _scores(decoder.decode(emission, n_best=4000))
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("seed", range(6))
def test_unbounded_lexicon_search_equals_enumeration(lm: NgramModel, seed: int) -> None:
    emission = _emission(seed, 5, 4)

    def language(words: Words) -> float:
        return 0.9 * math.log(10) * sum(lm.score(words)) + 0.5 * len(words)

    expected = enumerate_readings(emission, PHONES, _spell_lexicon, language)
    decoder = BeamDecoder(
        PHONES, lm=lm, lexicon=LEXICON, beam_width=4000, alpha=0.9, beta=0.5, **EVERYTHING
    )
    found = decoder.decode(emission, n_best=4000)
    best = max(expected, key=expected.__getitem__)
    # two pronunciations of a word are two readings; the texts and the bound of their sum remain
    assert _scores(found).keys() == expected.keys()
    assert all(found.score <= expected[words] + 1e-5 for words, found in
               ((tuple(w.text for w in h.words), h) for h in found))  # fmt: skip
    if "ab" not in best:
        assert _scores(found)[best] == pytest.approx(expected[best], abs=1e-5)


@pytest.mark.parametrize("width", [1, 3, 8])
@pytest.mark.parametrize("seed", range(4))
def test_bounded_search_equals_the_plain_one(seed: int, width: int) -> None:
    tokens = ("<blank>", "a", "b", "c")
    emission = _emission(seed, 20, 4, sharpness=3.0)
    expected = search_prefixes(emission, tokens, lambda _: 0.0, beam_width=width)
    decoder = BeamDecoder((tokens[0], " ", *tokens[1:]), beam_width=width, beta=0.0, **EVERYTHING)
    silent = np.full((len(emission), 1), -1e4, np.float32)
    emission = np.concatenate([emission[:, :1], silent, emission[:, 1:]], axis=1)
    found = _scores(decoder.decode(emission, n_best=width))
    assert found == pytest.approx(
        {("".join(p),) if p else (): score for p, score in expected.items()}, abs=1e-4
    )


@pytest.mark.parametrize("seed", range(4))
def test_recombination_changes_scores_little(lm: NgramModel, seed: int) -> None:
    emission = _emission(seed, 7, 4)
    settings: dict[str, Any] = {"lm": lm, "lexicon": LEXICON, "alpha": 0.9, "beta": 0.5}
    apart = BeamDecoder(PHONES, beam_width=20_000, **settings, **EVERYTHING)
    expected = _scores(apart.decode(emission, n_best=50))
    together = BeamDecoder(
        PHONES, beam_width=2000, **settings, **(EVERYTHING | {"recombine": True})
    )
    found = _scores(together.decode(emission, n_best=50))
    best = max(expected.values())
    assert expected[max(found, key=found.__getitem__)] > best - 0.7
    for words, score in found.items():
        if score > best - 3.0 and words in expected:
            assert score == pytest.approx(
                expected[words], abs=0.7
            )  # shares do not tell blanks from tokens


@pytest.mark.parametrize("seed", range(5))
def test_any_chunking_gives_the_same(lm: NgramModel, seed: int) -> None:
    draw = np.random.default_rng(seed)
    emission = _emission(seed, 300, 4)
    decoder = BeamDecoder(PHONES, lm=lm, lexicon=LEXICON, beam_width=20)
    whole = decoder.decode(emission, n_best=4)
    run = decoder.open()
    cuts = np.sort(draw.integers(0, 300, size=12))
    for part in np.split(emission, cuts):
        n_settled = int(draw.integers(0, len(part) + 1))
        run.read(part, n_settled=n_settled)
        run.push(part[n_settled:])
    assert run.finish(n_best=4) == whole


def test_frames_that_are_not_settled_are_read_for_once(lm: NgramModel) -> None:
    emission, other = _emission(3, 60, 4), _emission(4, 30, 4)
    decoder = BeamDecoder(PHONES, lm=lm, lexicon=LEXICON, beam_width=20)
    run = decoder.open()
    told = run.read(np.concatenate([emission[:30], other]), n_settled=30)
    whole = decoder.open()
    whole.push(np.concatenate([emission[:30], other]))
    assert told == whole.n_best(3)[0]
    assert run.n_frames == 30
    run.push(emission[30:])
    assert run.finish() == decoder.decode(emission)


@pytest.mark.parametrize("seed", range(20))
def test_best_reading_is_the_first_of_many(lm: NgramModel, seed: int) -> None:
    emission = _emission(seed, 60, 4, sharpness=1.0)
    decoder = BeamDecoder(PHONES, lm=lm, lexicon=LEXICON, beam_width=50)
    assert decoder.decode(emission) == decoder.decode(emission, n_best=5)[:1]


def test_readings_are_distinct_and_ranked(lm: NgramModel) -> None:
    decoder = BeamDecoder(PHONES, lm=lm, lexicon=LEXICON, beam_width=50)
    found = decoder.decode(_emission(0, 40, 4, sharpness=1.0), n_best=20)
    assert len({h.text for h in found}) == len(found) == 20
    assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)


def test_words_that_are_alike_to_the_model_are_told_apart_without_trying_all(
    lm: NgramModel,
) -> None:
    alike = dict.fromkeys(("ab", "abb", "b"), (("A", "B"),))
    decoder = BeamDecoder(PHONES, lm=lm, lexicon=alike, beam_width=50, alpha=0.0, beta=0.0)
    emission = np.full((3 * 40, 4), -12.0, np.float32)
    emission[np.arange(len(emission)), [1, 2, 0] * 40] = -1e-4  # 3 ** 40 readings of equal mass
    found = decoder.decode(emission, n_best=5)
    assert len({h.text for h in found}) == 5
    assert {len(h.words) for h in found} == {40}


def test_times_are_ordered_and_inside(lm: NgramModel) -> None:
    decoder = BeamDecoder(PHONES, lm=lm, lexicon=LEXICON, beam_width=50)
    for seed in range(10):
        emission = _emission(seed, 50, 4)
        (best,) = decoder.decode(emission)
        edges = [edge for word in best.words for edge in (word.start_frame, word.end_frame)]
        assert edges == sorted(edges)
        assert edges[0] >= 0
        assert edges[-1] <= len(emission) + 1
        assert all(0 <= word.confidence <= 1 for word in best.words)


def test_spike_is_where_the_word_is() -> None:
    log_probs = np.full((20, 4), -20.0, np.float32)
    log_probs[:, 0] = -1e-6
    for frame, token in ((4, 2), (6, 3), (9, 1), (12, 3)):
        log_probs[frame] = -20.0
        log_probs[frame, token] = -1e-6
    (best,) = BeamDecoder(LETTERS, beta=0.0).decode(log_probs)
    assert [(w.text, w.start_frame, w.end_frame) for w in best.words] == [
        ("ab", 4, 7),
        ("b", 12, 13),
    ]


def test_boosted_phrase_wins_and_suppressed_phrase_loses() -> None:
    tokens = ("<blank>", " ", *"abcdefghijklmnopqrstuvwxyz")
    emission = np.full((9, len(tokens)), -12.0, np.float32)
    for frame, letters in enumerate(["j", "", "oa", "", "n", "", "", "", ""]):
        for rank, letter in enumerate(letters):
            emission[frame, tokens.index(letter)] = -0.3 - 1.2 * rank
        if not letters:
            emission[frame, 0] = -0.01
    decoder = BeamDecoder(tokens, beta=0.0)
    assert decoder.decode(emission)[0].text == "jon"
    assert decoder.decode(emission, phrases=[Phrase("Jan", 3.0)])[0].text == "jan"
    assert decoder.decode(emission, phrases=[Phrase("Jan", 0.5)])[0].text == "jon"
    assert decoder.decode(emission, phrases=[Phrase("jon", -3.0)])[0].text == "jan"
    # a phrase that only begins is worth nothing in the end
    plain = decoder.decode(emission)[0].score
    assert decoder.decode(emission, phrases=[Phrase("jonas", 3.0)])[0].score == pytest.approx(plain)


def test_phrase_makes_an_unknown_word_known(lm: NgramModel) -> None:
    log_probs = np.full((7, 4), -9.0, np.float32)
    log_probs[:, 0] = -0.1
    for frame, token in ((1, 3), (3, 2), (5, 2)):
        log_probs[frame] = -9.0
        log_probs[frame, token] = -0.1
    decoder = BeamDecoder(LETTERS, lm=lm, alpha=0.9, beta=0.5)
    assert decoder.decode(log_probs)[0].text != "baa"
    assert decoder.decode(log_probs, phrases=[Phrase("baa", 6.0)])[0].text == "baa"


@pytest.mark.parametrize(
    ("phrases", "message"),
    [
        ([Phrase("!?", 1.0)], "has no word"),
        ([Phrase("ab", 1e6)], "weight 1000000.0"),
        ([Phrase("ab", math.nan)], "weight nan"),
        ([Phrase(f"a{'b' * i}", 1.0) for i in range(5001)], "5001 phrases"),
    ],
)
def test_phrases_that_cannot_be_used_are_refused(phrases: list[Phrase], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BeamDecoder(LETTERS).open(phrases=phrases)


@pytest.mark.parametrize("with_lm", [False, True])
def test_odd_emissions_give_an_answer(lm: NgramModel, with_lm: bool) -> None:
    settings: dict[str, Any] = {"lm": lm, "lexicon": LEXICON} if with_lm else {}
    decoder = BeamDecoder(PHONES if with_lm else LETTERS, beam_width=4, **settings)
    nothing = np.full((50, 4), -np.inf, np.float32)
    nothing[:, 0] = 0.0
    assert decoder.decode(nothing)[0].text == ""
    assert decoder.decode(nothing[:1])[0].text == ""
    assert decoder.decode(nothing[:0])[0].text == ""
    certain = np.full((3, 4), -np.inf, np.float32)
    certain[:, 3] = 0.0
    assert decoder.decode(certain)[0].text == ("c" if with_lm else "b")
    BeamDecoder(LETTERS, beam_width=1).decode(_emission(0, 40, 4))


def test_impossible_emissions_are_refused() -> None:
    decoder = BeamDecoder(LETTERS)
    good = _emission(0, 10, 4)
    for value, message in ((np.nan, "frame 3 has NaN"), (-np.inf, "frame 3 has no possible")):
        bad = good.copy()
        bad[3] = value
        with pytest.raises(InputError, match=message):
            decoder.decode(bad)
    with pytest.raises(InputError, match=r"shape \(10, 3\), expected \(frames, 4\)"):
        decoder.decode(good[:, :3])


def test_long_search_stays_small_and_loses_nothing(lm: NgramModel) -> None:
    decoder = BeamDecoder(PHONES, lm=lm, lexicon=LEXICON, beam_width=20)
    emission = _emission(0, 100_000, 4)
    run = decoder.open()
    size = run.n_bytes
    run.push(emission)
    words = run.finish()[0].words
    assert run.n_bytes == size <= 1 << 20
    assert len(words) > 10_000
    assert words[-1].end_frame > 99_900
    starts = [word.start_frame for word in words]
    assert starts == sorted(starts)


def test_threads_share_a_decoder(lm: NgramModel) -> None:
    decoder = BeamDecoder(PHONES, lm=lm, lexicon=LEXICON, beam_width=20)
    emissions = [_emission(seed, 100, 4) for seed in range(8)]
    expected = [decoder.decode(emission) for emission in emissions]
    found: dict[int, list[Hypothesis]] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.__setitem__(i, decoder.decode(emissions[i])))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(8)] == expected


def test_subwords_begin_words() -> None:
    tokens = ("<blank>", "\u2581he", "llo", "\u2581wor", "ld")
    log_probs = np.full((4, 5), -20.0, np.float32)
    for frame, token in enumerate((1, 2, 3, 4)):
        log_probs[frame, token] = -1e-6
    assert BeamDecoder(tokens, beta=0.0).decode(log_probs)[0].text == "hello world"


def test_lexicon_without_language_model_is_refused(tmp_path: Path) -> None:
    del tmp_path
    with pytest.raises(InputError, match="needs a language model"):
        BeamDecoder(PHONES, lexicon=LEXICON)
