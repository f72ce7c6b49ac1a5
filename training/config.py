"""The settings of a training run: one TOML file, changed by `key=value` arguments.

Paths are relative to the current folder. Every field has a unit and a meaning; a wrong name or
value is refused before anything is loaded.
"""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from service.errors import TrainingError
from service.features import FeatureSettings
from training.model import Cell

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


_Frames = Annotated[int, Field(ge=1)]
_Speed = Annotated[float, Field(gt=0)]


class Settings(BaseModel):
    """A section; a name that it does not have is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DataSettings(Settings):
    """What is trained on."""

    train: tuple[Path, ...] = Field(min_length=1)
    """Manifests of the training set."""
    dev: tuple[Path, ...] = Field(min_length=1)
    """Manifests of the development set; its speakers must not be in the training set."""
    corpora: tuple[str, ...] = ()
    """Corpora of the training manifests that are used; none named means all."""
    held_out_speakers: tuple[str, ...] = ()
    """Speakers of the training manifests that are kept for other tests."""
    cache: Path = Path("runs/features")
    """Folder of the computed features; they are computed once and found again."""
    longest_s: float = Field(default=20.0, gt=0)
    """Longer training utterances are left out, seconds."""
    shortest_s: float = Field(default=0.3, ge=0)
    """Shorter training utterances are left out, seconds."""
    speeds: tuple[_Speed, ...] = Field(default=(0.9, 1.0, 1.1), min_length=1)
    """Speed perturbation: each pass plays an utterance at one of these, drawn at random."""
    n_pieces: int | None = Field(default=None, ge=0)
    """Pieces of words that the token head writes, chosen on the training transcripts; 0 writes
    characters. Unset, it writes what that of `run.initial_checkpoint` does, or characters."""
    g2p: Path | None = None
    """Letters-to-phones graph of `voxgate g2p`, for words that the dictionary lacks; if there is
    none, utterances that have such words do not train the phone head."""
    aligner: Path | None = None
    """Checkpoint of an earlier model, which says which pronunciation of a word was said; without
    one, it is always the usual one."""
    n_jobs: int = Field(default=2, ge=1)
    """Processes that compute features."""


class ModelSettings(Settings):
    """The acoustic model; the fields are the arguments of `AcousticModel`."""

    cell: Cell = "lstm"
    """Kind of recurrent cell."""
    n_layers: int = Field(default=4, ge=1)
    """Recurrent layers."""
    n_spelling_layers: int = Field(default=0, ge=0)
    """Recurrent layers that write tokens from the phone head's probabilities; 0 reads tokens off
    the sound."""
    hidden_size: int = Field(default=320, ge=1)
    """Units of one direction of a layer."""
    bidirectional: bool = True
    """Whether a layer also reads from the end to the start."""
    subsampling: Literal[2, 3, 4] = 4
    """Feature frames (10 ms) for each output frame."""
    n_channels: int = Field(default=32, ge=1)
    """Channels of the two convolutions."""
    dropout: float = Field(default=0.2, ge=0, lt=1)
    """Dropout on the output of every layer."""
    skip: bool = True
    """Whether what goes into a layer is added to what comes out."""
    conditioned_layers: tuple[int, ...] = ()
    """Layers, from 1, after which phones are read and the next layers told of them
    (self-conditioned CTC)."""

    @model_validator(mode="after")
    def _conditioned_layers_exist(self) -> ModelSettings:
        if any(not 1 <= i < self.n_layers for i in self.conditioned_layers):
            raise ValueError(
                f"conditioned_layers is {list(self.conditioned_layers)}, expected numbers from 1 "
                f"to {self.n_layers - 1}"
            )
        return self


class StreamingSettings(Settings):
    """Batches read window by window, so that the same weights also serve streams."""

    share: float = Field(default=0.5, ge=0, le=1)
    """Share of the training batches; the others are read with full context."""
    chunkings: tuple[tuple[_Frames, _Frames], ...] = ((8, 8), (16, 8), (8, 4))
    """Chunk and right context, output frames; each such batch draws one of them."""

    @model_validator(mode="after")
    def _share_has_chunkings(self) -> StreamingSettings:
        if self.share and not self.chunkings:
            raise ValueError("share is above 0 but chunkings is empty; name one, or set share to 0")
        return self


class AugmentSettings(Settings):
    """Augmentation of the features of each training batch."""

    n_frequency_masks: int = Field(default=2, ge=0)
    """SpecAugment frequency masks an utterance."""
    frequency_width: int = Field(default=15, ge=0)
    """The widest frequency mask, mel bands."""
    time_masks_per_s: float = Field(default=0.6, ge=0)
    """SpecAugment time masks a second of audio."""
    time_width_frames: int = Field(default=25, ge=0)
    """The longest time mask, feature frames of 10 ms."""
    time_share: float = Field(default=0.1, ge=0, le=1)
    """The most of an utterance that one time mask covers, a fraction."""
    level_db: float = Field(default=4.0, ge=0)
    """Standard deviation of the random change in level, decibels."""
    tilt_db: float = Field(default=4.0, ge=0)
    """Standard deviation of the random change between the lowest and highest band, decibels."""
    warp: float = Field(default=0.0, ge=0, lt=1)
    """The most that frequencies are stretched or squeezed, a fraction, as longer and shorter vocal
    tracts do."""
    noise_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the utterances that get babble or coloured noise."""
    lowest_snr_db: float = 0.0
    """Loudest noise: signal-to-noise ratio, decibels."""
    highest_snr_db: float = 25.0
    """Faintest noise: signal-to-noise ratio, decibels."""
    most_voices: int = Field(default=8, ge=1)
    """The most utterances that babble is made of."""
    room_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the utterances that reverberate."""
    longest_room_s: float = Field(default=0.8, gt=0)
    """Longest reverberation time (60 dB), seconds."""
    telephone_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the utterances that lose the bands a telephone does not carry."""


class OptimiserSettings(Settings):
    """The optimiser, its schedule, and what a step is."""

    kind: Literal["adamw", "muon"] = "adamw"
    """`muon` makes the steps of weight matrices orthogonal; both take the same learning rates."""

    n_epochs: int = Field(default=60, ge=1)
    """Passes over the training set; the schedule ends with the last one."""
    batch_s: float = Field(default=160.0, gt=0)
    """Audio in one step, summed over all processes, seconds; padding is not counted."""
    learning_rate: float = Field(default=1.5e-3, gt=0)
    """The highest learning rate."""
    final_learning_rate: float = Field(default=1e-5, ge=0)
    """The learning rate at the end of the cosine."""
    n_warmup_steps: int = Field(default=500, ge=0)
    """Steps over which the learning rate rises from zero."""
    weight_decay: float = Field(default=1e-2, ge=0)
    """Decoupled weight decay of the weight matrices."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm."""
    phone_weight: float = Field(default=0.5, ge=0, le=1)
    """Share of the phone head in the loss; the token head has the rest."""
    phone_criterion: Literal["ctc", "crf"] = "ctc"
    """What the phone head learns by; `crf` is CTC-CRF under a phone trigram of the transcripts."""
    ctc_share: float = Field(default=0.1, ge=0)
    """What CTC-CRF takes of CTC."""
    consistency: float = Field(default=0.0, ge=0)
    """Weight of the divergence between two views of each utterance, augmented and dropped out each
    for itself (CR-CTC, Yao et al. 2024); 0 reads each once."""
    intermediate_weight: float = Field(default=0.3, ge=0, lt=1)
    """Share of the phone head's loss that the conditioned layers have, by CTC."""
    average_decay: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the exponential moving average of the weights, per step."""
    n_sorted_epochs: int = Field(default=1, ge=0)
    """First passes in which short utterances come first."""


class RunSettings(Settings):
    """Where a run of any task lives and how it proceeds."""

    directory: Path
    """Folder of the checkpoints and logs."""
    seed: int = 1
    """Seed of every random draw."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto` times one step in each type and takes the faster, at every start, as the machine may
    be another; a run equals an uninterrupted one where both chose the same."""
    n_threads: int = Field(default=0, ge=0)
    """Threads of one process; 0 leaves it to torch."""
    checkpoint_every_s: float = Field(default=120.0, ge=0)
    """Seconds between two checkpoints inside a pass."""


class AcousticRun(RunSettings):
    """Where a run of an acoustic model lives and how it proceeds."""

    directory: Path = Path("runs/train")
    """Folder of the checkpoints, logs and TensorBoard events."""
    checkpoint_every_s: float = Field(default=300.0, gt=0)
    """Seconds between two checkpoints inside a pass."""
    evaluate_every_epochs: int = Field(default=1, ge=1)
    """Passes between two evaluations on the development set."""
    initial_checkpoint: Path | None = None
    """Checkpoint whose weights the run starts from: of the same shape, or of fewer layers."""


class TrainingSettings(Settings):
    """Everything a run needs to know."""

    data: DataSettings
    features: FeatureSettings = FeatureSettings()
    model: ModelSettings = ModelSettings()
    streaming: StreamingSettings = StreamingSettings()
    augment: AugmentSettings = AugmentSettings()
    optimiser: OptimiserSettings = OptimiserSettings()
    run: AcousticRun = AcousticRun()

    @model_validator(mode="after")
    def _speeds_include_normal(self) -> TrainingSettings:
        if 1.0 not in self.data.speeds:
            raise ValueError(f"data.speeds is {self.data.speeds}; 1.0 must be one of them")
        return self


_AnySettings = TypeVar("_AnySettings", bound=BaseModel)


def load_settings(path: Path, overrides: Sequence[str] = ()) -> TrainingSettings:
    """Read the settings of an acoustic model; see `read_tree` and `validate`."""
    return validate(TrainingSettings, read_tree(path, overrides), path)


def read_tree(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a TOML file and apply `section.key=value` overrides; a value is written as in TOML.

    Raises:
        TrainingError: the file or an override cannot be read.
    """
    try:
        tree: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise TrainingError(f"cannot read the settings {path}: {error}") from error
    for override in overrides:
        _apply(override, tree)
    return tree


def validate(kind: type[_AnySettings], tree: dict[str, Any], path: Path) -> _AnySettings:
    """Settings of some kind.

    Raises:
        TrainingError: a setting is unknown, missing or wrong.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}{_describe_input(e)}"
            for e in error.errors()
        )
        raise TrainingError(f"the settings of {path} do not fit: {problems}") from error


def _describe_input(error: ErrorDetails) -> str:
    """What arrived instead, and how a list is written."""
    if error["type"] == "missing":
        return ""
    listed = "; write it as a list: [...]" if error["type"] == "tuple_type" else ""
    return f", not {reprlib.repr(error['input'])}{listed}"


def _apply(override: str, tree: dict[str, Any]) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise TrainingError(f"{override!r} is no setting; expected section.key=value")
    *sections, name = key.split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise TrainingError(f"{override!r}: {section} is a value, not a section")
    node[name] = _parse_value(text)


def _parse_value(text: str) -> object:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word, such as a path or a cell name
