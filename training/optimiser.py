"""The optimisers of the acoustic model: AdamW, or Muon with AdamW beside it."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import nn

from service.errors import TrainingError
from training.config import OptimiserSettings

_BETAS: Final = (0.9, 0.98)


class Optimiser:
    """One or two optimisers of disjoint parameters, stepped as one."""

    def __init__(self, model: nn.Module, settings: OptimiserSettings) -> None:
        """Take the parameters; weight matrices decay, biases and norms do not.

        Args:
            model: what is trained.
            settings: under `muon`, every matrix is stepped along its momentum made orthogonal
                (Jordan et al. 2024), as far on average as AdamW would step, so that both take the
                same learning rates; convolutions, biases and norms stay with AdamW.
        """
        decay, rate = settings.weight_decay, settings.learning_rate
        orthogonal = [p for p in model.parameters() if p.dim() == 2 and settings.kind == "muon"]
        taken = set(orthogonal)
        rest = [p for p in model.parameters() if p not in taken]
        groups = [
            {"params": [p for p in rest if p.dim() > 1], "weight_decay": decay},
            {"params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=rate, betas=_BETAS)
        ]
        if orthogonal:
            self._parts.append(
                torch.optim.Muon(
                    orthogonal, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
                )
            )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all parameters."""
        return [group for part in self._parts for group in part.param_groups]

    def step(self, rate: float) -> None:
        """One step at a learning rate."""
        for group in self.param_groups:
            group["lr"] = rate
        for part in self._parts:
            part.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self._parts:
            part.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state and, under "muon", that of the matrices' optimiser if there is one."""
        first, *others = (part.state_dict() for part in self._parts)
        return {**first, "muon": others[0]} if others else first

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another optimiser of the same kind was.

        Raises:
            TrainingError: the state is of the other kind.
        """
        if ("muon" in state) != (len(self._parts) > 1):
            raise TrainingError(
                "optimiser.kind is not what the run began with; keep it or choose another "
                "run.directory"
            )
        for part, held in zip(self._parts, (state, state.get("muon", {})), strict=False):
            part.load_state_dict(held)
