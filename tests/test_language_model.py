"""The compiled n-gram model against KenLM, and what is refused."""

from __future__ import annotations

import gzip
import lzma
import subprocess
import sys
from pathlib import Path

import kenlm
import numpy as np
import pytest

from service.decoding.ngram import load_ngram
from service.decoding.reference import load_kenlm
from service.errors import InputError
from training.arpa import compile_arpa
from training.ngram import build_ngram

PRUNED_ARPA = r"""\data\
ngram 1=5
ngram 2=1
ngram 3=2

\1-grams:
-1.0	<unk>
-99	<s>	-0.5
-0.8	</s>
-0.6	a	-0.3
-0.9	b	-0.2

\2-grams:
-0.4	<s> a	-0.1

\3-grams:
-0.2	<s> a b
-0.7	a b a

\end\
"""


def _sentences(seed: int, n: int) -> list[str]:
    draw = np.random.default_rng(seed)
    words = [f"w{'abcdefghij'[i]}" for i in range(10)]
    return [
        " ".join(words[min(9, int(draw.exponential(2.5)))] for _ in range(draw.integers(1, 12)))
        for _ in range(n)
    ]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(_sentences(0, 400)), encoding="utf-8")
    return path


@pytest.mark.parametrize("order", [2, 3, 4, 6])
@pytest.mark.parametrize("prune", [(0,), (0, 0, 1)])
def test_scores_equal_kenlms(
    text: Path, tmp_path: Path, order: int, prune: tuple[int, ...]
) -> None:
    build_ngram([text], tmp_path / "lm", order=order, prune=prune)
    ours = load_ngram(tmp_path / "lm" / "lm.ngram")
    theirs = kenlm.Model(str(tmp_path / "lm" / "lm.binary"))
    assert ours.tables.order == order
    n_scores = 0
    for sentence in [*_sentences(1, 100), "", "nobody wa knows", "wa nobody wb wb wb"]:
        found = ours.score(sentence.split())
        expected = [score for score, _, _ in theirs.full_scores(sentence)]
        np.testing.assert_allclose(found, expected, atol=1e-4)
        n_scores += len(found)
    assert n_scores > 500


def test_pruned_file_scores_as_kenlm_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "pruned.arpa"
    path.write_text(PRUNED_ARPA, encoding="utf-8")
    ours = compile_arpa(path)
    assert ours.score(["a", "b"])[:2] == pytest.approx([-0.4, -0.2], abs=1e-4)
    # a b a needs the bigram a b, which the file lacks: its context is kept for the trigram
    assert ours.score(["b", "a", "b", "a"])[3] == pytest.approx(-0.7, abs=1e-4)
    assert ours.score(["b", "a", "b"])[2] == pytest.approx(-0.3 - 0.9, abs=1e-4)


def test_quantised_scores_are_close(text: Path, tmp_path: Path) -> None:
    build_ngram([text], tmp_path / "lm", order=3, keep_arpa=True)
    exact = compile_arpa(tmp_path / "lm" / "lm.arpa.gz")
    small = compile_arpa(tmp_path / "lm" / "lm.arpa.gz", quantise=True)
    differences = np.concatenate(
        [np.subtract(exact.score(s.split()), small.score(s.split())) for s in _sentences(2, 50)]
    )
    assert 0 < np.abs(differences).max() < 0.2
    assert np.abs(differences).mean() < 0.02


@pytest.mark.parametrize("order", [2, 4])
@pytest.mark.parametrize("quantise", [False, True])
def test_model_written_as_text_scores_the_same(
    text: Path, tmp_path: Path, order: int, quantise: bool
) -> None:
    build_ngram([text], tmp_path / "lm", order=order, prune=(0, 0, 1), keep_arpa=True)
    model = compile_arpa(tmp_path / "lm" / "lm.arpa.gz", quantise=quantise)
    model.save_arpa(tmp_path / "again.arpa")
    again, theirs = compile_arpa(tmp_path / "again.arpa"), load_kenlm(model)
    assert again.words == model.words
    assert again.tables.order_start.tolist() == model.tables.order_start.tolist()
    assert set(model.vocabulary) == set(model.words) - {"<unk>", "<s>", "</s>"}
    for sentence in _sentences(3, 60):
        expected = model.score(sentence.split())
        np.testing.assert_allclose(again.score(sentence.split()), expected, atol=1e-4)
        found = [score for score, _, _ in theirs.full_scores(sentence)]
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("packed", ["plain", "gz", "xz"])
def test_packed_files_give_the_same_model(tmp_path: Path, packed: str) -> None:
    path = tmp_path / "model.arpa"  # what it is shows inside, not in its name
    data = PRUNED_ARPA.encode()
    path.write_bytes({"plain": data, "gz": gzip.compress(data), "xz": lzma.compress(data)}[packed])
    model = compile_arpa(path)
    model.save(tmp_path / "model.ngram")
    loaded = load_ngram(tmp_path / "model.ngram")
    assert loaded.words == ("<unk>", "<s>", "</s>", "a", "b")
    assert loaded.score(["a", "b", "x"]) == model.score(["a", "b", "x"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("\\data\\", "data"), r"expected \\data\\"),
        (("ngram 2=1", "ngram 2=2"), r"model.arpa:\d+: 0 fields"),
        (("-0.4\t<s> a", "-0.4\t<s> c"), r"the word 'c', expected words of the 1-grams"),
        (("-0.4\t<s> a", "x\t<s> a"), "'x' and .*, expected numbers"),
        (("-0.4\t<s> a", "nan\t<s> a"), "a NaN or infinity among the 2-grams"),
        (("-0.9\tb", "-0.9\ta"), "'a' twice"),
        (("\\3-grams:", "\\4-grams:"), r"expected \\3-grams"),
        (("a b a\n", ""), "fields, expected"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "model.arpa"
    path.write_text(PRUNED_ARPA.replace(*change), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        compile_arpa(path)


def test_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.arpa"
    path.write_text(PRUNED_ARPA[: len(PRUNED_ARPA) // 2], encoding="utf-8")
    with pytest.raises(InputError, match=r"the file ends|fields"):
        compile_arpa(path)
    model = tmp_path / "model.ngram"
    path.write_text(PRUNED_ARPA, encoding="utf-8")
    compile_arpa(path).save(model)
    model.write_bytes(model.read_bytes()[:-200])
    with pytest.raises(InputError, match="the file ends at byte"):
        load_ngram(model)


def test_foreign_files_are_named(text: Path, tmp_path: Path) -> None:
    build_ngram([text], tmp_path / "lm", order=2)
    with pytest.raises(InputError, match=r"is a KenLM binary.*voxgate lm compile MODEL\.arpa"):
        load_ngram(tmp_path / "lm" / "lm.binary")
    arpa = tmp_path / "model.arpa"
    arpa.write_text(PRUNED_ARPA, encoding="utf-8")
    with pytest.raises(InputError, match=r"no compiled language model; compile it: voxgate lm"):
        load_ngram(arpa)
    with pytest.raises(InputError, match="cannot read the language model"):
        load_ngram(tmp_path / "nowhere.ngram")


def test_command_compiles_what_the_search_opens(tmp_path: Path) -> None:
    source, target = tmp_path / "model.arpa", tmp_path / "model.ngram"
    source.write_text(PRUNED_ARPA, encoding="utf-8")
    command = [sys.executable, "-m", "service.cli", "lm", "compile", str(source), str(target)]
    subprocess.run(command, check=True, capture_output=True)
    assert load_ngram(target).score(["a", "b"])[:2] == pytest.approx([-0.4, -0.2], abs=1e-4)
