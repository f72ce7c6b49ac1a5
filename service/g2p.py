"""Pronunciations of words that no dictionary has: a letters-to-phones graph run by onnxruntime."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import onnxruntime

from service.errors import BundleError, InputError
from service.text import collapse

_BATCH: Final = 256


class Pronouncer:
    """Gives each word the phones that the graph finds most likely; safe to share by threads."""

    def __init__(self, graph: Path) -> None:
        """Load a graph that `voxgate g2p` wrote; it says itself which letters and phones it has.

        Raises:
            BundleError: the file is missing or is no such graph.
        """
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.enable_mem_pattern = False  # lengths vary
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(
                str(graph), options, providers=["CPUExecutionProvider"]
            )
            facts = self._session.get_modelmeta().custom_metadata_map
            self._letters = {letter: i for i, letter in enumerate(json.loads(facts["letters"]))}
            self._phones: tuple[str, ...] = tuple(json.loads(facts["phones"]))
            self._n_repeats = int(facts["n_repeats"])
        except Exception as error:
            # onnxruntime raises its own kinds, which share no base
            raise BundleError(
                f"{graph} is no letters-to-phones graph ({error}); copy the bundle again or write "
                "one with `voxgate g2p`"
            ) from error

    def pronounce(self, words: Sequence[str]) -> list[tuple[str, ...]]:
        """The phones of each word; what a word is pronounced like does not depend on the others.

        Raises:
            InputError: a word has a sign that the graph does not know, or no letter.
        """
        for word in words:
            unknown = sorted(set(word) - self._letters.keys())
            if unknown or not word.strip("'"):
                found = f"the signs {unknown}" if unknown else "no letter"
                raise InputError(
                    f"{word!r} cannot be pronounced: it has {found}, expected "
                    f"{''.join(self._letters)}"
                )
        by_length = sorted(range(len(words)), key=lambda i: len(words[i]))
        phones: list[tuple[str, ...]] = [()] * len(words)
        for start in range(0, len(words), _BATCH):
            rows = by_length[start : start + _BATCH]
            for row, found_phones in zip(rows, self._run([words[i] for i in rows]), strict=True):
                phones[row] = found_phones
        return phones

    def _run(self, words: Sequence[str]) -> list[tuple[str, ...]]:
        lengths = np.array([len(word) for word in words])
        letters = np.full((len(words), lengths.max()), len(self._letters), np.int64)
        for row, word in enumerate(words):
            letters[row, : len(word)] = [self._letters[letter] for letter in word]
        (log_probs,) = self._session.run(None, {"letters": letters, "lengths": lengths})
        paths = log_probs.argmax(axis=-1)
        return [
            tuple(self._phones[i] for i in collapse(path[: n * self._n_repeats].tolist()))
            for path, n in zip(paths, lengths.tolist(), strict=True)
        ]
