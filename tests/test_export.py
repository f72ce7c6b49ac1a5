"""Export: what is written computes what was trained, or nothing is written."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from tiny import (
    N_MELS,
    TEXTS,
    TinyCorpus,
    make_checkpoint,
    make_model,
    make_settings,
    one_weight_changed,
    write_corpus,
)

from export.bundle import export_bundle
from export.graph import ServedModel, export_graph, quantise_graph
from export.parity import check_parity, measure_parity
from service.bundle import load_bundle
from service.errors import ExportError
from service.recogniser import load_recogniser
from training.checkpoint import save_checkpoint
from training.ngram import build_ngram

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's exporter and onnx have their own


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TinyCorpus:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def checkpoint(corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    settings = make_settings(corpus, folder / "run")
    model = make_model(**settings.model.model_dump())
    save_checkpoint(make_checkpoint(model, settings), folder / "last.pt")
    return folder / "last.pt"


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_graph_equals_model_for_any_length_and_batch(
    cell: str, bidirectional: bool, tmp_path: Path
) -> None:
    model = make_model(cell=cell, bidirectional=bidirectional)
    export_graph(model, tmp_path / "graph.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "graph.onnx"))
    served = ServedModel(model).eval()
    for lengths in ([1], [2], [3], [400], [57, 57], [90, 3, 1, 44, 17]):
        features = torch.randn(len(lengths), max(lengths), N_MELS) * 4 - 8
        with torch.no_grad():
            expected = served(features, torch.tensor(lengths))
        actual = session.run(
            None, {"features": features.numpy(), "feature_lengths": np.array(lengths)}
        )
        assert actual[2].tolist() == expected[2].tolist()
        for head in (0, 1):
            for i, n_frames in enumerate(actual[2]):
                np.testing.assert_allclose(
                    actual[head][i, :n_frames], expected[head][i, :n_frames], atol=1e-4
                )


def test_parity_check_finds_one_other_weight(tmp_path: Path) -> None:
    model = make_model()
    export_graph(model, tmp_path / "graph.onnx")
    assert check_parity(model, tmp_path / "graph.onnx").largest < 1e-4
    with one_weight_changed(model), pytest.raises(ExportError, match="nothing was written"):
        check_parity(model, tmp_path / "graph.onnx")


def test_int8_graph_is_smaller_and_close(tmp_path: Path) -> None:
    model = make_model(hidden_size=64)
    export_graph(model, tmp_path / "full.onnx")
    quantise_graph(tmp_path / "full.onnx", tmp_path / "int8.onnx")
    sizes = [(tmp_path / name).stat().st_size for name in ("full.onnx", "int8.onnx")]
    assert sizes[1] < sizes[0] / 2
    assert 0 < measure_parity(model, tmp_path / "int8.onnx").mean < 0.01


def test_exported_bundle_is_whole_and_can_be_used(
    checkpoint: Path, corpus: TinyCorpus, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(TEXTS) + "\n")
    build_ngram([text], tmp_path / "lm", order=2)
    notes = tmp_path / "notes.md"
    notes.write_text("## Licences\n\nTones are free.\n")
    bundle = tmp_path / "bundles" / "tones"
    config = export_bundle(
        checkpoint, bundle, name="tones", language="en", lm=tmp_path / "lm", dev=corpus.dev,
        notes=notes,
    )  # fmt: skip
    assert load_bundle(bundle).config == config
    assert set(config.files) == {"offline.onnx", "lm/lm.binary", "lm/words.txt", "MODEL_CARD.md"}
    assert sorted(p.name for p in bundle.parent.iterdir()) == ["tones"]
    card = (bundle / "MODEL_CARD.md").read_text()
    assert "Tones are free." in card
    measured = config.provenance["measured"]
    assert set(measured) == {"greedy", "beam", "greedy_float32"}
    rate = f"{measured['beam']['total']['wer']:.1%}"
    assert re.search(rf"\| all \|.*{re.escape(rate)}", card)
    assert load_recogniser(bundle).name == "tones"


def test_failed_export_leaves_the_old_bundle(checkpoint: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "tones"
    export_bundle(checkpoint, bundle, name="tones", language="en", int8=False)
    before = {p.name: p.read_bytes() for p in bundle.iterdir()}
    with pytest.raises(ExportError, match=r"lm\.binary is missing"):
        export_bundle(checkpoint, bundle, name="other", language="en", lm=tmp_path / "nowhere")
    assert {p.name: p.read_bytes() for p in bundle.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["tones"]
    export_bundle(checkpoint, bundle, name="other", language="en")
    assert load_bundle(bundle).config.name == "other"
    assert [p.name for p in tmp_path.iterdir()] == ["tones"]
