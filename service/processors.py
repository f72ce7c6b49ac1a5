"""How many processors this process may use."""

from __future__ import annotations

import math
from pathlib import Path

import psutil


def count_usable_processors(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Processors by affinity, or fewer where the container's quota allows fewer; at least 1."""
    n_processors = len(psutil.Process().cpu_affinity() or [0])
    quota = _read_quota(cgroup)
    return n_processors if quota is None else max(1, min(n_processors, math.floor(quota)))


def _read_quota(cgroup: Path) -> float | None:
    """Processors' worth of time the cgroup grants (v2, then v1); None without a limit."""
    v1 = cgroup / "cpu"
    for files in ((cgroup / "cpu.max",), (v1 / "cpu.cfs_quota_us", v1 / "cpu.cfs_period_us")):
        try:
            limit, period = " ".join(f.read_text(encoding="utf-8") for f in files).split()
            if limit == "max" or limit.startswith("-"):
                return None
            return int(limit) / int(period)
        except (OSError, ValueError, ZeroDivisionError):  # not there, or not understood
            continue
    return None
