"""Export: what is written computes what was trained, or nothing is written."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from pydantic import TypeAdapter
from tiny import (
    N_MELS,
    TEXTS,
    TinyCorpus,
    make_checkpoint,
    make_model,
    make_settings,
    one_weight_changed,
    save_language_model,
    say,
    write_corpus,
    write_manifest,
    write_recordings,
)

from export import bundle as export_module
from export.bundle import export_bundle, make_profiles
from export.graph import ServedModel, export_graph, export_streaming_graph, quantise_graph
from export.parity import (
    check_parity,
    check_streaming_parity,
    measure_parity,
    measure_streaming_parity,
)
from service.bundle import (
    LEXICON,
    LM_NGRAM,
    RESCORER_GRAPH,
    DecoderSettings,
    DecodingSettings,
    Profile,
    Survival,
    load_bundle,
)
from service.decoding.ngram import load_ngram
from service.errors import BundleError, ExportError, ManifestError, TrainingError
from service.recogniser import load_recogniser
from service.text import CHARACTERS
from training.checkpoint import load_checkpoint, load_model, save_checkpoint, save_weights
from training.config import TrainingSettings
from training.lexicon import PHONES
from training.model import AcousticModel, Cell
from training.ngram import build_ngram

_BATCHES = ([1], [2], [3], [4], [7], [57], [201], [399], [57, 57], [1, 400], [90, 3, 1, 44, 17])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TinyCorpus:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def settings(corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> TrainingSettings:
    return make_settings(
        corpus, tmp_path_factory.mktemp("settings") / "run", 'data.corpora=["tones", "chimes"]'
    )


@pytest.fixture(scope="module")
def model(settings: TrainingSettings) -> AcousticModel:
    """A model that hears one `a`, whatever is said."""
    model = make_model(**settings.model.model_dump())
    model.token_head.weight.data.mul_(0.1)
    model.token_head.bias.data[CHARACTERS.index("a")] += 10.0
    return model


@pytest.fixture(scope="module")
def checkpoint(
    model: AcousticModel, settings: TrainingSettings, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "last.pt"
    save_checkpoint(make_checkpoint(model, settings), path)
    return path


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm")
    (folder / "text.txt").write_text("\n".join(TEXTS) + "\n")
    build_ngram([folder / "text.txt"], folder / "lm", order=2)
    return folder / "lm"


def _read(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


# The graph


@pytest.mark.parametrize(
    ("cell", "bidirectional", "subsampling"),
    [
        ("lstm", True, 4),
        ("lstm", False, 4),
        ("lstm", True, 3),
        ("lstm", True, 2),
        ("gru", True, 4),
        ("gru", False, 2),
        ("rnn", True, 3),
    ],
)
def test_graph_equals_model_for_any_length_and_batch(
    tmp_path: Path, cell: Cell, bidirectional: bool, subsampling: int
) -> None:
    model = make_model(cell=cell, bidirectional=bidirectional, subsampling=subsampling)
    export_graph(model, tmp_path / "graph.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "graph.onnx"))
    served = ServedModel(model).eval()
    generator = torch.Generator().manual_seed(2)
    for lengths in _BATCHES:
        features = torch.randn(len(lengths), max(lengths) + 5, N_MELS, generator=generator) * 4 - 8
        with torch.no_grad():
            expected = served(features, torch.tensor(lengths))
        actual = session.run(
            None, {"features": features.numpy(), "feature_lengths": np.array(lengths)}
        )
        assert actual[2].tolist() == expected[2].tolist() == [-(-n // subsampling) for n in lengths]
        for head, n_labels in ((0, len(CHARACTERS)), (1, len(PHONES))):
            assert actual[head].shape[2] == n_labels
            for i, n_frames in enumerate(actual[2]):
                np.testing.assert_allclose(
                    actual[head][i, :n_frames], expected[head][i, :n_frames], atol=1e-4, rtol=0
                )
                total = np.exp(actual[head][i, :n_frames]).sum(axis=-1)
                np.testing.assert_allclose(total, 1.0, atol=1e-4)


def test_export_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = make_model(dropout=0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export_graph(model, tmp_path / "graph.onnx")
    export_streaming_graph(model, tmp_path / "streaming.onnx")
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_parity_check_accepts_the_models_own_graph(tmp_path: Path) -> None:
    model = make_model()
    export_graph(model, tmp_path / "graph.onnx")
    assert check_parity(model, tmp_path / "graph.onnx").largest < 1e-4


def test_parity_check_finds_one_other_weight(tmp_path: Path) -> None:
    model = make_model()
    export_graph(model, tmp_path / "graph.onnx")
    with one_weight_changed(model), pytest.raises(ExportError, match="nothing was written"):
        check_parity(model, tmp_path / "graph.onnx")


def test_parity_check_finds_another_phone_head(tmp_path: Path) -> None:
    model = make_model()
    export_graph(model, tmp_path / "graph.onnx")
    model.phone_head.bias.data[3] += 1.0
    with pytest.raises(ExportError, match="differs from the model"):
        check_parity(model, tmp_path / "graph.onnx")


def test_parity_check_refuses_what_is_not_a_number(tmp_path: Path) -> None:
    broken = make_model()
    broken.token_head.bias.data[3] = float("nan")
    export_graph(broken, tmp_path / "graph.onnx")
    with pytest.raises(ExportError, match="differs from the model"):
        check_parity(make_model(), tmp_path / "graph.onnx")


def test_int8_graph_is_smaller_and_close(tmp_path: Path) -> None:
    model = make_model(hidden_size=64)
    export_graph(model, tmp_path / "full.onnx")
    quantise_graph(tmp_path / "full.onnx", tmp_path / "int8.onnx")
    sizes = [(tmp_path / name).stat().st_size for name in ("full.onnx", "int8.onnx")]
    assert sizes[1] < sizes[0] / 2
    assert 0 < measure_parity(model, tmp_path / "int8.onnx").mean < 0.002


def test_int8_weights_keep_seven_bits(tmp_path: Path) -> None:
    model = make_model(hidden_size=64)
    export_graph(model, tmp_path / "full.onnx")
    quantise_graph(tmp_path / "full.onnx", tmp_path / "int8.onnx")
    weights = [
        onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load(str(tmp_path / "int8.onnx")).graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1
    ]
    assert sum(weight.size for weight in weights) > 0.8 * sum(
        p.numel() for p in model.parameters() if p.dim() == 2
    )
    assert max(int(np.abs(weight.astype(int)).max()) for weight in weights) <= 64


# The streaming graph


@pytest.fixture(scope="module")
def streaming_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The streaming graph of `make_model()`."""
    path = tmp_path_factory.mktemp("graph") / "streaming.onnx"
    export_streaming_graph(make_model(), path)
    return path


def test_streaming_parity_check_accepts_the_models_own_graph(streaming_graph: Path) -> None:
    assert check_streaming_parity(make_model(), streaming_graph).largest < 1e-4


@pytest.mark.parametrize("subsampling", [2, 3])
def test_streaming_parity_check_accepts_every_subsampling(tmp_path: Path, subsampling: int) -> None:
    model = make_model(cell="rnn", bidirectional=False, subsampling=subsampling)
    export_streaming_graph(model, tmp_path / "streaming.onnx")
    assert check_streaming_parity(model, tmp_path / "streaming.onnx").largest < 1e-4


def test_streaming_parity_check_finds_one_other_weight(streaming_graph: Path) -> None:
    with (
        one_weight_changed(make_model()) as model,
        pytest.raises(ExportError, match="nothing was written"),
    ):
        check_streaming_parity(model, streaming_graph)


def test_streaming_parity_check_finds_another_model(streaming_graph: Path) -> None:
    with pytest.raises(ExportError, match="differs from the model"):
        check_streaming_parity(make_model(seed=2), streaming_graph)


@pytest.mark.parametrize(
    "part", ["phone_head.bias", "layers.1.ahead.bias_hh_l0", "layers.0.back.bias_hh_l0"]
)
def test_streaming_parity_check_finds_another_part(streaming_graph: Path, part: str) -> None:
    model = make_model()
    model.get_parameter(part).data[3] += 1.0
    with pytest.raises(ExportError, match="differs from the model"):
        check_streaming_parity(model, streaming_graph)


def test_streaming_parity_check_refuses_what_is_not_a_number(tmp_path: Path) -> None:
    broken = make_model()
    broken.token_head.bias.data[3] = float("nan")
    export_streaming_graph(broken, tmp_path / "streaming.onnx")
    with pytest.raises(ExportError, match="differs from the model"):
        check_streaming_parity(make_model(), tmp_path / "streaming.onnx")


@pytest.mark.parametrize("bidirectional", [True, False])
def test_int8_streaming_graph_is_smaller_and_close(tmp_path: Path, bidirectional: bool) -> None:
    model = make_model(hidden_size=64, bidirectional=bidirectional)
    export_streaming_graph(model, tmp_path / "full.onnx")
    quantise_graph(tmp_path / "full.onnx", tmp_path / "int8.onnx")
    sizes = [(tmp_path / name).stat().st_size for name in ("full.onnx", "int8.onnx")]
    assert sizes[1] < sizes[0] / 2
    assert 0 < measure_streaming_parity(model, tmp_path / "int8.onnx").mean < 0.002


@pytest.mark.parametrize("bidirectional", [True, False])
def test_int8_graphs_quantise_every_lstm_operator(tmp_path: Path, bidirectional: bool) -> None:
    model = make_model(hidden_size=64, bidirectional=bidirectional)
    for export in (export_graph, export_streaming_graph):
        export(model, tmp_path / "full.onnx")
        quantise_graph(tmp_path / "full.onnx", tmp_path / "int8.onnx")
        before, after = (
            [node.op_type for node in onnx.load(str(tmp_path / name)).graph.node]
            for name in ("full.onnx", "int8.onnx")
        )
        assert before.count("LSTM") >= 2
        assert "LSTM" not in after
        assert after.count("DynamicQuantizeLSTM") == before.count("LSTM")


def test_int8_streaming_graph_keeps_each_weight_once(tmp_path: Path) -> None:
    for name, export in (("offline", export_graph), ("streaming", export_streaming_graph)):
        export(make_model(hidden_size=64), tmp_path / "full.onnx")
        quantise_graph(tmp_path / "full.onnx", tmp_path / f"{name}.onnx")
    sizes = [(tmp_path / f"{name}.onnx").stat().st_size for name in ("offline", "streaming")]
    assert sizes[1] < 1.2 * sizes[0]  # the forward direction has two operators there


# The bundle


def test_load_model_makes_the_averaged_model(checkpoint: Path, model: AcousticModel) -> None:
    loaded = load_model(load_checkpoint(checkpoint))
    assert not loaded.training
    assert all(
        torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items()
    )


def test_exported_bundle_is_whole_and_can_be_used(
    checkpoint: Path, lm: Path, corpus: TinyCorpus, tmp_path: Path
) -> None:
    notes = tmp_path / "notes.md"
    notes.write_text("## Licences\n\nTones are free.\n")
    folder = tmp_path / "bundles" / "tones"
    settings = DecodingSettings(characters=DecoderSettings(alpha=0.25, beta=2.0))
    decoding = tmp_path / "decoding.json"
    decoding.write_text(settings.model_dump_json())
    config = export_bundle(
        checkpoint,
        folder,
        name="hears-a",
        language="en-GB",
        lm=lm,
        decoding=decoding,
        dev=corpus.dev,
        notes=notes,
    )
    bundle = load_bundle(folder)
    assert bundle.config == config
    assert set(config.files) == {
        "offline.onnx",
        "streaming.onnx",
        "lexicon/lexicon.txt",
        "lm/lm.ngram",
        "MODEL_CARD.md",
    }
    assert {p.name for p in folder.parent.iterdir()} == {"tones"}
    assert (config.name, config.language, config.subsampling) == ("hears-a", "en-GB", 4)
    assert config.decoding == settings
    assert config.features.n_mels == N_MELS
    assert bundle.ngram is not None
    assert sorted(load_ngram(bundle.ngram).vocabulary) == (lm / "words.txt").read_text().split()
    assert set(config.profiles) == {"fast", "balanced"}
    assert set(config.provenance["measured"]) == {
        f"{profile}{kind}"
        for profile in ("", "fast ", "balanced ")
        for kind in ("greedy", "beam-phones", "greedy_float32")
    } | {"beam-characters", "reference"}
    assert "Tones are free." in (folder / "MODEL_CARD.md").read_text()
    assert str(tmp_path) not in (folder / "config.json").read_text()

    recogniser = load_recogniser(folder)
    (segment,) = recogniser.recognise(say("bad cab"), decoder="greedy")
    assert segment.alternatives[0].transcript == "a"


def test_bundle_takes_from_another_what_is_not_named(
    checkpoint: Path, lm: Path, tmp_path: Path
) -> None:
    save_language_model(tmp_path / "lm.pt")
    settings = DecodingSettings(search_tokens="phones", phones=DecoderSettings(alpha=0.25))
    (tmp_path / "decoding.json").write_text(settings.model_dump_json())
    survival = {"greedy": Survival(confidence=0.5)}
    (tmp_path / "survival.json").write_bytes(TypeAdapter(dict[str, Survival]).dump_json(survival))
    first, second = tmp_path / "first", tmp_path / "second"
    export_bundle(
        checkpoint,
        first,
        name="x",
        language="en",
        lm=lm,
        rescorer=tmp_path / "lm.pt",
        decoding=tmp_path / "decoding.json",
        survival=tmp_path / "survival.json",
    )
    export = partial(export_bundle, checkpoint, second, name="y", language="en", like=first)

    config = export()
    for name in (LM_NGRAM, RESCORER_GRAPH, LEXICON):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert (config.decoding, config.survival) == (settings, survival)
    (segment,) = load_recogniser(second).recognise(say("a"), decoder="rescored")
    assert segment.alternatives[0].transcript == "a"

    (tmp_path / "decoding.json").write_text(DecodingSettings().model_dump_json())
    assert export(decoding=tmp_path / "decoding.json").decoding == DecodingSettings()
    with pytest.raises(BundleError, match=r"offline\.onnx"):
        export(rescorer=first / "offline.onnx")
    with pytest.raises(BundleError, match="none"):
        export(like=tmp_path / "none")
    assert load_bundle(second).config.decoding == DecodingSettings()


def test_bundle_that_nothing_was_fitted_to_searches_phones(
    checkpoint: Path, lm: Path, tmp_path: Path
) -> None:
    config = export_bundle(checkpoint, tmp_path / "new", name="x", language="en", lm=lm)
    assert config.decoding == DecodingSettings(search_tokens="phones")


def test_model_card_names_corpora_and_figures(checkpoint: Path, tmp_path: Path) -> None:
    rows = write_recordings(tmp_path, ["a", "a", "a", "bad"], speaker="cleo", corpus="mostly-a")
    rows += write_recordings(tmp_path, ["cab a"], speaker="dora", corpus="cabs")
    dev = write_manifest(tmp_path / "dev.jsonl", rows)
    config = export_bundle(checkpoint, tmp_path / "tones", name="hears-a", language="en", dev=dev)
    measured = config.provenance["measured"]["greedy"]
    assert measured["corpora"]["mostly-a"]["wer"] == pytest.approx(1 / 4)
    assert measured["corpora"]["cabs"]["wer"] == pytest.approx(1 / 2)
    assert measured["total"]["wer"] == pytest.approx(2 / 6)
    lines = (tmp_path / "tones" / "MODEL_CARD.md").read_text().splitlines()
    assert lines[0] == "# hears-a"
    assert "| reading | cabs | mostly-a | all |" in lines
    assert "|  | 2 words | 4 words | 6 words |" in lines
    for profile in ("", "fast ", "balanced "):
        for kind in ("greedy", "greedy_float32"):
            row = f"| {profile}{kind} | 50.0% / 80.0% | 25.0% / 33.3% | 33.3% / 54.5% |"
            assert row in lines
    (trained,) = [line for line in lines if line.startswith("Trained with")]
    assert "(2.0 hours of audio seen" in trained
    assert trained.endswith("on: tones, chimes.")


def test_bundle_of_a_model_that_spells_recognises_and_says_so(
    settings: TrainingSettings, tmp_path: Path
) -> None:
    model = make_model(n_layers=1, hidden_size=32, n_spelling_layers=2)
    spelling = settings.model_copy(
        update={"model": settings.model.model_copy(update={"n_spelling_layers": 2})}
    )
    save_weights(make_checkpoint(model, spelling), tmp_path / "spelling.pt")
    for int8 in (True, False):
        folder = tmp_path / f"int8-{int8}"
        export_bundle(tmp_path / "spelling.pt", folder, name="x", language="en", int8=int8)
        assert "2 further layers write from the phones" in (folder / "MODEL_CARD.md").read_text()
        recogniser = load_recogniser(folder, decoders=("greedy",))
        features = np.full((50, settings.features.n_mels), -8, np.float32)
        assert np.isfinite(recogniser.emission(features)).all()
        first_pass = recogniser.open_first_pass("fast", "greedy")
        assert np.isfinite(first_pass.push(features)).all()


def test_model_card_says_that_nothing_was_measured(checkpoint: Path, tmp_path: Path) -> None:
    config = export_bundle(checkpoint, tmp_path / "tones", name="x", language="en", int8=False)
    card = (tmp_path / "tones" / "MODEL_CARD.md").read_text()
    assert "No error rate was measured" in card
    assert "weights float32" in card
    assert "LSTM" in card
    assert config.provenance["measured"] == {}


def test_bundle_without_int8_holds_the_models_own_graph(
    checkpoint: Path, model: AcousticModel, tmp_path: Path
) -> None:
    for int8 in (True, False):
        folder = tmp_path / f"int8-{int8}"
        export_bundle(checkpoint, folder, name="x", language="en", int8=int8)
        assert (measure_parity(model, folder / "offline.onnx").largest < 1e-4) == (not int8)
        parity = measure_streaming_parity(model, folder / "streaming.onnx")
        assert (parity.largest < 1e-4) == (not int8)


@pytest.mark.parametrize("name", ["tones", "old", "float32.onnx"])
def test_export_replaces_a_bundle(checkpoint: Path, tmp_path: Path, lm: Path, name: str) -> None:
    folder = tmp_path / "bundles" / name
    export_bundle(checkpoint, folder, name="first", language="en", int8=False, lm=lm)
    export_bundle(checkpoint, folder, name="second", language="en", int8=False)
    assert load_bundle(folder).config.name == "second"
    assert set(_read(folder.parent)) == {
        f"{name}/{file}"
        for file in ("config.json", "offline.onnx", "streaming.onnx", "MODEL_CARD.md")
    }


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_export_refuses_to_replace_what_is_no_bundle(
    checkpoint: Path, tmp_path: Path, kind: str
) -> None:
    target = tmp_path / "runs" / "train"
    precious = target / "last.pt" if kind == "folder" else target
    precious.parent.mkdir(parents=True)
    precious.write_bytes(b"weeks of training")
    with pytest.raises(ExportError, match=str(target)):
        export_bundle(checkpoint, target, name="x", language="en", int8=False)
    assert precious.read_bytes() == b"weeks of training"


@pytest.fixture
def old(checkpoint: Path, tmp_path: Path) -> Path:
    """A bundle that stands where the next one goes."""
    folder = tmp_path / "bundles" / "tones"
    export_bundle(checkpoint, folder, name="old", language="en", int8=False)
    return folder


def test_missing_language_model_leaves_the_old_bundle(
    checkpoint: Path, old: Path, tmp_path: Path
) -> None:
    before = _read(old.parent)
    (tmp_path / "half").mkdir()
    with pytest.raises(ExportError, match=r"half/lm\.ngram is missing.*voxgate lm build"):
        export_bundle(checkpoint, old, name="new", language="en", lm=tmp_path / "half")
    assert _read(old.parent) == before
    assert list(old.parent.iterdir()) == [old]


def test_graph_that_differs_leaves_the_old_bundle(
    checkpoint: Path, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _read(old.parent)
    monkeypatch.setattr(  # exports another model: a bug of the exporter
        export_module, "export_graph", lambda _, path: export_graph(make_model(), path)
    )
    with pytest.raises(ExportError, match="nothing was written"):
        export_bundle(checkpoint, old, name="new", language="en")
    assert _read(old.parent) == before


def test_streaming_graph_that_differs_leaves_the_old_bundle(
    checkpoint: Path, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _read(old.parent)
    monkeypatch.setattr(  # exports another model: a bug of the exporter
        export_module,
        "export_streaming_graph",
        lambda _, path: export_streaming_graph(make_model(n_layers=1, hidden_size=32), path),
    )
    with pytest.raises(ExportError, match="nothing was written"):
        export_bundle(checkpoint, old, name="new", language="en")
    assert _read(old.parent) == before


def test_int8_that_loses_too_much_leaves_the_old_bundle(
    checkpoint: Path, old: Path, corpus: TinyCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _read(old.parent)
    monkeypatch.setattr(export_module, "LARGEST_INT8_LOSS", -0.01)  # no loss is small enough
    with pytest.raises(ExportError, match=r"int8 raises the greedy WER.*--no-int8"):
        export_bundle(checkpoint, old, name="new", language="en", dev=corpus.dev)
    assert _read(old.parent) == before
    export_bundle(checkpoint, old, name="new", language="en", dev=corpus.dev, int8=False)
    assert load_bundle(old).config.name == "new"


def test_development_set_that_cannot_be_read_leaves_the_old_bundle(
    checkpoint: Path, old: Path, tmp_path: Path
) -> None:
    before = _read(old.parent)
    with pytest.raises(ManifestError, match=r"absent\.jsonl"):
        export_bundle(checkpoint, old, name="new", language="en", dev=tmp_path / "absent.jsonl")
    (tmp_path / "silent.wav").write_bytes(b"no audio")
    dev = write_manifest(tmp_path / "dev.jsonl", [{"audio_filepath": "silent.wav", "text": "a"}])
    with pytest.raises(ExportError, match=r"cannot be measured: silent\.wav"):
        export_bundle(checkpoint, old, name="new", language="en", dev=dev)
    assert _read(old.parent) == before


def test_missing_notes_are_named(checkpoint: Path, old: Path, tmp_path: Path) -> None:
    before = _read(old.parent)
    with pytest.raises(ExportError, match=r"absent\.md"):
        export_bundle(checkpoint, old, name="new", language="en", notes=tmp_path / "absent.md")
    assert _read(old.parent) == before


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"greedy": 1}',
        b'{"greedy": {"surprise": 1}}',
        b'{"greedy": {"confidence": "much"}}',
    ],
)
def test_calibration_that_does_not_fit_is_refused(
    checkpoint: Path, tmp_path: Path, content: bytes
) -> None:
    survival = tmp_path / "survival.json"
    survival.write_bytes(content)
    with pytest.raises(ExportError, match=rf"cannot read the calibration {survival}"):
        export_bundle(checkpoint, tmp_path / "tones", name="new", language="en", survival=survival)
    assert list(tmp_path.iterdir()) == [survival]


def test_missing_calibration_leaves_the_old_bundle(
    checkpoint: Path, old: Path, tmp_path: Path
) -> None:
    before = _read(old.parent)
    with pytest.raises(ExportError, match=r"absent\.json"):
        export_bundle(checkpoint, old, name="new", language="en", survival=tmp_path / "absent.json")
    assert _read(old.parent) == before


def test_bundle_keeps_the_calibration(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "survival.json").write_text('{"greedy": {"intercept": -0.5, "length": 0.25}}')
    export_bundle(
        checkpoint,
        tmp_path / "tones",
        name="x",
        language="en",
        int8=False,
        survival=tmp_path / "survival.json",
    )
    loaded = load_bundle(tmp_path / "tones").config.survival
    assert loaded == {"greedy": Survival(intercept=-0.5, length=0.25)}


def test_missing_checkpoint_is_named(old: Path, tmp_path: Path) -> None:
    before = _read(old.parent)
    with pytest.raises(TrainingError, match=r"absent\.pt"):
        export_bundle(tmp_path / "absent.pt", old, name="new", language="en")
    assert _read(old.parent) == before


@pytest.mark.parametrize(
    ("subsampling", "bidirectional", "fast", "balanced"),
    [
        (4, True, (8, 8, 64), (16, 8, 96)),
        (4, False, (8, 0, 32), (16, 0, 64)),
        (3, True, (10, 10, 62), (21, 10, 95)),
        (2, True, (16, 16, 66), (32, 16, 98)),
        (2, False, (16, 0, 34), (32, 0, 66)),
    ],
)
def test_profiles_last_as_long_at_every_subsampling(
    subsampling: int,
    bidirectional: bool,
    fast: tuple[int, int, int],
    balanced: tuple[int, int, int],
) -> None:
    profiles = make_profiles(make_model(subsampling=subsampling, bidirectional=bidirectional))
    for name, (chunk, right, window) in (("fast", fast), ("balanced", balanced)):
        assert profiles[name] == Profile(
            chunk_frames=chunk, right_frames=right, window_feature_frames=window
        )


def test_bundle_config_keeps_the_settings_of_the_run(
    checkpoint: Path, settings: TrainingSettings, tmp_path: Path
) -> None:
    trained = load_checkpoint(checkpoint)
    save_checkpoint(
        replace(trained, progress=replace(trained.progress, audio_s=9 * 3600)), tmp_path / "last.pt"
    )
    export_bundle(tmp_path / "last.pt", tmp_path / "tones", name="x", language="en", int8=False)
    config = json.loads((tmp_path / "tones" / "config.json").read_text())
    assert config["features"] == settings.features.model_dump(mode="json")
    assert config["provenance"]["model"] == settings.model.model_dump(mode="json")
    assert config["provenance"]["audio_seen_h"] == 9
    assert config["tokens"] == list(CHARACTERS)
    assert config["phones"] == list(PHONES)
