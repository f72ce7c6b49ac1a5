"""The second pass: how it ranks, what it leaves alone, and how its weights are found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import CHECKOUT
from tiny import save_language_model

from export.bundle import export_bundle
from export.rescorer import export_rescorer
from service.bundle import CONFIG_NAME, RESCORER_GRAPH, RescoringSettings, hash_file, load_bundle
from service.decoding.beam import BeamDecoder
from service.decoding.hypothesis import FloatArray, Hypothesis, Phrase, Word
from service.decoding.ngram import NgramModel, load_ngram
from service.errors import BundleError, ExportError
from service.features import log_mel
from service.recogniser import Recogniser, load_recogniser
from service.rescorer import Rescorer
from service.rescoring import RescoringDecoder, describe_readings
from service.scoring import count_errors
from service.tuning import Item, ReadingList, fit_rescoring, score_readings, tune_bundle

_TEXTS = ("a bad cab", "a dab", "", "add a bead")
_N_BEST = 12


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rescorer")
    save_language_model(folder / "model.pt")
    export_rescorer(folder / "model.pt", folder / RESCORER_GRAPH)
    return folder / RESCORER_GRAPH


@pytest.fixture(scope="module")
def rescorer(graph: Path) -> Rescorer:
    return Rescorer(graph)


@pytest.fixture(scope="module")
def lm(shipped_bundle: Path) -> NgramModel:
    ngram = load_bundle(shipped_bundle).ngram
    assert ngram is not None
    return load_ngram(ngram)


@pytest.fixture(scope="module")
def rescoring_bundle(
    shipped_bundle: Path, graph: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The shipped bundle and a recurrent model that has learned nothing."""
    folder = tmp_path_factory.mktemp("bundles") / "rescoring"
    shutil.copytree(shipped_bundle, folder)
    shutil.copy(graph, folder / RESCORER_GRAPH)
    config = json.loads((folder / CONFIG_NAME).read_text())
    config["files"][RESCORER_GRAPH] = hash_file(graph)
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def search(recogniser: Recogniser) -> BeamDecoder:
    decoder = recogniser.decoder("beam")
    assert isinstance(decoder, BeamDecoder)
    return decoder


@pytest.fixture(scope="module")
def emission(recogniser: Recogniser, waveforms: list[FloatArray]) -> FloatArray:
    """What the search reads of a clip."""
    heard = recogniser.emission(log_mel(waveforms[0], recogniser.features))
    return heard[:, recogniser.columns("beam")]


def test_readings_are_described_by_both_models_and_their_words(
    rescorer: Rescorer, lm: NgramModel
) -> None:
    readings = [text.split() for text in _TEXTS]
    features = describe_readings(readings, rescorer, lm)
    assert features.shape == (len(_TEXTS), 3)
    np.testing.assert_allclose(features[:, 0], rescorer.score(readings))
    assert features[1, 1] == pytest.approx(np.log(10) * sum(lm.score(["a", "dab"])), rel=1e-6)
    assert features[:, 2].tolist() == [3, 2, 0, 3]


def test_score_is_the_sum_of_both_passes(
    search: BeamDecoder, emission: FloatArray, rescorer: Rescorer, lm: NgramModel
) -> None:
    settings = RescoringSettings(
        n_best=_N_BEST, margin=1e9, recurrent_weight=0.7, ngram_weight=-0.2, word_score=1.5
    )
    found = search.decode(emission, n_best=_N_BEST)
    features = describe_readings([reading.text.split() for reading in found], rescorer, lm)
    expected = features @ [0.7, -0.2, 1.5] + [reading.score for reading in found]
    order = np.argsort(-expected)
    assert order[0] != 0
    rescored = RescoringDecoder(search, rescorer, lm, settings).decode(emission, n_best=_N_BEST)
    np.testing.assert_allclose([reading.score for reading in rescored], expected[order], rtol=1e-6)
    assert [reading.words for reading in rescored] == [found[i].words for i in order]
    (best,) = RescoringDecoder(search, rescorer, lm, settings).decode(emission)
    assert best == rescored[0]


def test_readings_far_behind_the_best_stay_behind(
    search: BeamDecoder, emission: FloatArray, rescorer: Rescorer, lm: NgramModel
) -> None:
    found = search.decode(emission, n_best=_N_BEST)
    margin = found[0].score - found[4].score + 1e-6
    settings = RescoringSettings(
        n_best=_N_BEST, margin=margin, recurrent_weight=0.7, ngram_weight=-0.2, word_score=1.5
    )
    rescored = RescoringDecoder(search, rescorer, lm, settings).decode(emission, n_best=_N_BEST)
    texts = [reading.text for reading in rescored]
    assert sorted(texts[:5]) == sorted(reading.text for reading in found[:5])
    assert texts[:5] != [reading.text for reading in found[:5]]
    assert texts[5:] == [reading.text for reading in found[5:]]
    scores = [reading.score for reading in rescored]
    assert scores == sorted(scores, reverse=True)


def test_without_weights_nothing_changes(
    search: BeamDecoder, emission: FloatArray, rescorer: Rescorer, lm: NgramModel
) -> None:
    decoder = RescoringDecoder(search, rescorer, lm, RescoringSettings(recurrent_weight=0.0))
    expected = search.decode(emission, n_best=_N_BEST)
    assert decoder.decode(emission, n_best=_N_BEST) == expected
    more = RescoringDecoder(search, rescorer, lm, RescoringSettings(n_best=2, recurrent_weight=0.0))
    assert more.decode(emission, n_best=_N_BEST) == expected  # more are wanted than are ranked


def test_phrases_count_before_the_second_pass(
    search: BeamDecoder, emission: FloatArray, rescorer: Rescorer, lm: NgramModel
) -> None:
    decoder = RescoringDecoder(search, rescorer, lm, RescoringSettings(recurrent_weight=0.0))
    best, *others = search.decode(emission, n_best=_N_BEST)
    wanted = {word for other in others for word in other.text.split()}
    phrases = [Phrase(word, 20.0) for word in sorted(wanted - set(best.text.split()))]
    assert phrases
    assert decoder.decode(emission, phrases=phrases) == search.decode(emission, phrases=phrases)
    assert decoder.decode(emission, phrases=phrases) != search.decode(emission)


def test_interim_results_are_the_searchs(
    search: BeamDecoder, emission: FloatArray, rescorer: Rescorer, lm: NgramModel
) -> None:
    decoder = RescoringDecoder(search, rescorer, lm, RescoringSettings(recurrent_weight=9.0))
    ours, theirs = decoder.open(), search.open()
    assert ours is not None
    assert ours.read(emission, n_settled=20) == theirs.read(emission, n_settled=20)


def test_emission_without_frames_has_no_words(
    search: BeamDecoder, emission: FloatArray, rescorer: Rescorer, lm: NgramModel
) -> None:
    decoder = RescoringDecoder(search, rescorer, lm, RescoringSettings())
    assert decoder.decode(emission[:0])[0].text == ""


def test_bundle_with_a_rescorer_has_the_decoder(
    rescoring_bundle: Path, waveforms: list[FloatArray]
) -> None:
    recogniser = load_recogniser(rescoring_bundle)
    assert "rescored" in recogniser.decoders
    assert recogniser.best_decoder == "rescored"
    assert list(load_recogniser(rescoring_bundle, decoders="best").decoders) == ["rescored"]
    (found,) = recogniser.recognise(waveforms[0], decoder="beam", n_best=100)
    (rescored,) = recogniser.recognise(waveforms[0], decoder="rescored", n_best=100)
    by_beam, by_both = (
        [reading.transcript for reading in segment.alternatives] for segment in (found, rescored)
    )
    assert sorted(by_both) == sorted(by_beam)
    assert by_both != by_beam
    scores = [reading.score for reading in rescored.alternatives]
    assert scores == sorted(scores, reverse=True)


def test_bundle_without_a_rescorer_refuses_it(shipped_bundle: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(shipped_bundle, plain)
    config = json.loads((plain / CONFIG_NAME).read_text())
    config["files"].pop(RESCORER_GRAPH, None)
    (plain / CONFIG_NAME).write_text(json.dumps(config))
    recogniser = load_recogniser(plain)
    assert "rescored" not in recogniser.decoders
    assert recogniser.best_decoder == "beam"
    assert list(load_recogniser(plain, decoders="best").decoders) == ["beam"]
    assert load_recogniser(plain, decoders=("greedy",)).best_decoder == "greedy"
    with pytest.raises(BundleError, match=r"no recurrent language model.*--rescorer"):
        load_recogniser(plain, decoders=("rescored",))


def test_export_refuses_a_rescorer_that_nothing_is_found_for(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="--lm"):
        export_bundle(
            tmp_path / "last.pt",
            tmp_path / "bundle",
            name="x",
            language="en",
            rescorer=tmp_path / "best.pt",
        )
    assert not (tmp_path / "bundle").exists()


# Weights


def _read(text: str, score: float) -> Hypothesis:
    words = tuple(Word(w, float(i), i + 1.0, 0.5) for i, w in enumerate(text.split()))
    return Hypothesis(words, score)


def _item(speaker: str, reference: str) -> Item:
    return Item(speaker, "corpus", reference, {})


def test_weights_are_those_that_make_fewest_errors(rescorer: Rescorer, lm: NgramModel) -> None:
    likely, unlikely = sorted(_TEXTS[:2], key=lambda t: -rescorer.score([t.split()])[0])
    found = [_read(unlikely, -1.0), _read(likely, -1.5)]
    items = [_item(f"speaker {i}", likely) for i in range(8)]
    lists = [score_readings(item, found, rescorer, lm) for item in items]
    lines: list[str] = []
    weights = fit_rescoring(items, lists, lines.append)
    names = ("recurrent_weight", "ngram_weight", "word_score")
    assert lists[0].choose((weights[names[0]], weights[names[1]], weights[names[2]])).n_errors == 0
    assert lists[0].choose((0.0, 0.0, 0.0)).n_errors > 0
    assert "WER 0.00% (0.0% to 0.0%) on all" in lines[-2]
    assert "oracle" in lines[-2]


def test_weights_that_change_nothing_are_zero() -> None:
    items = [_item("a", "one"), _item("b", "two")]
    empty = np.zeros((2, 3))
    readings = [[_read("one", -1), _read("won", -2)], [_read("two", -1), _read("too", -2)]]
    lists = [
        ReadingList(
            errors=[count_errors([item.reference], [reading.text]) for reading in found],
            searched=np.array([reading.score for reading in found]),
            features=empty,
        )
        for item, found in zip(items, readings, strict=True)
    ]
    weights = fit_rescoring(items, lists, lambda _: None)
    assert weights == {"recurrent_weight": 0.0, "ngram_weight": 0.0, "word_score": 0.0}


def test_tuning_fits_the_second_pass(rescoring_bundle: Path) -> None:
    lines: list[str] = []
    settings = tune_bundle(
        rescoring_bundle,
        CHECKOUT / "examples" / "manifest.jsonl",
        alphas=[0.7],
        betas=[0.5],
        on_line=lines.append,
    )
    assert sum("rescored: cross-fitted WER" in line for line in lines) == 2  # a corpus, and all
    assert (
        settings.rescoring.n_best == load_bundle(rescoring_bundle).config.decoding.rescoring.n_best
    )
    assert settings.rescoring.recurrent_weight <= 0.3  # it has learned nothing
