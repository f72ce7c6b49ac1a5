"""The processors a container's quota leaves, with a temporary folder as the cgroup."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from service.processors import count_usable_processors

N_PROCESSORS = len(os.sched_getaffinity(0))
PERIOD = 100_000


def write_v2(cgroup: Path, text: str) -> None:
    (cgroup / "cpu.max").write_text(text, encoding="utf-8")


def write_v1(cgroup: Path, *, quota: str, period: str | None) -> None:
    (cgroup / "cpu").mkdir()
    (cgroup / "cpu" / "cpu.cfs_quota_us").write_text(quota, encoding="utf-8")
    if period is not None:
        (cgroup / "cpu" / "cpu.cfs_period_us").write_text(period, encoding="utf-8")


@pytest.fixture
def _four_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's affinity may be one processor, which no quota could lower."""
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda _: [0, 1, 2, 3])


def test_count_is_the_affinity_without_a_cgroup(tmp_path: Path) -> None:
    assert count_usable_processors(tmp_path) == N_PROCESSORS
    assert count_usable_processors(tmp_path / "missing") == N_PROCESSORS


def test_count_is_between_one_and_the_affinity_on_this_machine() -> None:
    assert 1 <= count_usable_processors() <= N_PROCESSORS


@pytest.mark.usefixtures("_four_processors")
@pytest.mark.parametrize(
    ("quota", "n_processors"),
    [
        (100_000, 1),
        (200_000, 2),
        (250_000, 2),
        (299_999, 2),
        (300_000, 3),
        (400_000, 4),
        (6_400_000, 4),
        (50_000, 1),
        (1_000, 1),
    ],
)
def test_count_is_the_quota_in_whole_processors_at_least_one_at_most_all(
    quota: int, n_processors: int, tmp_path: Path
) -> None:
    v2, v1 = tmp_path / "v2", tmp_path / "v1"
    v2.mkdir()
    v1.mkdir()
    write_v2(v2, f"{quota} {PERIOD}\n")
    write_v1(v1, quota=f"{quota}\n", period=f"{PERIOD}\n")
    assert count_usable_processors(v2) == n_processors
    assert count_usable_processors(v1) == n_processors


@pytest.mark.usefixtures("_four_processors")
def test_count_takes_the_period_into_account(tmp_path: Path) -> None:
    write_v2(tmp_path, "100000 50000\n")
    assert count_usable_processors(tmp_path) == 2


@pytest.mark.usefixtures("_four_processors")
def test_count_is_the_affinity_when_v2_has_no_limit(tmp_path: Path) -> None:
    write_v2(tmp_path, "max 100000\n")
    assert count_usable_processors(tmp_path) == 4


@pytest.mark.usefixtures("_four_processors")
def test_count_is_the_affinity_when_v1_has_no_limit(tmp_path: Path) -> None:
    write_v1(tmp_path, quota="-1\n", period="100000\n")
    assert count_usable_processors(tmp_path) == 4


@pytest.mark.usefixtures("_four_processors")
def test_count_takes_v2_before_v1(tmp_path: Path) -> None:
    write_v2(tmp_path, "200000 100000\n")
    write_v1(tmp_path, quota="300000\n", period="100000\n")
    assert count_usable_processors(tmp_path) == 2


@pytest.mark.usefixtures("_four_processors")
def test_count_is_the_affinity_when_v1_lacks_its_period(tmp_path: Path) -> None:
    write_v1(tmp_path, quota="100000\n", period=None)
    assert count_usable_processors(tmp_path) == 4


@pytest.mark.usefixtures("_four_processors")
@pytest.mark.parametrize(
    "text",
    ["", "garbage", "200000", "1 2 3", "two 100000", "200000 x", "200000 0", "\xff"],
)
def test_count_is_the_affinity_when_v2_is_garbage(text: str, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_bytes(text.encode("latin-1"))
    assert count_usable_processors(tmp_path) == 4


@pytest.mark.usefixtures("_four_processors")
@pytest.mark.parametrize(
    ("quota", "period"), [("", "100000"), ("garbage", "100000"), ("200000", ""), ("200000", "0")]
)
def test_count_is_the_affinity_when_v1_is_garbage(quota: str, period: str, tmp_path: Path) -> None:
    write_v1(tmp_path, quota=quota, period=period)
    assert count_usable_processors(tmp_path) == 4
