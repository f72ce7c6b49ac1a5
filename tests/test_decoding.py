"""The decoders against enumeration of every path, and what a language model changes."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import kenlm
import numpy as np
import numpy.typing as npt
import pytest

from service.decoding.greedy import GreedyDecoder
from service.decoding.hypothesis import Decoder, Hypothesis, Word
from service.decoding.reference import ReferenceDecoder
from service.text import BLANK_TOKEN, CHARACTERS

FloatArray = npt.NDArray[np.float32]

TOKENS = ("<blank>", " ", "a", "b")
BLANK, SPACE, A, B = range(4)
UNBOUNDED = 10**9

# bigrams over the words a, b, ab: log10 probabilities and back-off weights
TOY_ARPA = """\\data\\
ngram 1=6
ngram 2=3

\\1-grams:
-2.0	<unk>
0	<s>	-0.5
-1.0	</s>
-0.4	a	-0.3
-1.2	b	-0.2
-1.5	ab	-0.1

\\2-grams:
-0.2	<s> a
-0.3	a b
-0.1	b </s>

\\end\\
"""

# the model prefers sun to son, and has never seen sin; kenlm wants at least one bigram
SUN_ARPA = """\\data\\
ngram 1=5
ngram 2=1

\\1-grams:
-3.0	<unk>
-99	<s>	0
-1.0	</s>
-0.5	sun	0
-2.0	son	0

\\2-grams:
-0.5	sun sun

\\end\\
"""


@pytest.fixture(scope="module")
def toy_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lm") / "toy.arpa"
    path.write_text(TOY_ARPA, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def sun_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lm") / "sun.arpa"
    path.write_text(SUN_ARPA, encoding="utf-8")
    return path


def random_emission(
    n_frames: int, *, seed: int, n_tokens: int = len(TOKENS), sharpness: float = 2.0
) -> FloatArray:
    """Log_probs of random logits, (frames, token)."""
    logits = sharpness * np.random.default_rng(seed).standard_normal((n_frames, n_tokens))
    return np.asarray(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True), np.float32)


def emission_along(path: list[int], *, probability: float = 0.9) -> FloatArray:
    """Each frame gives its token of the path `probability`, the others share the rest."""
    others = (1 - probability) / (len(TOKENS) - 1)
    emission = np.full((len(path), len(TOKENS)), math.log(others), np.float32)
    emission[np.arange(len(path)), path] = math.log(probability)
    return emission


def emission_of(frames: list[dict[str, float]]) -> FloatArray:
    """Log_probs over CHARACTERS from the probabilities of a few tokens in each frame."""
    emission = np.full((len(frames), len(CHARACTERS)), math.log(1e-6), np.float32)
    for frame, probabilities in enumerate(frames):
        for token, probability in probabilities.items():
            emission[frame, CHARACTERS.index(token)] = math.log(probability)
    return emission


def sun_or_son(sun: float) -> FloatArray:
    """Three frames, "sun" with this probability and otherwise "son"."""
    return emission_of([{"s": 1.0}, {"u": sun, "o": 1 - sun}, {"n": 1.0}])


def text_of_path(path: tuple[int, ...], tokens: tuple[str, ...] = TOKENS) -> str:
    """The text of a path: runs shortened, blanks deleted, words joined by single spaces."""
    signs = "".join("-" if token == BLANK else tokens[token] for token in path)
    return " ".join(re.sub(r"(.)\1+", r"\1", signs).replace("-", "").split())


def enumerate_texts(emission: FloatArray) -> dict[str, float]:
    """Log probability of every text, by adding up all its paths."""
    texts: dict[str, float] = {}
    for path in itertools.product(range(len(TOKENS)), repeat=len(emission)):
        score = float(sum(emission[frame, token] for frame, token in enumerate(path)))
        text = text_of_path(path)
        texts[text] = float(np.logaddexp(texts.get(text, -np.inf), score))
    return texts


def unbounded(
    lm_path: Path | None = None,
    *,
    words: tuple[str, ...] = (),
    alpha: float = 0.5,
    beta: float = 1.0,
    unknown_score: float = -10.0,
) -> ReferenceDecoder:
    """A search over TOKENS that drops nothing: for a few frames only."""
    return ReferenceDecoder(
        TOKENS,
        lm=kenlm.Model(str(lm_path)) if lm_path else None,
        words=words,
        alpha=alpha,
        beta=beta,
        unknown_score=unknown_score,
        beam_width=UNBOUNDED,
        beam_prune_log_prob=-1e9,
        token_min_log_prob=-1e9,
    )


def with_sun_lm(
    path: Path, *, words: tuple[str, ...] = ("sun", "son"), alpha: float = 0.5
) -> ReferenceDecoder:
    return ReferenceDecoder(
        CHARACTERS,
        lm=kenlm.Model(str(path)),
        words=words,
        alpha=alpha,
        beta=0.0,
        unknown_score=-10.0,
        beam_prune_log_prob=-100.0,  # so that the penalised word stays to be seen
    )


def assert_words_are_in_order(hypothesis: Hypothesis, *, n_frames: int) -> None:
    end = 0.0
    for word in hypothesis.words:
        assert end <= word.start_frame < word.end_frame <= n_frames
        assert 0 < word.confidence <= 1
        end = word.end_frame


# --- greedy --------------------------------------------------------------------------------------


def test_greedy_equals_collapsed_best_path_on_random_emissions() -> None:
    n_words = 0
    for seed in range(100):
        emission = random_emission(seed % 30, seed=seed)
        hypotheses = GreedyDecoder(TOKENS).decode(emission)
        assert [h.text for h in hypotheses] == [text_of_path(tuple(emission.argmax(axis=1)))]
        n_words += len(hypotheses[0].words)
    assert n_words > 200


def test_greedy_words_are_where_the_best_path_has_them() -> None:
    for seed in range(50):
        emission = random_emission(40, seed=seed, n_tokens=len(CHARACTERS))
        emission[:, 1] += 3.0  # more spaces
        emission = np.minimum(emission, 0)
        best = emission.argmax(axis=1)
        (hypothesis,) = GreedyDecoder(CHARACTERS).decode(emission)
        assert_words_are_in_order(hypothesis, n_frames=40)
        for word in hypothesis.words:
            frames = tuple(best[word.start_frame : word.end_frame])
            assert text_of_path(frames, CHARACTERS) == word.text
            assert best[word.start_frame] > SPACE
            assert best[word.end_frame - 1] > SPACE


def test_greedy_score_is_the_log_probability_of_the_best_path() -> None:
    emission = random_emission(20, seed=1)
    (hypothesis,) = GreedyDecoder(TOKENS).decode(emission)
    assert hypothesis.score == pytest.approx(float(emission.max(axis=1).sum()), rel=1e-6)


def test_greedy_gives_frames_and_confidence_of_each_word() -> None:
    path = [BLANK, A, A, BLANK, A, SPACE, B, B, BLANK]
    emission = emission_along(path)
    emission[6, B], emission[7, B] = math.log(0.5), math.log(0.4)
    (hypothesis,) = GreedyDecoder(TOKENS).decode(emission)
    assert [(w.text, w.start_frame, w.end_frame) for w in hypothesis.words] == [
        ("aa", 1, 5),
        ("b", 6, 8),
    ]
    assert [w.confidence for w in hypothesis.words] == pytest.approx([0.9, 0.5])
    assert hypothesis.confidence == pytest.approx(0.7)


def test_greedy_begins_words_at_marked_pieces() -> None:
    tokens = [BLANK_TOKEN, "\u2581", "\u2581no", "w", "\u2581here"]
    path = [2, 3, 0, 4, 0, 1, 3]
    emission = np.full((len(path), len(tokens)), -9.0, np.float32)
    emission[np.arange(len(path)), path] = -0.1
    (hypothesis,) = GreedyDecoder(tokens).decode(emission)
    assert hypothesis.text == "now here w"
    assert [(w.start_frame, w.end_frame) for w in hypothesis.words] == [(0, 2), (3, 4), (6, 7)]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ([SPACE, A], "a"),
        ([A, SPACE], "a"),
        ([SPACE, SPACE, A, SPACE, BLANK, SPACE, B, SPACE], "a b"),
        ([A, SPACE, BLANK, SPACE, A], "a a"),
        ([SPACE], ""),
        ([SPACE, BLANK, SPACE], ""),
        ([BLANK], ""),
        ([BLANK] * 20, ""),
        ([A], "a"),
        ([A, A, A], "a"),
        ([A, BLANK, A], "aa"),
    ],
)
@pytest.mark.parametrize("decoder", [GreedyDecoder(TOKENS), ReferenceDecoder(TOKENS)])
def test_decoders_give_single_spaces_between_words(
    path: list[int], text: str, decoder: Decoder
) -> None:
    hypothesis = decoder.decode(emission_along(path, probability=0.97))[0]
    assert hypothesis.text == text
    assert [word.text for word in hypothesis.words] == text.split()
    assert_words_are_in_order(hypothesis, n_frames=len(path))


@pytest.mark.parametrize("decoder", [GreedyDecoder(TOKENS), ReferenceDecoder(TOKENS)])
def test_decoders_give_one_hypothesis_without_words_without_frames(decoder: Decoder) -> None:
    for n_tokens in (len(TOKENS), 1):  # the recogniser's emission of no frames has one token
        hypotheses = decoder.decode(np.zeros((0, n_tokens), np.float32), n_best=5)
        assert hypotheses == [Hypothesis(words=(), score=0.0)]
        assert hypotheses[0].text == ""
        assert hypotheses[0].confidence == 0.0


# --- beam search without a language model --------------------------------------------------------


@pytest.mark.parametrize("n_frames", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("seed", range(5))
def test_unbounded_beam_equals_enumeration_of_all_paths(n_frames: int, seed: int) -> None:
    emission = random_emission(n_frames, seed=seed)
    texts = enumerate_texts(emission)
    hypotheses = unbounded().decode(emission, n_best=UNBOUNDED)
    assert hypotheses[0].text == max(texts, key=lambda text: texts[text])
    assert {h.text: h.score for h in hypotheses} == pytest.approx(texts, abs=1e-4)
    assert len(hypotheses) == len(texts)


def test_unbounded_beam_adds_up_paths_where_greedy_does_not() -> None:
    emission = np.log(np.array([[0.6, 1e-9, 0.4, 1e-9]] * 2)).astype(np.float32)
    assert GreedyDecoder(TOKENS).decode(emission)[0].text == ""  # 0.36 against 0.24
    best = unbounded().decode(emission)[0]
    assert best.text == "a"
    assert best.score == pytest.approx(math.log(0.64), abs=1e-5)


@pytest.mark.parametrize("n_best", [1, 2, 3, 10, 10_000])
def test_beam_gives_distinct_hypotheses_best_first_at_most_n(n_best: int) -> None:
    for seed in range(5):
        emission = random_emission(12, seed=seed, sharpness=1.0)
        hypotheses = ReferenceDecoder(TOKENS).decode(emission, n_best=n_best)
        assert 1 <= len(hypotheses) <= n_best
        texts = [h.text for h in hypotheses]
        assert len(set(texts)) == len(texts)
        scores = [h.score for h in hypotheses]
        assert scores == sorted(scores, reverse=True)
        if n_best <= 10:
            assert len(hypotheses) == n_best


def test_beam_words_are_in_order_and_inside_the_emission() -> None:
    n_words = 0
    for seed in range(20):
        emission = random_emission(30, seed=seed, sharpness=3.0)
        for hypothesis in ReferenceDecoder(TOKENS).decode(emission, n_best=5):
            assert_words_are_in_order(hypothesis, n_frames=30)
            n_words += len(hypothesis.words)
    assert n_words > 200


def test_beam_agrees_with_greedy_on_words_and_frames_when_the_path_is_clear() -> None:
    path = [BLANK, SPACE, A, A, BLANK, B, SPACE, SPACE, BLANK, B, BLANK, B, BLANK, SPACE, A, BLANK]
    emission = emission_along(path, probability=0.99)
    greedy = GreedyDecoder(TOKENS).decode(emission)[0]
    beam = ReferenceDecoder(TOKENS).decode(emission)[0]
    assert [(w.text, w.start_frame, w.end_frame) for w in greedy.words] == [
        ("ab", 2, 6),
        ("bb", 9, 12),
        ("a", 14, 15),
    ]
    assert [w.text for w in beam.words] == [w.text for w in greedy.words]
    for ours, theirs in zip(beam.words, greedy.words, strict=True):
        assert abs(ours.start_frame - theirs.start_frame) <= 1
        assert abs(ours.end_frame - theirs.end_frame) <= 1
        assert ours.confidence == pytest.approx(0.99, rel=1e-4)


def test_beam_follows_no_token_below_its_least_log_prob() -> None:
    emission = np.log(np.array([[0.7, 1e-9, 0.2, 0.1]])).astype(np.float32)
    decoder = ReferenceDecoder(TOKENS, token_min_log_prob=math.log(0.15))
    assert [h.text for h in decoder.decode(emission, n_best=9)] == ["", "a"]


def test_beam_drops_hypotheses_far_below_the_best() -> None:
    emission = np.log(np.array([[0.7, 1e-9, 0.2, 0.1]])).astype(np.float32)
    decoder = ReferenceDecoder(TOKENS, beam_prune_log_prob=math.log(0.15 / 0.7))
    assert [h.text for h in decoder.decode(emission, n_best=9)] == ["", "a"]


def test_beam_keeps_no_more_hypotheses_than_its_width() -> None:
    emission = random_emission(10, seed=0, sharpness=0.5)
    assert len(ReferenceDecoder(TOKENS, beam_width=3).decode(emission, n_best=100)) == 3


# --- beam search with a language model -----------------------------------------------------------


@pytest.mark.parametrize("n_frames", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(4))
def test_unbounded_beam_with_lm_equals_enumeration_of_all_paths(
    n_frames: int, seed: int, toy_lm: Path
) -> None:
    alpha, beta, unknown_score = 0.7, 0.4, -3.0
    words = ("a", "b")
    emission = random_emission(n_frames, seed=seed)
    lm = kenlm.Model(str(toy_lm))
    texts = {}
    for text, log_prob in enumerate_texts(emission).items():
        n_unknown = sum(word not in words for word in text.split())
        lm_score = math.log(10) * (lm.score(text) + unknown_score * n_unknown)
        texts[text] = log_prob + alpha * lm_score + beta * len(text.split())
    decoder = unbounded(toy_lm, words=words, alpha=alpha, beta=beta, unknown_score=unknown_score)
    hypotheses = decoder.decode(emission, n_best=UNBOUNDED)
    assert hypotheses[0].text == max(texts, key=lambda text: texts[text])
    assert {h.text: h.score for h in hypotheses} == pytest.approx(texts, abs=1e-4)


def test_lm_scores_the_words_in_their_context(toy_lm: Path) -> None:
    decoder = unbounded(toy_lm, words=("a", "b"), alpha=1.0, beta=0.25)
    emission = emission_along([A, SPACE, B], probability=0.999)
    best = decoder.decode(emission)[0]
    assert best.text == "a b"
    log10 = -0.2 - 0.3 - 0.1  # a after <s>, b after a, </s> after b
    expected = 3 * math.log(0.999) + math.log(10) * log10 + 2 * 0.25
    assert best.score == pytest.approx(expected, abs=1e-3)


def test_lm_makes_its_word_win_over_a_slightly_better_one_when_alpha_is_positive(
    sun_lm: Path,
) -> None:
    emission = sun_or_son(0.45)
    assert ReferenceDecoder(CHARACTERS).decode(emission)[0].text == "son"
    assert with_sun_lm(sun_lm, alpha=0.5).decode(emission)[0].text == "sun"


def test_lm_changes_nothing_when_alpha_is_zero(sun_lm: Path) -> None:
    emission = sun_or_son(0.45)
    hypotheses = with_sun_lm(sun_lm, alpha=0.0).decode(emission, n_best=2)
    assert [h.text for h in hypotheses] == ["son", "sun"]
    assert hypotheses[0].score == pytest.approx(math.log(0.55), abs=1e-4)
    assert hypotheses[1].score == pytest.approx(math.log(0.45), abs=1e-4)


def test_lm_loses_to_a_clear_emission(sun_lm: Path) -> None:
    assert with_sun_lm(sun_lm, alpha=0.5).decode(sun_or_son(0.1))[0].text == "son"


def test_lm_weight_is_alpha_times_natural_log(sun_lm: Path) -> None:
    hypotheses = with_sun_lm(sun_lm, alpha=0.3).decode(sun_or_son(0.5), n_best=2)
    assert [h.text for h in hypotheses] == ["sun", "son"]
    difference = hypotheses[0].score - hypotheses[1].score
    assert difference == pytest.approx(0.3 * math.log(10) * 1.5, abs=1e-4)


def test_lm_penalises_a_word_outside_the_word_list(sun_lm: Path) -> None:
    emission = sun_or_son(0.05)
    known = with_sun_lm(sun_lm).decode(emission, n_best=2)
    assert [h.text for h in known] == ["son", "sun"]
    unknown = with_sun_lm(sun_lm, words=("sun",)).decode(emission, n_best=2)
    assert [h.text for h in unknown] == ["sun", "son"]
    lost = known[0].score - unknown[1].score
    assert lost == pytest.approx(0.5 * math.log(10) * 10.0, abs=1e-4)


def test_lm_penalises_a_word_it_has_never_seen(sun_lm: Path) -> None:
    emission = emission_of([{"s": 1.0}, {"u": 0.05, "i": 0.95}, {"n": 1.0}])
    hypotheses = with_sun_lm(sun_lm).decode(emission, n_best=2)
    assert [h.text for h in hypotheses] == ["sun", "sin"]


def test_beta_favours_more_words_when_large(toy_lm: Path) -> None:
    emission = np.log(
        np.array([[1e-6, 1e-6, 1, 1e-6], [0.6, 0.4, 1e-6, 1e-6], [1e-6, 1e-6, 1e-6, 1]])
    ).astype(np.float32)
    texts = [
        unbounded(toy_lm, words=("a", "b", "ab"), alpha=0.1, beta=beta).decode(emission)[0].text
        for beta in (-4.0, 4.0)
    ]
    assert texts == ["ab", "a b"]


def test_lm_adds_no_word_to_an_emission_of_almost_only_blanks(toy_lm: Path) -> None:
    emission = np.log(np.array([[0.989, 1e-3, 0.009, 1e-3]])).astype(np.float32)
    decoder = ReferenceDecoder(TOKENS, lm=kenlm.Model(str(toy_lm)), words=["a", "b", "ab"])
    assert decoder.decode(emission)[0].text == ""


def test_lm_gives_a_trailing_space_no_weight(toy_lm: Path) -> None:
    """A reading is not worse because it was also reached with a space at its end."""
    decoder = ReferenceDecoder(TOKENS, lm=kenlm.Model(str(toy_lm)), words=["a", "b", "ab"])
    clear = decoder.decode(emission_along([A, SPACE, B, BLANK], probability=0.9999))[0]
    emission = emission_along([A, SPACE, B, BLANK], probability=0.9999)
    emission[3, [BLANK, SPACE]] = np.log([0.9, 0.1])
    also_with_space = decoder.decode(emission)[0]
    assert clear.text == also_with_space.text == "a b"
    assert also_with_space.score == pytest.approx(clear.score, abs=1e-2)


def test_lm_takes_an_emission_of_one_frame_and_of_none(toy_lm: Path) -> None:
    decoder = ReferenceDecoder(TOKENS, lm=kenlm.Model(str(toy_lm)), words=["a", "b", "ab"])
    assert decoder.decode(np.zeros((0, 4), np.float32)) == [Hypothesis(words=(), score=0.0)]
    (hypothesis,) = decoder.decode(emission_along([A], probability=0.99))
    (word,) = hypothesis.words
    assert (word.text, word.start_frame, word.end_frame) == ("a", 0, 1)
    assert word.confidence == pytest.approx(0.99)


def test_lm_of_one_decoder_leaves_another_alone(toy_lm: Path, sun_lm: Path) -> None:
    emission = sun_or_son(0.45)
    first = with_sun_lm(sun_lm)
    ReferenceDecoder(TOKENS, lm=kenlm.Model(str(toy_lm)), words=["a"])
    plain = ReferenceDecoder(CHARACTERS)
    assert first.decode(emission)[0].text == "sun"
    assert plain.decode(emission)[0].text == "son"


# --- hypotheses ----------------------------------------------------------------------------------


def test_hypothesis_confidence_is_the_mean_of_its_words() -> None:
    words = (Word("a", 0, 1, 0.5), Word("b", 2, 3, 1.0))
    assert Hypothesis(words=words, score=-1.0).confidence == 0.75
    assert Hypothesis(words=words, score=-1.0).text == "a b"
