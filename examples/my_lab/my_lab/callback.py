"""A number of one's own in metrics.csv and at every logger."""

from dataclasses import dataclass
from typing import Any

import torch

from ldmlab.training.callbacks.base import StepCallback


@dataclass
class WeightNorm(StepCallback):
    """Length of the trained parameters as one vector."""

    name: str = "weight_norm"

    def metrics(self, session: Any) -> dict[str, float]:
        """For each row of the log."""
        trained = [p.detach().norm() for p in session.stage.parameters() if p.requires_grad]
        return {self.name: float(torch.stack(trained).norm())}
