"""The n-gram of a domain: a distribution in every context, over words from outside as well."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from service.decoding.ngram import SENTENCE_END, NgramModel
from training.arpa import compile_arpa
from training.domain_lm import write_domain_arpa

_SENTENCES = [("small", "latte"), ("large", "latte"), ("small", "mocha"), ("a", "small", "latte")]
_GENERAL = {"the": 0.3, "cat": 0.1, "latte": 0.1}
_WORDS = ("small", "large", "latte", "mocha", "a", "the", "cat", SENTENCE_END)


def _model(
    folder: Path, *, weight: float = 0.1, general: dict[str, float] = _GENERAL
) -> NgramModel:
    path = folder / "lm.arpa"
    write_domain_arpa(_SENTENCES, general, path, general_weight=weight, order=3)
    return compile_arpa(path)


def _prob(model: NgramModel, *words: str) -> float:
    """Of the last word after those before it."""
    return 10 ** float(model.score(words)[len(words) - 1])


def test_words_after_any_context_sum_to_one(tmp_path: Path) -> None:
    model = _model(tmp_path)
    contexts = [(), *product(_WORDS[:-1], repeat=1), *product(_WORDS[:-1], repeat=2)]
    for context in contexts:
        words = sum(_prob(model, *context, word) for word in _WORDS[:-1])
        end = 10 ** float(model.score(context)[-1])
        assert words + end == pytest.approx(1.0, abs=1e-4), context


def test_what_the_domain_says_is_more_likely_than_what_it_does_not(tmp_path: Path) -> None:
    model = _model(tmp_path)
    assert _prob(model, "small", "latte") > 0.5
    assert _prob(model, "small", "mocha") > 10 * _prob(model, "large", "mocha")
    assert _prob(model, "small", "cat") < 0.01
    assert _prob(model, "the", "cat") > _prob(model, "small", "cat")


def test_share_of_words_from_outside_is_what_was_asked_for(tmp_path: Path) -> None:
    model = _model(tmp_path, weight=0.25, general={"the": 1.0, "cat": 3.0})
    unigrams = {
        w: 10 ** float(p) for w, p in zip(model.words, model.unigram_log_probs(), strict=True)
    }
    assert unigrams["the"] == pytest.approx(0.25 / 4, rel=1e-4)
    assert unigrams["cat"] == pytest.approx(0.25 * 3 / 4, rel=1e-4)


def test_without_words_from_outside_nothing_is_kept_for_them(tmp_path: Path) -> None:
    model = _model(tmp_path, general={})
    total = sum(10 ** model.unigram_log_probs().astype(float))
    assert total == pytest.approx(1.0, abs=1e-4)
