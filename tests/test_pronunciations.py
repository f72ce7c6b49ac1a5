"""Which pronunciation was said: the best path against all of them, and what a run makes of it."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from tiny import TinyCorpus, make_checkpoint, make_model, make_settings, write_corpus
from torch import Tensor

from training.checkpoint import save_weights
from training.data import Labels
from training.distributed import World
from training.lexicon import PHONES, find_variants
from training.pronunciations import SpokenWord, Variants, align, replace_phones
from training.train import TrainingRun

_ALONE = World(rank=0, size=1, device=torch.device("cpu"))
_AH, _EY = PHONES.index("AH"), PHONES.index("EY")  # how "a" is said
_N_PHONES = 4
_WORDS: list[Variants] = [[(1, 2), (1, 3)], [(2,), (2, 2), (3,)], [(3, 1), (1,)]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TinyCorpus:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def _draw(n_frames: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(n_frames, _N_PHONES, generator=generator)).log_softmax(-1)


def _score_path(log_probs: Tensor, path: tuple[int, ...]) -> float:
    return float(log_probs[torch.arange(len(path)), torch.tensor(path)].sum())


def _score_best(log_probs: Tensor, labels: list[int]) -> float:
    """Of all paths that collapse to the labels."""
    paths = itertools.product(range(_N_PHONES), repeat=len(log_probs))
    fitting = (p for p in paths if [k for k, _ in itertools.groupby(p) if k] == labels)
    return max((_score_path(log_probs, path) for path in fitting), default=-1e9)


@pytest.mark.parametrize("seed", range(6))
def test_chosen_pronunciations_have_the_best_path(seed: int) -> None:
    log_probs = _draw(6, seed)
    scores: dict[tuple[int, ...], float] = {}
    for choice in itertools.product(*(range(len(word)) for word in _WORDS)):
        phones = [phone for word, i in zip(_WORDS, choice, strict=True) for phone in word[i]]
        scores[choice] = _score_best(log_probs, phones)
    spoken = align(log_probs, _WORDS)
    assert spoken is not None
    assert scores[tuple(word.variant for word in spoken)] == pytest.approx(max(scores.values()))


def test_phones_begin_where_the_best_path_enters_them() -> None:
    path = [0, 1, 1, 2, 0, 0, 2, 3, 1, 0]
    log_probs = torch.full((len(path), _N_PHONES), 0.1).scatter(1, torch.tensor([path]).T, 0.7)
    assert align(log_probs.log(), _WORDS) == [
        SpokenWord(variant=0, phones=(1, 2), first_frames=(1, 3)),
        SpokenWord(variant=0, phones=(2,), first_frames=(6,)),
        SpokenWord(variant=0, phones=(3, 1), first_frames=(7, 8)),
    ]


def test_too_few_frames_choose_nothing() -> None:
    assert align(_draw(3, 0), _WORDS) is None
    assert align(_draw(0, 0), _WORDS) is None
    assert align(_draw(4, 0), _WORDS) is not None


def test_variants_are_those_of_the_dictionary() -> None:
    dictionary = {"the": (("DH", "AH"), ("DH", "IY")), "bee": (("B", "IY"),)}
    dh, ah, iy, b = (PHONES.index(phone) for phone in ("DH", "AH", "IY", "B"))
    assert find_variants("the bee", dictionary) == [[(dh, ah), (dh, iy)], [(b, iy)]]


def test_phones_are_replaced_where_it_is_known_what_was_said() -> None:
    labels = {"a": Labels((1,), (5, 6)), "b": Labels((2,), (7,))}
    assert replace_phones(labels, {"a": (5, 8)}) == {
        "a": Labels((1,), (5, 8)),
        "b": Labels((2,), (7,)),
    }


def test_run_trains_on_what_was_said(corpus: TinyCorpus, tmp_path: Path) -> None:
    aligner = tmp_path / "aligner.pt"
    model = make_model(seed=3, n_layers=1, hidden_size=32)
    model.phone_head.bias.data[_EY] = 20.0  # it hears this everywhere
    save_weights(make_checkpoint(model, make_settings(corpus, tmp_path / "old")), aligner)
    plain = TrainingRun(make_settings(corpus, tmp_path / "plain"), _ALONE)
    settings = make_settings(corpus, tmp_path / "run", f'data.aligner="{aligner}"')
    aligned = TrainingRun(settings, _ALONE)
    assert set(plain.corpus.labels) == set(aligned.corpus.labels)
    changed = [
        (before.phones, aligned.corpus.labels[i].phones)
        for i, before in plain.corpus.labels.items()
        if before != aligned.corpus.labels[i]
    ]
    assert changed
    for before, after in changed:
        assert _EY in after
        assert [_AH if phone == _EY else phone for phone in after] == [
            _AH if phone == _EY else phone for phone in before
        ]
    aligner.unlink()
    assert (
        TrainingRun(settings, _ALONE).corpus.labels == aligned.corpus.labels
    )  # it was written down
