"""Checkpoint → bundle: exported, proven equal, quantised, measured, then put in place whole."""

from __future__ import annotations

import functools
import json
import logging
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from export.graph import export_graph, quantise_graph
from export.model_card import write_model_card
from export.parity import check_parity, measure_parity
from service.bundle import (
    CONFIG_NAME,
    FORMAT_VERSION,
    LM_BINARY,
    LM_WORDS,
    MODEL_CARD,
    OFFLINE_GRAPH,
    BundleConfig,
    DecoderSettings,
    hash_file,
)
from service.engine import OnnxEngine
from service.errors import ExportError
from service.evaluation import evaluate
from service.features import FeatureSettings
from service.manifest import read_manifest
from service.recogniser import DecoderName, Recogniser, load_recogniser
from training.checkpoint import Checkpoint, load_checkpoint
from training.model import AcousticModel
from training.ngram import BINARY_NAME, WORDS_NAME

logger = logging.getLogger(__name__)

LARGEST_INT8_LOSS: Final = 0.003
"""Most that greedy WER on the development set may rise by int8, as a fraction."""


def export_bundle(
    checkpoint_path: Path,
    folder: Path,
    *,
    name: str,
    language: str,
    lm: Path | None = None,
    decoder: DecoderSettings | None = None,
    dev: Path | None = None,
    notes: Path | None = None,
    int8: bool = True,
) -> BundleConfig:
    """Write a bundle; `folder` is replaced only when everything has been checked.

    Args:
        checkpoint_path: a checkpoint of `voxgate train`; its averaged weights are exported.
        folder: where the bundle goes.
        name: name by which requests choose the model.
        language: BCP-47 tag.
        lm: folder that `voxgate lm build` wrote; None makes a bundle without a language model.
        decoder: defaults of the beam search.
        dev: manifest on which the finished bundle is measured, and int8 held against float32.
        notes: Markdown on data and licences for the model card.
        int8: whether to quantise the graph.

    Raises:
        ExportError: a file is missing, or parity fails; nothing is written then.
        TrainingError: the checkpoint cannot be read.
    """
    _refuse_to_replace(folder)
    note_text = _read_notes(notes)
    checkpoint = load_checkpoint(checkpoint_path)
    model = load_model(checkpoint)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        work = Path(temporary) / "new"
        work.mkdir()
        full_graph = Path(temporary) / "float32.onnx"
        export_graph(model, full_graph)
        parity = check_parity(model, full_graph)
        logger.info("float32 graph equals the model: largest difference %.1e", parity.largest)
        if int8:
            quantise_graph(full_graph, work / OFFLINE_GRAPH)
            loss = measure_parity(model, work / OFFLINE_GRAPH)
            logger.info("int8 graph: mean difference of a probability %.1e", loss.mean)
        else:
            shutil.copy(full_graph, work / OFFLINE_GRAPH)
        if lm is not None:
            _copy_lm(lm, work)
        describe = functools.partial(
            _write_description,
            work,
            checkpoint,
            name=name,
            language=language,
            decoder=decoder or DecoderSettings(),
            notes=note_text,
            int8=int8,
        )
        config = describe(measured={})
        if dev is not None:
            measured = _measure(work, full_graph, dev, int8=int8, has_lm=lm is not None)
            config = describe(measured=measured)
        _put_in_place(work, folder)
    return config


def load_model(checkpoint: Checkpoint) -> AcousticModel:
    """The averaged model of a checkpoint, ready to evaluate."""
    model = AcousticModel(
        n_mels=len(checkpoint.averaged["feature_mean"]),
        n_tokens=len(checkpoint.tokens),
        n_phones=len(checkpoint.phones),
        **checkpoint.settings["model"],
    )
    model.load_state_dict(checkpoint.averaged)
    return model.eval()


def _refuse_to_replace(folder: Path) -> None:
    """Let nothing but a bundle, or an empty folder, be replaced."""
    is_empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not is_empty and not (folder / CONFIG_NAME).is_file():
        raise ExportError(f"{folder} exists and is no bundle; choose another folder or remove it")


def _read_notes(notes: Path | None) -> str:
    if notes is None:
        return ""
    try:
        return notes.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"cannot read the notes {notes}: {error}") from error


def _copy_lm(lm: Path, work: Path) -> None:
    (work / LM_BINARY).parent.mkdir()
    for source, target in ((BINARY_NAME, LM_BINARY), (WORDS_NAME, LM_WORDS)):
        if not (lm / source).is_file():
            raise ExportError(
                f"{lm / source} is missing; name a folder that `voxgate lm build` wrote"
            )
        shutil.copy(lm / source, work / target)


def _write_description(
    work: Path,
    checkpoint: Checkpoint,
    *,
    name: str,
    language: str,
    decoder: DecoderSettings,
    notes: str,
    int8: bool,
    measured: Mapping[str, Any],
) -> BundleConfig:
    """Write the model card and `config.json` with the hashes of all other files."""
    provenance = {
        "trained_on": checkpoint.settings["data"]["corpora"] or "all corpora of the manifests",
        "model": checkpoint.settings["model"],
        "n_epochs": checkpoint.progress.epoch,
        "audio_seen_h": round(checkpoint.progress.audio_s / 3600, 1),
        "weights": "int8 (7 bits, dynamic, per channel)" if int8 else "float32",
        "measured": measured,
    }
    card = write_model_card(name=name, language=language, provenance=provenance, notes=notes)
    (work / MODEL_CARD).write_text(card, encoding="utf-8")
    paths = sorted(p for p in work.rglob("*") if p.is_file() and p.name != CONFIG_NAME)
    config = BundleConfig(
        format_version=FORMAT_VERSION,
        name=name,
        language=language,
        features=FeatureSettings.model_validate(checkpoint.settings["features"]),
        tokens=tuple(checkpoint.tokens),
        phones=tuple(checkpoint.phones),
        subsampling=checkpoint.settings["model"]["subsampling"],
        decoder=decoder,
        files={p.relative_to(work).as_posix(): hash_file(p) for p in paths},
        provenance=provenance,
    )
    text = json.dumps(config.model_dump(mode="json"), indent=2, ensure_ascii=False)
    (work / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
    return config


def _measure(
    work: Path, full_graph: Path, dev: Path, *, int8: bool, has_lm: bool
) -> dict[str, Any]:
    """Error rates of the new bundle by decoder and corpus, and what int8 costs."""
    recogniser = load_recogniser(work)
    measured = {"greedy": _evaluate(recogniser, dev, "greedy")}
    if has_lm:
        measured["beam"] = _evaluate(recogniser, dev, "beam")
    if int8:
        exact = replace(recogniser, engine=OnnxEngine(full_graph))
        measured["greedy_float32"] = _evaluate(exact, dev, "greedy")
        loss = measured["greedy"]["total"]["wer"] - measured["greedy_float32"]["total"]["wer"]
        if loss > LARGEST_INT8_LOSS:
            raise ExportError(
                f"int8 raises the greedy WER on {dev} by {loss:.2%}, at most "
                f"{LARGEST_INT8_LOSS:.1%} is allowed; nothing was written: export with --no-int8"
            )
    return measured


def _evaluate(recogniser: Recogniser, dev: Path, decoder: DecoderName) -> dict[str, Any]:
    utterances = read_manifest(dev)
    with tqdm(total=len(utterances), desc=f"measuring {decoder}", unit="utterance") as bar:
        evaluation = evaluate(recogniser, utterances, decoder=decoder, on_done=bar.update)
    if evaluation.failures:
        raise ExportError(f"the development set cannot be measured: {evaluation.failures[0]}")
    measured = evaluation.as_json()
    logger.info("%s: WER %.1f %%", decoder, 100 * measured["total"]["wer"])
    return {"total": measured["total"], "corpora": measured["corpora"]}


def _put_in_place(work: Path, folder: Path) -> None:
    """Replace `folder` by the finished bundle; the old one is gone only when the new one stands."""
    old = work.parent / "old"
    if folder.exists():
        folder.rename(old)
    try:
        work.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
