"""Labelled sentences: read from disk, varied in training by other slot values and misheard words.

Two layouts are read. A folder holds `seq.in` (words), `seq.out` (a BIO label a word) and `label`
(the intent), line by line. A JSON-lines file holds objects such as
`{"text": "play some jazz", "slots": [{"name": "genre", "begin": 2, "end": 3}], "intent": "Play"}`,
where `begin` is a slot's first word and `end` the word behind its last.
"""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.errors import TrainingError
from service.understanding import OUTSIDE, may_follow, spans
from training.g2p import edit_distance
from training.lexicon import Dictionary

Confusions = Mapping[str, tuple[str, ...]]
"""Words, and what a recogniser may hear instead of each."""

_FILES: Final = ("seq.in", "seq.out", "label")
_PARTS: Final[Mapping[str, tuple[str, ...]]] = {
    "train": ("train",),
    "dev": ("valid", "dev"),
    "test": ("test",),
}
_WORD: Final = re.compile(r"[^ \t\r\n]+")
_LABEL: Final = re.compile(r"O|[BI]-.+")
_DELETED_SHARE: Final = 0.15
_INSERTED_SHARE: Final = 0.15
_MOST_NEIGHBOURS: Final = 8
_FARTHEST_PHONES: Final = 2


@dataclass(frozen=True)
class LabelledSentence:
    """An utterance and what it means."""

    words: tuple[str, ...]
    """Its words, at least one."""
    labels: tuple[str, ...]
    """BIO label of each word; an `I-` continues a slot of its name."""
    intent: str
    """Its intent, taken whole even where it names several, as in `a#b`."""

    def __post_init__(self) -> None:
        if not self.words or len(self.words) != len(self.labels):
            raise ValueError(
                f"{len(self.words)} words and {len(self.labels)} labels; expected as many labels "
                "as words, and at least one"
            )
        wrong = [label for label in self.labels if not _LABEL.fullmatch(label)]
        if wrong:
            raise ValueError(f"the label {wrong[0]!r}; expected O, B-name or I-name")


@dataclass(frozen=True)
class Parts:
    """The usual three parts of a data set; one that is not there is empty."""

    train: tuple[LabelledSentence, ...]
    """Trained on."""
    dev: tuple[LabelledSentence, ...]
    """Choose the pass that is kept."""
    test: tuple[LabelledSentence, ...]
    """Measure what is reported."""


def read_parts(folder: Path) -> Parts:
    """Read a folder with the parts `train`, `valid` (or `dev`) and `test`.

    A part is a folder of that name, or a file of that name that ends in `.jsonl`.

    Raises:
        TrainingError: there is no such part, or one cannot be read.
    """
    found = {part: _find_part(folder, names) for part, names in _PARTS.items()}
    if not any(found.values()):
        raise TrainingError(
            f"{folder} has no train, valid or test in it; expected folders of these names with "
            f"{', '.join(_FILES)}, or files such as train.jsonl"
        )
    return Parts(
        **{part: tuple(read_sentences(path)) if path else () for part, path in found.items()}
    )


def read_sentences(path: Path) -> list[LabelledSentence]:
    """Read one part of a data set, in either layout.

    An `I-` that continues nothing becomes a `B-`: the chunks stay what `conlleval` sees.

    Args:
        path: a folder with `seq.in`, `seq.out` and `label`, or a JSON-lines file.

    Raises:
        TrainingError: a file is missing or a line is wrong; the message names both.
    """
    sentences = list(_read_folder(path) if path.is_dir() else _read_json_lines(path))
    if not sentences:
        raise TrainingError(f"{path} has no sentences; expected at least one")
    return sentences


def repair_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """Labels of the same chunks in which every `I-` continues a slot of its name."""
    repaired: list[str] = []
    for label in labels:
        before = repaired[-1] if repaired else None
        repaired.append(label if may_follow(label, before) else f"B-{label[2:]}")
    return tuple(repaired)


# Reading


def _find_part(folder: Path, names: Sequence[str]) -> Path | None:
    candidates = [folder / name for name in names] + [folder / f"{name}.jsonl" for name in names]
    return next((path for path in candidates if path.exists()), None)


def _read_folder(folder: Path) -> Iterator[LabelledSentence]:
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise TrainingError(
            f"{folder} lacks {', '.join(missing)}; expected the files {', '.join(_FILES)}: name "
            "the folder of one part, such as its train"
        )
    columns = [_read_lines(folder / name) for name in _FILES]
    n_lines = [len(column) for column in columns]
    if len(set(n_lines)) > 1:
        counts = ", ".join(f"{name} {n}" for name, n in zip(_FILES, n_lines, strict=True))
        raise TrainingError(f"{folder} has lines: {counts}; expected as many in each file")
    for number, (text, tags, intent) in enumerate(zip(*columns, strict=True), 1):
        words, labels = tuple(_WORD.findall(text)), tuple(_WORD.findall(tags))
        if not (words or labels or intent):
            continue
        yield _make_sentence(
            words, labels, intent, place=f"{folder}, line {number} of {', '.join(_FILES)}"
        )


def _read_lines(path: Path) -> list[str]:
    """Stripped lines; only a line feed ends one, and blank ones at the end are left out."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"cannot read {path}: {error}; expected text in UTF-8") from error
    lines = [line.strip(" \t\r") for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _make_sentence(
    words: tuple[str, ...], labels: tuple[str, ...], intent: str, *, place: str
) -> LabelledSentence:
    if not intent:
        raise TrainingError(f"{place}: no intent; expected its name")
    try:
        sentence = LabelledSentence(words=words, labels=labels, intent=intent)
    except ValueError as error:
        raise TrainingError(f"{place}: {error}") from error
    return LabelledSentence(words=words, labels=repair_labels(sentence.labels), intent=intent)


class _Slot(BaseModel):
    model_config = ConfigDict(strict=True)

    name: Annotated[str, Field(min_length=1)]
    begin: Annotated[int, Field(ge=0)]
    end: int


class _Line(BaseModel):
    model_config = ConfigDict(strict=True)

    text: str
    slots: list[_Slot] = []
    intent: str


def _read_json_lines(path: Path) -> Iterator[LabelledSentence]:
    for number, text in enumerate(_read_lines(path), 1):
        if not text:
            continue
        place = f"{path}, line {number}"
        try:
            line = _Line.model_validate_json(text)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"])) or "line"
            raise TrainingError(
                f"{place}: {where}: {problem['msg']}, not {_shorten(problem['input'])}; expected "
                '{"text": …, "slots": [{"name": …, "begin": …, "end": …}], "intent": …}'
            ) from error
        words = tuple(_WORD.findall(line.text))
        yield _make_sentence(words, _label(words, line.slots, place), line.intent, place=place)


def _label(words: Sequence[str], slots: Iterable[_Slot], place: str) -> tuple[str, ...]:
    labels = [OUTSIDE] * len(words)
    for slot in slots:
        if not slot.begin < slot.end <= len(words):
            raise TrainingError(
                f"{place}: slot {slot.name} from word {slot.begin} to {slot.end} of {len(words)}; "
                "expected begin < end, and end at most the number of words"
            )
        if set(labels[slot.begin : slot.end]) != {OUTSIDE}:
            raise TrainingError(
                f"{place}: slot {slot.name} from word {slot.begin} to {slot.end} overlaps another; "
                "expected each word in one slot at most"
            )
        inside = [f"I-{slot.name}"] * (slot.end - slot.begin - 1)
        labels[slot.begin : slot.end] = [f"B-{slot.name}", *inside]
    return tuple(labels)


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def read_confusions(path: Path) -> Confusions:
    """Read a JSON object: a word, and the list of words that may be heard instead.

    Raises:
        TrainingError: the file cannot be read or holds something else.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"cannot read the confusions {path}: {error}") from error
    if not isinstance(tree, dict) or not all(map(_is_word_list, tree.values())):
        raise TrainingError(f'{path} holds no confusions; expected {{"word": ["neighbour", …], …}}')
    return {word: tuple(neighbours) for word, neighbours in tree.items() if neighbours}


def _is_word_list(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) and entry for entry in value)


# Slot values


def collect_values(sentences: Iterable[LabelledSentence]) -> Mapping[str, list[tuple[str, ...]]]:
    """The different values of each slot, sorted."""
    values: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for sentence in sentences:
        for name, begin, end in spans(sentence.labels):
            values[name].add(sentence.words[begin:end])
    return {name: sorted(found) for name, found in sorted(values.items())}


def swap_values(
    sentence: LabelledSentence,
    values: Mapping[str, Sequence[tuple[str, ...]]],
    *,
    probability: float,
    draw: random.Random,
) -> LabelledSentence:
    """Replace each slot's value, with some probability, by another of the same slot."""
    words: list[str] = []
    labels: list[str] = []
    behind = 0
    for name, begin, end in spans(sentence.labels):
        value = sentence.words[begin:end]
        if name in values and draw.random() < probability:
            value = draw.choice(values[name])
        words += [*sentence.words[behind:begin], *value]
        labels += [*sentence.labels[behind:begin], f"B-{name}", *[f"I-{name}"] * (len(value) - 1)]
        behind = end
    words += sentence.words[behind:]
    labels += sentence.labels[behind:]
    return LabelledSentence(tuple(words), tuple(labels), sentence.intent)


# Misheard words


def mishear(
    sentence: LabelledSentence,
    confusions: Confusions,
    *,
    probability: float,
    vocabulary: Sequence[str],
    draw: random.Random,
) -> LabelledSentence:
    """Make the errors of a recogniser; the labels follow the words.

    Args:
        sentence: what was said.
        confusions: words and what is heard instead; other words become any word.
        probability: of an error at a word: 70 % replaced, 15 % deleted, 15 % followed by another.
        vocabulary: words to insert, and to take for words without confusions.
        draw: source of the draws.
    """
    heard: list[tuple[str, str]] = []
    for place, (word, label) in enumerate(zip(sentence.words, sentence.labels, strict=True)):
        if draw.random() >= probability:
            heard.append((word, label))
            continue
        kind = draw.random()
        if kind < _DELETED_SHARE:
            continue
        if kind < _DELETED_SHARE + _INSERTED_SHARE:
            heard += [(word, label), (draw.choice(vocabulary), _label_behind(sentence, place))]
        else:
            heard.append((draw.choice(confusions.get(word) or vocabulary), label))
    if not heard:
        return sentence
    words, labels = zip(*heard, strict=True)
    return LabelledSentence(words, repair_labels(labels), sentence.intent)


def _label_behind(sentence: LabelledSentence, place: int) -> str:
    """The label of a word that is inserted behind another: inside a slot that goes on."""
    following = sentence.labels[place + 1 : place + 2]
    return following[0] if following and following[0].startswith("I-") else OUTSIDE


def find_confusions(words: Iterable[str], dictionary: Dictionary) -> Confusions:
    """Words of the dictionary that sound almost like each word: at most two phones apart.

    Two pronunciations are compared if they are equal after each has lost at most one phone, which
    finds every substitution, deletion and insertion of one phone without comparing all pairs.
    """
    index: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for word, pronunciations in dictionary.items():
        for shortened in _shorten_phones(pronunciations[0]):
            index[shortened].append(word)
    found = {
        word: _nearest(word, index, dictionary) for word in sorted(set(words) & set(dictionary))
    }
    return {word: neighbours for word, neighbours in found.items() if neighbours}


def _shorten_phones(phones: tuple[str, ...]) -> set[tuple[str, ...]]:
    return {phones, *(phones[:i] + phones[i + 1 :] for i in range(len(phones)))}


def _nearest(
    word: str, index: Mapping[tuple[str, ...], list[str]], dictionary: Dictionary
) -> tuple[str, ...]:
    phones = dictionary[word][0]
    others = {other for key in _shorten_phones(phones) for other in index.get(key, ())} - {word}
    ranked = sorted((edit_distance(dictionary[other][0], phones), other) for other in others)
    near = [other for distance, other in ranked if distance <= min(_FARTHEST_PHONES, len(phones))]
    return tuple(near[:_MOST_NEIGHBOURS])
