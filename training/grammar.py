"""A domain's sentences, written as templates: what can be said, and what it means.

A template is words with `[a|b]` for one of several, `(x)` for what may be left out and `{slot}` for
a value of a slot; the signs may be nested. An optional part that begins with "and" is said only
where the optional part before it is.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.errors import TrainingError
from service.text import normalise
from training.slot_data import LabelledSentence, read_sentences

OUTSIDE: Final = "O"
_OPTIONAL_SHARE: Final = 0.5
_JOINING: Final = "and"
_CLOSING: Final = {"[": "]", "(": ")", "{": "}"}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class IntentSpec(_Part):
    """What one intent is said like."""

    templates: tuple[str, ...] = Field(min_length=1)
    """Sentences, see above."""
    any_order: tuple[str, ...] = ()
    """Slots whose optional parts may stand in any order among themselves."""


class SlotSpec(_Part):
    """What fills one slot."""

    values: tuple[str | dict[str, tuple[str, ...]], ...] = Field(min_length=1)
    """Values as they are written in results; `value: [other, forms]` names what else is said."""
    quantities: tuple[str, ...] = ("",)
    """What may stand before a value, part of it in the result; empty for nothing."""


class DomainSpec(_Part):
    """A domain file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Name by which requests choose it."""
    intents: dict[str, IntentSpec] = {}
    """By name."""
    slots: dict[str, SlotSpec | tuple[str | dict[str, tuple[str, ...]], ...]] = {}
    """By name; a list is the values alone."""
    sentences: Path | None = None
    """Annotated sentences, beside the templates: a file or folder, relative to this one."""
    general_weight: float = Field(default=0.003, ge=0, lt=1)
    """Share of the language model that any other word of the bundle has."""
    n_samples: int = Field(default=20_000, ge=100)
    """Sentences drawn from the templates."""


@dataclass(frozen=True)
class SlotValue:
    """One way to say a value."""

    words: tuple[str, ...]
    """As they are spoken, normalised."""
    value: str
    """As results have it."""


@dataclass(frozen=True)
class _Slot:
    name: str


@dataclass(frozen=True)
class _Optional:
    inside: _Sequence


@dataclass(frozen=True)
class _Choice:
    options: tuple[_Sequence, ...]


_Item = str | _Slot | _Optional | _Choice
_Sequence = tuple[_Item, ...]


@dataclass(frozen=True)
class Grammar:
    """What can be said in a domain."""

    spec: DomainSpec
    values: Mapping[str, tuple[SlotValue, ...]]
    """Of each slot."""
    templates: tuple[tuple[str, _Sequence], ...]
    """Intents and their sentences."""
    annotated: tuple[LabelledSentence, ...]
    """Sentences that are given as they are."""

    def sample(self, n: int, *, seed: int = 1) -> Iterator[LabelledSentence]:
        """Draw sentences: templates in turn, everything else by chance."""
        draw = random.Random(seed)
        for i in range(n if self.templates else 0):
            intent, items = self.templates[i % len(self.templates)]
            words: list[str] = []
            labels: list[str] = []
            any_order = self.spec.intents[intent].any_order
            for word, label in self._say(_shuffle(items, any_order, draw), draw):
                words.append(word)
                labels.append(label)
            if words:
                yield LabelledSentence(tuple(words), tuple(labels), intent)

    def _say(self, items: _Sequence, draw: random.Random) -> Iterator[tuple[str, str]]:
        """Words and their labels."""
        was_said = True
        for item in items:
            if isinstance(item, str):
                yield item, OUTSIDE
            elif isinstance(item, _Slot):
                words = draw.choice(self.values[item.name]).words
                for i, word in enumerate(words):
                    yield word, f"{'I' if i else 'B'}-{item.name}"
            elif isinstance(item, _Choice):
                yield from self._say(draw.choice(item.options), draw)
            else:
                follows = item.inside[:1] == (_JOINING,)
                was_said = (was_said or not follows) and draw.random() < _OPTIONAL_SHARE
                if was_said:
                    yield from self._say(item.inside, draw)


def load_grammar(path: Path) -> Grammar:
    """Read a domain file.

    Raises:
        TrainingError: it cannot be read, or says what cannot be; the message names the place.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        spec = DomainSpec.model_validate(tree)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TrainingError(f"cannot read the domain {path}: {error}") from error
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'domain'}: {e['msg']}" for e in error.errors()
        )
        raise TrainingError(f"the domain {path} does not fit: {problems}") from error
    values = {name: tuple(_spoken(name, slot)) for name, slot in spec.slots.items()}
    templates = tuple(
        (name, _Template(text, name, values).read())
        for name, intent in spec.intents.items()
        for text in intent.templates
    )
    annotated: Sequence[LabelledSentence] = ()
    if spec.sentences is not None:
        annotated = read_sentences(path.parent / spec.sentences)
    if not templates and not annotated:
        raise TrainingError(f"the domain {path} has no intents; expected templates or sentences")
    return Grammar(spec, values, templates, tuple(annotated))


def _spoken(name: str, slot: SlotSpec | tuple[Any, ...]) -> Iterator[SlotValue]:
    """Every way to say every value of a slot."""
    spec = slot if isinstance(slot, SlotSpec) else SlotSpec(values=slot)
    for entry in spec.values:
        ways = {entry: ()} if isinstance(entry, str) else entry
        for value, others in ways.items():
            for way in (value, *others):
                for quantity in spec.quantities:
                    words = tuple(normalise(f"{quantity} {way}").split())
                    if not words:
                        raise TrainingError(f"slot {name} has the value {way!r}, expected words")
                    yield SlotValue(words, f"{quantity} {value}".strip())


class _Template:
    """Reads one template."""

    def __init__(self, text: str, intent: str, slots: Mapping[str, object]) -> None:
        self._text = text
        self._intent = intent
        self._slots = slots
        self._at = 0

    def read(self) -> _Sequence:
        items = self._sequence("")
        if self._at < len(self._text):
            raise self._error(f"{self._text[self._at]!r} closes nothing")
        return items

    def _sequence(self, ends: str) -> _Sequence:
        """Items up to one of some signs, which is left."""
        items: list[_Item] = []
        while self._at < len(self._text) and self._text[self._at] not in f"{ends}])}}":
            sign = self._text[self._at]
            if sign == "|":
                raise self._error("'|' stands outside of [ ]")
            if sign not in _CLOSING:
                items += normalise(self._take_until("[({])}|")).split()
                continue
            self._at += 1
            if sign == "{":
                items.append(self._slot(self._take_until("}").strip()))
            elif sign == "(":
                items.append(_Optional(self._sequence(")")))
            else:
                options = [self._sequence("|]")]
                while self._peek() == "|":
                    self._at += 1
                    options.append(self._sequence("|]"))
                items.append(_Choice(tuple(options)))
            if self._peek() != _CLOSING[sign]:
                raise self._error(f"expected {_CLOSING[sign]!r}")
            self._at += 1
        return tuple(items)

    def _slot(self, name: str) -> _Slot:
        if name not in self._slots:
            known = ", ".join(self._slots) or "no slots"
            raise self._error(f"there is no slot {name!r}; this domain has {known}")
        return _Slot(name)

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _take_until(self, signs: str) -> str:
        begin = self._at
        while self._at < len(self._text) and self._text[self._at] not in signs:
            self._at += 1
        return self._text[begin : self._at]

    def _error(self, what: str) -> TrainingError:
        return TrainingError(
            f"intent {self._intent}, template {self._text!r}, character {self._at + 1}: {what}"
        )


def _shuffle(items: _Sequence, any_order: Sequence[str], draw: random.Random) -> _Sequence:
    """Exchange the optional parts that hold one slot of `any_order` each."""
    places = [
        i
        for i, item in enumerate(items)
        if isinstance(item, _Optional) and any(slot.name in any_order for slot in _slots(item))
    ]
    order = places.copy()
    draw.shuffle(order)
    shuffled = list(items)
    for place, source in zip(places, order, strict=True):
        shuffled[place] = items[source]
    return tuple(shuffled)


def _slots(item: _Optional) -> list[_Slot]:
    return [inner for inner in item.inside if isinstance(inner, _Slot)]
