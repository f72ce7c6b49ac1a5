"""Which model a file of settings trains: its `task`, the acoustic model where it names none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from service.errors import TrainingError
from training.config import TrainingSettings, read_tree, validate

ACOUSTIC_MODEL: Final = "acoustic-model"


def run_task(path: Path, overrides: Sequence[str] = ()) -> None:
    """Train what the file says, or go on with a run that stopped.

    Raises:
        TrainingError: the file or a setting cannot be used, or the run fails.
    """
    tree = read_tree(path, overrides)
    task = tree.pop("task", ACOUSTIC_MODEL)
    if task not in _TASKS:
        raise TrainingError(f"{path}: task is {task!r}, expected one of {', '.join(_TASKS)}")
    _TASKS[task](tree, path)


def _train_acoustic_model(tree: dict[str, Any], path: Path) -> None:
    from training.train import train  # noqa: PLC0415  # each task loads what it needs

    train(validate(TrainingSettings, _take_shape(tree), path))


def _take_shape(tree: dict[str, Any]) -> dict[str, Any]:
    """The settings of a fine-tuning: what they do not say of the model is as it was."""
    from training.checkpoint import load_acoustic_checkpoint  # noqa: PLC0415

    run = tree.get("run")
    initial = run.get("initial_checkpoint") if isinstance(run, dict) else None
    if not isinstance(initial, str):
        return tree
    known = load_acoustic_checkpoint(Path(initial)).settings
    sections = {name: tree.get(name, {}) for name in ("model", "features")}
    if not all(isinstance(section, dict) for section in sections.values()):
        return tree  # which is refused for it
    return {**tree, **{name: {**known[name], **section} for name, section in sections.items()}}


def _train_language_model(tree: dict[str, Any], path: Path) -> None:
    from training.rnn_lm import LanguageModelSettings, train_language_model  # noqa: PLC0415

    train_language_model(validate(LanguageModelSettings, tree, path))


def _train_understanding(tree: dict[str, Any], path: Path) -> None:
    from training.understanding import (  # noqa: PLC0415
        UnderstandingSettings,
        train_understanding,
    )

    train_understanding(validate(UnderstandingSettings, tree, path))


def _train_spelling(tree: dict[str, Any], path: Path) -> None:
    from training.spelling import SpellingSettings, train_spelling  # noqa: PLC0415

    train_spelling(validate(SpellingSettings, tree, path))


_TASKS: Final[dict[str, Callable[[dict[str, Any], Path], None]]] = {
    ACOUSTIC_MODEL: _train_acoustic_model,
    "language-model": _train_language_model,
    "spelling": _train_spelling,
    "understanding": _train_understanding,
}
