"""A domain file becomes a folder that is listened to."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.domain import build_domain
from service.domain import load_domain
from service.errors import ExportError, TrainingError
from service.understanding import spans

_LIGHTS = """
name: lights
n_samples: 400
intents:
  turnOn: {templates: ["[turn|switch] on the {room} [light|lights]"]}
  turnOff: {templates: ["[turn|switch] off the {room} [light|lights] (please)"]}
slots:
  room: [kitchen, {Living Room: [lounge]}, zanzibarium]
"""


def test_domain_is_built_from_text_alone(shipped_bundle: Path, tmp_path: Path) -> None:
    source = tmp_path / "lights.yaml"
    source.write_text(_LIGHTS, encoding="utf-8")
    (tmp_path / "lights").mkdir()
    (tmp_path / "lights" / "config.json").write_text("{}")  # an older one is replaced
    report = build_domain(source, tmp_path / "lights", shipped_bundle)
    assert report.folder == tmp_path / "lights"
    assert 20 < report.n_sentences <= 2 * 2 * 4 * 2 * 2
    domain = load_domain(tmp_path / "lights")
    assert domain.lexicon is not None
    assert domain.lexicon["zanzibarium"][0]  # which no dictionary has
    words = "switch off the lounge light please".split()
    parse = domain.understander.understand(words)
    assert parse.intent == "turnOff"
    assert spans(parse.labels) == [("room", 3, 4)]
    found = domain.interpret([words], [0.9])
    assert (found.intent, found.slots[0].value) == ("turnOff", "Living Room")
    assert domain.interpret([["many", "years", "ago", "she", "wrote"]], [0.9]).intent == ""
    assert domain.lm.score(words)[3] > domain.lm.score([*words[:3], "years"])[3]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_nothing_is_written_where_something_else_is(shipped_bundle: Path, tmp_path: Path) -> None:
    source = tmp_path / "lights.yaml"
    source.write_text(_LIGHTS, encoding="utf-8")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ExportError, match="is no domain"):
        build_domain(source, tmp_path / "mine", shipped_bundle)
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


def test_file_that_cannot_be_used_leaves_nothing(shipped_bundle: Path, tmp_path: Path) -> None:
    source = tmp_path / "lights.yaml"
    source.write_text(_LIGHTS.replace("{room}", "{rum}"), encoding="utf-8")
    with pytest.raises(TrainingError, match="no slot 'rum'"):
        build_domain(source, tmp_path / "lights", shipped_bundle)
    assert not (tmp_path / "lights").exists()
