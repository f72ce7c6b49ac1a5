"""ONNX graphs run by onnxruntime: how one is opened, and the acoustic model at serving time."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as onnxruntime_errors

from service.errors import BundleError, ProviderError

FloatArray = npt.NDArray[np.float32]
Provider = Literal["cpu", "cuda"]
T = TypeVar("T")

INPUTS: Final = ("features", "feature_lengths")
OUTPUTS: Final = ("token_log_probs", "phone_log_probs", "lengths")
STATES: Final = ("feature_cache", "convolution_cache", "recurrent_state", "spelling_state")
"""Names of the parts of `StreamState`; a graph without spelling layers lacks the last one."""
STREAMING_INPUTS: Final = (*INPUTS, "n_chunk_frames", *STATES)
STREAMING_OUTPUTS: Final = (*OUTPUTS, *(f"next_{name}" for name in STATES))

SPELL: Final = "spell"
"""Input of a graph that spells tokens from phones: whether it does."""

_PROVIDERS: Final[dict[Provider, str]] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
}
_LOAD_ERRORS: Final = (
    onnxruntime_errors.Fail,
    onnxruntime_errors.InvalidArgument,
    onnxruntime_errors.InvalidGraph,
    onnxruntime_errors.InvalidProtobuf,
    onnxruntime_errors.NoSuchFile,
)
_REPAIR: Final = (
    "`make install-gpu` in a checkout, or: pip uninstall -y onnxruntime onnxruntime-gpu && "
    "pip install 'onnxruntime-gpu[cuda,cudnn]'"
)


class StreamState(NamedTuple):
    """What a window needs of the windows before it, for a batch of streams."""

    features: FloatArray
    """The last feature frame, normalised, float32, (batch, 1, mel)."""
    convolved: FloatArray
    """The last frame of the first convolution, float32, (batch, channel, 1, band)."""
    recurrent: FloatArray
    """Forward state of each layer, float32, (batch, layer, part, hidden)."""
    spelling: FloatArray
    """The same of the layers that spell the tokens from the phones."""


class StreamingEngine(Protocol):
    """Maps windows of streams to log_probs and carries their states."""

    def initial_state(self, batch_size: int = 1) -> StreamState:
        """The state at the start of `batch_size` streams: zeros."""
        ...

    def step(
        self,
        features: FloatArray,
        feature_lengths: npt.NDArray[np.int64],
        *,
        n_chunk_frames: int,
        state: StreamState,
        spell: bool = True,
    ) -> tuple[FloatArray, npt.NDArray[np.int64], StreamState]:
        """Read one window of each stream.

        Args:
            features: log-mel energies of a chunk and its right context, float32,
                (batch, time, mel).
            feature_lengths: frames of each window, int64, (batch,), at least 1; fewer than `time`
                only where audio ends.
            n_chunk_frames: output frames of the chunk.
            state: what the window before left.
            spell: whether the tokens are wanted; see `AcousticEngine`. The same for all windows of
                a stream.

        Returns:
            Log probabilities of the window, float32, (batch, frames, unit), the tokens' and then
            the phones': the first `n_chunk_frames` are settled, those behind them know less of what
            follows; how many frames there are, int64, (batch,); and the state at the chunk's end.
        """
        ...


class AcousticEngine(Protocol):
    """Maps features to log_probs of both heads, tokens and phones."""

    def log_probs(
        self,
        features: FloatArray,
        feature_lengths: npt.NDArray[np.int64],
        *,
        spell: bool = True,
    ) -> FloatArray:
        """Compute the log_probs of a batch.

        Args:
            features: log-mel energies, float32, (batch, time, mel); padding is ignored.
            feature_lengths: frames of each utterance, int64, (batch,), at least 1.
            spell: whether the tokens are wanted. Where they are spelt from the phones, a caller who
                needs the phones alone saves that work; its columns of the tokens are NaN.

        Returns:
            Log probabilities, float32, (batch, frames, unit), those of the tokens and then those
            of the phones; frames behind an utterance's end mean nothing.
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
        self._heads = _Heads(open_session(graph, provider=provider, n_threads=n_threads))

    def log_probs(
        self,
        features: FloatArray,
        feature_lengths: npt.NDArray[np.int64],
        *,
        spell: bool = True,
    ) -> FloatArray:
        """Compute the log_probs of a batch; see `AcousticEngine`."""
        inputs = dict(zip(INPUTS, (features, feature_lengths), strict=True))
        return self._heads.run((), inputs, spell=spell)[0]


class OnnxStreamingEngine:
    """An exported streaming graph on the CPU or on a GPU."""

    def __init__(self, graph: Path, *, provider: Provider = "cpu", n_threads: int = 1) -> None:
        """Load the graph; see `OnnxEngine`.

        Raises:
            ProviderError: the provider is not there, or two onnxruntime packages are installed.
        """
        session = open_session(graph, provider=provider, n_threads=n_threads, keeps_memory=True)
        self._heads = _Heads(session)
        shapes = {i.name: i.shape for i in session.get_inputs()}
        self._state_shapes = [tuple(shapes[name][1:]) for name in STATES if name in shapes]

    def initial_state(self, batch_size: int = 1) -> StreamState:
        """The state at the start of `batch_size` streams: zeros."""
        parts = [np.zeros((batch_size, *shape), np.float32) for shape in self._state_shapes]
        missing = [np.zeros((batch_size, 0), np.float32)] * (len(STATES) - len(parts))
        return StreamState(*parts, *missing)

    def step(
        self,
        features: FloatArray,
        feature_lengths: npt.NDArray[np.int64],
        *,
        n_chunk_frames: int,
        state: StreamState,
        spell: bool = True,
    ) -> tuple[FloatArray, npt.NDArray[np.int64], StreamState]:
        """Read one window of each stream; see `StreamingEngine`."""
        n_parts = len(self._state_shapes)
        values = (features, feature_lengths, np.array(n_chunk_frames, np.int64), *state[:n_parts])
        wanted = STREAMING_OUTPUTS[2 : 3 + n_parts]
        inputs = dict(zip(STREAMING_INPUTS, values, strict=False))
        log_probs, lengths, *after = self._heads.run(wanted, inputs, spell=spell)
        return log_probs, lengths, StreamState(*after, *state[n_parts:])


class _Heads:
    """A graph of both heads, and which of them is run."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session = session
        self._spells = SPELL in [i.name for i in session.get_inputs()]

    def run(
        self, more: Sequence[str], inputs: dict[str, Any], *, spell: bool
    ) -> list[npt.NDArray[Any]]:
        """The log_probs of both heads side by side, and more outputs."""
        if self._spells:
            inputs[SPELL] = np.array(spell)
        tokens, phones, *others = self._session.run([*OUTPUTS[:2], *more], inputs)
        if tokens.shape[:2] != phones.shape[:2]:
            tokens = np.broadcast_to(tokens, (*phones.shape[:2], tokens.shape[2]))
        return [np.concatenate([tokens, phones], axis=-1, dtype=np.float32), *others]


def open_session(
    graph: Path, *, provider: Provider = "cpu", n_threads: int = 1, keeps_memory: bool = False
) -> onnxruntime.InferenceSession:
    """Load a graph of any kind.

    Args:
        graph: an ONNX file.
        provider: where to run it.
        n_threads: threads of one run on the CPU.
        keeps_memory: whether memory is kept from run to run, which is faster; where lengths vary,
            what the longest run took would be kept for good.

    Raises:
        BundleError: the file is missing or damaged.
        ProviderError: the provider is not there, or two onnxruntime packages are installed.
    """
    check_installation(provider)
    if provider == "cuda":
        onnxruntime.preload_dlls()  # CUDA libraries that pip installed
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = n_threads
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # lengths vary: patterns would pile up
    options.enable_cpu_mem_arena = keeps_memory
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    wanted = _PROVIDERS[provider]
    try:
        session = onnxruntime.InferenceSession(str(graph), options, providers=[wanted])
    except _LOAD_ERRORS as error:
        raise BundleError(f"cannot load {graph}: {error}; copy or export it again") from error
    active = session.get_providers()
    if wanted not in active:
        raise ProviderError(
            f"--provider {provider} was asked for but onnxruntime chose {active}; "
            f"check the GPU driver and CUDA libraries, or use --provider cpu"
        )
    return session


def open_described(
    graph: Path,
    read: Callable[[Mapping[str, str]], T],
    kind: str,
    *,
    n_threads: int = 1,
    keeps_memory: bool = False,
) -> tuple[onnxruntime.InferenceSession, T]:
    """Load a graph that brings its own description.

    Args:
        graph: an ONNX file.
        read: makes the description of the file's metadata; raises ValueError or TypeError.
        kind: what the file should be, for the message.
        n_threads: threads of one run.
        keeps_memory: see `open_session`.

    Raises:
        BundleError: the file is missing, damaged or another graph.
        ProviderError: two onnxruntime packages are installed.
    """
    session = open_session(graph, n_threads=n_threads, keeps_memory=keeps_memory)
    try:
        return session, read(session.get_modelmeta().custom_metadata_map)
    except (TypeError, ValueError) as error:
        raise BundleError(f"{graph} is no {kind}: {error}; export it again") from error


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
