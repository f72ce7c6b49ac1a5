"""The weights of a run: stepped, averaged, kept in its folder and found there again.

`last.pt` has everything that an exact continuation needs, `best.pt` the best weights so far,
`dev.jsonl` a line an evaluation. What a step draws depends on the seed and the step alone, so a run
that was interrupted equals one that was not.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from service.errors import TrainingError
from training.checkpoint import Checkpoint, Progress, State, load_checkpoint, save_checkpoint
from training.precision import choose_precision

logger = logging.getLogger(__name__)

LAST: Final = "last.pt"
BEST: Final = "best.pt"
_MOST_SKIPPED: Final = 100

Model = TypeVar("Model", bound=nn.Module)
Example = TypeVar("Example")


class Weights(Generic[Model]):
    """A model under training."""

    def __init__(
        self,
        directory: Path,
        model: Model,
        optimiser: torch.optim.Optimizer,
        *,
        settings: Mapping[str, Any],
        tokens: Sequence[str] = (),
        phones: Sequence[str] = (),
        seed: int,
        clip_norm: float,
        average_decay: float,
        checkpoint_every_s: float,
    ) -> None:
        """Begin a run; `restore` goes on with an older one.

        Args:
            directory: of the run; made if it does not exist.
            model: what is trained.
            optimiser: of its parameters.
            settings: of the run, as plain data.
            tokens: token list of the checkpoints.
            phones: phone list of the checkpoints.
            seed: of every random draw.
            clip_norm: gradients are scaled down to this global norm.
            average_decay: decay of the exponential moving average, per step.
            checkpoint_every_s: seconds between two checkpoints.
        """
        self.directory = directory
        self.model = model
        self.progress = Progress()
        """How far the run is; `best_cer` has the lowest error that was told."""
        self._optimiser = optimiser
        self._averaged = average_model(model, average_decay)
        self._settings = dict(settings)
        self._tokens, self._phones = list(tokens), list(phones)
        self._seed = seed
        self._clip_norm = clip_norm
        self._guard = GradientGuard()
        self._checkpoint_every_s = checkpoint_every_s
        self._saved = time.monotonic()
        directory.mkdir(parents=True, exist_ok=True)

    @property
    def averaged(self) -> Model:
        """The model with averaged weights: what is evaluated and exported."""
        return cast("Model", self._averaged.module)

    def restore(self, check: Callable[[State], object]) -> None:
        """Continue from `last.pt` where there is one.

        Args:
            check: refuses the settings of another run.

        Raises:
            TrainingError: the checkpoint cannot be read, or what `check` raises.
        """
        path = self.directory / LAST
        if not path.exists():
            return
        checkpoint = load_checkpoint(path)
        check(checkpoint.settings)
        assert checkpoint.model is not None
        assert checkpoint.optimiser is not None
        self.model.load_state_dict(checkpoint.model)
        self.averaged.load_state_dict(checkpoint.averaged)
        self._averaged.n_averaged.fill_(checkpoint.progress.step)
        self._optimiser.load_state_dict(checkpoint.optimiser)
        self.progress = checkpoint.progress
        logger.info("going on at step %d", checkpoint.progress.step)

    def choose_precision(
        self, compute_loss: Callable[[torch.dtype], Tensor], requested: str
    ) -> torch.dtype:
        """The type to compute in; see `training.precision`."""

        def step(dtype: torch.dtype) -> None:
            compute_loss(dtype).backward()
            self._optimiser.zero_grad()

        return choose_precision(step, requested)

    def step(self, compute_loss: Callable[[], Tensor], *, rate: float) -> float:
        """One optimiser step at a learning rate; returns the loss."""
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        torch.manual_seed(self._seed * 1_000_003 + self.progress.step)
        loss = compute_loss()
        self._optimiser.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self._clip_norm)
        if self._guard.allows(norm, step=self.progress.step):
            self._optimiser.step()
            self._averaged.update_parameters(self.model)
        return loss.item()

    def advance(self) -> None:
        """Count a batch that was trained on."""
        self.progress = replace(
            self.progress, batch=self.progress.batch + 1, step=self.progress.step + 1
        )

    def end_pass(self) -> None:
        """Count a pass that is complete."""
        self.progress = replace(self.progress, epoch=self.progress.epoch + 1, batch=0)

    def train_pass(
        self,
        batches: Sequence[Sequence[Example]],
        step: Callable[[Sequence[Example]], float],
        *,
        n_passes: int,
    ) -> None:
        """What is left of one pass.

        Args:
            batches: of the whole pass.
            step: trains on one and returns the loss.
            n_passes: of the run; shown only.
        """
        bar = tqdm(
            batches[self.progress.batch :],
            desc=f"pass {self.progress.epoch + 1}/{n_passes}",
            initial=self.progress.batch,
            total=len(batches),
            mininterval=5.0,
        )
        for batch in bar:
            loss = step(batch)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            self.advance()
            self.save_if_due()
        self.end_pass()

    def keep_if_best(self, error: float, *, or_equal: bool = False) -> None:
        """Keep the weights as `best.pt` if no error before was lower."""
        if error < self.progress.best_cer or (or_equal and error == self.progress.best_cer):
            self.progress = replace(self.progress, best_cer=error)
            self.save(BEST)

    def log(self, row: Mapping[str, object]) -> None:
        """Add a line to `dev.jsonl`."""
        with (self.directory / "dev.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")

    def save_if_due(self) -> None:
        """Write `last.pt` where it is time."""
        if time.monotonic() - self._saved >= self._checkpoint_every_s:
            self.save(LAST)

    def save(self, name: str) -> None:
        """Write a checkpoint into the run's folder."""
        checkpoint = Checkpoint(
            settings=self._settings,
            tokens=self._tokens,
            phones=self._phones,
            averaged=self.averaged.state_dict(),
            progress=self.progress,
            model=self.model.state_dict(),
            optimiser=self._optimiser.state_dict(),
        )
        save_checkpoint(checkpoint, self.directory / name)
        self._saved = time.monotonic()


def average_model(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of a model's weights that forgets faster while it is young.

    Args:
        model: the model.
        decay: of a step, from about the (9 / (1 - `decay`))th on; before that it is smaller.
    """

    def average(averaged: Tensor, current: Tensor, n_averaged: Tensor | int) -> Tensor:
        n_steps = int(n_averaged)
        return torch.lerp(averaged, current, 1 - min(decay, (1 + n_steps) / (10 + n_steps)))

    return AveragedModel(model, avg_fn=average)


class GradientGuard:
    """Leaves out a step whose gradient is not finite, and gives up where none is."""

    def __init__(self) -> None:
        self._n_skipped = 0  # in a row

    def allows(self, norm: Tensor, *, step: int) -> bool:
        """Whether to take the step.

        Args:
            norm: of the gradient, scalar.
            step: its number.

        Raises:
            TrainingError: so many steps in a row were left out that the run is broken.
        """
        if torch.isfinite(norm):
            self._n_skipped = 0
            return True
        self._n_skipped += 1
        if self._n_skipped == _MOST_SKIPPED:
            raise TrainingError(
                f"the gradients of {_MOST_SKIPPED} steps in a row are not finite; lower "
                "optimiser.learning_rate, and go on from a checkpoint before it went wrong"
            )
        logger.warning("step %d: the gradient is not finite; step left out", step)
        return False


def draw_batches(
    examples: Sequence[Example],
    *,
    size: int,
    n_pooled: int,
    length: Callable[[Example], int],
    draw: random.Random,
) -> list[list[Example]]:
    """Batches of examples of similar length, in random order.

    Args:
        examples: all of them.
        size: examples in a batch.
        n_pooled: batches among whose examples those of similar length are looked for.
        length: of an example.
        draw: the chance.
    """
    shuffled = draw.sample(examples, len(examples))
    batches: list[list[Example]] = []
    for first in range(0, len(shuffled), size * n_pooled):
        pool = sorted(shuffled[first : first + size * n_pooled], key=length)
        batches += [pool[i : i + size] for i in range(0, len(pool), size)]
    draw.shuffle(batches)
    return batches
