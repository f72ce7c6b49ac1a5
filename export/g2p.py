"""The letters-to-phones model as an ONNX graph that says itself what it reads and writes."""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path

import onnx
import torch

from export.graph import quantise_graph
from service.errors import ExportError
from service.g2p import Pronouncer
from training.g2p import LETTERS, G2pModel, pronounce_greedily
from training.lexicon import PHONES

_OPSET = 17
_PROBE = ("voxgate", "o'clock", "a", "pneumonia", "knights", "recogniser", "zyzzyva", "queue")


def export_g2p(model: G2pModel, path: Path, *, int8: bool = False) -> None:
    """Write the graph, and check that it pronounces as the model does.

    Args:
        model: a trained model.
        path: the file to write.
        int8: whether to quantise its matrix products.

    Raises:
        ExportError: the float32 graph pronounces a word differently; nothing is written then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        unfinished = Path(folder) / "g2p.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter warns of its own age
            torch.onnx.export(
                model.eval(),
                (torch.zeros(2, 5, dtype=torch.int64), torch.tensor([5, 3])),
                str(unfinished),
                input_names=["letters", "lengths"],
                output_names=["log_probs"],
                dynamic_axes={
                    "letters": {0: "batch", 1: "letter"},
                    "lengths": {0: "batch"},
                    "log_probs": {0: "batch", 1: "frames"},
                },
                opset_version=_OPSET,
                dynamo=False,
            )
        _describe(unfinished, model)
        expected = pronounce_greedily(model, _PROBE)
        found = Pronouncer(unfinished).pronounce(_PROBE)
        for word, ours, theirs in zip(_PROBE, found, expected, strict=True):
            if ours != theirs:
                raise ExportError(f"the graph pronounces {word!r} {ours}, the model {theirs}")
        if int8:
            quantise_graph(unfinished, Path(folder) / "int8.onnx")
            unfinished = Path(folder) / "int8.onnx"
        unfinished.replace(path)


def _describe(path: Path, model: G2pModel) -> None:
    graph = onnx.load(str(path))
    facts = {
        "letters": json.dumps(LETTERS),
        "phones": json.dumps(PHONES),
        "n_repeats": str(model.shape.n_repeats),
    }
    for key, value in facts.items():
        entry = graph.metadata_props.add()
        entry.key, entry.value = key, value
    onnx.save(graph, str(path))
