"""The training objective of a denoiser: path, prediction, distribution of times, weighting and loss."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from ldmlab.contracts import DiffusionLoss, Noised, Path, Prediction, TimeSampling, Weighting
from ldmlab.diffusion.diffusion_loss import named
from ldmlab.diffusion.parameterization import Parameterization
from ldmlab.diffusion.schedule import as_path
from ldmlab.diffusion.time_sampling import UniformTimes
from ldmlab.errors import InputError

Network = Callable[[Tensor, Tensor], Tensor]  # input (B, C, h, w), times (B,) float32 => output


class Objective(nn.Module):
    """The loss from its exchangeable parts; has parameters only if the weighting has."""

    def __init__(
        self,
        schedule: Any,  # contracts.Path, or a discrete schedule of `steps` and `levels`
        prediction: Prediction,
        time_sampling: TimeSampling | None = None,  # None: uniform
        weighting: Weighting | None = None,  # None: the prediction's own loss
        loss: str | DiffusionLoss = "l2",
    ) -> None:
        super().__init__()
        self.path: Path = as_path(schedule)
        self.prediction = prediction
        self.loss = named(loss)
        self.time_sampling = time_sampling or UniformTimes()
        self.weighting = weighting
        self.form = Parameterization(prediction, self.path)
        self._check()

    def _check(self) -> None:
        """InputError where loss or weighting do not fit prediction and path."""
        learned, discrete = self.form.outputs == 2, hasattr(self.path, "steps")
        taught = getattr(self.loss, "learns_variance", False)
        if learned and not taught:
            raise InputError(
                f"diffusion.loss={type(self.loss).__name__.lower()} never trains the variance that "
                f"diffusion.prediction={type(self.prediction).__name__} has; choose VariationalLoss, or a prediction "
                "without a variance."
            )
        if taught and not (learned and discrete):
            raise InputError(
                "diffusion.loss: the variational loss needs prediction=LearnedVariance and a discrete schedule."
            )
        if discrete and getattr(self.weighting, "of_flows", False):
            raise InputError(
                f"diffusion.weighting={type(self.weighting).__name__} weighs velocities of a flow, and this diffusion "
                "has a discrete schedule; choose MinSnr, Snr or P2, or a continuous path such as diffusion=flow."
            )

    def times(self, u: Tensor, position: Tensor, values: int) -> Tensor:
        """Training times (B,) of uniform numbers and positions, for latents of that many values."""
        return self.time_sampling(u, position, self.path.at_size(values))

    def forward(self, network: Network, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """The loss of each image (B,), float32."""
        alpha, sigma = self.path.levels(times)
        x = alpha * clean + sigma * noise
        form = self.form
        given = form.checked(network(form.scaled(x, alpha, sigma), times.float()), x)
        output = form.compared(form.split(given)[0], alpha, sigma)
        target = self.prediction.target(clean, noise, alpha, sigma, *form.rates(times))
        at = Noised(clean, noise, x, times, alpha, sigma, self.path, self.prediction, given)
        if self.weighting is None:
            return self.loss(output, target, None, at)
        rates = partial(self.path.rates, times)
        factor = self.weighting(alpha, sigma, rates) * form.slope(at).square()
        loss = self.loss(output, target, factor.flatten(), at)
        finished = getattr(self.weighting, "finished", None)
        return loss if finished is None else finished(loss, times)
