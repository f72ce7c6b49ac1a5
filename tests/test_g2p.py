"""Letters to phones: training, export, and pronouncing without torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from export.g2p import export_g2p
from service.errors import BundleError, InputError, TrainingError
from service.g2p import Pronouncer
from training import g2p
from training.g2p import (
    G2pModel,
    G2pShape,
    edit_distance,
    evaluate_g2p,
    pronounce_greedily,
    split_words,
    train_g2p,
)
from training.lexicon import Dictionary, load_dictionary, make_lexicon

SHAPE = G2pShape(n_layers=1, hidden_size=24, dropout=0.0)
_SOUNDS = {"a": "AA", "b": "B", "d": "D", "e": "EH", "k": "K", "o": "OW", "s": "S", "t": "T"}


@pytest.fixture(scope="module")
def dictionary() -> Dictionary:
    """Words that are spelled as they sound."""
    draw = torch.Generator().manual_seed(0)
    letters = sorted(_SOUNDS)
    words = {
        "".join(letters[i] for i in torch.randint(0, 8, (int(n),), generator=draw).tolist())
        for n in torch.randint(2, 7, (700,), generator=draw)
    }
    return {word: (tuple(_SOUNDS[letter] for letter in word),) for word in sorted(words)}


@pytest.fixture(scope="module")
def model(dictionary: Dictionary, tmp_path_factory: pytest.TempPathFactory) -> G2pModel:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("g2p")
    return train_g2p(
        dictionary, folder, shape=SHAPE, n_epochs=30, batch_size=32, highest_rate=2e-2,
        averaging=0.9, precision="float32",
    )  # fmt: skip


@pytest.fixture(scope="module")
def pronouncer(model: G2pModel, tmp_path_factory: pytest.TempPathFactory) -> Pronouncer:
    path = tmp_path_factory.mktemp("graph") / "g2p.onnx"
    export_g2p(model, path)
    return Pronouncer(path)


def test_split_depends_on_the_word_alone() -> None:
    dictionary = load_dictionary()
    split = split_words(dictionary)
    parts = [set(split.train), set(split.dev), set(split.test)]
    assert not parts[0] & parts[1]
    assert not (parts[0] | parts[1]) & parts[2]
    assert 0.04 < len(parts[2]) / sum(map(len, parts)) < 0.06
    fewer = {word: dictionary[word] for word in list(dictionary)[::7]}
    assert set(split_words(fewer).test) <= parts[2]


def test_held_out_words_are_learnt(model: G2pModel, dictionary: Dictionary) -> None:
    errors = evaluate_g2p(model, split_words(dictionary).test, dictionary)
    assert errors.words < 0.2
    assert errors.phones < 0.1


def test_graph_pronounces_as_the_model_does(model: G2pModel, pronouncer: Pronouncer) -> None:
    words = ["a", "bad", "toast", "k", "sodabote", "ebb"]
    assert pronouncer.pronounce(words) == pronounce_greedily(model, words)


def test_pronunciation_does_not_depend_on_the_batch(pronouncer: Pronouncer) -> None:
    words = ["a", "bad", "toast", "sodabotestake"]
    alone = [pronouncer.pronounce([word])[0] for word in words]
    assert pronouncer.pronounce(words) == alone
    assert pronouncer.pronounce(words[::-1]) == alone[::-1]
    assert pronouncer.pronounce([]) == []


@pytest.mark.parametrize("word", ["café", "", "'", "two words"])
def test_words_that_cannot_be_pronounced_are_refused(pronouncer: Pronouncer, word: str) -> None:
    with pytest.raises(InputError, match="cannot be pronounced"):
        pronouncer.pronounce(["bad", word])


def test_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "g2p.onnx"
    path.write_bytes(b"nonsense")
    with pytest.raises(BundleError, match="is no letters-to-phones graph"):
        Pronouncer(path)


def test_resumed_run_equals_an_uninterrupted_one(
    dictionary: Dictionary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(folder: Path) -> G2pModel:
        torch.manual_seed(5)
        return train_g2p(
            dictionary, folder, shape=SHAPE, n_epochs=2, batch_size=64, precision="float32"
        )

    whole = run(tmp_path / "whole")
    n_saved = 0
    save = g2p._save

    def stop(*arguments: object) -> None:
        nonlocal n_saved
        save(*arguments)  # type: ignore[arg-type]  # passed through
        n_saved += 1
        if n_saved == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(g2p, "_CHECKPOINT_S", -1.0)
    monkeypatch.setattr(g2p, "_save", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped")
    monkeypatch.setattr(g2p, "_save", save)
    resumed = run(tmp_path / "stopped")
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0)


def test_directory_of_another_run_is_refused(dictionary: Dictionary, tmp_path: Path) -> None:
    train_g2p(dictionary, tmp_path, shape=SHAPE, n_epochs=1, precision="float32")
    with pytest.raises(TrainingError, match="was trained with"):
        train_g2p(dictionary, tmp_path, shape=SHAPE, n_epochs=2, precision="float32")


def test_too_small_a_dictionary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="too few"):
        train_g2p({"a": (("AA",),)}, tmp_path)


def test_edit_distance_counts_edits() -> None:
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == 3
    assert edit_distance("abc", "abc") == 0


def test_lexicon_takes_the_dictionary_first(pronouncer: Pronouncer) -> None:
    dictionary = {"bad": (("B", "AE", "D"), ("B", "AA", "D"))}
    lexicon = make_lexicon(["bad", "dab", "'"], dictionary, pronouncer.pronounce)
    assert lexicon["bad"] == dictionary["bad"]
    assert lexicon["dab"] == (pronouncer.pronounce(["dab"])[0],)
    assert "'" not in lexicon
    assert "dab" not in make_lexicon(["dab"], dictionary, None)
