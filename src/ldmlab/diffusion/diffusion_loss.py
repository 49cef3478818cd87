"""The training objective of a denoiser (path, prediction, times, weighting, loss), and losses, one number an image.

Squares, magnitudes, direction of a velocity, contrast, bound of DDPM.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldmlab.contracts import DiffusionLoss, Noised, Path, Prediction, TimeSampling, Weighting
from ldmlab.diffusion.parameterization import EpsPrediction, Parameterization
from ldmlab.diffusion.schedule import as_path, levels_of
from ldmlab.diffusion.time_sampling import UniformTimes
from ldmlab.errors import InputError, one_of
from ldmlab.nn.pixels import cosine_basis


class L2:
    """Mean of squares."""

    def __call__(self, output: Tensor, target: Tensor, factor: Tensor | None, at: Noised) -> Tensor:
        """(B, C, h, w) twice => (B,)."""
        return weighted(F.mse_loss(output, target, reduction="none").mean(dim=(1, 2, 3)), factor)


class L1:
    """Mean of magnitudes."""

    def __call__(self, output: Tensor, target: Tensor, factor: Tensor | None, at: Noised) -> Tensor:
        return weighted(F.l1_loss(output, target, reduction="none").mean(dim=(1, 2, 3)), factor)


class MultiScaleLoss(L2):
    """Mean of squares of the cosine transform, low frequencies weighted up (Crowson et al. 2024, k-diffusion).

    Coefficient (i, j) of n x m counts min(w(i / n), w(j / m)), w(f) = min(-log2(f / 2), scales) from 1 at the finest.
    """

    def __init__(self, scales: int = 4) -> None:
        """scales: octaves of different weight; 1 is the mean of squares."""
        if scales < 1:
            raise InputError(f"diffusion.loss.scales={scales} must be 1 or more; k-diffusion's configurations have 1.")
        self.scales = scales

    def __call__(self, output: Tensor, target: Tensor, factor: Tensor | None, at: Noised) -> Tensor:
        down, across = (cosine_basis(side, output.device).float() for side in output.shape[2:])
        found = down @ (output - target) @ across.T  # (B, C, h, w)
        height, width = (self.frequency_weights(side, output) for side in output.shape[2:])
        squares = torch.minimum(height[:, None], width) * found.square()
        return weighted(squares.mean(dim=(1, 2, 3)), factor)

    def frequency_weights(self, side: int, like: Tensor) -> Tensor:
        """(side,), of frequencies 1 / 2 side .. 1 / 2."""
        return -torch.linspace(0.5 / side, 0.5, side, device=like.device).log2().clamp_min(-self.scales)


class CosineLoss(L2):
    """Mean of squares, and `cosine` times 1 - the cosine over channels, averaged over places (LightningDiT)."""

    def __init__(self, cosine: float = 1.0) -> None:
        self.cosine = cosine

    def __call__(self, output: Tensor, target: Tensor, factor: Tensor | None, at: Noised) -> Tensor:
        direction = 1 - F.cosine_similarity(output, target, dim=1)  # (B, h, w)
        return super().__call__(output, target, factor, at) + self.cosine * direction.mean(dim=(1, 2))


class ContrastiveLoss(L2):
    """Squares less `contrast` times those to another image's target (Stoica et al. 2025, eq. 6).

    The other image is the next one of the micro-batch, so this loss depends on how a batch is split.
    """

    def __init__(self, contrast: float = 0.05) -> None:
        if not 0 <= contrast < 1:
            raise InputError(f"diffusion.loss.contrast={contrast} is outside 0 .. 1; the paper's is 0.05.")
        self.contrast = contrast

    def __call__(self, output: Tensor, target: Tensor, factor: Tensor | None, at: Noised) -> Tensor:
        if len(output) < 2:
            raise InputError("diffusion.loss: a contrast needs two images in a micro-batch; raise trainer.micro_batch.")
        apart = super().__call__(output, target.roll(1, 0), factor, at)
        return super().__call__(output, target, factor, at) - self.contrast * apart


class VariationalLoss(L2):
    """Mean of squares plus the variational bound of a learned variance, in bits a dimension (Nichol & Dhariwal 2021).

    L = L_simple + weight L_vlb (eq. 16), the mean detached in L_vlb; alone: T L_vlb, the mean learned by it too.
    """

    idle_without = "weight: alone=false"
    learns_variance = True  # of prediction=LearnedVariance

    def __init__(self, weight: float = 1.0, alone: bool = False) -> None:
        self.weight, self.alone = weight, alone
        self._tables: dict[tuple[int, torch.device], Tensor] = {}

    def __call__(self, output: Tensor, target: Tensor, factor: Tensor | None, at: Noised) -> Tensor:
        if self.alone:
            return self.bound(output, target, at) * at.path.steps  # type: ignore[attr-defined]
        simple = super().__call__(output, target, factor, at)
        return simple + self.weight * self.bound(output.detach(), target, at)

    def tables(self, path: Path, device: torch.device) -> Tensor:
        """`step_variances` of a path, computed once."""
        key = id(path), device
        if key not in self._tables:
            self._tables[key] = step_variances(path).float().to(device)
        return self._tables[key]

    def bound(self, output: Tensor, target: Tensor, at: Noised) -> Tensor:
        """KL(q(x_{t-1} | x_t, clean) | p) in bits a dimension, (B,); at t = 0 the likelihood of bins of 1/255."""
        tables = self.tables(at.path, at.x.device)
        low, high, from_clean, scale, ratio = tables[:, at.times, None, None, None].unbind()  # (B, 1, 1, 1)
        fraction = (at.output.chunk(2, dim=1)[1] + 1) / 2
        log_variance = fraction * high + (1 - fraction) * low
        off = at.prediction.clean_slope(at.alpha, at.sigma) * (output - target)  # type: ignore[attr-defined]
        # the likelihood of bins amplifies rounding: a noise's estimate is computed as the official programs do
        noise = isinstance(getattr(at.prediction, "mean", None), EpsPrediction)
        clean = scale * at.x - ratio * output if noise else at.clean + off
        gap = (from_clean * off).square() * torch.exp(-log_variance)
        divergence = 0.5 * (log_variance - low - 1 + torch.exp(low - log_variance) + gap)
        first = -log_of_bins(at.clean, clean, 0.5 * log_variance)
        nats = torch.where(at.times[:, None, None, None] == 0, first, divergence)
        return nats.mean(dim=(1, 2, 3)) / math.log(2)


def step_variances(path: Path) -> Tensor:
    """By time, float64 (5, T): log beta~ (at 0 the next), log beta, the clean's share, 1 / alpha, sigma / alpha."""
    levels = levels_of(path)
    before = [
        torch.cat([end, part[:-1]]) for end, part in zip(levels.alpha.new_tensor([[1.0], [0.0]]), levels, strict=True)
    ]
    beta = levels.sigma**2 - (levels.alpha / before[0]) ** 2 * before[1] ** 2
    posterior = beta * before[1] ** 2 / levels.sigma**2
    low = torch.cat([posterior[1:2], posterior[1:]]).log()
    ratio = levels.sigma / levels.alpha
    return torch.stack([low, beta.log(), before[0] * beta / levels.sigma**2, 1 / levels.alpha, ratio])


def log_of_bins(value: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-probability of the bin of width 2 / 255 around a value in -1 .. 1; the outer bins are open."""
    from_mean, narrow = value - mean, torch.exp(-log_std)
    below, above = (_normal_below(narrow * (from_mean + side / 255)) for side in (-1, 1))
    inside = torch.where(value > 0.999, 1 - below, above - below)
    return torch.where(value < -0.999, above, inside).clamp_min(1e-12).log()


def _normal_below(x: Tensor) -> Tensor:
    """The normal distribution function, in the approximation of the official programs."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def weighted(loss: Tensor, factor: Tensor | None) -> Tensor:
    """(B,) times the weighting's factor (B,), if there is one."""
    return loss if factor is None else factor * loss


def named(loss: str | DiffusionLoss) -> DiffusionLoss:
    """l2 | l1, or a loss as it is."""
    if not isinstance(loss, str):
        return loss
    one_of("diffusion.loss", loss, ("l1", "l2"))
    return L1() if loss == "l1" else L2()


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
