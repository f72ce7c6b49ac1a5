"""The bundle: one folder that holds a model and everything needed to serve it.

`config.json` describes the model and lists the hash of every file; a bundle that is incomplete,
altered or of another format is refused with a message that says which file and what to do.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

import service
from service.errors import BundleError
from service.features import FeatureSettings
from service.text import BLANK, BLANK_TOKEN

FORMAT_VERSION: Final = 3
CONFIG_NAME: Final = "config.json"
OFFLINE_GRAPH: Final = "offline.onnx"
STREAMING_GRAPH: Final = "streaming.onnx"
LM_NGRAM: Final = "lm/lm.ngram"
LEXICON: Final = "lexicon/lexicon.txt"
G2P_GRAPH: Final = "lexicon/g2p.onnx"
RESCORER_GRAPH: Final = "rescorer.onnx"
MODEL_CARD: Final = "MODEL_CARD.md"
DEFAULT_PROFILE: Final = "balanced"
BUNDLE_VARIABLE: Final = "VOXGATE_BUNDLE"

_HASH_BLOCK_BYTES: Final = 1 << 20


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


SearchTokens = Literal["characters", "phones"]


class Confidence(_Part):
    """Probability that a recognised word is right: a logistic regression."""

    intercept: float = 0.0
    """Added always."""
    weights: tuple[float, ...] = ()
    """By what the search knows of a word; without any, its share of the beam is given."""


class ReferenceSettings(_Part):
    """Defaults of pyctcdecode, fitted on development data."""

    beam_width: Annotated[int, Field(ge=1)] = 100
    """Hypotheses kept after each frame."""
    alpha: float = 0.5
    """Weight of the language model."""
    beta: float = 1.0
    """Added for each word."""


class DecoderSettings(_Part):
    """Defaults of a beam search, fitted on development data."""

    beam_width: Annotated[int, Field(ge=1)] = 100
    """Hypotheses kept after each frame."""
    alpha: float = 0.5
    """Weight of the language model."""
    beta: float = 1.0
    """Added for each word."""
    unknown_score: float = -10.0
    """Added for a word outside the word list, log10."""
    beam_prune_log_prob: float = -10.0
    """Beams this far below the best are dropped, natural log."""
    token_min_log_prob: float = -5.0
    """Tokens below this in a frame are not followed, natural log."""
    look_ahead: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of a word's log probability that is charged while it is spelled."""
    start_shift_frames: float = 0.0
    """Added to the output frame of a word's first token: CTC is late."""
    end_shift_frames: float = 0.0
    """Added to the output frame after a word's last token."""
    confidence: Confidence = Confidence()
    """Calibration of word confidences."""


class RescoringSettings(_Part):
    """How a recurrent language model ranks the best readings anew, fitted on development data."""

    n_best: Annotated[int, Field(ge=1)] = 50
    """Readings that are ranked, at most."""
    margin: Annotated[float, Field(ge=0)] = 4.0
    """Readings whose log score is further below the best one's are not."""
    recurrent_weight: float = 0.5
    """Weight of the recurrent model's log probability."""
    ngram_weight: float = 0.0
    """Weight of the n-gram's, besides what the search gave it."""
    word_score: float = 0.0
    """Added for each word, besides what the search gave it."""


class DecodingSettings(_Part):
    """How emissions are searched where a request does not say; `voxgate tune` writes this."""

    search_tokens: SearchTokens = "characters"
    """Which head `beam` searches."""
    characters: DecoderSettings = DecoderSettings()
    """Defaults of the search over characters."""
    phones: DecoderSettings = DecoderSettings(
        beam_width=500,
        alpha=0.9,
        beta=0.0,
        beam_prune_log_prob=-12.0,
        token_min_log_prob=-8.0,
        look_ahead=1.0,
    )
    """Defaults of the search over phones."""
    reference: ReferenceSettings = ReferenceSettings()
    """Defaults of the reference decoder."""
    rescoring: RescoringSettings = RescoringSettings()
    """Defaults of the second pass."""

    def of(self, search_tokens: SearchTokens) -> DecoderSettings:
        """Defaults of the search over one head."""
        return self.phones if search_tokens == "phones" else self.characters


class Profile(_Part):
    """How a stream is read: a window is a chunk and some frames to its right."""

    chunk_frames: Annotated[int, Field(ge=1)]
    """Output frames that a window settles."""
    right_frames: Annotated[int, Field(ge=0)]
    """Output frames to the right of the chunk that the window sees as well."""
    window_feature_frames: Annotated[int, Field(ge=1)]
    """Feature frames of a window, with what the convolutions see ahead."""


class Survival(_Part):
    """Probability that an interim word is in the final result, as logistic regression.

    The log odds are the sum of these weights times what they are named for.
    """

    intercept: float = 0.0
    """Added always."""
    confidence: float = 1.0
    """For the log odds of the word's confidence."""
    settled: float = 0.0
    """For a word whose frames are all settled."""
    distance: float = 0.0
    """For log(1 + output frames from the word's end to the last known frame)."""
    length: float = 0.0
    """For log(letters)."""


class BundleConfig(_Part):
    """`config.json`."""

    format_version: int
    """Layout of the folder and of this file."""
    name: str
    """Name by which requests choose the model."""
    language: str
    """BCP-47 tag."""
    features: FeatureSettings
    """The front end the model was trained with."""
    tokens: tuple[str, ...]
    """Token list of the first head; the blank is token 0."""
    phones: tuple[str, ...]
    """Phone list of the second head; the blank is phone 0."""
    subsampling: int
    """Feature frames for each output frame."""
    profiles: Mapping[str, Profile]
    """How streams may be read, by the name that requests use; `balanced` is the default."""
    decoding: DecodingSettings = DecodingSettings()
    """How emissions are searched."""
    survival: Mapping[str, Survival] = {}
    """Calibration of interim results, by the kind of final result: decoder, and `+second-pass`."""
    files: Mapping[str, str]
    """SHA-256 of every other file, by path inside the folder."""
    provenance: Mapping[str, Any]
    """Where the model comes from: data, hours, licences, measured error rates."""

    @property
    def frame_s(self) -> float:
        """Seconds of one output frame."""
        return self.subsampling * self.features.hop_ms / 1000

    @model_validator(mode="after")
    def _windows_hold_their_frames(self) -> BundleConfig:
        for name, profile in self.profiles.items():
            n_frames = profile.chunk_frames + profile.right_frames
            if profile.window_feature_frames < n_frames * self.subsampling:
                raise ValueError(f"the window of profile {name} is too short for its frames")
        if DEFAULT_PROFILE not in self.profiles:
            raise ValueError(f"there is no profile {DEFAULT_PROFILE}")
        return self

    @model_validator(mode="after")
    def _blank_comes_first(self) -> BundleConfig:
        for units in (self.tokens, self.phones):
            if not units or units[BLANK] != BLANK_TOKEN:
                raise ValueError(f"token 0 and phone 0 must be {BLANK_TOKEN}")
        return self


@dataclass(frozen=True)
class Bundle:
    """A checked bundle on disk."""

    folder: Path
    config: BundleConfig

    @property
    def offline_graph(self) -> Path:
        """The full-context acoustic model."""
        return self.folder / OFFLINE_GRAPH

    @property
    def streaming_graph(self) -> Path:
        """The acoustic model that reads window by window."""
        return self.folder / STREAMING_GRAPH

    @property
    def ngram(self) -> Path | None:
        """The compiled language model, where the bundle has one."""
        return self._find(LM_NGRAM)

    @property
    def g2p_graph(self) -> Path | None:
        """The letters-to-phones graph, where the bundle has one."""
        return self._find(G2P_GRAPH)

    @property
    def rescorer_graph(self) -> Path | None:
        """The recurrent language model of the second pass, where the bundle has one."""
        return self._find(RESCORER_GRAPH)

    @property
    def has_lexicon(self) -> bool:
        """Whether words have pronunciations, so that phones can be searched."""
        return LEXICON in self.config.files

    def read_lexicon(self) -> dict[str, tuple[tuple[str, ...], ...]]:
        """The pronunciations of each word, the usual one first."""
        return read_lexicon(self.folder / LEXICON)

    def _find(self, name: str) -> Path | None:
        return self.folder / name if name in self.config.files else None


def write_lexicon(lexicon: Mapping[str, Sequence[Sequence[str]]], path: Path) -> None:
    """Write pronunciations, a line each: the word and its phones."""
    lines = (f"{word} {' '.join(phones)}\n" for word in sorted(lexicon) for phones in lexicon[word])
    path.write_text("".join(lines), encoding="utf-8")


def read_lexicon(path: Path) -> dict[str, tuple[tuple[str, ...], ...]]:
    """The pronunciations of each word, the usual one first; see `write_lexicon`."""
    lexicon: dict[str, tuple[tuple[str, ...], ...]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        word, *phones = line.split()
        lexicon[word] = (*lexicon.get(word, ()), tuple(map(sys.intern, phones)))
    return lexicon  # of tuples, which the garbage collector does not go through


def load_bundle(folder: Path) -> Bundle:
    """Read and check a bundle.

    Raises:
        BundleError: it is missing, incomplete, altered, or of another format.
    """
    config = read_config(BundleConfig, folder, _KIND)
    needed = [OFFLINE_GRAPH, STREAMING_GRAPH]
    if config.decoding.search_tokens == "phones":
        needed += [LEXICON, LM_NGRAM]
    for name in needed:
        if name not in config.files:
            raise BundleError(f"{folder / CONFIG_NAME} lists no {name}; export the bundle again")
    return Bundle(folder=folder, config=config)


def find_bundle(requested: Path | None) -> Path:
    """The bundle folder to use: the one asked for, $VOXGATE_BUNDLE, or the checkout's en-small.

    Raises:
        BundleError: none was asked for and neither default exists.
    """
    if requested is not None:
        return requested
    from_environment = os.environ.get(BUNDLE_VARIABLE)
    if from_environment:
        return Path(from_environment)
    checkout = Path(service.__file__).resolve().parent.parent
    shipped = checkout / "bundles" / "en-small"
    if not shipped.is_dir():
        raise BundleError(
            f"no bundle: {BUNDLE_VARIABLE} is not set and {shipped} does not exist; "
            "name one with --bundle DIR"
        )
    return shipped


def hash_file(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


_Config = TypeVar("_Config", bound=BaseModel)


class _Version(BaseModel):
    """The part of `config.json` that every format has."""

    format_version: int


class _Files(BaseModel):
    """The part of `config.json` that says which files there are."""

    files: Mapping[str, str]


@dataclass(frozen=True)
class FolderKind:
    """What is said of a kind of folder where one cannot be used."""

    name: str
    format_version: int
    command: str
    """That writes it."""
    fix: str
    """What to do with one that does not fit."""


_KIND: Final = FolderKind("bundle", FORMAT_VERSION, "voxgate export", "export the bundle again")


def read_config(model: type[_Config], folder: Path, kind: FolderKind) -> _Config:
    """Read the `config.json` of a folder and check the files that it lists.

    Raises:
        BundleError: it is missing, incomplete, altered, or of another format.
    """
    path = folder / CONFIG_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(
            f"{folder} is no {kind.name}: cannot read {path} ({error}); "
            f"name a folder that `{kind.command}` wrote"
        ) from error
    try:
        version = _Version.model_validate_json(text).format_version
        if version != kind.format_version:
            raise BundleError(
                f"{path} has format version {version}, this Voxgate reads {kind.format_version}; "
                f"{kind.fix} or use the Voxgate that wrote it"
            )
        config = model.model_validate_json(text)
        files = _Files.model_validate_json(text).files
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise BundleError(
            f"{path} does not fit this version of Voxgate: {where}: {first['msg']}; {kind.fix}"
        ) from error
    for name, expected in files.items():
        if name != MODEL_CARD:  # one may add to it
            _check_file(folder, name, expected)
    return config


def _check_file(folder: Path, name: str, expected: str) -> None:
    path = folder / name
    if not path.is_file():
        raise BundleError(f"{path} is missing from the bundle; copy the whole folder again")
    if hash_file(path) != expected:
        raise BundleError(
            f"{path} was altered or damaged: its hash is not the one in {CONFIG_NAME}; "
            "copy the bundle again, or export it again after a change"
        )
