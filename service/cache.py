"""Where code that was compiled for this processor is kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

CACHE_VARIABLE: Final = "VOXGATE_CACHE"


def cache_folder() -> Path:
    """What `CACHE_VARIABLE` names, else `voxgate` in the user's folder; it may not exist yet."""
    home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(os.environ.get(CACHE_VARIABLE) or Path(home) / "voxgate")
