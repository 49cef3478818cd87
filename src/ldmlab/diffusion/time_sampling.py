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
    """Positions sigmoid(mean + std n), n normal (Esser et al. 2024, "SD3", section 3.1); mean above 0: noisier.

    low, high: none are drawn beyond these positions (LightningDiT's `partitial_train`, which counts from the noise).
    """

    def __init__(
        self, mean: float = 0.0, std: float = 1.0, strata: int | None = None, low: float = 0.0, high: float = 1.0
    ) -> None:
        super().__init__(strata)
        self.mean, self.std = mean, checked_std(std)
        if not 0 <= low < high <= 1:
            raise InputError(f"diffusion.time_sampling.low={low} and high={high} are no range within 0 .. 1.")
        ends = (torch.logit(torch.tensor([low, high], dtype=torch.float64)) - mean) / std
        self.side = -1 if ends.sum() > 0 else 1  # of a range above the mean, shares of the other side have more digits
        self.low, self.high = (torch.erfc(-self.side * ends / math.sqrt(2)) / 2).tolist()  # ndtr has no small ones
        if self.low == self.high:
            raise InputError(
                f"diffusion.time_sampling.low={low} and high={high} hold none of the times of mean={mean} and "
                f"std={std}; choose another range or mean."
            )

    def __call__(self, u: Tensor, position: Tensor, path: Path) -> Tensor:
        within = self.low + (self.high - self.low) * self.stratified(u, position)
        normal = self.side * torch.special.ndtri(within)
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


class SigmaTimes(UniformTimes):
    """Times by a distribution of sigma / alpha, given as its quantile function."""

    def quantile(self, u: Tensor) -> Tensor:
        """Uniform numbers (B,) => sigma / alpha (B,)."""
        raise NotImplementedError

    def __call__(self, u: Tensor, position: Tensor, path: Path) -> Tensor:
        return path.time_of(self.quantile(self.stratified(u, position)))


class LogNormalSigma(SigmaTimes):
    """log(sigma / alpha) = mean + std n (Karras et al. 2022, table 1; EDM2: -0.4, 1; REPA's lognormal: 0, 1)."""

    def __init__(self, mean: float = -1.2, std: float = 1.2, strata: int | None = None) -> None:
        super().__init__(strata)
        self.mean, self.std = mean, checked_std(std)

    def quantile(self, u: Tensor) -> Tensor:
        return torch.exp(self.mean + self.std * torch.special.ndtri(u))


class SplitLogNormalSigma(SigmaTimes):
    """Log-normal with another deviation below the mode than above; continuous there (k-diffusion, split-lognormal)."""

    def __init__(
        self, mean: float = -1.2, std_below: float = 1.2, std_above: float = 1.2, strata: int | None = None
    ) -> None:
        """mean: of log sigma, the mode."""
        super().__init__(strata)
        self.mean = mean
        self.below, self.above = (checked_std(std) for std in (std_below, std_above))

    def quantile(self, u: Tensor) -> Tensor:
        """mean + std n of a normal n below 0 with probability std_below / (std_below + std_above)."""
        share = self.below / (self.below + self.above)
        low = torch.special.ndtri(0.5 * u / share) * self.below
        high = torch.special.ndtri(0.5 + 0.5 * (u - share) / (1 - share)) * self.above
        return torch.exp(self.mean + torch.where(u < share, low, high))


class LogUniformSigma(SigmaTimes):
    """log(sigma / alpha) uniform over a range."""

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, strata: int | None = None) -> None:
        super().__init__(strata)
        self.range = checked_range(sigma_min, sigma_max, least=1e-9)

    def quantile(self, u: Tensor) -> Tensor:
        low, high = self.range
        return low * (high / low) ** u


class LogLogisticSigma(SigmaTimes):
    """log(sigma / alpha) = mean + scale logit(u), within a range (Crowson et al. 2024, "HDiT")."""

    def __init__(
        self,
        mean: float = math.log(0.5),  # HDiT: log sigma_data
        scale: float = 0.5,
        sigma_min: float = 0.0,
        sigma_max: float = math.inf,
        strata: int | None = None,
    ) -> None:
        super().__init__(strata)
        self.mean, self.scale = mean, checked_std(scale, "scale")
        self.range = checked_range(sigma_min, sigma_max)

    def quantile(self, u: Tensor) -> Tensor:
        low, high = torch.sigmoid((torch.tensor(self.range).to(u).log() - self.mean) / self.scale)
        return torch.exp(self.mean + self.scale * torch.logit(torch.lerp(low, high, u)))


class AngleSigma(SigmaTimes):
    """sigma / alpha = sigma_data tan(angle), the angle uniform within a range of sigma (k-diffusion, v-diffusion).

    Salimans & Ho 2022: cos and sin of a uniform angle, where sigma_data is 1.
    """

    def __init__(
        self, sigma_data: float = 1.0, sigma_min: float = 0.0, sigma_max: float = math.inf, strata: int | None = None
    ) -> None:
        super().__init__(strata)
        self.sigma_data = checked_std(sigma_data, "sigma_data")
        self.range = checked_range(sigma_min, sigma_max)

    def quantile(self, u: Tensor) -> Tensor:
        return self.tangent(u, 1.0)

    def tangent(self, u: Tensor, factor: float) -> Tensor:
        """Quantiles of sigma_data / factor tan(angle)."""
        scale = self.sigma_data / factor
        low, high = (torch.tensor(self.range).to(u) / scale).atan()
        return scale * torch.lerp(low, high, u).tan()


class CosineInterpolatedSigma(AngleSigma):
    """Between the shifted cosine schedules of two resolutions (Hoogeboom et al. 2023, "simple diffusion", eq. 10).

    Noise is like that of images of `noise_size_low` px where it is strong, of `noise_size_high` px where it is weak.
    """

    def __init__(
        self,
        image_size: int = 64,  # px
        noise_size_low: int = 32,  # px
        noise_size_high: int = 256,  # px
        sigma_data: float = 0.5,
        sigma_min: float = 1e-3,
        sigma_max: float = 1e3,
        strata: int | None = None,
    ) -> None:
        super().__init__(sigma_data, sigma_min, sigma_max, strata)
        if min(image_size, noise_size_low, noise_size_high) < 1:
            raise InputError("diffusion.time_sampling: image_size and both noise sizes are px of 1 or more.")
        self.factors = noise_size_low / image_size, noise_size_high / image_size

    def quantile(self, u: Tensor) -> Tensor:
        """Geometric mean of both schedules, of weights u and 1 - u."""
        low, high = (self.tangent(u, factor) for factor in self.factors)
        return low**u * high ** (1 - u)


def checked_range(low: float, high: float, least: float = 0.0) -> tuple[float, float]:
    """sigma_min and sigma_max."""
    if not least <= low < high:
        raise InputError(
            f"diffusion.time_sampling.sigma_min={low} and sigma_max={high} are no range; give for instance 0.001, 1000."
        )
    return low, high


def checked_std(std: float, name: str = "std") -> float:
    """A deviation above 0."""
    if not std > 0:
        raise InputError(f"diffusion.time_sampling.{name}={std} must be above 0.")
    return std
