"""Error counts against known cases and an independent Levenshtein distance."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from service.scoring import ErrorCounts, count_errors, format_interval, pool, wer_interval


def distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Levenshtein distance, row by row."""
    row = list(range(len(b) + 1))
    for i, item in enumerate(a, start=1):
        previous, row[0] = row[0], i
        for j, other in enumerate(b, start=1):
            substitution = previous + (item != other)
            previous = row[j]
            row[j] = min(substitution, row[j] + 1, row[j - 1] + 1)
    return row[-1]


def random_text(rng: random.Random, *, fewest: int, most: int) -> str:
    return " ".join(rng.choices(["a", "b", "ab", "the", "don't"], k=rng.randint(fewest, most)))


@pytest.mark.parametrize(
    ("reference", "hypothesis", "expected"),
    [
        ("a b c", "a b c", ErrorCounts(3, 0, 0, 0, 5, 0)),
        ("a b c", "a x c", ErrorCounts(3, 1, 0, 0, 5, 1)),
        ("a b c", "a c", ErrorCounts(3, 0, 1, 0, 5, 2)),
        ("a c", "a b c", ErrorCounts(2, 0, 0, 1, 3, 2)),
        ("a b c", "", ErrorCounts(3, 0, 3, 0, 5, 5)),
        ("", "a b c", ErrorCounts(0, 0, 0, 3, 0, 5)),
        ("", "", ErrorCounts()),
        ("the cat sat", "the hat sat down", ErrorCounts(3, 1, 0, 1, 11, 6)),
        ("ab", "a b", ErrorCounts(1, 1, 0, 1, 2, 1)),
        ("a b c d", "d", ErrorCounts(4, 0, 3, 0, 7, 6)),
    ],
)
def test_count_errors_on_known_pairs(
    reference: str, hypothesis: str, expected: ErrorCounts
) -> None:
    assert count_errors([reference], [hypothesis]) == expected


def test_rates_are_errors_by_the_references_length() -> None:
    counts = count_errors(["the cat sat"], ["the hat sat down"])
    assert counts.n_errors == 2
    assert counts.wer == pytest.approx(2 / 3)
    assert counts.cer == pytest.approx(6 / 11)


def test_rates_exceed_one_when_insertions_are_many() -> None:
    counts = count_errors(["a"], ["a b c d"])
    assert counts.wer == 3.0
    assert counts.cer == 6.0


@pytest.mark.parametrize(
    ("references", "hypotheses", "rate"),
    [([], [], 0.0), ([""], [""], 0.0), ([""], ["word"], 1.0), (["..."], ["!"], 0.0)],
)
def test_rates_are_zero_or_one_without_reference_words(
    references: list[str], hypotheses: list[str], rate: float
) -> None:
    counts = count_errors(references, hypotheses)
    assert counts.wer == rate
    assert counts.cer == rate


@pytest.mark.parametrize(
    ("reference", "hypothesis"),
    [
        ("Hello, World!", "hello world"),
        ("It\u2019s 21 o'clock", "it's twenty one o'clock"),
        ("Café", "cafe"),
        ("  spaced \n out ", "spaced out"),
        ("well-known", "well known"),
    ],
)
def test_count_errors_normalises_both_sides(reference: str, hypothesis: str) -> None:
    for a, b in [(reference, hypothesis), (hypothesis, reference)]:
        counts = count_errors([a], [b])
        assert counts.n_errors == 0
        assert counts.n_character_errors == 0
        assert counts.n_words == len(hypothesis.split())
        assert counts.n_characters == len(hypothesis)


def test_count_errors_agrees_with_levenshtein_on_random_words() -> None:
    rng = random.Random(0)
    n_errors = 0
    for _ in range(300):
        reference = random_text(rng, fewest=0, most=7)
        hypothesis = random_text(rng, fewest=0, most=7)
        counts = count_errors([reference], [hypothesis])
        assert counts.n_errors == distance(reference.split(), hypothesis.split())
        assert counts.n_character_errors == distance(reference, hypothesis)
        assert counts.n_words == len(reference.split())
        assert counts.n_characters == len(reference)
        n_extra = len(hypothesis.split()) - len(reference.split())
        assert counts.n_insertions - counts.n_deletions == n_extra
        n_errors += counts.n_errors
    assert n_errors > 500


def test_count_errors_pools_the_pairs() -> None:
    rng = random.Random(1)
    references = [random_text(rng, fewest=0, most=6) for _ in range(20)]
    hypotheses = [random_text(rng, fewest=0, most=6) for _ in range(20)]
    pairs = [count_errors([r], [h]) for r, h in zip(references, hypotheses, strict=True)]
    assert count_errors(references, hypotheses) == pool(pairs)
    assert pool(pairs).n_words == sum(len(r.split()) for r in references)


def test_pool_weighs_by_words_not_by_utterances() -> None:
    pooled = pool(
        [count_errors(["a"], ["b"]), count_errors(["a b c d e f g h i"], ["a b c d e f g h i"])]
    )
    assert pooled.wer == pytest.approx(0.1)


def test_pool_of_nothing_is_no_errors() -> None:
    assert pool([]) == ErrorCounts()


def test_add_adds_field_by_field() -> None:
    added = ErrorCounts(1, 2, 3, 4, 5, 6) + ErrorCounts(10, 20, 30, 40, 50, 60)
    assert added == ErrorCounts(11, 22, 33, 44, 55, 66)


def test_as_json_has_rates_and_counts() -> None:
    counts = count_errors(["the cat sat"], ["the hat sat down"])
    assert counts.as_json() == {
        "wer": pytest.approx(2 / 3),
        "cer": pytest.approx(6 / 11),
        "n_words": 3,
        "n_substitutions": 1,
        "n_deletions": 0,
        "n_insertions": 1,
    }


@pytest.mark.parametrize(("n_references", "n_hypotheses"), [(1, 0), (0, 1), (3, 2)])
def test_count_errors_raises_on_lists_of_other_lengths(
    n_references: int, n_hypotheses: int
) -> None:
    message = f"{n_references} references but {n_hypotheses} hypotheses"
    with pytest.raises(ValueError, match=message):
        count_errors(["a"] * n_references, ["a"] * n_hypotheses)


def test_interval_holds_the_rate_as_often_as_it_says() -> None:
    rng = random.Random(5)
    n_held = 0
    for _ in range(200):  # speakers whose error rates are 0.2 on average
        rates = [rng.uniform(0.0, 0.4) for _ in range(40)]
        counts = [ErrorCounts(50, sum(rng.random() < rate for _ in range(50))) for rate in rates]
        interval = wer_interval(counts)
        assert interval is not None
        n_held += interval[0] <= 0.2 <= interval[1]
    assert 180 <= n_held <= 198


def test_interval_is_that_of_speakers_not_of_words() -> None:
    alike = [ErrorCounts(100, 20)] * 10
    differing = [ErrorCounts(100, 40), ErrorCounts(100, 0)] * 5
    assert wer_interval(alike) == pytest.approx((0.2, 0.2))
    interval = wer_interval(differing)
    assert interval is not None
    assert interval == pytest.approx((0.08, 0.32), abs=0.021)  # binomial, 10 draws of 0 or 40 %


@pytest.mark.parametrize(
    "by_speaker", [[], [ErrorCounts(5, 1)] * 2, [*[ErrorCounts(5, 1)] * 2, ErrorCounts()]]
)
def test_interval_needs_some_speakers(by_speaker: list[ErrorCounts]) -> None:
    assert wer_interval(by_speaker) is None
    assert format_interval(by_speaker) == "-"


def test_interval_is_written_in_percent() -> None:
    assert format_interval([ErrorCounts(100, 20)] * 3) == "20.0% to 20.0%"
