"""Distributions of the training times: an image's uniform number and its position in training => its time.

All are quantile functions, so a time belongs to its image however a batch is split. Times are then shifted by the
path (`shift`, `shift_base`), as at sampling.
"""

import math

import torch
from torch import Tensor

from ldmlab.contracts import Path
from ldmlab.errors import InputError


class UniformTimes:
    """Uniform over the path; with `strata` = n, each n consecutive images of training have one time in each n-th."""

    def __init__(self, strata: int | None = None) -> None:
        """strata: usually the global batch; None: independent times."""
        if strata is not None and strata < 1:
            raise InputError(f"diffusion.time_sampling.strata={strata} must be at least 1.")
        self.strata = strata

    def stratified(self, u: Tensor, position: Tensor) -> Tensor:
        """(position mod n + u) / n."""
        return u if self.strata is None else (position % self.strata + u) / self.strata

    def __call__(self, u: Tensor, position: Tensor, path: Path) -> Tensor:
        """(B,) float64, (B,) int64 => times (B,)."""
        return path.quantile(self.stratified(u, position))


class LogitNormalTimes(UniformTimes):
    """Positions sigmoid(mean + std n), n normal (Esser et al. 2024, "SD3", section 3.1); mean above 0: noisier."""

    def __init__(self, mean: float = 0.0, std: float = 1.0, strata: int | None = None) -> None:
        super().__init__(strata)
        self.mean, self.std = mean, checked_std("time_sampling", std)

    def __call__(self, u: Tensor, position: Tensor, path: Path) -> Tensor:
        normal = torch.special.ndtri(self.stratified(u, position))
        return path.quantile(torch.sigmoid(self.mean + self.std * normal))


class ModeTimes(UniformTimes):
    """Positions 1 - u - scale (cos^2(pi u / 2) - 1 + u) (SD3, eq. 20); scale above 0: more times in the middle."""

    def __init__(self, scale: float = 1.29, strata: int | None = None) -> None:
        super().__init__(strata)
        if not -1 <= scale <= 2 / (math.pi - 2):
            raise InputError(f"diffusion.time_sampling.scale={scale} is outside -1 .. 1.75, where times are monotonic.")
        self.scale = scale

    def __call__(self, u: Tensor, position: Tensor, path: Path) -> Tensor:
        u = self.stratified(u, position)
        return path.quantile(1 - u - self.scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u))


class LogNormalSigma(UniformTimes):
    """log(sigma / alpha) = mean + std n (Karras et al. 2022, table 1; EDM2: -0.4, 1; REPA's lognormal: 0, 1)."""

    def __init__(self, mean: float = -1.2, std: float = 1.2, strata: int | None = None) -> None:
        super().__init__(strata)
        self.mean, self.std = mean, checked_std("time_sampling", std)

    def __call__(self, u: Tensor, position: Tensor, path: Path) -> Tensor:
        return path.time_of(torch.exp(self.mean + self.std * torch.special.ndtri(self.stratified(u, position))))


def checked_std(option: str, std: float) -> float:
    """A deviation above 0."""
    if not std > 0:
        raise InputError(f"diffusion.{option}.std={std} must be above 0.")
    return std
