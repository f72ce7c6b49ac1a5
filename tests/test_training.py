"""Training: it learns, it resumes exactly, it refuses what cannot be trained on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CHECKOUT
from tiny import TinyCorpus, make_settings, write_corpus, write_manifest, write_settings

from service.errors import TrainingError
from training.checkpoint import load_checkpoint, save_checkpoint, save_weights
from training.config import load_settings
from training.loss import compute_losses
from training.precision import choose_precision
from training.schedule import learning_rate
from training.train import train

pytestmark = pytest.mark.filterwarnings("ignore")  # lhotse's and torch's own


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TinyCorpus:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def _states_equal(first: object, second: object) -> bool:
    """Whether two nested states are the same, tensors bit for bit."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(
            _states_equal(first[key], second[key]) for key in first
        )
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(_states_equal, first, second))
    return first == second


def test_training_overfits_to_zero_errors(corpus: TinyCorpus, tmp_path: Path) -> None:
    settings = make_settings(
        corpus, tmp_path / "run", "optimiser.n_epochs=60", "run.evaluate_every_epochs=60"
    )
    train(settings)
    rows = [json.loads(line) for line in (tmp_path / "run" / "dev.jsonl").open()]
    assert rows[-1]["total"] == {"wer": 0.0, "cer": 0.0}
    assert load_checkpoint(tmp_path / "run" / "best.pt").progress.best_cer == 0.0


def test_stopped_run_continues_exactly(corpus: TinyCorpus, tmp_path: Path) -> None:
    """Stopped by SIGTERM inside a pass, with dropout and masks that must be drawn again."""
    noisy = ("optimiser.n_epochs=3", "model.dropout=0.3", "augment.time_masks_per_s=2")
    train(make_settings(corpus, tmp_path / "whole", *noisy))
    path = write_settings(corpus, tmp_path / "parts.toml")
    command = [sys.executable, "-m", "service.cli", "train", str(path), *noisy]
    log = tmp_path / "log.txt"
    with log.open("wb") as stderr, subprocess.Popen(command, stderr=stderr) as process:
        while "passes" not in log.read_text():
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
    stopped = load_checkpoint(tmp_path / "parts" / "last.pt").progress
    assert stopped.step > 0
    assert stopped.epoch < 3, "the run ended before it was stopped"
    train(load_settings(path, noisy))
    whole, parts = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    assert whole.progress == parts.progress
    for part in ("model", "averaged", "optimiser"):
        assert _states_equal(getattr(whole, part), getattr(parts, part)), part


def test_two_processes_train_together(corpus: TinyCorpus, tmp_path: Path) -> None:
    path = write_settings(corpus, tmp_path / "pair.toml")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += ["2", "-m", "service.cli", "train", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    progress = load_checkpoint(tmp_path / "pair" / "last.pt").progress
    assert progress.epoch == 2
    assert progress.step > 0
    assert len((tmp_path / "pair" / "dev.jsonl").read_text().splitlines()) == 2


def test_folder_of_another_model_is_refused(corpus: TinyCorpus, tmp_path: Path) -> None:
    train(make_settings(corpus, tmp_path / "run", "optimiser.n_epochs=1"))
    other = make_settings(corpus, tmp_path / "run", "model.hidden_size=48")
    with pytest.raises(TrainingError, match="another model"):
        train(other)


def test_shared_speakers_are_refused(corpus: TinyCorpus, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in corpus.train.open()]
    dev = write_manifest(corpus.train.parent / "shared.jsonl", rows[:1])
    with pytest.raises(TrainingError, match="anna"):
        train(make_settings(replace(corpus, dev=dev), tmp_path / "run"))


def test_fine_tuning_starts_from_half_precision_weights(corpus: TinyCorpus, tmp_path: Path) -> None:
    train(make_settings(corpus, tmp_path / "first", "optimiser.n_epochs=1"))
    first = load_checkpoint(tmp_path / "first" / "last.pt")
    save_weights(first, tmp_path / "weights.pt")
    weights = load_checkpoint(tmp_path / "weights.pt")
    assert weights.model is None
    assert str(corpus.train) not in json.dumps(weights.settings)
    for name, value in first.averaged.items():
        assert torch.equal(weights.averaged[name], value.half().float())
    still = (
        "optimiser.n_epochs=1",
        "optimiser.learning_rate=1e-12",
        "optimiser.final_learning_rate=0",
    )
    start = f"run.initial_checkpoint={tmp_path / 'weights.pt'}"
    train(make_settings(corpus, tmp_path / "second", start, *still))
    second = load_checkpoint(tmp_path / "second" / "last.pt")
    for name, value in weights.averaged.items():
        assert torch.allclose(second.averaged[name], value, atol=1e-6), name


def test_masked_phone_head_learns_nothing() -> None:
    token_logits = torch.randn(2, 20, 5, requires_grad=True)
    phone_logits = torch.randn(2, 20, 4, requires_grad=True)
    losses = compute_losses(
        token_logits,
        phone_logits,
        torch.tensor([20, 15]),
        tokens=torch.tensor([[1, 2, 3], [2, 2, 0]]),
        token_lengths=torch.tensor([3, 2]),
        phones=torch.tensor([[1, 2], [0, 0]]),
        phone_lengths=torch.tensor([2, 0]),
    )
    losses.combine(0.5).backward()
    assert phone_logits.grad is not None
    assert phone_logits.grad[0].abs().sum() > 0
    assert phone_logits.grad[1].abs().sum() == 0
    expected = torch.nn.functional.ctc_loss(
        token_logits.log_softmax(-1).transpose(0, 1),
        torch.tensor([[1, 2, 3], [2, 2, 0]]),
        torch.tensor([20, 15]),
        torch.tensor([3, 2]),
        reduction="none",
    )
    assert torch.allclose(losses.token_nll, expected.sum())
    assert int(losses.n_tokens) == 5
    assert int(losses.n_phones) == 2


def test_learning_rate_warms_up_and_ends_low() -> None:
    def rate(step: int, progress: float) -> float:
        return learning_rate(step, progress=progress, n_warmup_steps=10, highest=1.0, final=0.1)

    assert rate(0, 0.0) == pytest.approx(0.1)
    assert rate(9, 0.0) == pytest.approx(1.0)
    assert rate(500, 0.5) == pytest.approx(0.55)
    assert rate(1000, 1.0) == pytest.approx(0.1)
    rates = [rate(10 + i, i / 100) for i in range(101)]
    assert rates == sorted(rates, reverse=True)


def test_precision_is_chosen_by_the_clock() -> None:
    def step(dtype: torch.dtype) -> None:
        time.sleep(0.05 if dtype == torch.bfloat16 else 0.001)

    def unsupported(dtype: torch.dtype) -> None:
        if dtype == torch.bfloat16:
            raise RuntimeError("could not create a primitive descriptor")

    assert choose_precision(step, "auto") == torch.float32
    assert choose_precision(unsupported, "auto") == torch.float32
    assert choose_precision(step, "bfloat16") == torch.bfloat16


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.hiden_size=3", "model.hiden_size"),
        ("model.cell=transformer", "model.cell"),
        ("optimiser.n_epochs=many", "optimiser.n_epochs"),
        ("data.speeds=[0.9]", "data.speeds"),
        ("nonsense", "section.key=value"),
        ("data.train.x=1", "data.train.x"),
    ],
)
def test_wrong_settings_are_named(
    corpus: TinyCorpus, tmp_path: Path, override: str, named: str
) -> None:
    with pytest.raises(TrainingError, match=named.replace(".", r"\.")):
        make_settings(corpus, tmp_path / "run", override)


def test_overrides_are_read_as_toml(corpus: TinyCorpus, tmp_path: Path) -> None:
    settings = make_settings(
        corpus, tmp_path / "run", "model.cell=gru", "data.speeds=[0.9, 1.0]", "model.dropout=0.5"
    )
    assert settings.model.cell == "gru"
    assert settings.data.speeds == (0.9, 1.0)
    assert settings.model.dropout == 0.5


def test_shipped_recipe_is_valid() -> None:
    recipe = CHECKOUT / "training" / "recipes" / "en-small.toml"
    settings = load_settings(recipe, ['data.train=["a"]', 'data.dev=["b"]'])
    assert settings.model.bidirectional


def test_damaged_checkpoints_are_refused(corpus: TinyCorpus, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no checkpoint"):
        load_checkpoint(tmp_path / "none.pt")
    train(make_settings(corpus, tmp_path / "run", "optimiser.n_epochs=1"))
    path = tmp_path / "run" / "last.pt"
    checkpoint = load_checkpoint(path)
    save_checkpoint(checkpoint, tmp_path / "copy.pt")
    copy = load_checkpoint(tmp_path / "copy.pt")
    assert _states_equal(copy.averaged, checkpoint.averaged)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(TrainingError, match="cannot be read"):
        load_checkpoint(path)
    torch.save({"format_version": 99}, path)
    with pytest.raises(TrainingError, match="format 99"):
        load_checkpoint(path)
