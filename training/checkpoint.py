"""Checkpoints: everything an exact continuation needs, written whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from pydantic import BaseModel

from service.errors import TrainingError
from training.model import AcousticModel

FORMAT_VERSION: Final = 1

State = dict[str, Any]


@dataclass(frozen=True)
class Progress:
    """Where a run is."""

    epoch: int = 0
    """The pass being made, from 0."""
    batch: int = 0
    """Batches of this pass already trained on, per process."""
    step: int = 0
    """Optimiser steps since the start."""
    audio_s: float = 0.0
    """Audio trained on, seconds; that of the checkpoint that a run starts from included."""
    best_cer: float = float("inf")
    """Lowest character error rate on the development set."""


@dataclass(frozen=True)
class Checkpoint:
    """One file of a run."""

    settings: State
    """The settings of the run, as plain data."""
    tokens: Sequence[str]
    """Token list, blank first."""
    phones: Sequence[str]
    """Phone list, blank first."""
    averaged: State
    """Averaged weights: what is evaluated and exported."""
    progress: Progress
    """Where the run is."""
    model: State | None = None
    """The weights being trained; None in a weights-only checkpoint."""
    optimiser: State | None = None
    """Optimiser state; None in a weights-only checkpoint."""
    data: State = field(default_factory=dict)
    """What decides the batches of a pass; empty where that is not watched."""


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint so that `path` always holds a whole one.

    Raises:
        TrainingError: it cannot be written.
    """
    unfinished = path.with_suffix(".unfinished")
    fields = {name: getattr(checkpoint, name) for name in checkpoint.__dataclass_fields__}
    fields["progress"] = asdict(checkpoint.progress)
    try:
        torch.save({"format_version": FORMAT_VERSION, **fields}, unfinished)
        unfinished.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as the latter
        unfinished.unlink(missing_ok=True)
        raise TrainingError(
            f"cannot write {path}: {error}; make room or choose another folder, then start again: "
            "the run goes on from the last checkpoint that was written"
        ) from error


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU; half-precision weights become float32.

    Raises:
        TrainingError: the file is missing, is no checkpoint or has another format version.
    """
    try:
        fields = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise TrainingError(f"there is no checkpoint {path}") from error
    except Exception as error:  # torch raises whatever the damaged bytes provoke
        raise TrainingError(f"{path} cannot be read as a checkpoint: {error}") from error
    version = fields.pop("format_version", None) if isinstance(fields, dict) else None
    if version != FORMAT_VERSION:
        raise TrainingError(
            f"{path} has checkpoint format {version}, expected {FORMAT_VERSION}; "
            "export it with the Voxgate version that wrote it"
        )
    fields["averaged"] = {name: value.float() for name, value in fields["averaged"].items()}
    return Checkpoint(**{**fields, "progress": Progress(**fields["progress"])})


def save_weights(checkpoint: Checkpoint, path: Path) -> None:
    """Write the averaged weights alone, in half precision: what a fine-tuning run starts from.

    Of the settings, those that name files of this machine stay behind.
    """
    halved = {name: value.half() for name, value in checkpoint.averaged.items()}
    settings = {
        **{p: checkpoint.settings[p] for p in ("features", "model", "augment", "optimiser")},
        "data": {"corpora": checkpoint.settings["data"]["corpora"]},
    }
    save_checkpoint(
        Checkpoint(
            settings=settings,
            tokens=checkpoint.tokens,
            phones=checkpoint.phones,
            averaged=halved,
            progress=checkpoint.progress,
        ),
        path,
    )


def load_acoustic_checkpoint(path: Path) -> Checkpoint:
    """Read the checkpoint of an acoustic model; see `load_checkpoint`.

    Raises:
        TrainingError: as `load_checkpoint`, or it is of another kind of model.
    """
    checkpoint = load_checkpoint(path)
    if "feature_mean" not in checkpoint.averaged:
        raise TrainingError(
            f"{path} is a checkpoint of another kind of model; expected one of an acoustic model"
        )
    return checkpoint


def describe_difference(checkpoint: Checkpoint, model: BaseModel) -> str:
    """Where a checkpoint's model settings differ from others: `name` there, not here."""
    held, asked = checkpoint.settings["model"], model.model_dump(mode="json")
    return ", ".join(
        f"{name} is {held[name]} there and {asked[name]} here"
        for name in asked
        if name in held and held[name] != asked[name]
    )


def load_model(checkpoint: Checkpoint) -> AcousticModel:
    """The averaged acoustic model of a checkpoint, ready to evaluate."""
    model = AcousticModel(
        n_mels=len(checkpoint.averaged["feature_mean"]),
        n_tokens=len(checkpoint.tokens),
        n_phones=len(checkpoint.phones),
        **checkpoint.settings["model"],
    )
    model.load_state_dict(checkpoint.averaged)
    return model.eval()
