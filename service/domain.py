"""A domain: what a bundle is asked to listen for, and what it means.

A folder beside the bundle's own files, or anywhere: `config.json` with the hashes of the others, an
n-gram of what is said in the domain, the pronunciations of its words, and the model that finds the
intent and the slots. The acoustic model is the bundle's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

from service.bundle import CONFIG_NAME, FolderKind, read_config, read_lexicon
from service.decoding.ngram import NgramModel, load_ngram
from service.errors import BundleError
from service.understanding import Parse, Understander, spans

FORMAT_VERSION: Final = 1
DOMAINS_FOLDER: Final = "domains"
DOMAIN_LM: Final = "lm.ngram"
DOMAIN_LEXICON: Final = "lexicon.txt"
UNDERSTANDING_GRAPH: Final = "understanding.onnx"
_KIND: Final = FolderKind(
    "domain", FORMAT_VERSION, "voxgate domain build", "build the domain again"
)
READINGS: Final = 20
"""Readings of an utterance among which the first one that makes sense is chosen."""


class SearchChanges(BaseModel):
    """What a search in a domain does otherwise; None leaves it as the bundle has it.

    Few words can follow, so a search can afford to follow tokens that were hardly heard.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    beam_width: int | None = 200
    alpha: float | None = None
    beta: float | None = None
    beam_prune_log_prob: float | None = -20.0
    token_min_log_prob: float | None = -12.0


class DomainConfig(BaseModel):
    """`config.json` of a domain."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int
    """Layout of the folder and of this file."""
    name: str
    """Name by which requests choose it."""
    values: Mapping[str, Mapping[str, str]]
    """What may fill each slot, as it is spoken, and as results have it; nothing for anything."""
    least_confidence: Annotated[float, Field(ge=0, le=1)] = 0.5
    """An intent below this is left empty."""
    search: SearchChanges = SearchChanges()
    """How the searches differ from the bundle's."""
    files: Mapping[str, str]
    """SHA-256 of every other file, by path inside the folder."""


@dataclass(frozen=True)
class FilledSlot:
    """A slot and the words that fill it."""

    name: str
    value: str
    """In the words of the domain."""
    begin: int
    """Place of its first word in the reading."""
    end: int
    """Place behind its last word."""
    confidence: float
    """Between 0 and 1."""


@dataclass(frozen=True)
class Interpretation:
    """What an utterance means."""

    reading: int
    """Place of the reading that was chosen."""
    intent: str
    """Empty where nothing was asked for that the domain knows."""
    confidence: float
    """Between 0 and 1, that the intent is right."""
    slots: tuple[FilledSlot, ...]
    """In order; none without an intent."""


@dataclass(frozen=True)
class Domain:
    """A loaded domain."""

    config: DomainConfig
    lm: NgramModel
    lexicon: Mapping[str, tuple[tuple[str, ...], ...]] | None
    """Pronunciations of the words; None where the bundle has no phones."""
    understander: Understander

    def interpret(
        self, readings: Sequence[Sequence[str]], confidences: Sequence[float]
    ) -> Interpretation:
        """Choose the first reading that makes sense, and say what it means.

        Args:
            readings: words of each reading, best first, at least one.
            confidences: that the words of each are right.
        """
        parses = self.understander.understand_many(readings)
        found = list(map(self._fill, readings, parses))
        sensible = (
            i
            for i, slots in enumerate(found)
            if parses[i].intent and all(slot is not None for slot in slots)
        )
        chosen = next(sensible, 0)
        slots = tuple(slot for slot in found[chosen] if slot is not None)
        parse = parses[chosen]
        confidence = parse.intent_confidence * confidences[chosen]
        if len(slots) < len(found[chosen]):
            confidence *= self.config.least_confidence  # what fills a slot is no value of it
        if not parse.intent or confidence < self.config.least_confidence:
            return Interpretation(chosen, "", confidence if parse.intent else 0.0, ())
        return Interpretation(chosen, parse.intent, confidence, slots)

    def _fill(self, reading: Sequence[str], parse: Parse) -> list[FilledSlot | None]:
        """The slots of a reading; None for one that is filled by what is no value of it."""
        return [
            self._slot(name, begin, end, reading, parse) for name, begin, end in spans(parse.labels)
        ]

    def _slot(
        self, name: str, begin: int, end: int, reading: Sequence[str], parse: Parse
    ) -> FilledSlot | None:
        said = " ".join(reading[begin:end])
        values = self.config.values.get(name, {})
        if values and said not in values:
            return None
        confidence = min(parse.label_confidences[begin:end])
        return FilledSlot(name, values.get(said, said), begin, end, confidence)


def bundled_domains(bundle_folder: Path) -> list[Path]:
    """The domains in a bundle's folder, by name."""
    configs = (bundle_folder / DOMAINS_FOLDER).glob(f"*/{CONFIG_NAME}")
    return sorted(config.parent for config in configs)


def find_domain(name: str, bundle_folder: Path) -> Path:
    """The folder of a domain: one of the bundle's by its name, or any by its path.

    Raises:
        BundleError: there is neither.
    """
    bundled = bundled_domains(bundle_folder)
    for folder in (*bundled, Path(name)):
        if name in (folder.name, str(folder)) and (folder / CONFIG_NAME).is_file():
            return folder
    known = ", ".join(folder.name for folder in bundled) or "none"
    raise BundleError(
        f"there is no domain {name!r}: {bundle_folder} has {known}, and it is no folder that "
        "`voxgate domain build` wrote"
    )


def load_domain(folder: Path) -> Domain:
    """Read and check a domain.

    Raises:
        BundleError: it is missing, incomplete, altered, or of another format.
    """
    config = read_config(DomainConfig, folder, _KIND)
    for name in (DOMAIN_LM, UNDERSTANDING_GRAPH):
        if name not in config.files:
            raise BundleError(f"{folder / CONFIG_NAME} lists no {name}; build the domain again")
    has_lexicon = DOMAIN_LEXICON in config.files
    return Domain(
        config=config,
        lm=load_ngram(folder / DOMAIN_LM),
        lexicon=read_lexicon(folder / DOMAIN_LEXICON) if has_lexicon else None,
        understander=Understander(folder / UNDERSTANDING_GRAPH),
    )
