"""What this machine has for Voxgate, what is missing, and what to do about it: `voxgate doctor`.

A check is a function that yields findings. What a check raises becomes a finding, too, in one
place, so that one broken part does not hide the others.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil
from rich.console import Console
from rich.text import Text

from service.bundle import CONFIG_NAME, Bundle, find_bundle, load_bundle
from service.cache import CACHE_VARIABLE
from service.errors import InputError, VoxgateError
from service.processors import count_usable_processors

if TYPE_CHECKING:
    from service.recogniser import DecoderName, Recogniser

_SUPPORTED_PYTHON: Final = ((3, 10), (3, 12))
_SHOWN_PACKAGES: Final = (
    "voxgate onnxruntime onnxruntime-gpu grpcio protobuf numpy numba kenlm pyctcdecode soundfile "
    "torch"
).split()
_INSTRUCTION_SETS: Final = {
    "avx2": "AVX2",
    "avx_vnni": "AVX-VNNI",
    "avx512_vnni": "AVX512-VNNI",
    "amx_int8": "AMX",
    "asimddp": "dot products",
    "i8mm": "int8 matrices",
}
_NAME_OF_CPU_FLAGS: Final = ("flags", "Features")  # x86, ARM
_ENOUGH_MEMORY_BYTES: Final = 1 << 30
_ENOUGH_FILES: Final = 1024
_CONNECT_S: Final = 2.0
_NVIDIA_SMI_S: Final = 20.0
_NVIDIA_SMI_QUERY: Final = ("--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
_NOISE_S: Final = 1.0
_MARKS: Final = {"ok": "green", "note": "yellow", "FIX": "bold red"}
_GB: Final = 1e9


@dataclass(frozen=True)
class Finding:
    """Something that a check found out."""

    topic: str
    text: str
    fix: str | None = None
    """What to do; None where nothing needs to be done."""
    is_error: bool = False
    """Whether it must be fixed; otherwise a fix is advice."""

    @property
    def mark(self) -> str:
        """`ok`, `note` for advice, or `FIX`."""
        if self.is_error:
            return "FIX"
        return "ok" if self.fix is None else "note"


Findings = Iterator[Finding]


def examine(*, bundles: Sequence[Path], models: Path | None, address: str) -> Findings:
    """Run all checks.

    Args:
        bundles: model folders, as `voxgate serve` takes them; without any, and without `models`,
            the default one.
        models: a folder of model folders.
        address: `host:port` where a server runs or is going to.

    Raises:
        InputError: the address is none.
    """
    host, port = split_address(address)
    found = sorted(path.parent for path in models.glob(f"*/{CONFIG_NAME}")) if models else []
    folders: list[Path | None] = [*bundles, *(folder for folder in found if folder not in bundles)]
    if not folders and models is None:
        folders = [None]
    checks: list[tuple[str, Callable[[], Findings]]] = [
        ("versions", check_versions),
        ("versions", check_requirements),
        ("audio", check_audio_formats),
        ("processor", check_processor),
        ("memory", check_memory),
        ("search", check_search_cache),
        ("providers", check_providers),
        ("GPU", partial(check_gpu, folders)),
        *(("bundle", partial(check_bundle, folder)) for folder in folders),
        ("bundle", partial(check_names, folders, models)),
        ("microphone", check_microphone),
        ("port", partial(check_port, host, port)),
        ("files", check_file_limit),
    ]
    return run_checks(checks)


def run_checks(checks: Iterable[tuple[str, Callable[[], Findings]]]) -> Findings:
    """Yield what checks find; an error that ends a check is a finding of its topic."""
    for topic, check in checks:
        try:
            yield from check()
        except VoxgateError as error:  # its message says what is wrong and then what to do
            text, _, fix = str(error).partition("; ")
            yield Finding(topic, text, fix=fix or "see the message", is_error=True)
        except Exception as error:  # noqa: BLE001  # one broken part must not hide the others
            yield Finding(
                topic,
                f"this check failed: {type(error).__name__}: {error}",
                fix="repair what the message names; if it names nothing, install Voxgate again",
                is_error=True,
            )


def print_findings(findings: Iterable[Finding], console: Console) -> list[Finding]:
    """Print findings as they come, a line each and one below it for a fix; return them."""
    printed = []
    for finding in findings:
        mark = (f"{finding.mark:<6}", _MARKS[finding.mark])
        console.print(Text.assemble(mark, f"{finding.topic:<12}{finding.text}"))
        if finding.fix is not None:
            console.print(Text(f"{'':<18}-> {finding.fix}"))
        printed.append(finding)
    n_errors = sum(finding.is_error for finding in printed)
    console.print(f"{n_errors} to fix" if n_errors else "nothing must be fixed")
    return printed


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port`.

    Raises:
        InputError: it is of another form.
    """
    host, _, port = address.strip().rpartition(":")
    if not (host and port.isascii() and port.isdecimal() and int(port) < 1 << 16):
        raise InputError(f"address {address!r}: expected host:port such as 127.0.0.1:50051")
    return host.strip("[]"), int(port)


# The installation


def check_versions() -> Findings:
    """Versions of Python and of the packages that matter; one onnxruntime."""
    from service.engine import check_installation  # noqa: PLC0415  # may be what is broken

    lowest, highest = _SUPPORTED_PYTHON
    if not lowest <= sys.version_info[:2] <= highest:
        yield Finding(
            "versions",
            f"Python {platform.python_version()} is not supported",
            fix="make the virtual environment with Python 3.10, 3.11 or 3.12",
            is_error=True,
        )
    versions = {name: _version(name) for name in _SHOWN_PACKAGES}
    shown = (f"{name} {version}" for name, version in versions.items() if version)
    yield Finding("versions", ", ".join([f"Python {platform.python_version()}", *shown]))
    check_installation("cpu")


def check_requirements() -> Findings:
    """Whether the versions that Voxgate asks for are the ones installed."""
    from packaging.requirements import Requirement  # noqa: PLC0415  # comes with onnxruntime

    unmet = []
    for line in importlib.metadata.requires("voxgate") or ():
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        if version is None and requirement.name == "onnxruntime":
            version = _version("onnxruntime-gpu")
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            unmet.append(f"{requirement.name}{requirement.specifier}")
            yield Finding(
                "versions",
                f"{requirement.name} {version or 'is missing'}: Voxgate needs {unmet[-1]}",
                fix=f"pip install '{unmet[-1]}'",
                is_error=True,
            )
    if not unmet:
        yield Finding("versions", "every package is of a version that Voxgate asks for")


def check_audio_formats() -> Findings:
    """The audio library and whether it reads what needs a recent one."""
    import soundfile  # noqa: PLC0415  # may be what is broken

    reads = {
        "mp3": "MP3" in soundfile.available_formats(),
        "Opus": "OPUS" in soundfile.available_subtypes("OGG"),
    }
    library = f"libsndfile {soundfile.__libsndfile_version__}"
    lacking = [name for name, is_read in reads.items() if not is_read]
    if not lacking:
        yield Finding("audio", f"{library} reads WAV, FLAC, Ogg (Opus, Vorbis) and mp3")
        return
    yield Finding(
        "audio",
        f"{library} does not read {' or '.join(lacking)}",
        fix="pip install --force-reinstall --no-deps soundfile (its wheels bring libsndfile 1.2), "
        "or install libsndfile 1.1 or newer",
    )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


# The machine


def check_processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> Findings:
    """The processor, how much of it is ours, and what it does for an int8 model."""
    facts = _read_cpuinfo(cpuinfo)
    name = facts.get("model name") or platform.processor() or platform.machine()
    yield Finding(
        "processor",
        f"{name}: {count_usable_processors()} usable of {os.cpu_count()} "
        "(by affinity and the container's quota)",
    )
    flags = " ".join(facts.get(name, "") for name in _NAME_OF_CPU_FLAGS).split()
    if not flags:
        return
    present = [name for flag, name in _INSTRUCTION_SETS.items() if flag in flags]
    listed = ", ".join(present) or "no vector instructions that matter here"
    if set(present) - {"AVX2"}:
        yield Finding("processor", f"{listed}: int8 models run at their full speed")
    else:
        yield Finding(
            "processor",
            f"{listed}: int8 models run slower than with VNNI or AMX",
            fix="in a virtual machine, pass the host's processor through (cpu: host); otherwise "
            "measure what it carries with `voxgate bench serve`",
        )


def _read_cpuinfo(path: Path) -> dict[str, str]:
    """The facts of the last processor listed; none where there is no such file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def check_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> Findings:
    """Memory of the machine, and what the container may have of it."""
    memory = psutil.virtual_memory()
    limit = _read_memory_limit(cgroup)
    text = f"{memory.available / _GB:.1f} GB available of {memory.total / _GB:.1f} GB"
    if limit is not None and limit < memory.total:
        text += f", the container's limit is {limit / _GB:.1f} GB"
    else:
        limit = memory.total
    is_enough = min(memory.available, limit) >= _ENOUGH_MEMORY_BYTES
    fix = f"free memory or raise the limit to {_ENOUGH_MEMORY_BYTES / _GB:.1f} GB and more"
    yield Finding("memory", text, fix=None if is_enough else fix)


def _read_memory_limit(cgroup: Path) -> int | None:
    """Bytes the cgroup grants (v2, then v1); None without a limit."""
    for path in (cgroup / "memory.max", cgroup / "memory" / "memory.limit_in_bytes"):
        try:
            return int(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return None


def check_search_cache() -> Findings:
    """Where the compiled search is kept, and what that means for a start."""
    from service.decoding import compiled  # noqa: PLC0415  # numba may be what is broken

    folder = compiled._FOLDER  # noqa: SLF001  # what the search itself has decided to use
    if folder is None:
        where = os.environ.get(CACHE_VARIABLE) or "the cache folder"
        yield Finding(
            "search",
            f"{where} cannot be written: every start compiles the search, which takes about a "
            "minute",
            fix=f"set {CACHE_VARIABLE} to a folder that can be written and is kept",
        )
    elif any(folder.rglob("*.nbi")):
        yield Finding("search", f"compiled for this processor, in {folder}: starts take seconds")
    else:
        yield Finding(
            "search",
            f"not yet compiled for this processor; {folder} can be written: the first start takes "
            "about a minute longer (below, the first bundle's test)",
        )


def check_file_limit() -> Findings:
    """How many files, and so connections, this process may open."""
    import resource  # noqa: PLC0415  # not everywhere

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    is_enough = soft == resource.RLIM_INFINITY or soft >= _ENOUGH_FILES
    yield Finding(
        "files",
        f"{_limit(soft)} can be open at a time, each connection is one (hard limit {_limit(hard)})",
        fix=None if is_enough else f"ulimit -n {_ENOUGH_FILES}, or LimitNOFILE= of the service",
    )


def _limit(n_files: int) -> str:
    return "any number" if n_files < 0 else f"{n_files:,}"


# Where models run


def check_providers() -> Findings:
    """The execution providers that onnxruntime was built with."""
    import onnxruntime  # noqa: PLC0415  # may be what is broken

    yield Finding("providers", ", ".join(onnxruntime.get_available_providers()))


def check_gpu(folders: Sequence[Path | None]) -> Findings:
    """Whether there is an NVIDIA driver, and a model that really runs on it.

    Args:
        folders: bundles; the first one is tried.
    """
    from service.engine import check_installation  # noqa: PLC0415  # may be what is broken

    gpu, has_driver = _ask_nvidia_smi(), _has_cuda_driver()
    if gpu is not None:
        yield Finding("GPU", f"nvidia-smi: {gpu}")
    try:
        check_installation("cuda")
        lacking = None
    except VoxgateError as error:
        lacking = str(error)
    if not has_driver:
        text = "no NVIDIA driver (libcuda.so.1 cannot be loaded): models run on the processor"
        fix = "install the driver; in a container, start it with --gpus all"
        yield Finding("GPU", text, fix=fix if gpu is not None or lacking is None else None)
    elif lacking is not None:
        text, _, fix = lacking.partition("; ")
        yield Finding("GPU", f"there is a driver, but: {text}", fix=fix)
    elif folders:
        yield from _check_cuda(load_bundle(find_bundle(folders[0])))


def _check_cuda(bundle: Bundle) -> Findings:
    from service.engine import open_session  # noqa: PLC0415  # may be what is broken

    start = time.perf_counter()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # onnxruntime prints what it cannot load
            open_session(bundle.streaming_graph, provider="cuda")
    except VoxgateError as error:
        yield Finding(
            "GPU",
            str(error).partition("; ")[0],
            fix="pip install 'onnxruntime-gpu[cuda,cudnn]' brings the CUDA libraries and cuDNN; "
            "the driver must be as new as they ask for",
            is_error=True,
        )
        return
    seconds = time.perf_counter() - start
    yield Finding("GPU", f"CUDA runs {bundle.streaming_graph} (loaded in {seconds:.1f} s)")


def _ask_nvidia_smi() -> str | None:
    """What nvidia-smi says of the GPUs; None where there is no such program."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        said = subprocess.run(
            [program, *_NVIDIA_SMI_QUERY],
            capture_output=True,
            check=False,
            text=True,
            timeout=_NVIDIA_SMI_S,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {_NVIDIA_SMI_S:.0f} s"
    lines = (said.stdout or said.stderr).strip().splitlines()
    return "; ".join(lines) or f"exit status {said.returncode}"


def _has_cuda_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


# Bundles


def check_bundle(folder: Path | None) -> Findings:
    """Load a bundle, say what is in it, and recognise noise with it.

    Args:
        folder: the bundle; None for the default one.

    Raises:
        BundleError: it cannot be used; `run_checks` reports it.
        ProviderError: onnxruntime is not installed as it must be.
    """
    bundle = load_bundle(find_bundle(folder))
    config = bundle.config
    yield Finding(
        "bundle",
        f"{config.name} ({config.language}) in {bundle.folder}, format {config.format_version}, "
        f"every hash is right: {', '.join(_describe_parts(bundle))}",
    )
    from service.recogniser import load_recogniser  # noqa: PLC0415  # may be what is broken

    start = time.perf_counter()
    recogniser = load_recogniser(bundle.folder, decoders=("greedy", "beam"))
    load_s = time.perf_counter() - start
    profiles = ", ".join(
        f"{name} {1000 * recogniser.latency_s(name):.0f} ms" for name in sorted(config.profiles)
    )
    yield Finding("bundle", f"{config.name}: look-ahead of the profiles: {profiles}")
    yield Finding(
        "bundle",
        f"{config.name}: loaded in {load_s:.1f} s; {_NOISE_S:.0f} s of noise took "
        f"{_time_noise(recogniser, 'greedy'):.3f} s greedy, {_time_noise(recogniser, 'beam'):.3f} "
        f"s with the beam over {config.decoding.search_tokens}",
    )


def _describe_parts(bundle: Bundle) -> Iterator[str]:
    size = sum((bundle.folder / name).stat().st_size for name in bundle.config.files)
    yield f"{size / 1e6:.0f} MB"
    if bundle.ngram is None:
        yield "no language model"
    else:
        yield f"language model {bundle.ngram.stat().st_size / 1e6:.0f} MB"
    yield f"lexicon of {len(bundle.read_lexicon()):,} words" if bundle.has_lexicon else "no lexicon"
    yield "letters to phones" if bundle.g2p_graph else "no letters to phones"


def _time_noise(recogniser: Recogniser, decoder: DecoderName) -> float:
    """Seconds that recognising noise takes."""
    import numpy as np  # noqa: PLC0415  # may be what is broken

    n_samples = round(_NOISE_S * recogniser.sample_rate)
    waveform = np.random.default_rng(0).normal(0, 0.1, n_samples).astype(np.float32)
    start = time.perf_counter()
    recogniser.recognise(waveform, decoder=decoder)
    return time.perf_counter() - start


def check_names(folders: Sequence[Path | None], models: Path | None) -> Findings:
    """Whether a server could tell its models apart, and has one."""
    if not folders:
        yield Finding(
            "bundle",
            f"{models} holds no bundle: no folder in it has a {CONFIG_NAME}",
            fix="put folders there that `voxgate export` wrote, or name one with --bundle DIR",
            is_error=True,
        )
    if len(folders) < 2:
        return
    names: Counter[str] = Counter()
    for folder in folders:
        with contextlib.suppress(VoxgateError):  # `check_bundle` says what is wrong with it
            names[load_bundle(find_bundle(folder)).config.name] += 1
    for name, n_bundles in names.items():
        if n_bundles > 1:
            yield Finding(
                "bundle",
                f"{n_bundles} bundles are named {name!r}, and a server refuses that",
                fix="export one of them with another --name, or name a folder once",
                is_error=True,
            )


# Around the server


def check_microphone() -> Findings:
    """Whether `voxgate stream mic` has something to listen to."""
    try:
        import sounddevice  # noqa: PLC0415  # an extra
    except (ImportError, OSError) as error:
        yield Finding(
            "microphone",
            f"not usable ({error})",
            fix="for `voxgate stream mic`: pip install 'voxgate[microphone]', and on Debian: "
            "apt-get install libportaudio2",
        )
        return
    try:
        device = sounddevice.query_devices(kind="input")
    except (sounddevice.PortAudioError, ValueError) as error:
        yield Finding(
            "microphone",
            f"no input device ({error})",
            fix="connect one, or pipe audio in: arecord -f S16_LE -r 16000 | voxgate stream -",
        )
        return
    yield Finding("microphone", str(device["name"]))


def check_port(host: str, port: int) -> Findings:
    """Whether a server answers at an address, or could listen there."""
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if not _is_answered(host, port):
        try:
            _listen_once(host, port)
        except OSError as error:
            yield Finding(
                "port",
                f"nothing answers at {where}, and no server can listen there ({error.strerror})",
                fix="name another with --address H:P, and with --host and --port of voxgate serve",
            )
        else:
            yield Finding("port", f"{where} is free")
        return
    from service.client import check_health  # noqa: PLC0415  # grpc may be what is broken

    if check_health(where):
        yield Finding("port", f"a server answers at {where} and is serving")
        return
    yield Finding(
        "port",
        f"something listens at {where} but does not say that it is serving: another program, a "
        "server that is stopping, or one that wants TLS",
        fix="look what it is (ss -ltnp), or choose another port with voxgate serve --port",
    )


def _is_answered(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_S):
            return True
    except OSError:
        return False


def _listen_once(host: str, port: int) -> None:
    """Take a port and give it back.

    Raises:
        OSError: it cannot be had.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
