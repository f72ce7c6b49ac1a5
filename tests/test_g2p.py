"""Letters to phones: what is held out stays so, runs go on exactly, graphs say what torch says."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from tiny import make_model

from export import g2p as export_module
from export.g2p import export_g2p
from export.graph import export_graph
from service.errors import BundleError, ExportError, InputError, TrainingError
from service.g2p import BEAM_WIDTH, Alphabets, FloatArray, Pronouncer, search
from service.text import LETTERS, collapse
from training import g2p as training_module
from training.checkpoint import Checkpoint, Progress, load_checkpoint, save_checkpoint
from training.g2p import (
    G2pErrors,
    G2pModel,
    count_errors,
    edit_distance,
    evaluate_g2p,
    load_g2p,
    make_examples,
    pronounce_greedily,
    split_words,
    train_g2p,
)
from training.lexicon import PHONES, Dictionary, load_dictionary, make_lexicon

_SOUNDS: Mapping[str, tuple[str, ...]] = {
    "a": ("AE",),
    "b": ("B",),
    "e": ("EH",),
    "k": ("K",),
    "t": ("T",),
    "x": ("K", "S"),
}
_WORDS = ("a", "it's", "zyzzyva", "hello", "rock'n'roll", "b", "onomatopoeia", "z" * 30)


def _make_dictionary(n_words: int = 300) -> Dictionary:
    """Words that are said as they are written, a first `e` in two ways."""
    draw = random.Random(1)
    words = {"".join(draw.choices("abektx", k=draw.randint(1, 6))) for _ in range(n_words)}
    dictionary: dict[str, tuple[tuple[str, ...], ...]] = {}
    for word in words:
        phones = tuple(phone for letter in word for phone in _SOUNDS[letter])
        dictionary[word] = (phones, ("IY", *phones[1:])) if word[0] == "e" else (phones,)
    return dictionary


def _train(directory: Path, *, n_epochs: int = 2, checkpoint_every_s: float = 60.0) -> G2pErrors:
    return train_g2p(
        directory,
        dictionary=_make_dictionary(),
        n_layers=1,
        hidden_size=24,
        n_repeats=3,
        dropout=0.1,
        n_epochs=n_epochs,
        batch_size=16,
        learning_rate=2e-2,
        precision="float32",
        checkpoint_every_s=checkpoint_every_s,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that learned its dictionary."""
    directory = tmp_path_factory.mktemp("g2p") / "run"
    _train(directory, n_epochs=20)
    return directory


@pytest.fixture(scope="module", params=[False, True], ids=["float32", "int8"])
def graph(
    run: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("graph") / "g2p.onnx"
    export_g2p(run / "best.pt", path, int8=request.param)
    return path


# The split and the examples


def test_split_holds_each_word_out_once() -> None:
    dictionary = load_dictionary()
    split = split_words(dictionary)
    parts = [set(split.train), set(split.dev), set(split.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) > 120_000
    assert len(split.test) / len(dictionary) == pytest.approx(0.05, abs=0.005)
    assert len(split.dev) / len(dictionary) == pytest.approx(0.02, abs=0.005)


def test_split_of_a_word_depends_on_the_word_alone() -> None:
    dictionary = load_dictionary()
    split = split_words(dictionary)
    some = random.Random(0).sample(sorted(dictionary), 2000)
    part = split_words({word: dictionary[word] for word in some})
    assert set(part.train) == set(split.train) & set(some)
    assert set(part.dev) == set(split.dev) & set(some)
    assert set(part.test) == set(split.test) & set(some)


def test_split_never_moves_between_versions() -> None:
    words = ("aardvark", "gabrall", "spare", "hello", "zebra")
    split = split_words(dict.fromkeys(words, (("AA",),)))
    assert split.train == ("aardvark", "hello", "zebra")
    assert (split.dev, split.test) == (("spare",), ("gabrall",))


def test_split_leaves_out_what_letters_do_not_spell() -> None:
    words = ("well-known", "a.m.", "naïve", "3d", "'", "''", "")
    split = split_words(dict.fromkeys(words, (("AA",),)))
    assert split.train + split.dev + split.test == ()


def test_examples_are_all_pronunciations_that_ctc_can_align() -> None:
    dictionary = {
        "ab": (("AE", "B"), ("EY", "B")),
        "w": (("D", "AH", "B", "AH", "L", "Y", "UW"),),  # seven phones, three frames
        "m": (("EH", "M", "M"),),  # three phones, and a blank between two of them
        "x": (("EH", "K", "S"),),
    }
    examples = make_examples(tuple(dictionary), dictionary=dictionary, n_repeats=3)
    spelled = [
        ("".join(LETTERS[i] for i in e.letters), tuple(PHONES[i] for i in e.phones))
        for e in examples
    ]
    assert spelled == [("ab", ("AE", "B")), ("ab", ("EY", "B")), ("x", ("EH", "K", "S"))]


# The model and its training


def test_model_ignores_padding_and_the_other_words() -> None:
    torch.manual_seed(2)
    model = G2pModel(n_layers=2, hidden_size=12).eval()
    lengths = torch.tensor([3, 9, 1, 6])
    letters = torch.randint(len(LETTERS), (4, 11))
    with torch.no_grad():
        together = model(letters, lengths)
        for row, n_letters in enumerate(lengths.tolist()):
            alone = model(letters[row : row + 1, :n_letters], lengths[row : row + 1])
            n_frames = n_letters * model.n_repeats
            torch.testing.assert_close(together[row, :n_frames], alone[0], atol=1e-5, rtol=0)


def test_training_learns_its_dictionary_and_unseen_words(run: Path) -> None:
    dictionary = _make_dictionary()
    split = split_words(dictionary)
    model = load_g2p(run / "best.pt")
    for words in (split.train, split.test):
        errors = count_errors(pronounce_greedily(model, words), words=words, dictionary=dictionary)
        assert errors.n_words > 5
        assert errors.n_wrong_words == errors.n_phone_errors == 0


def test_training_keeps_the_best_pass(tmp_path: Path) -> None:
    best = _train(tmp_path / "run", n_epochs=4)
    rows = (tmp_path / "run" / "dev.jsonl").read_text().splitlines()
    errors = [float(row.split('"word_error": ')[1].split(",")[0]) for row in rows]
    assert len(errors) == 4
    assert best.word_error == pytest.approx(min(errors), abs=1e-4)
    kept = load_checkpoint(tmp_path / "run" / "best.pt").progress
    assert kept.epoch == errors.index(min(errors)) + 1


def test_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _train(tmp_path / "whole")
    n_steps = load_checkpoint(tmp_path / "whole" / "last.pt").progress.step
    for stop in (3, n_steps // 2, n_steps // 2 + 4):  # inside a pass, and where one begins
        _interrupt(tmp_path / "parts", at_step=stop, monkeypatch=monkeypatch)
    assert _train(tmp_path / "parts") == whole
    for name in ("last.pt", "best.pt"):
        one, other = (load_checkpoint(tmp_path / part / name) for part in ("whole", "parts"))
        assert one.progress == other.progress
        assert one.model is not None
        assert other.model is not None
        for ours, theirs in ((one.model, other.model), (one.averaged, other.averaged)):
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    lines = [(tmp_path / part / "dev.jsonl").read_text() for part in ("whole", "parts")]
    assert lines[0] == lines[1]


def _interrupt(directory: Path, *, at_step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train until a step is about to be made; a checkpoint was written after the one before."""
    make_step = training_module._Run._step

    def stop(run: training_module._Run, *arguments: Any, **settings: Any) -> float:
        if run.weights.progress.step == at_step:
            raise KeyboardInterrupt
        return make_step(run, *arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(training_module._Run, "_step", stop)
        with pytest.raises(KeyboardInterrupt):
            _train(directory, checkpoint_every_s=0.0)


def test_finished_run_is_not_trained_on(run: Path) -> None:
    before = (run / "last.pt").read_bytes()
    errors = _train(run, n_epochs=20)
    assert (run / "last.pt").read_bytes() == before
    assert errors.word_error == load_checkpoint(run / "best.pt").progress.best_cer


def test_run_with_other_settings_is_refused(run: Path) -> None:
    before = (run / "last.pt").read_bytes()
    with pytest.raises(TrainingError, match=r"holds a run with .*'n_epochs': 20.*delete it"):
        _train(run, n_epochs=21)
    assert (run / "last.pt").read_bytes() == before


def test_too_small_a_dictionary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="dictionary of more words"):
        train_g2p(tmp_path / "run", dictionary={"a": (("AH",),)})


def test_acoustic_checkpoint_is_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint(
        settings={}, tokens=["<blank>", "a"], phones=PHONES, averaged={}, progress=Progress()
    )
    save_checkpoint(checkpoint, tmp_path / "best.pt")
    with pytest.raises(TrainingError, match=r"best\.pt is no checkpoint of a pronunciation"):
        load_g2p(tmp_path / "best.pt")


# Errors


@pytest.mark.parametrize(
    ("hypothesis", "reference", "expected"),
    [("", "", 0), ("abc", "abc", 0), ("", "abc", 3), ("abc", "", 3), ("kitten", "sitting", 3)],
)
def test_edit_distance_counts_edits(hypothesis: str, reference: str, expected: int) -> None:
    assert edit_distance(hypothesis, reference) == expected


def test_errors_are_counted_against_the_nearest_pronunciation() -> None:
    dictionary = {"tab": (("T", "AE", "B"), ("T", "EY", "B", "Z")), "a": (("AH",),)}
    heard = [("T", "EY", "B", "S"), ("AH",)]
    errors = count_errors(heard, words=("tab", "a"), dictionary=dictionary)
    assert errors == G2pErrors(n_words=2, n_wrong_words=1, n_phones=5, n_phone_errors=1)
    assert (errors.word_error, errors.phone_error) == (0.5, 0.2)


def test_evaluation_of_a_graph_counts_the_test_words_alone(graph: Path) -> None:
    dictionary = dict(_make_dictionary())
    n_test = len(split_words(dictionary).test)
    assert evaluate_g2p(graph, dictionary=dictionary).n_wrong_words == 0
    for word in split_words(dictionary).test[:3]:
        dictionary[word] = (("ZH", "ZH"),)
    errors = evaluate_g2p(graph, dictionary=dictionary)
    assert (errors.n_words, errors.n_wrong_words) == (n_test, 3)


# The search


def _draw_emission(n_frames: int, n_phones: int, *, seed: int) -> FloatArray:
    scores = np.random.default_rng(seed).normal(scale=2.0, size=(n_frames, n_phones))
    return np.asarray(scores - np.logaddexp.reduce(scores, axis=1, keepdims=True), np.float32)


@pytest.mark.parametrize("seed", range(8))
def test_unbounded_search_equals_enumeration(seed: int) -> None:
    emission = _draw_emission(5, 4, seed=seed)
    totals: dict[tuple[int, ...], float] = defaultdict(lambda: -np.inf)
    for path in itertools.product(range(4), repeat=5):
        log_prob = sum(float(emission[frame, label]) for frame, label in enumerate(path))
        labels = tuple(collapse(path))
        totals[labels] = float(np.logaddexp(totals[labels], log_prob))
    expected = sorted(filter(None, totals), key=lambda labels: -totals[labels])
    found = search(emission, beam_width=10_000, lowest_log_prob=-np.inf)
    assert found == expected


def test_search_finds_a_phone_even_in_silence() -> None:
    emission = np.log(np.array([[0.99998, 1e-5, 1e-5]] * 4, dtype=np.float32))
    assert search(emission, beam_width=2)


# The graph


def test_graph_equals_model_for_any_length_and_batch(run: Path, tmp_path: Path) -> None:
    export_g2p(run / "best.pt", tmp_path / "g2p.onnx", int8=False)
    model, pronouncer = load_g2p(run / "best.pt"), Pronouncer(tmp_path / "g2p.onnx")
    generator = torch.Generator().manual_seed(3)
    for lengths in ([1], [2], [17], [40], [1, 9], [5, 5, 5], [12, 1, 3, 30, 7]):
        letters = torch.randint(len(LETTERS), (len(lengths), max(lengths) + 2), generator=generator)
        with torch.no_grad():
            expected = model(letters, torch.tensor(lengths)).numpy()
        actual = pronouncer.log_probs(letters.numpy(), np.array(lengths))
        assert actual.shape == expected.shape
        for row, n_letters in enumerate(lengths):
            n_frames = n_letters * model.n_repeats
            np.testing.assert_allclose(
                actual[row, :n_frames], expected[row, :n_frames], atol=1e-4, rtol=0
            )


def test_graph_is_padding_proof(graph: Path) -> None:
    pronouncer = Pronouncer(graph)
    generator = np.random.default_rng(4)
    lengths = np.array([1, 20, 4, 11, 7])
    letters = generator.integers(len(LETTERS), size=(5, 20))
    letters[np.arange(20) >= lengths[:, np.newaxis]] = len(LETTERS)  # no letter at all
    together = pronouncer.log_probs(letters, lengths)
    for row, n_letters in enumerate(lengths):
        alone = pronouncer.log_probs(letters[row : row + 1, :n_letters], lengths[row : row + 1])
        np.testing.assert_allclose(together[row, : alone.shape[1]], alone[0], atol=1e-5, rtol=0)


def test_pronunciations_do_not_depend_on_the_other_words(graph: Path) -> None:
    pronouncer = Pronouncer(graph)
    words = [*_WORDS, *split_words(_make_dictionary()).train]  # more than a batch
    together = pronouncer.pronounce_n_best(words, n_best=3)
    assert together == [pronouncer.pronounce_n_best([word], n_best=3)[0] for word in words]
    assert together[::-1] == pronouncer.pronounce_n_best(words[::-1], n_best=3)
    assert together == pronouncer.pronounce_n_best(words, n_best=3)


def test_n_best_are_different_and_start_with_the_best(graph: Path) -> None:
    pronouncer = Pronouncer(graph)
    for best, several in zip(
        pronouncer.pronounce(_WORDS),
        pronouncer.pronounce_n_best(_WORDS, n_best=BEAM_WIDTH),
        strict=True,
    ):
        assert best == several[0]
        assert len(set(several)) == len(several) <= BEAM_WIDTH
        assert all(phones and set(phones) <= set(PHONES[1:]) for phones in several)


def test_both_pronunciations_of_an_unseen_word_are_the_best(graph: Path) -> None:
    assert not {"ebakt", "xabet"} & set(_make_dictionary())
    found = Pronouncer(graph).pronounce_n_best(["ebakt", "xabet"], n_best=2)
    assert set(found[0]) == {("EH", "B", "AE", "K", "T"), ("IY", "B", "AE", "K", "T")}
    assert found[1][0] == ("K", "S", "AE", "B", "EH", "T")


def test_lexicon_takes_the_dictionary_first(graph: Path) -> None:
    pronouncer = Pronouncer(graph)
    dictionary: Dictionary = {"bat": (("B", "AE", "T"), ("B", "AA", "T"))}
    lexicon = make_lexicon(["bat", "tab", "'"], dictionary, pronouncer.pronounce)
    assert lexicon == {"bat": dictionary["bat"], "tab": tuple(pronouncer.pronounce(["tab"]))}
    assert "tab" not in make_lexicon(["tab"], dictionary, None)


def test_no_words_have_no_pronunciations(graph: Path) -> None:
    assert Pronouncer(graph).pronounce([]) == []


def test_graph_with_int8_weights_is_a_quarter(tmp_path: Path) -> None:
    run = tmp_path / "run"
    model = G2pModel(n_layers=1, hidden_size=64)
    settings = {"n_layers": 1, "hidden_size": 64}
    run.mkdir()
    save_checkpoint(
        Checkpoint(
            settings={"model": settings},
            tokens=list(LETTERS),
            phones=list(PHONES),
            averaged=model.state_dict(),
            progress=Progress(),
        ),
        run / "best.pt",
    )
    for int8 in (False, True):
        export_g2p(run / "best.pt", run / f"{int8}.onnx", int8=int8)
    sizes = [(run / f"{int8}.onnx").stat().st_size for int8 in (False, True)]
    assert sizes[1] < 0.32 * sizes[0]


def test_graph_that_differs_is_not_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = export_module._write_graph

    def write_another(model: G2pModel, path: Path) -> None:
        write(model, path)
        graph = onnx.load(str(path))
        bias = next(
            t
            for t in graph.graph.initializer
            if t.name == "model.head.bias" or "head.bias" in t.name
        )
        values = onnx.numpy_helper.to_array(bias).copy()
        values[3] += 1.0
        bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
        onnx.save(graph, str(path))

    monkeypatch.setattr(export_module, "_write_graph", write_another)
    (tmp_path / "g2p.onnx").write_bytes(b"the old one")
    with pytest.raises(ExportError, match="nothing was written"):
        export_g2p(run / "best.pt", tmp_path / "g2p.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["g2p.onnx"]
    assert (tmp_path / "g2p.onnx").read_bytes() == b"the old one"


# What is refused


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("", "'' has no letter"),
        ("''", "has no letter"),
        ("Hello", r"contains \['H'\]"),
        ("naïve", r"contains \['ï'\]"),
        ("ice cream", r"contains \[' '\]"),
        ("r2d2", r"contains \['2'\]"),
    ],
)
def test_word_that_letters_do_not_spell_is_refused(graph: Path, word: str, message: str) -> None:
    with pytest.raises(InputError, match=rf"{message}.*normalise"):
        Pronouncer(graph).pronounce(["fine", word])


@pytest.mark.parametrize("n_best", [0, -1, BEAM_WIDTH + 1])
def test_n_best_out_of_range_is_refused(graph: Path, n_best: int) -> None:
    with pytest.raises(ValueError, match=f"n_best is {n_best}, expected 1 to {BEAM_WIDTH}"):
        Pronouncer(graph).pronounce_n_best(["tab"], n_best=n_best)


@pytest.mark.parametrize("content", [None, b"", b"no graph"])
def test_file_that_is_no_graph_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "g2p.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BundleError, match=r"cannot load .*g2p\.onnx.*export it again"):
        Pronouncer(path)


def test_damaged_graph_is_refused(graph: Path, tmp_path: Path) -> None:
    content = graph.read_bytes()
    (tmp_path / "g2p.onnx").write_bytes(content[: len(content) // 2])
    with pytest.raises(BundleError, match=r"g2p\.onnx"):
        Pronouncer(tmp_path / "g2p.onnx")


def test_graph_of_another_model_is_refused(tmp_path: Path) -> None:
    export_graph(make_model(), tmp_path / "offline.onnx")
    with pytest.raises(BundleError, match=r"offline\.onnx is no pronunciation model: .*lacks"):
        Pronouncer(tmp_path / "offline.onnx")


@pytest.mark.parametrize(
    "change", [{"n_repeats": "0"}, {"n_repeats": "many"}, {"letters": "[]"}, {"phones": "<blank>"}]
)
def test_metadata_that_makes_no_sense_is_refused(
    graph: Path, tmp_path: Path, change: dict[str, str]
) -> None:
    model = onnx.load(str(graph))
    kept = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, {**kept, **change})
    onnx.save(model, str(tmp_path / "g2p.onnx"))
    with pytest.raises(BundleError, match="is no pronunciation model"):
        Pronouncer(tmp_path / "g2p.onnx")


def test_alphabets_survive_the_metadata() -> None:
    alphabets = Alphabets(letters=LETTERS, phones=PHONES, n_repeats=3)
    assert Alphabets.from_metadata(alphabets.to_metadata()) == alphabets
