"""Which number type trains faster on this machine: asked of the machine, not of a table.

bfloat16 is two to four times faster where the processor multiplies it (AMX, AVX512-BF16) and a
hundred times slower where it does not.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch

logger = logging.getLogger(__name__)

_CANDIDATES: Final = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_N_TIMED: Final = 3
_TIMED_S: Final = 20.0
"""No further step is timed after so long: a processor without bfloat16 may need minutes a step."""


def choose_precision(step: Callable[[torch.dtype], None], requested: str) -> torch.dtype:
    """Time one training step in each type and take the faster; log what was measured.

    Args:
        step: runs one step (forward and backward) under autocast to the type it is given.
        requested: `auto`, or the type to use without asking.
    """
    if requested != "auto":
        return _CANDIDATES[requested]
    seconds = {name: _time_step(step, dtype) for name, dtype in _CANDIDATES.items()}
    fastest = min(seconds, key=seconds.__getitem__)
    measured = ", ".join(f"{name} {s:.2f} s" for name, s in seconds.items())
    logger.info("one step on %s: %s; training in %s", device_name(), measured, fastest)
    return _CANDIDATES[fastest]


def device_name() -> str:
    """The name of the GPU, or of the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return processor_name()


def processor_name() -> str:
    """The processor's model name and matrix extensions, as Linux tells them."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "unknown processor"
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    facts = {key.strip(): value.strip() for key, value in fields.items()}
    wanted = ("avx2", "avx512_vnni", "avx512_bf16", "amx_bf16")
    extensions = [flag for flag in wanted if flag in facts.get("flags", "").split()]
    return f"{facts.get('model name', 'unknown processor')} ({', '.join(extensions)})"


def _time_step(step: Callable[[torch.dtype], None], dtype: torch.dtype) -> float:
    """Seconds of the fastest step after a first; infinite where the type is not supported."""
    seconds: list[float] = []
    try:
        step(dtype)
        while len(seconds) < _N_TIMED and sum(seconds) < _TIMED_S:
            start = time.perf_counter()
            step(dtype)
            seconds.append(time.perf_counter() - start)
    except RuntimeError as error:
        logger.info("%s does not run here: %s", dtype, error)
        return float("inf")
    return min(seconds)
