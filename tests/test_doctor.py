"""The doctor: what it finds on a machine that is well, and what it says of one that is not."""

from __future__ import annotations

import importlib.metadata
import json
import resource
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from io import StringIO
from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime
import pytest
import soundfile
from conftest import RunningServer
from rich.console import Console
from typer.testing import CliRunner

from service import doctor
from service.bundle import CONFIG_NAME, load_bundle
from service.cache import CACHE_VARIABLE
from service.cli import app
from service.decoding import compiled
from service.doctor import Finding, Findings
from service.errors import BundleError, InputError


def _only(findings: Iterator[Finding], topic: str = "") -> Finding:
    (finding,) = (f for f in findings if topic in ("", f.topic))
    return finding


def _of_bundles(*bundles: Path | None, models: Path | None = None) -> list[Finding]:
    return list(
        doctor.run_checks(
            [
                *(("bundle", lambda b=b: doctor.check_bundle(b)) for b in bundles),
                ("bundle", lambda: doctor.check_names(bundles, models)),
            ]
        )
    )


def _copy(bundle: Path, target: Path) -> Path:
    return Path(shutil.copytree(bundle, target))


def _damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# Bundles


def test_good_bundle_is_described_and_tried(shipped_bundle: Path) -> None:
    contents, profiles, trial = _of_bundles(shipped_bundle)
    assert not any(f.is_error or f.fix for f in (contents, profiles, trial))
    config = load_bundle(shipped_bundle).config
    for part in (config.name, config.language, str(shipped_bundle), "language model", "lexicon of"):
        assert part in contents.text
    assert all(f"{name} " in profiles.text for name in config.profiles)
    assert f"beam over {config.decoding.search_tokens}" in trial.text


def test_damaged_bundle_names_the_file_and_the_others_are_still_tried(
    shipped_bundle: Path, tmp_path: Path
) -> None:
    damaged = _copy(shipped_bundle, tmp_path / "damaged")
    _damage(damaged / "offline.onnx")
    first, *others = _of_bundles(damaged, shipped_bundle)
    assert first.is_error
    assert str(damaged / "offline.onnx") in first.text
    assert first.fix is not None
    assert "copy the bundle again" in first.fix
    assert len(others) == 3
    assert not any(f.is_error for f in others)


def test_missing_bundle_says_what_to_name(tmp_path: Path) -> None:
    finding = _only(iter(_of_bundles(tmp_path / "none")))
    assert finding.is_error
    assert str(tmp_path / "none") in finding.text
    assert "voxgate export" in (finding.fix or "")


def test_bundles_of_one_name_are_refused_as_the_server_does(
    shipped_bundle: Path, tmp_path: Path
) -> None:
    folders = (shipped_bundle, tmp_path / "missing", _copy(shipped_bundle, tmp_path / "twin"))
    finding = _only(doctor.check_names(folders, None))
    assert finding.is_error
    assert "2 bundles are named 'en-small'" in finding.text


def test_folder_of_models_is_searched_and_an_empty_one_is_an_error(
    shipped_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "models" / "empty").mkdir(parents=True)
    empty = list(_examine(models=tmp_path / "models"))
    assert [f.text.split(":")[0] for f in empty if f.is_error] == [
        f"{tmp_path / 'models'} holds no bundle"
    ]
    _copy(shipped_bundle, tmp_path / "models" / "mine")
    (tmp_path / "models" / "mine" / CONFIG_NAME).write_text('{"format_version": 1}')
    (error,) = (f for f in _examine(models=tmp_path / "models") if f.is_error)
    assert "format version 1" in error.text


def _examine(*, bundles: Sequence[Path] = (), models: Path | None = None) -> Findings:
    return doctor.examine(bundles=bundles, models=models, address="127.0.0.1:50051")


# Checks that fail


def test_check_that_raises_becomes_a_finding_and_the_next_one_runs() -> None:
    def break_down() -> Findings:
        yield Finding("first", "found before")
        raise ZeroDivisionError("unforeseen")

    def refuse() -> Findings:
        raise BundleError("x is damaged; copy it again")
        yield

    def pass_by() -> Findings:
        yield Finding("last", "fine")

    checks = [("first", break_down), ("second", refuse), ("last", pass_by)]
    before, broken, refused, last = doctor.run_checks(checks)
    assert (before.text, last.text) == ("found before", "fine")
    assert (broken.topic, broken.is_error) == ("first", True)
    assert "ZeroDivisionError: unforeseen" in broken.text
    assert refused == Finding("second", "x is damaged", fix="copy it again", is_error=True)


# The installation


def _install(folder: Path, distribution: str, version: str = "99.0") -> None:
    """What pip leaves of a distribution: its metadata."""
    name = f"{distribution.replace('-', '_')}-{version}.dist-info"
    (folder / name).mkdir(parents=True)
    (folder / name / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
    )


def test_versions_name_what_matters_and_are_what_voxgate_asks_for() -> None:
    finding = _only(doctor.check_versions())
    for name in ("Python", "voxgate", "grpcio", "protobuf", "numba", "kenlm", "pyctcdecode"):
        assert f"{name} " in finding.text
    assert f"numpy {np.__version__}" in finding.text
    assert not any(f.is_error for f in doctor.check_requirements())


def test_both_onnxruntime_packages_are_an_error_with_the_repair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for distribution in ("onnxruntime", "onnxruntime-gpu"):
        _install(tmp_path, distribution)
    monkeypatch.syspath_prepend(str(tmp_path))
    versions, error = doctor.run_checks([("versions", doctor.check_versions)])
    assert "onnxruntime 99.0, onnxruntime-gpu 99.0" in versions.text
    assert error.is_error
    assert "both installed" in error.text
    assert "make install-gpu" in (error.fix or "")


def test_package_of_another_version_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _install(tmp_path, "numpy", "2.1.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    error = _only(doctor.check_requirements())
    assert error.is_error
    assert error.text.startswith("numpy 2.1.0")
    assert (error.fix or "").startswith("pip install 'numpy")


def test_onnxruntime_for_gpus_is_an_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "onnxruntime":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.22.0" if name == "onnxruntime-gpu" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert not any(f.is_error for f in doctor.check_requirements())


def test_unsupported_python_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 13, 0, "final", 0))
    first, *_ = doctor.check_versions()
    assert first.is_error


def test_audio_library_that_reads_no_mp3_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _only(doctor.check_audio_formats()).mark == "ok"
    monkeypatch.setattr(soundfile, "available_formats", lambda: {"WAV": "WAV"})
    finding = _only(doctor.check_audio_formats())
    assert finding.mark == "note"
    assert "does not read mp3" in finding.text


# The machine


@pytest.mark.parametrize(
    ("flags", "mark", "said"),
    [
        ("fpu avx2 avx512_vnni", "ok", "AVX2, AVX512-VNNI: int8 models run at their full"),
        ("fpu avx2 avx_vnni", "ok", "AVX-VNNI"),
        ("fpu avx2", "note", "AVX2: int8 models run slower"),
        ("fpu sse2", "note", "no vector instructions"),
    ],
)
def test_processor_is_judged_by_its_instruction_sets(
    tmp_path: Path, flags: str, mark: str, said: str
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nmodel name\t: A: B\nflags\t\t: {flags}\n\n")
    name, sets = doctor.check_processor(cpuinfo)
    assert name.text.startswith("A: B: ")
    assert sets.mark == mark
    assert said in sets.text


def test_processor_without_cpuinfo_has_a_name_alone(tmp_path: Path) -> None:
    assert _only(doctor.check_processor(tmp_path / "none")).mark == "ok"


def test_memory_knows_the_limit_of_a_container(tmp_path: Path) -> None:
    assert "limit" not in _only(doctor.check_memory(tmp_path)).text
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("500000000\n")  # v1
    small = _only(doctor.check_memory(tmp_path))
    assert "the container's limit is 0.5 GB" in small.text
    assert small.mark == "note"
    (tmp_path / "memory.max").write_text("2000000000\n")  # v2
    assert "the container's limit is 2.0 GB" in _only(doctor.check_memory(tmp_path)).text


def test_search_cache_is_filled_empty_or_unwritable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "_FOLDER", tmp_path)
    assert "not yet compiled" in _only(doctor.check_search_cache()).text
    (tmp_path / "search.nbi").touch()
    assert "starts take seconds" in _only(doctor.check_search_cache()).text
    monkeypatch.setenv(CACHE_VARIABLE, "/dev/null/below")
    monkeypatch.setattr(compiled, "_FOLDER", compiled._cache_folder())
    finding = _only(doctor.check_search_cache())
    assert finding.mark == "note"
    assert finding.text.startswith("/dev/null/below cannot be written")
    assert CACHE_VARIABLE in (finding.fix or "")


def test_few_open_files_are_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    for soft, mark in ((256, "note"), (1024, "ok"), (resource.RLIM_INFINITY, "ok")):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, -1))
        assert _only(doctor.check_file_limit()).mark == mark


# Where models run


@pytest.mark.parametrize(
    ("has_cuda", "has_driver", "mark", "said"),
    [
        (False, False, "ok", "models run on the processor"),
        (False, True, "note", "has only"),
        (True, False, "note", "no NVIDIA driver"),
        (True, True, "FIX", "onnxruntime chose"),
    ],
)
def test_gpu_needs_a_driver_and_a_provider_that_really_runs(
    monkeypatch: pytest.MonkeyPatch,
    shipped_bundle: Path,
    has_cuda: bool,
    has_driver: bool,
    mark: str,
    said: str,
) -> None:
    providers = [*(["CUDAExecutionProvider"] if has_cuda else []), "CPUExecutionProvider"]
    session = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    monkeypatch.setattr(  # listed, but its libraries are not there: onnxruntime falls back
        onnxruntime,
        "InferenceSession",
        lambda graph, options, **_: session(graph, options, providers=["CPUExecutionProvider"]),
    )
    monkeypatch.setattr(doctor, "_has_cuda_driver", lambda: has_driver)
    monkeypatch.setattr(doctor, "_ask_nvidia_smi", lambda: None)
    finding = _only(doctor.check_gpu([shipped_bundle]))
    assert finding.mark == mark
    assert said in finding.text
    assert ", ".join(providers) in _only(doctor.check_providers()).text


def test_nvidia_smi_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._ask_nvidia_smi() is None
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'Some GPU, 555.1, 16 GiB'\n")
    program.chmod(0o755)
    assert doctor._ask_nvidia_smi() == "Some GPU, 555.1, 16 GiB"
    program.write_text("#!/bin/sh\necho 'no driver' >&2; exit 9\n")
    assert doctor._ask_nvidia_smi() == "no driver"


# Around the server


def test_microphone_is_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    assert _only(doctor.check_microphone()).mark == "note"
    module = ModuleType("sounddevice")
    error = type("PortAudioError", (Exception,), {})

    def query_devices(*, kind: str) -> dict[str, str]:
        if has_device:
            return {"name": f"an {kind}"}
        raise error("Error querying device -1")

    vars(module).update(PortAudioError=error, query_devices=query_devices)
    monkeypatch.setitem(sys.modules, "sounddevice", module)
    has_device = False
    assert "arecord" in (_only(doctor.check_microphone()).fix or "")
    has_device = True
    assert _only(doctor.check_microphone()) == Finding("microphone", "an input")


def test_port_is_free_taken_or_out_of_reach() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert _only(doctor.check_port("127.0.0.1", port)).text.endswith("is free")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))  # taken, but not answered
        port = listener.getsockname()[1]
        finding = _only(doctor.check_port("127.0.0.1", port))
    assert "no server can listen there" in finding.text
    assert finding.mark == "note"


def test_port_where_a_server_runs(server: RunningServer) -> None:
    finding = _only(doctor.check_port(*doctor.split_address(server.address)))
    assert finding.mark == "ok"
    assert "is serving" in finding.text


def test_address_is_split_or_refused() -> None:
    assert doctor.split_address("[::1]:50051") == ("::1", 50051)
    for wrong in ("localhost", ":1", "localhost:x", "localhost:65536", "localhost:-1", ""):
        with pytest.raises(InputError, match="host:port"):
            doctor.split_address(wrong)


# The command


def test_command_prints_marks_and_fixes_and_ends_with_0_without_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = [Finding("first", "fine"), Finding("second", "[x] could be better", fix="improve it")]
    monkeypatch.setattr(doctor, "examine", lambda **_: iter(found))
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "ok    first       fine",
        "note  second      [x] could be better",
        "                  -> improve it",
        "nothing must be fixed",
    ]


def test_command_ends_with_1_for_a_damaged_bundle(shipped_bundle: Path, tmp_path: Path) -> None:
    damaged = _copy(shipped_bundle, tmp_path / "damaged")
    _damage(damaged / "streaming.onnx")
    runner = CliRunner()
    result = runner.invoke(app, ["doctor", "--bundle", str(damaged)])
    assert result.exit_code == 1
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("FIX"))
    assert str(damaged / "streaming.onnx") in line
    assert result.stdout.splitlines()[-1] == "1 to fix"
    as_json = runner.invoke(app, ["doctor", "--bundle", str(damaged), "--json"])
    assert as_json.exit_code == 1
    rows = json.loads(as_json.stdout)
    assert all(set(row) == {"topic", "text", "fix", "is_error"} for row in rows)
    assert [row["topic"] for row in rows if row["is_error"]] == ["bundle"]


def test_every_topic_is_reported_for_the_default_bundle() -> None:
    findings = doctor.print_findings(_examine(), Console(file=StringIO()))
    assert not any(f.is_error for f in findings)
    topics = "versions audio processor memory search providers GPU bundle microphone port files"
    assert list(dict.fromkeys(f.topic for f in findings)) == topics.split()
