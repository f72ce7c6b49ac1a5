"""Sentences of a domain: what a template says, and what is wrong with one that says nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.errors import TrainingError
from training.grammar import load_grammar
from training.slot_data import LabelledSentence

_COUNTER = """
name: counter
intents:
  order:
    templates:
      - "[I want|get me] a ({size}) ({roast}) {drink} (with {milk}) (and {sugar})"
    any_order: [size, roast]
slots:
  size: [small, Eight Ounce]
  roast: [dark roast]
  drink: [latte, {flat white: [flattie]}]
  milk:
    quantities: ["", a lot of]
    values: [Skim milk]
  sugar: [sugar]
"""


def _write(folder: Path, text: str) -> Path:
    path = folder / "domain.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def _sample(folder: Path, text: str, n: int = 500) -> list[LabelledSentence]:
    return list(load_grammar(_write(folder, text)).sample(n))


def test_everything_that_can_be_said_is_said(tmp_path: Path) -> None:
    said = {" ".join(sentence.words) for sentence in _sample(tmp_path, _COUNTER)}
    assert "i want a latte" in said
    assert "get me a flattie" in said
    assert any("small dark roast" in sentence for sentence in said)
    assert any("dark roast small" in sentence for sentence in said)
    assert any(s.endswith("with a lot of skim milk and sugar") for s in said)
    assert all(" with " in s for s in said if " and " in s)


def test_labels_mark_the_words_of_each_slot(tmp_path: Path) -> None:
    sentences = {s.words: s for s in _sample(tmp_path, _COUNTER)}
    words = ("get", "me", "a", "eight", "ounce", "latte", "with", "a", "lot", "of", "skim", "milk")
    found = sentences[words]
    assert found.intent == "order"
    assert found.labels == (
        "O", "O", "O", "B-size", "I-size", "B-drink", "O",
        "B-milk", "I-milk", "I-milk", "I-milk", "I-milk",
    )  # fmt: skip


def test_values_are_written_as_in_the_file_with_quantity_and_without_synonyms(
    tmp_path: Path,
) -> None:
    values = load_grammar(_write(tmp_path, _COUNTER)).values
    written = {(name, " ".join(v.words)): v.value for name, ways in values.items() for v in ways}
    assert written["drink", "flattie"] == "flat white"
    assert written["milk", "a lot of skim milk"] == "a lot of Skim milk"
    assert written["size", "eight ounce"] == "Eight Ounce"


def test_equal_seeds_draw_equal_sentences(tmp_path: Path) -> None:
    grammar = load_grammar(_write(tmp_path, _COUNTER))
    assert list(grammar.sample(50, seed=3)) == list(grammar.sample(50, seed=3))
    assert list(grammar.sample(50, seed=3)) != list(grammar.sample(50, seed=4))


def test_annotated_sentences_stand_beside_templates(tmp_path: Path) -> None:
    (tmp_path / "more.jsonl").write_text(
        '{"text": "one tea", "slots": [{"name": "drink", "begin": 1, "end": 2}], "intent": "tea"}\n'
    )
    grammar = load_grammar(_write(tmp_path, "name: tea\nsentences: more.jsonl\n"))
    assert grammar.annotated == (LabelledSentence(("one", "tea"), ("O", "B-drink"), "tea"),)
    assert list(grammar.sample(10)) == []


def _with_template(template: str) -> str:
    return f"name: x\nintents: {{a: {{templates: ['{template}']}}}}\nslots: {{size: [small]}}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (_with_template("a {colour} cup"), r"no slot 'colour'; this domain has size"),
        (_with_template("a (small cup"), r"character 13: expected '\)'"),
        (_with_template("a [small|big cup"), r"expected '\]'"),
        (_with_template("a small] cup"), r"'\]' closes nothing"),
        (_with_template("a small | big"), r"'\|' stands outside"),
        (_with_template("a {size cup"), r"no slot 'size cup'"),
        ("name: x\n", "has no intents"),
        ("name: ../x\n", "name: String should match"),
        ("name: x\nslots: {size: []}\nsurprise: 1\n", "surprise: Extra"),
        ("name: x\nslots: {size: ['!']}\n", "slot size has the value '!', expected words"),
        ("name: [", "cannot read the domain"),
    ],
)
def test_a_domain_that_cannot_be_is_refused_with_the_place(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        load_grammar(_write(tmp_path, text))
