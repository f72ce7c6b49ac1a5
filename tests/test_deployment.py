"""Dockerfile, compose file and data lists, checked without an engine."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml
from conftest import CHECKOUT
from typer.testing import CliRunner

from service.bundle import BUNDLE_VARIABLE, load_bundle
from service.cache import CACHE_VARIABLE
from service.cli import DEFAULT_PORT, app

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def _instructions() -> list[tuple[str, str]]:
    """(instruction, argument) of the Dockerfile, continued lines joined, comments left out."""
    text = (CHECKOUT / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines()]


def _compose() -> dict[str, Any]:
    service: dict[str, Any] = yaml.safe_load((CHECKOUT / "docker-compose.yml").read_text())
    return dict(service["services"]["voxgate"])


def test_image_is_built_in_stages_and_runs_unprivileged() -> None:
    instructions = _instructions()
    stages = [i for i, (name, _) in enumerate(instructions) if name == "FROM"]
    assert len(stages) == 2
    last = instructions[stages[1] :]
    assert not any("g++" in argument for _, argument in last), "the compiler must stay behind"
    users = [argument for name, argument in last if name == "USER"]
    assert users == ["voxgate"]
    made = [argument for name, argument in last if name == "RUN" and "useradd" in argument]
    assert len(made) == 1
    order = [name for name, _ in last]
    assert order.index("USER") < order.index("ENTRYPOINT")


def test_image_copies_what_exists_and_what_docker_is_sent() -> None:
    sent = {line[1:] for line in (CHECKOUT / ".dockerignore").read_text().split() if line[0] == "!"}
    for name, argument in _instructions():
        if name == "COPY" and not argument.startswith("--from"):
            *sources, _ = argument.split()
            assert all((CHECKOUT / source).exists() for source in sources)
            assert set(sources) <= sent


def test_image_copies_every_package_and_installs_them() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]["find"]["include"]
    copied = {a.split()[0] for name, a in _instructions() if name == "COPY"}
    assert {pattern.rstrip("*") for pattern in packages} <= copied
    assert any(
        "pip install" in a and a.endswith(" .") for name, a in _instructions() if name == "RUN"
    )


def test_image_serves_on_all_addresses_with_a_health_check() -> None:
    last = dict(_instructions())
    assert yaml.safe_load(last["ENTRYPOINT"]) == ["voxgate"]
    assert yaml.safe_load(last["CMD"]) == ["serve", "--host", "0.0.0.0"]  # noqa: S104
    assert last["EXPOSE"] == str(DEFAULT_PORT)
    assert last["HEALTHCHECK"].endswith('CMD ["voxgate", "health"]')
    variables = dict(word.split("=", 1) for word in shlex.split(last["ENV"]))
    assert f"-o voxgate {variables[CACHE_VARIABLE]}" in last["RUN"]
    assert variables[BUNDLE_VARIABLE].startswith("/bundles/")


def test_gpu_image_holds_one_onnxruntime() -> None:
    (swap,) = [a for name, a in _instructions() if name == "RUN" and "onnxruntime-gpu" in a]
    assert swap.index("uninstall --yes onnxruntime onnxruntime-gpu") < swap.index(
        "onnxruntime-gpu["
    )


def test_compose_mounts_the_bundles_read_only() -> None:
    compose = _compose()
    volume, cache = compose["volumes"]
    assert cache.startswith("cache:/var/cache/voxgate")
    source, target, mode = volume.split(":")
    assert mode == "ro"
    assert (CHECKOUT / source).is_dir()
    default = re.search(r":-(.*)}", compose["environment"][BUNDLE_VARIABLE])
    assert default is not None
    inside = Path(default[1]).relative_to(target)
    assert load_bundle(CHECKOUT / source / inside).config.name == "en-small"


def test_compose_is_locked_down_and_checked() -> None:
    compose = _compose()
    assert compose["healthcheck"]["test"] == ["CMD", "voxgate", "health"]
    assert compose["read_only"] is True
    assert compose["cap_drop"] == ["ALL"]
    assert compose["ports"] == [f"{DEFAULT_PORT}:{DEFAULT_PORT}"]
    assert compose["stop_grace_period"] == "15s"


def test_compose_serves_with_options_that_exist() -> None:
    command, *arguments = _compose()["command"]
    found = CliRunner().invoke(app, [command, *arguments, "--help"])
    assert (command, found.exit_code) == ("serve", 0)
    options = [a for a in arguments if a.startswith("--")]
    assert options
    assert all(option in found.stdout for option in options)


def test_data_lists_keep_speakers_apart() -> None:
    speakers = {}
    for part in ("train", "dev"):
        header, *rows = (CHECKOUT / "docs" / "data" / f"{part}.tsv").read_text().splitlines()
        assert header == "corpus\tspeaker\tutterance"
        assert len({row.split("\t")[2] for row in rows}) == len(rows)
        speakers[part] = {row.split("\t")[1] for row in rows}
    assert not speakers["train"] & speakers["dev"]


def test_example_clips_are_development_recordings(clips: list[Any]) -> None:
    listed = (CHECKOUT / "docs" / "data" / "dev.tsv").read_text()
    assert len(clips) == 8
    assert all(f"/{Path(clip.name).stem}\n" in listed for clip in clips)
