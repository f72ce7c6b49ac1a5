"""Stored features: computed once, found again, read without copying.

One folder holds the features of one set of cuts at one speed, in parts of a few hundred
utterances: `N.npy` has the frames of all of them, float16, one after another, and `N.json` says
where each begins. A part appears only when it is whole, so an interrupted computation goes on.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from lhotse import CutSet, MonoCut
from lhotse.audio.backend import LibsndfileBackend, set_current_audio_backend
from torch import Tensor
from tqdm import tqdm

from service.audio import resample
from service.errors import AudioError
from service.features import FeatureSettings, log_mel

_PART_CUTS: Final = 250


class FeatureStore:
    """Random access to the stored features of one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._places: dict[str, tuple[int, int, int]] = {}  # id → part, first frame, frames
        for index in folder.glob("*.json"):
            for utterance_id, (first, n_frames) in json.loads(index.read_text()).items():
                self._places[utterance_id] = (int(index.stem), first, n_frames)
        self._frames: dict[int, npt.NDArray[np.float16]] = {}

    def load(self, utterance_id: str) -> Tensor:
        """Log-mel energies of one utterance, float32, (time, mel)."""
        part, first, n_frames = self._places[utterance_id]
        if part not in self._frames:
            self._frames[part] = np.load(self._folder / f"{part}.npy", mmap_mode="r")
        return torch.from_numpy(self._frames[part][first : first + n_frames].astype(np.float32))

    def statistics(
        self, utterance_ids: Sequence[str], n_sampled: int = 500
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each band over evenly spaced utterances, each (mel,)."""
        step = max(1, len(utterance_ids) // n_sampled)
        frames = torch.cat([self.load(i) for i in utterance_ids[::step]]).double()
        return frames.mean(dim=0).float(), frames.std(dim=0).float().clamp(min=1e-2)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open files behind when a store goes to another process."""
        return {**self.__dict__, "_frames": {}}


def store_features(
    cuts: CutSet, *, speed: float, settings: FeatureSettings, cache: Path, n_jobs: int
) -> FeatureStore:
    """Compute the features of cuts played at `speed`, or find those computed before.

    Args:
        cuts: whole recordings at any sample rate; they are resampled as in serving.
        speed: playing speed; 1.1 is a tenth faster and higher.
        settings: the feature definition.
        cache: folder that holds the stores.
        n_jobs: processes to use.

    Raises:
        AudioError: a recording cannot be decoded, or holds samples that are no numbers.
    """
    folder = cache / _store_name(cuts, speed=speed, settings=settings)
    folder.mkdir(parents=True, exist_ok=True)
    played = list(cuts.perturb_speed(speed, affix_id=False))
    parts = {n: played[i : i + _PART_CUTS] for n, i in enumerate(range(0, len(played), _PART_CUTS))}
    missing = [n for n in parts if not (folder / f"{n}.json").exists()]
    if missing:
        compute = functools.partial(_store_part, folder, settings)
        with ProcessPoolExecutor(n_jobs, mp_context=get_context("spawn")) as pool:
            done = pool.map(compute, missing, [parts[n] for n in missing])
            list(tqdm(done, f"features at speed {speed}", len(missing), unit="part"))
    return FeatureStore(folder)


def _store_part(folder: Path, settings: FeatureSettings, part: int, cuts: list[MonoCut]) -> None:
    torch.set_num_threads(1)
    set_current_audio_backend(LibsndfileBackend())
    index: dict[str, tuple[int, int]] = {}
    blocks: list[npt.NDArray[np.float16]] = []
    first = 0
    for cut in cuts:
        waveform = resample(_play(cut), cut.sampling_rate, settings.sample_rate)
        frames = log_mel(waveform, settings).astype(np.float16)
        index[cut.id] = (first, len(frames))
        blocks.append(frames)
        first += len(frames)
    own = f"{part}.{os.getpid()}.unfinished"  # another run may compute the same
    np.save(folder / f"{own}.npy", np.concatenate(blocks))
    (folder / f"{own}.npy").replace(folder / f"{part}.npy")
    (folder / own).write_text(json.dumps(index))
    (folder / own).replace(folder / f"{part}.json")


def _play(cut: MonoCut) -> npt.NDArray[np.float32]:
    """The samples of a cut at its speed, mono, float32, (time,)."""
    source = cut.recording.sources[0].source
    try:
        played: npt.NDArray[np.float32] = np.asarray(cut.load_audio(), np.float32).mean(axis=0)
    except Exception as error:  # lhotse raises what the damaged bytes provoke
        raise AudioError(
            f"cannot decode {source}: {error}; `voxgate prepare folder` leaves out such recordings"
        ) from error
    if not np.isfinite(played).all():
        raise AudioError(f"{source} holds samples that are no numbers; record or convert it anew")
    return played


def _store_name(cuts: CutSet, *, speed: float, settings: FeatureSettings) -> str:
    digest = hashlib.sha256(settings.model_dump_json().encode())
    for cut in cuts:
        source = Path(cut.recording.sources[0].source).resolve()
        found = source.stat()
        known = (cut.id, source, found.st_size, found.st_mtime_ns, cut.recording.num_samples)
        digest.update(f"{known}\n".encode())
    return f"{digest.hexdigest()[:16]}-{speed}"
