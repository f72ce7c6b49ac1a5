"""Second-pass rescoring: a list is scored as its hypotheses alone, a graph says what torch says."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from tiny import PIECES, save_language_model

from export import rescorer as export_module
from export.rescorer import RescorerStep, export_rescorer
from service.errors import BundleError, ExportError, InputError, TrainingError
from service.rescorer import BOUNDARY_ID, IntArray, Level, Rescorer, build_levels
from training.model import Cell
from training.rnn_lm import LanguageModel


def _make_hypotheses(n: int = 60) -> list[list[str]]:
    """Changes of one sentence, as a search gives them."""
    draw = random.Random(1)
    words = ["bad", "gab", "a", "cab", "edge", "fig", "bag", "hi'd"]
    sentence = draw.choices(words, k=9)
    hypotheses = [
        [draw.choice(words) if draw.random() < 0.2 else w for w in sentence] for _ in range(n)
    ]
    return [[], *hypotheses, sentence[:4], hypotheses[3]]


def _score_by_torch(model: LanguageModel, words: list[str]) -> float:
    pieces = [piece for word in words for piece in PIECES.encode(word)] + [BOUNDARY_ID]
    with torch.inference_mode():
        log_probs = model(torch.tensor([[BOUNDARY_ID, *pieces[:-1]]]))[0].log_softmax(-1)
    return sum(float(log_probs[i, piece]) for i, piece in enumerate(pieces))


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rescorer")
    save_language_model(folder / "best.pt")
    export_rescorer(folder / "best.pt", folder / "rescorer.onnx")
    return folder / "rescorer.onnx"


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("int8", [False, True])
def test_graph_says_what_torch_says(tmp_path: Path, cell: Cell, int8: bool) -> None:
    model = save_language_model(tmp_path / "best.pt", cell=cell)
    export_rescorer(tmp_path / "best.pt", tmp_path / "rescorer.onnx", int8=int8)
    hypotheses = _make_hypotheses()

    scores = Rescorer(tmp_path / "rescorer.onnx", n_history=None).score(hypotheses)

    expected = [_score_by_torch(model, words) for words in hypotheses]
    np.testing.assert_allclose(scores, expected, rtol=0.02 if int8 else 1e-5)


def test_a_list_is_scored_as_its_hypotheses_alone(graph: Path) -> None:
    rescorer, hypotheses = Rescorer(graph, n_history=None), _make_hypotheses()

    together = rescorer.score(hypotheses)

    alone = [rescorer.score([words])[0] for words in hypotheses]
    np.testing.assert_allclose(together, alone, atol=1e-4)
    assert together[4] == together[-1]  # the same hypothesis twice


def test_probabilities_sum_to_one(graph: Path) -> None:
    """The empty sentence and all first pieces: nothing else can begin."""
    rescorer = Rescorer(graph)
    n_pieces = len(PIECES.names)
    begun = [[i, BOUNDARY_ID] for i in range(1, n_pieces)]
    levels, _ = build_levels([[BOUNDARY_ID], *begun], None)

    log_probs = rescorer._run(levels[0], rescorer._start)[0]

    assert len(log_probs) == n_pieces
    assert np.exp(log_probs).sum() == pytest.approx(1, abs=1e-5)


def test_empty_inputs_have_their_meaning(graph: Path) -> None:
    rescorer = Rescorer(graph)

    assert rescorer.score([]).shape == (0,)
    (end,) = rescorer.score([[]])
    assert end == rescorer.score([["bad"], []])[1]
    assert np.isfinite(end)
    assert end < 0


def test_unknown_letters_are_scored_and_non_words_refused(graph: Path) -> None:
    rescorer = Rescorer(graph)

    assert np.isfinite(rescorer.score([["zé", "bad"]])).all()
    for strange in ("", "two words"):
        with pytest.raises(InputError, match="is no word"):
            rescorer.score([["bad", strange]])


def _draw_sentences() -> list[tuple[int, ...]]:
    draw = random.Random(1)
    return [
        (*(draw.choice((1, 2)) for _ in range(draw.randint(0, 6))), BOUNDARY_ID) for _ in range(50)
    ]


def _read_back(levels: Sequence[Level], paths: Sequence[IntArray], sentence: int) -> list[int]:
    taken = [int(path[sentence]) for path in paths]
    return [int(level.wanted[edge]) for level, edge in zip(levels, taken, strict=True) if edge >= 0]


@pytest.mark.parametrize("n_history", [None, 2, 6])
def test_every_sentence_takes_its_own_pieces(n_history: int | None) -> None:
    sentences = _draw_sentences()
    levels, paths = build_levels(sentences, n_history)
    for i, sentence in enumerate(sentences):
        assert _read_back(levels, paths, i) == list(sentence)
    for depth in range(1, len(levels)):
        above, level = levels[depth - 1], levels[depth]
        for i in np.flatnonzero(paths[depth] >= 0):
            node = level.rows[paths[depth][i]]
            assert level.tokens[node] == above.wanted[paths[depth - 1][i]]


def test_levels_hold_every_beginning_once() -> None:
    sentences = _draw_sentences()
    levels, _ = build_levels(sentences, None)
    beginnings = {s[: i + 1] for s in sentences for i in range(len(s))}
    assert sum(len(level.wanted) for level in levels) == len(beginnings)


def test_beginnings_that_end_alike_are_one_node_of_the_first_that_has_it() -> None:
    sentences = [(1, 3, 4, BOUNDARY_ID), (2, 3, 4, BOUNDARY_ID), (2, 3, 5, BOUNDARY_ID)]
    exact, _ = build_levels(sentences, None)
    shared, _ = build_levels(sentences, 1)
    assert [len(level.tokens) for level in exact] == [1, 2, 2, 3]
    assert [len(level.tokens) for level in shared] == [1, 2, 1, 2]
    assert shared[2].parents.tolist() == [0]  # the one behind piece 1


def test_shared_nodes_change_scores_of_later_hypotheses_alone(graph: Path) -> None:
    sentences = [(3, 5, 7, 5, BOUNDARY_ID), (4, 5, 7, 5, BOUNDARY_ID)]
    exact = Rescorer(graph, n_history=None).score_tokens(sentences)
    shared = Rescorer(graph, n_history=1).score_tokens(sentences)
    assert shared[0] == pytest.approx(exact[0], abs=1e-4)
    assert abs(shared[1] - exact[1]) > 1e-4
    far = Rescorer(graph, n_history=50).score_tokens(sentences)
    np.testing.assert_allclose(far, exact, atol=1e-4)


def test_int8_graph_is_smaller_and_holds_no_large_float(graph: Path) -> None:
    large = [
        tensor.name
        for tensor in onnx.load(str(graph)).graph.initializer
        if numpy_helper.to_array(tensor).ndim == 2
        and numpy_helper.to_array(tensor).shape[1] > 1
        and tensor.data_type == onnx.TensorProto.FLOAT
    ]

    assert large == []


def test_export_writes_nothing_where_the_graph_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_language_model(tmp_path / "best.pt")
    forward = RescorerStep.forward
    monkeypatch.setattr(
        RescorerStep,
        "forward",
        lambda self, *inputs: (forward(self, *inputs)[0] * 1.1, *forward(self, *inputs)[1:]),
    )

    with pytest.raises(ExportError, match="nothing was written"):
        export_module.export_rescorer(tmp_path / "best.pt", tmp_path / "rescorer.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]


def test_what_is_no_rescorer_is_refused(tmp_path: Path, graph: Path) -> None:
    model = onnx.load(str(graph))
    del model.metadata_props[:]
    onnx.save(model, str(tmp_path / "bare.onnx"))

    with pytest.raises(BundleError, match="lacks"):
        Rescorer(tmp_path / "bare.onnx")
    with pytest.raises(BundleError, match="cannot load"):
        Rescorer(tmp_path / "none.onnx")
    with pytest.raises(TrainingError, match="no checkpoint"):
        export_rescorer(tmp_path / "none.pt", tmp_path / "rescorer.onnx")
