"""The acoustic model as an ONNX graph, and as an int8 one."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Final

import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor, nn

from service.engine import INPUTS, OUTPUTS
from training.model import AcousticModel

_OPSET: Final = 17
_EXAMPLE_FRAMES: Final = 200


class ServedModel(nn.Module):
    """What is exported: both heads as log probabilities."""

    def __init__(self, model: AcousticModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Tensor, feature_lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features to log_probs of both heads and their lengths; see `AcousticModel`."""
        token_logits, phone_logits, lengths = self.model(features, feature_lengths)
        return token_logits.log_softmax(-1), phone_logits.log_softmax(-1), lengths


def export_graph(model: AcousticModel, path: Path) -> None:
    """Write the float32 graph with free batch and time axes (the TorchScript path)."""
    n_mels = len(model.feature_mean)
    features = torch.zeros(2, _EXAMPLE_FRAMES, n_mels)
    feature_lengths = torch.tensor([_EXAMPLE_FRAMES, _EXAMPLE_FRAMES // 2])
    free = {0: "batch", 1: "time"}
    free_frames = {0: "batch", 1: "frames"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of its own age and of free batches
        torch.onnx.export(
            ServedModel(model).eval(),
            (features, feature_lengths),
            str(path),
            input_names=list(INPUTS),
            output_names=list(OUTPUTS),
            dynamic_axes={
                INPUTS[0]: free,
                INPUTS[1]: {0: "batch"},
                OUTPUTS[0]: free_frames,
                OUTPUTS[1]: free_frames,
                OUTPUTS[2]: {0: "batch"},
            },
            opset_version=_OPSET,
            dynamo=False,
        )
    onnx.checker.check_model(str(path))


def quantise_graph(source: Path, target: Path) -> None:
    """Quantise the matrix products to int8, activations scaled as they come.

    Weights keep 7 bits: processors without VNNI add pairs of products in 16 bits, which 8-bit
    weights would overflow.
    """
    logging.disable(logging.WARNING)  # it recommends steps that bring nothing here
    try:
        quantize_dynamic(
            str(source),
            str(target),
            op_types_to_quantize=["LSTM", "MatMul", "Gemm"],
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
        )
    finally:
        logging.disable(logging.NOTSET)
