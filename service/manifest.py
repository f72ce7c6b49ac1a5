"""Manifests: JSON lines that list recordings and their transcripts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from service.errors import ManifestError
from service.text import normalise


class _Line(BaseModel):
    model_config = ConfigDict(extra="ignore")

    audio_filepath: str
    duration: float | None = None
    text: str | None = None
    speaker: str = ""
    corpus: str = ""


@dataclass(frozen=True)
class Utterance:
    """One line of a manifest."""

    audio_path: Path
    """The recording; absolute, or relative to the current folder."""
    name: str
    """`audio_filepath` as the manifest has it: the utterance's id."""
    duration_s: float | None
    """Length in seconds, where the manifest says it."""
    text: str | None
    """Reference transcript, where there is one."""
    speaker: str
    """Speaker id, or empty."""
    corpus: str
    """Name of the corpus, or empty."""


def read_manifest(path: Path) -> list[Utterance]:
    """Read a JSON-lines manifest; `audio_filepath` is relative to the manifest's folder.

    Raises:
        ManifestError: the file cannot be read, or a line is not what a manifest holds.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"cannot read the manifest {path}: {error}") from error
    return [
        _parse_line(line, path, number)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def read_transcripts(path: Path) -> list[str]:
    """The different transcripts of a manifest, normalised, in alphabetical order.

    Raises:
        ManifestError: as `read_manifest`.
    """
    return sorted({normalise(row.text) for row in read_manifest(path) if row.text})


def _parse_line(line: str, path: Path, number: int) -> Utterance:
    try:
        row = _Line.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the line"
        raise ManifestError(
            f"{path} line {number}: {where}: {first['msg']}; expected a JSON object with "
            '"audio_filepath", and "duration" and "text" where they are known'
        ) from error
    return Utterance(
        audio_path=path.parent / row.audio_filepath,
        name=row.audio_filepath,
        duration_s=row.duration,
        text=row.text,
        speaker=row.speaker,
        corpus=row.corpus,
    )
