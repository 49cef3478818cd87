"""Prediction types: training target, and network output => estimate of the clean latent."""

from torch import Tensor

from ldmlab.contracts import Level
from ldmlab.errors import InputError


class EpsPrediction:
    """The network predicts the noise (Ho et al. 2020, eq. 14), as every model of the paper does."""

    def target(self, clean: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """eps, of clean's shape (B, C, h, w)."""
        return noise

    def clean(self, x: Tensor, output: Tensor, level: Level) -> Tensor:
        """(x - sigma eps) / alpha, in float64: samplers get eps back without loss where alpha is small."""
        if level.alpha == 0:
            raise InputError(
                f"a noise prediction gives no clean estimate at time {level.time}, where alpha = 0; "
                "use a schedule that keeps some signal, or a model with another prediction."
            )
        return (x.double() - level.sigma * output.double()) / level.alpha


class VPrediction:
    """The network predicts v = alpha eps - sigma clean (Salimans & Ho 2022, appendix D), as SD 2.x at 768 px."""

    def target(self, clean: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """alpha eps - sigma clean, (B, C, h, w)."""
        return alpha * noise - sigma * clean

    def clean(self, x: Tensor, output: Tensor, level: Level) -> Tensor:
        """(alpha x - sigma v) / (alpha^2 + sigma^2), in float64 as above."""
        scaled = level.alpha * x.double() - level.sigma * output.double()
        square = level.alpha**2 + level.sigma**2
        return scaled if abs(square - 1) < 1e-6 else scaled / square  # 1 but for rounding on most paths
