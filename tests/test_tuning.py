"""Calibration and its figures; tuning of a whole bundle."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import CHECKOUT

from service.bundle import DecodingSettings
from service.errors import InputError, MissingExtraError
from service.manifest import Utterance
from service.tuning import (
    fit_logistic,
    mark_right,
    measure_confidence,
    rank_probability,
    tune_bundle,
)


def test_logistic_regression_finds_the_weights_it_was_drawn_with() -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(20_000, 2)) * [1.0, 5.0] + [0.0, 3.0]
    log_odds = 0.5 + x @ [1.5, -0.3]
    y = draw.random(len(x)) < 1 / (1 + np.exp(-log_odds))
    intercept, weights = fit_logistic(x, y)
    assert intercept == pytest.approx(0.5, abs=0.1)
    assert weights == pytest.approx([1.5, -0.3], abs=0.06)


def test_figures_of_known_confidences() -> None:
    y = np.array([True] * 80 + [False] * 20)
    base = measure_confidence(np.full(100, 0.8), y)
    assert base.nce == pytest.approx(0.0, abs=1e-6)
    assert base.auc == pytest.approx(0.5)
    perfect = measure_confidence(np.where(y, 0.9999, 0.0001), y)
    assert perfect.nce > 0.99
    assert perfect.auc == 1.0
    assert perfect.ece < 0.001
    boastful = measure_confidence(np.full(100, 0.99), np.tile([True] * 4 + [False], 20))
    assert boastful.nce < 0
    assert boastful.ece == pytest.approx(0.19)


def test_rank_probability_counts_pairs() -> None:
    confidence = np.array([0.1, 0.4, 0.4, 0.9])
    y = np.array([False, True, False, True])
    pairs = [0.5 if p == q else float(p > q) for p in confidence[y] for q in confidence[~y]]
    assert rank_probability(confidence, y) == pytest.approx(np.mean(pairs))


def test_right_words_are_those_the_error_rate_counts_as_such() -> None:
    assert mark_right("the cat sat", ["the", "bat", "sat"]) == [True, False, True]
    assert mark_right("the cat sat", ["a", "the", "cat"]) == [False, True, True]
    assert mark_right("", ["word"]) == [False]
    assert mark_right("words", []) == []


def test_tuning_chooses_and_draws(shipped_bundle: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    settings = tune_bundle(
        shipped_bundle,
        CHECKOUT / "examples" / "manifest.jsonl",
        alphas=[0.0, 0.8],
        betas=[0.5],
        plot=tmp_path / "map.png",
        on_line=lines.append,
    )
    assert settings.phones.alpha == 0.8
    assert len(settings.phones.confidence.weights) > 5
    assert settings.search_tokens == "phones"
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert any("cross-fitted WER" in line for line in lines)
    again = DecodingSettings.model_validate_json(settings.model_dump_json())
    assert again == settings


def test_a_plot_without_matplotlib_is_refused_before_the_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match="matplotlib"):
        tune_bundle(tmp_path, tmp_path, alphas=[1.0], betas=[0.0], plot=tmp_path / "map.png")


def test_one_speaker_cannot_be_held_out(
    shipped_bundle: Path, clips: list[Utterance], tmp_path: Path
) -> None:
    row = {
        "audio_filepath": str(clips[0].audio_path),
        "duration": 5.0,
        "text": "a",
        "speaker": "one",
    }
    manifest = tmp_path / "dev.jsonl"
    manifest.write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match="has one speaker"):
        tune_bundle(shipped_bundle, manifest, alphas=[0.5], betas=[1.0])
