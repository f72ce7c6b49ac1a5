"""Domains: built from text alone, understood in speech, refused where they do not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from service.domain import Domain, DomainConfig, find_domain, load_domain
from service.errors import BundleError
from service.recogniser import Recogniser, load_recogniser
from service.text import BLANK
from service.transcript import Transcript, write_as
from service.understanding import Parse


def _config(**changes: object) -> DomainConfig:
    values = {
        "format_version": 1,
        "name": "counter",
        "values": {"drink": {"latte": "latte", "flattie": "flat white"}},
        "files": {},
        **changes,
    }
    return DomainConfig.model_validate(values)


@dataclass
class Parser:
    """Knows some sentences."""

    known: Mapping[str, Parse] = field(default_factory=dict)

    def understand_many(self, sentences: list[list[str]]) -> list[Parse]:
        nothing = Parse("", 0.0, (), (), 0.0)
        return [self.known.get(" ".join(words), nothing) for words in sentences]


def _parse(intent: str, labels: str, confidence: float = 0.9) -> Parse:
    names = tuple(labels.split())
    return Parse(intent, confidence, names, (0.8,) * len(names), 0.0)


def _domain(known: Mapping[str, Parse], **changes: object) -> Domain:
    return Domain(_config(**changes), lm=None, lexicon=None, understander=Parser(known))  # type: ignore[arg-type]  # only the parser is asked


_ORDER = _parse("order", "O O B-drink")


def test_reading_that_makes_sense_is_chosen_before_a_better_one_that_does_not() -> None:
    domain = _domain({"get a latter": _ORDER, "get a flattie": _ORDER})
    readings = [["get", "a", "latter"], ["cat"], ["get", "a", "flattie"]]
    found = domain.interpret(readings, [0.9, 0.9, 0.9])
    assert (found.reading, found.intent) == (2, "order")
    (slot,) = found.slots
    assert (slot.name, slot.value, slot.begin, slot.end) == ("drink", "flat white", 2, 3)
    assert slot.confidence == 0.8


def test_value_that_is_none_of_the_slot_is_no_order() -> None:
    found = _domain({"get a latter": _ORDER}).interpret([["get", "a", "latter"]], [0.99])
    assert (found.intent, found.slots) == ("", ())
    assert found.confidence < 0.5


def test_slot_without_listed_values_takes_anything() -> None:
    found = _domain({"get a latter": _ORDER}, values={}).interpret([["get", "a", "latter"]], [0.9])
    assert found.slots[0].value == "latter"


def test_words_that_were_hardly_heard_are_no_order() -> None:
    domain = _domain({"get a latte": _ORDER})
    assert domain.interpret([["get", "a", "latte"]], [0.9]).intent == "order"
    assert domain.interpret([["get", "a", "latte"]], [0.3]).intent == ""
    assert (
        _domain({"get a latte": _ORDER}, least_confidence=0.1)
        .interpret([["get", "a", "latte"]], [0.3])
        .intent
    )


def test_nothing_that_is_known_gives_an_empty_intent_and_the_best_reading() -> None:
    found = _domain({}).interpret([["some", "words"], ["sum"]], [0.9, 0.9])
    assert (found.reading, found.intent, found.confidence, found.slots) == (0, "", 0.0, ())


def _write(folder: Path, **changes: object) -> Path:
    folder.mkdir()
    text = json.dumps({**json.loads(_config().model_dump_json()), **changes})
    (folder / "config.json").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 9}, "format version 9, this Voxgate reads 1; build the domain again"),
        ({"least_confidence": 2}, "least_confidence.*build the domain again"),
        ({"files": {"lm.ngram": "0"}}, r"lm\.ngram is missing"),
        ({}, r"lists no lm\.ngram; build the domain again"),
    ],
)
def test_folder_that_does_not_fit_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(BundleError, match=message):
        load_domain(_write(tmp_path / "counter", **changes))


def test_folder_without_config_is_no_domain(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is no domain"):
        load_domain(tmp_path)


@pytest.fixture(scope="module")
def barista(shipped_bundle: Path) -> Recogniser:
    folder = shipped_bundle / "domains" / "barista"
    loaded = load_recogniser(shipped_bundle, decoders=("greedy", "beam"), domains=[folder])
    return loaded.in_domain("barista")


def _spoken(barista: Recogniser, text: str) -> npt.NDArray[np.float32]:
    """An emission that has every phone of a text for three frames, and a blank behind it."""
    assert barista.domain is not None
    assert barista.domain.lexicon is not None
    phones = [p for word in text.split() for p in barista.domain.lexicon[word][0]]
    units = [barista.phones.index(phone) for phone in phones]
    path = [unit for phone in units for unit in (phone, phone, phone, BLANK)]
    emission = np.full((len(path), len(barista.tokens) + len(barista.phones)), -9.0, np.float32)
    emission[np.arange(len(path)), len(barista.tokens) + np.array(path)] = -0.05
    return emission


def test_order_that_is_spoken_clearly_is_understood_whole(barista: Recogniser) -> None:
    text = "can i get a small dark roast latte with a lot of skim milk and some sugar"
    emission = _spoken(barista, text)
    segment = barista.segment(emission, first_frame=100, decoder="beam", n_best=2)
    assert segment.alternatives[0].transcript == text
    assert len(segment.alternatives) <= 2
    assert segment.intent is not None
    assert segment.intent.name == "orderDrink"
    assert 0.5 < segment.intent.confidence <= 1
    assert {slot.name: slot.value for slot in segment.slots} == {
        "size": "small",
        "roast": "dark roast",
        "coffeeDrink": "latte",
        "milkAmount": "a lot of skim milk",
        "sugarAmount": "some sugar",
    }
    starts = [slot.start_s for slot in segment.slots]
    assert starts == sorted(starts)
    first_s = 100 * barista.frame_s
    assert all(first_s <= s.start_s < s.end_s <= segment.end_s and s.raw for s in segment.slots)


def test_json_has_what_was_meant_and_other_transcripts_do_not(
    barista: Recogniser, recogniser: Recogniser
) -> None:
    emission = _spoken(barista, "get me a mocha")
    understood = barista.segment(emission, first_frame=0, decoder="beam")
    row = json.loads(write_as(Transcript("x", 1.0, [understood]), "json"))
    assert row["intent"]["name"] == "orderDrink"
    (slot,) = row["slots"]
    assert (slot["name"], slot["value"], slot["raw"]) == ("coffeeDrink", "mocha", "mocha")
    assert set(slot) == {"name", "value", "raw", "start_s", "end_s", "confidence"}
    plain = recogniser.segment(emission, first_frame=0, decoder="beam")
    assert "intent" not in json.loads(write_as(Transcript("x", 1.0, [plain]), "json"))


def test_domain_by_its_folder_is_the_one_by_its_name(shipped_bundle: Path, tmp_path: Path) -> None:
    by_name = find_domain("barista", shipped_bundle)
    elsewhere = shutil.copytree(by_name, tmp_path / "moved")
    assert find_domain(str(elsewhere), shipped_bundle) == elsewhere
    assert load_domain(elsewhere).config == load_domain(by_name).config
    with pytest.raises(BundleError, match=r"no domain 'tea': .* has barista"):
        find_domain("tea", shipped_bundle)


def test_two_domains_of_one_name_are_refused(shipped_bundle: Path) -> None:
    folder = find_domain("barista", shipped_bundle)
    with pytest.raises(BundleError, match="second domain barista"):
        load_recogniser(shipped_bundle, decoders=("greedy",), domains=[folder, folder])


def test_domain_that_was_altered_is_refused(shipped_bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(find_domain("barista", shipped_bundle), tmp_path / "barista")
    (copy / "lm.ngram").write_bytes(b"other")
    with pytest.raises(BundleError, match=r"lm\.ngram was altered"):
        load_domain(copy)
