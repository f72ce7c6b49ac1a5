"""The acoustic model at serving time: an ONNX graph run by onnxruntime."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Final, Literal, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime

from service.errors import ProviderError

FloatArray = npt.NDArray[np.float32]
Provider = Literal["cpu", "cuda"]

INPUTS: Final = ("features", "feature_lengths")
OUTPUTS: Final = ("token_log_probs", "phone_log_probs", "lengths")

_PROVIDERS: Final[dict[Provider, str]] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
}
_REPAIR: Final = (
    "`make install-gpu` in a checkout, or: pip uninstall -y onnxruntime onnxruntime-gpu && "
    "pip install 'onnxruntime-gpu[cuda,cudnn]'"
)


class AcousticEngine(Protocol):
    """Maps features to log_probs."""

    def log_probs(self, features: FloatArray, feature_lengths: npt.NDArray[np.int64]) -> FloatArray:
        """Compute the token log_probs of a batch.

        Args:
            features: log-mel energies, float32, (batch, time, mel); padding is ignored.
            feature_lengths: frames of each utterance, int64, (batch,), at least 1.

        Returns:
            Log probabilities, float32, (batch, frames, token); frames behind an utterance's end
            mean nothing.
        """
        ...


class OnnxEngine:
    """An exported graph on the CPU or on a GPU."""

    def __init__(self, graph: Path, *, provider: Provider = "cpu", n_threads: int = 1) -> None:
        """Load the graph.

        Args:
            graph: an ONNX file that `voxgate export` wrote.
            provider: where to run it.
            n_threads: threads of one run on the CPU.

        Raises:
            ProviderError: the provider is not there, or two onnxruntime packages are installed.
        """
        check_installation(provider)
        if provider == "cuda":
            onnxruntime.preload_dlls()  # CUDA libraries that pip installed
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = n_threads
        options.inter_op_num_threads = 1
        options.enable_mem_pattern = False  # lengths vary: patterns would pile up
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        wanted = _PROVIDERS[provider]
        self._session = onnxruntime.InferenceSession(str(graph), options, providers=[wanted])
        active = self._session.get_providers()
        if wanted not in active:
            raise ProviderError(
                f"--provider {provider} was asked for but onnxruntime chose {active}; "
                f"check the GPU driver and CUDA libraries, or use --provider cpu"
            )

    def log_probs(self, features: FloatArray, feature_lengths: npt.NDArray[np.int64]) -> FloatArray:
        """Compute the token log_probs of a batch; see `AcousticEngine`."""
        inputs = dict(zip(INPUTS, (features, feature_lengths), strict=True))
        outputs = self._session.run([OUTPUTS[0]], inputs)
        return np.asarray(outputs[0], dtype=np.float32)


def check_installation(provider: Provider) -> None:
    """Refuse an installation that would fall back silently.

    Raises:
        ProviderError: two onnxruntime packages share one folder, or the provider is missing.
    """
    installed = [name for name in ("onnxruntime", "onnxruntime-gpu") if _is_installed(name)]
    if len(installed) == 2:
        raise ProviderError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files; "
            f"repair with {_REPAIR} (where there is no GPU, install onnxruntime instead)"
        )
    available = onnxruntime.get_available_providers()
    if _PROVIDERS[provider] not in available:
        raise ProviderError(
            f"--provider {provider} was asked for but this onnxruntime has only {available}; "
            f"repair with {_REPAIR}; or use --provider cpu"
        )


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
