"""Checkpoint → bundle: exported, proven equal, quantised, measured, then put in place whole."""

from __future__ import annotations

import functools
import json
import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError
from tqdm import tqdm

from export.graph import (
    export_graph,
    export_streaming_graph,
    make_spelling_optional,
    quantise_graph,
)
from export.model_card import write_model_card
from export.parity import (
    check_parity,
    check_streaming_parity,
    measure_parity,
    measure_streaming_parity,
)
from export.rescorer import export_rescorer
from service.bundle import (
    CONFIG_NAME,
    FORMAT_VERSION,
    G2P_GRAPH,
    LEXICON,
    LM_NGRAM,
    MODEL_CARD,
    OFFLINE_GRAPH,
    RESCORER_GRAPH,
    STREAMING_GRAPH,
    Bundle,
    BundleConfig,
    DecodingSettings,
    Profile,
    Survival,
    hash_file,
    load_bundle,
    write_lexicon,
)
from service.decoding.ngram import load_ngram
from service.engine import OnnxEngine, OnnxStreamingEngine
from service.errors import ExportError
from service.evaluation import evaluate
from service.features import FeatureSettings
from service.g2p import Pronouncer
from service.manifest import read_manifest
from service.recogniser import DecoderName, Recogniser, load_recogniser
from service.rescorer import Rescorer
from service.text import are_pieces
from training.checkpoint import Checkpoint, load_acoustic_checkpoint, load_model
from training.lexicon import load_dictionary, make_lexicon
from training.model import AcousticModel, Chunking
from training.ngram import NGRAM_NAME

logger = logging.getLogger(__name__)

_PROFILES_MS: Final = {"fast": (320, 320), "balanced": (640, 320)}
"""Chunk and right context of each streaming profile, milliseconds."""

_FULL_STREAMING_GRAPH: Final = "float32-streaming.onnx"

LARGEST_INT8_LOSS: Final = 0.003
"""Most that greedy WER on the development set may rise by int8, as a fraction."""


def export_bundle(
    checkpoint_path: Path,
    folder: Path,
    *,
    name: str,
    language: str,
    like: Path | None = None,
    lm: Path | None = None,
    g2p: Path | None = None,
    rescorer: Path | None = None,
    decoding: Path | None = None,
    survival: Path | None = None,
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
        like: another bundle, whose language model, graphs beside the acoustic model, decoder
            settings and calibration are taken over where nothing else is named.
        lm: folder that `voxgate lm build` wrote; None makes a bundle without a language model.
        g2p: letters-to-phones graph that `voxgate g2p` wrote: pronounces the language model's
            words that the dictionary lacks, and goes into the bundle.
        rescorer: the second pass over final results, a checkpoint of a language model that
            `voxgate train` wrote or the `rescorer.onnx` of a bundle; needs `lm`.
        decoding: settings of the decoders that `voxgate tune` wrote.
        survival: calibration of interim results that `benchmarks/fit_stability.py` wrote.
        dev: manifest on which the finished bundle is measured, and int8 held against float32.
        notes: Markdown on data and licences for the model card.
        int8: whether to quantise the graph.

    Raises:
        ExportError: a file is missing, or parity fails; nothing is written then.
        BundleError: `like` is no bundle, or an ONNX rescorer is missing or none.
        TrainingError: the checkpoint cannot be read.
    """
    _refuse_to_replace(folder)
    other = None if like is None else load_bundle(like)
    if other is not None:
        lm = lm or (other.ngram and other.ngram.parent)
        g2p = g2p or other.g2p_graph
        rescorer = rescorer or other.rescorer_graph
    if rescorer is not None and lm is None:
        raise ExportError("a rescorer ranks what the search finds with --lm; name both or neither")
    note_text = _read_notes(notes)
    calibration = _read_survival(survival, other)
    settings = _read_decoding(decoding, other, has_lm=lm is not None)
    checkpoint = load_acoustic_checkpoint(checkpoint_path)
    model = load_model(checkpoint)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        work = Path(temporary) / "new"
        work.mkdir()
        full_graph = Path(temporary) / "float32.onnx"
        _write_graphs(model, full_graph, work, int8=int8)
        if lm is not None:
            _copy_lm(lm, work)
            _write_pronunciations(work, g2p)
        if rescorer is not None:
            _write_rescorer(rescorer, work / RESCORER_GRAPH, int8=int8)
        describe = functools.partial(
            _write_description,
            work,
            checkpoint,
            name=name,
            language=language,
            profiles=make_profiles(model, hop_ms=checkpoint.settings["features"]["hop_ms"]),
            decoding=settings,
            survival=calibration,
            notes=note_text,
            int8=int8,
        )
        config = describe(measured={})
        if dev is not None:
            measured = _measure(work, full_graph, dev, int8=int8, has_lm=lm is not None)
            config = describe(measured=measured)
        _put_in_place(work, folder)
    return config


def make_profiles(model: AcousticModel, *, hop_ms: float = 10.0) -> dict[str, Profile]:
    """The streaming profiles of a model: of these times or a little less at every subsampling."""
    frame_ms = model.convolutions.subsampling * hop_ms
    profiles = {}
    for name, (chunk_ms, right_ms) in _PROFILES_MS.items():
        chunking = Chunking(int(chunk_ms / frame_ms), int(right_ms / frame_ms))
        profiles[name] = Profile(
            chunk_frames=chunking.n_chunk,
            right_frames=chunking.n_right if model.bidirectional else 0,
            window_feature_frames=model.window_frames(chunking),
        )
    return profiles


def _write_graphs(model: AcousticModel, full_graph: Path, work: Path, *, int8: bool) -> None:
    """Write both graphs into the bundle, and the float32 one with full context to `full_graph`."""
    streaming_graph = full_graph.with_name(_FULL_STREAMING_GRAPH)
    export_graph(model, full_graph)
    export_streaming_graph(model, streaming_graph)
    parity = check_parity(model, full_graph)
    logger.info("float32 graph equals the model: largest difference %.1e", parity.largest)
    parity = check_streaming_parity(model, streaming_graph)
    logger.info("float32 streaming graph equals it too: largest difference %.1e", parity.largest)
    for source, name in ((full_graph, OFFLINE_GRAPH), (streaming_graph, STREAMING_GRAPH)):
        if int8:
            quantise_graph(source, work / name)
        else:
            shutil.copy(source, work / name)
        if model.spelling is not None:
            make_spelling_optional(work / name)
    if int8:
        loss = measure_parity(model, work / OFFLINE_GRAPH)
        logger.info("int8 graph: mean difference of a probability %.1e", loss.mean)
        loss = measure_streaming_parity(model, work / STREAMING_GRAPH)
        logger.info("int8 streaming graph: mean difference of a probability %.1e", loss.mean)


def _read_survival(path: Path | None, other: Bundle | None) -> Mapping[str, Survival]:
    if path is None:
        return {} if other is None else other.config.survival
    try:
        return TypeAdapter(dict[str, Survival]).validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ExportError(f"cannot read the calibration {path}: {error}") from error


def _read_decoding(path: Path | None, other: Bundle | None, *, has_lm: bool) -> DecodingSettings:
    """The settings of a file, of another bundle, or for a model that nothing was fitted to."""
    if path is None and other is not None:
        return other.config.decoding
    if path is None:
        return DecodingSettings(search_tokens="phones" if has_lm else "characters")
    try:
        return DecodingSettings.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ExportError(f"cannot read the decoder settings {path}: {error}") from error


def _write_pronunciations(work: Path, g2p: Path | None) -> None:
    """Write the pronunciations of the language model's words, and the graph for others."""
    pronounce = None
    (work / LEXICON).parent.mkdir()
    if g2p is not None:
        pronounce = Pronouncer(g2p).pronounce
        shutil.copy(g2p, work / G2P_GRAPH)
    words = load_ngram(work / LM_NGRAM).vocabulary
    lexicon = make_lexicon(words, load_dictionary(), pronounce)
    write_lexicon(lexicon, work / LEXICON)
    logger.info("%d of %d words have pronunciations", len(lexicon), len(words))


def _write_rescorer(source: Path, graph: Path, *, int8: bool) -> None:
    """Export a checkpoint, or take over a graph that was exported before."""
    if source.suffix == ".onnx":
        Rescorer(source)  # refuses what is none
        shutil.copy(source, graph)
    else:
        export_rescorer(source, graph, int8=int8)


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
    (work / LM_NGRAM).parent.mkdir()
    if not (lm / NGRAM_NAME).is_file():
        raise ExportError(
            f"{lm / NGRAM_NAME} is missing; name a folder that `voxgate lm build` wrote"
        )
    shutil.copy(lm / NGRAM_NAME, work / LM_NGRAM)


def _write_description(
    work: Path,
    checkpoint: Checkpoint,
    *,
    name: str,
    language: str,
    profiles: Mapping[str, Profile],
    decoding: DecodingSettings,
    survival: Mapping[str, Survival],
    notes: str,
    int8: bool,
    measured: Mapping[str, Any],
) -> BundleConfig:
    """Write the model card and `config.json` with the hashes of all other files."""
    provenance = {
        "trained_on": checkpoint.settings["data"]["corpora"] or "all corpora of the manifests",
        "model": checkpoint.settings["model"],
        "audio_seen_h": round(checkpoint.progress.audio_s / 3600, 1),
        "tokens": _describe_tokens(checkpoint.tokens),
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
        profiles=profiles,
        decoding=decoding,
        survival=survival,
        files={p.relative_to(work).as_posix(): hash_file(p) for p in paths},
        provenance=provenance,
    )
    text = json.dumps(config.model_dump(mode="json"), indent=2, ensure_ascii=False)
    (work / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
    return config


def _describe_tokens(tokens: Sequence[str]) -> str:
    return f"{len(tokens) - 1} pieces of words" if are_pieces(tokens) else "characters"


def _measure(
    work: Path, full_graph: Path, dev: Path, *, int8: bool, has_lm: bool
) -> dict[str, Any]:
    """Error rates of the new bundle by decoder and corpus, and what int8 costs."""
    beams: tuple[DecoderName, ...] = ("beam-phones", "beam-characters", "reference")
    if (work / RESCORER_GRAPH).is_file():
        beams = (*beams, "rescored")
    recogniser = load_recogniser(work, decoders=("greedy", *(beams if has_lm else ())))
    measured: dict[str, Any] = {}
    exact = replace(
        recogniser,
        engine=OnnxEngine(full_graph),
        streaming_engine=OnnxStreamingEngine(full_graph.with_name(_FULL_STREAMING_GRAPH)),
    )
    for profile in (None, *recogniser.profiles):
        name = "" if profile is None else f"{profile} "
        measured[f"{name}greedy"] = _evaluate(recogniser, dev, "greedy", profile)
        for beam in beams if has_lm and profile is None else beams[:has_lm]:
            measured[f"{name}{beam}"] = _evaluate(recogniser, dev, beam, profile)
        if int8:
            measured[f"{name}greedy_float32"] = _evaluate(exact, dev, "greedy", profile)
            _refuse_int8_loss(measured, name, dev)
    return measured


def _refuse_int8_loss(measured: Mapping[str, Any], name: str, dev: Path) -> None:
    int8, exact = (
        measured[f"{name}{kind}"]["total"]["wer"] for kind in ("greedy", "greedy_float32")
    )
    if int8 - exact > LARGEST_INT8_LOSS:
        raise ExportError(
            f"int8 raises the {name}greedy WER on {dev} by {int8 - exact:.2%}, at most "
            f"{LARGEST_INT8_LOSS:.1%} is allowed; nothing was written: export with --no-int8"
        )


def _evaluate(
    recogniser: Recogniser, dev: Path, decoder: DecoderName, profile: str | None = None
) -> dict[str, Any]:
    utterances = read_manifest(dev)
    name = f"{profile or 'full context'}, {decoder}"
    with tqdm(total=len(utterances), desc=f"measuring {name}", unit="utterance") as bar:
        evaluation = evaluate(
            recogniser, utterances, decoder=decoder, profile=profile, on_done=bar.update
        )
    if evaluation.failures:
        raise ExportError(f"the development set cannot be measured: {evaluation.failures[0]}")
    measured = evaluation.as_json()
    logger.info("%s: WER %.1f %%", name, 100 * measured["total"]["wer"])
    return {"total": measured["total"], "corpora": measured["corpora"]}


def _put_in_place(work: Path, folder: Path) -> None:
    """Replace `folder` by the finished bundle; the old one is gone only when the new one stands."""
    old = work.parent / "old"
    if lost := sorted(path.name for path in folder.glob("domains/*")):
        logger.warning(
            "the bundle that is replaced had the domains %s; build them anew with "
            "`voxgate domain build FILE --bundle %s`",
            ", ".join(lost),
            folder,
        )
    if folder.exists():
        folder.rename(old)
    try:
        work.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
