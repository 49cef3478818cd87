"""Prediction types: training target, and network output => estimate of the clean latent."""

from typing import Any

import torch
from torch import Tensor

from ldmlab.contracts import Level, Noised, Path, Prediction
from ldmlab.errors import InputError, one_of

Rates = tuple[Tensor, Tensor]  # d alpha / d s and d sigma / d s, from data to noise


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
        return (x - level.sigma * output.double()) / level.alpha

    def clean_slope(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """-sigma / alpha."""
        return -sigma / alpha


class ScorePrediction(EpsPrediction):
    """The network predicts the score -eps / sigma (SiT); what is compared with the noise is -sigma times its output."""

    def __init__(self, times_sigma: bool = False) -> None:
        """times_sigma: it predicts sigma times the score, as NCSN++ (Song et al. 2021; c_out = sigma in EDM)."""
        self.times_sigma = times_sigma

    def compared(self, output: Tensor, alpha: Any, sigma: Any) -> Tensor:
        """eps of the network's output."""
        return -output if self.times_sigma else -sigma * output

    def clean(self, x: Tensor, output: Tensor, level: Level) -> Tensor:
        """(x + sigma^2 score) / alpha, in float64."""
        return super().clean(x, self.compared(output.double(), level.alpha, level.sigma), level)


class CleanPrediction:
    """The network predicts the clean latent (Ho et al. 2020, section 3.2)."""

    def target(self, clean: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The clean latent itself."""
        return clean

    def clean(self, x: Tensor, output: Tensor, level: Level) -> Tensor:
        """The output, in float64."""
        return output.double()

    def clean_slope(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """1."""
        return alpha.new_ones(())


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

    def clean_slope(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """-sigma / (alpha^2 + sigma^2)."""
        return -sigma / (alpha.square() + sigma.square())


class VelocityPrediction:
    """The network predicts the velocity d x / d s of a flow (Lipman et al. 2023; SiT, LightningDiT, SD3)."""

    uses_rates = True

    def __init__(self, towards: str = "noise") -> None:
        """towards: noise (SD3, REPA) | data (SiT, LightningDiT, whose time runs that way)."""
        one_of("diffusion.prediction.towards", towards, ("noise", "data"))
        self.sign = 1 if towards == "noise" else -1

    def target(self, clean: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, rates: Rates) -> Tensor:
        """alpha' clean + sigma' eps, (B, C, h, w)."""
        return self.sign * (rates[0] * clean + rates[1] * noise)

    def clean(self, x: Tensor, output: Tensor, level: Level, rates: Rates) -> Tensor:
        """(sigma' x - sigma u) / (sigma' alpha - sigma alpha'), in float64."""
        d_alpha, d_sigma = (float(rate) for rate in rates)
        fall = d_sigma * level.alpha - level.sigma * d_alpha
        return (d_sigma * x.double() - level.sigma * self.sign * output.double()) / fall

    def clean_slope(self, alpha: Tensor, sigma: Tensor, rates: Rates) -> Tensor:
        """-sigma / (sigma' alpha - sigma alpha')."""
        return -self.sign * sigma / (rates[1] * alpha - sigma * rates[0])


class EdmPrediction:
    """Preconditioning of Karras et al. 2022, table 1 and eq. 7: clean = c_skip x / alpha + c_out F(c_in x / alpha).

    With sigma standing for sigma / alpha and sd for sigma_data: c_skip = sd^2 / (sigma^2 + sd^2), c_out = sigma sd /
    sqrt(sigma^2 + sd^2), c_in = 1 / sqrt(sigma^2 + sd^2); c_noise is the path's time.
    """

    def __init__(self, sigma_data: float = 0.5, negative: bool = False) -> None:
        """sigma_data: deviation of the latents; 1 where the latent scale is measured.

        negative: the network gives -F, with sigma_data 1 the v of a variance-preserving path (CosXL).
        """
        if not sigma_data > 0:
            raise InputError(f"diffusion.prediction.sigma_data={sigma_data} is no deviation; choose 1 or 0.5.")
        self.sigma_data, self.sign = sigma_data, -1 if negative else 1

    def scaled(self, x: Tensor, alpha: Any, sigma: Any) -> Tensor:
        """c_in x / alpha; alpha and sigma: tensors or numbers."""
        return x / ((alpha * self.sigma_data) ** 2 + sigma**2) ** 0.5

    def target(self, clean: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """(clean - c_skip x / alpha) / c_out, written without the difference: (sigma / sd clean - sd eps) c_in."""
        ratio, sd = sigma / alpha, self.sigma_data
        return self.sign * (ratio / sd * clean - sd * noise) / (ratio.square() + sd**2).sqrt()

    def clean(self, x: Tensor, output: Tensor, level: Level) -> Tensor:
        """c_skip x / alpha + c_out F, in float64."""
        ratio, sd = level.sigma / level.alpha, self.sigma_data
        total = ratio**2 + sd**2
        return sd**2 / total * (x.double() / level.alpha) + self.sign * ratio * sd / total**0.5 * output.double()

    def clean_slope(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """c_out."""
        ratio, sd = sigma / alpha, self.sigma_data
        return self.sign * ratio * sd / (ratio.square() + sd**2).sqrt()


class LearnedVariance:
    """Another prediction whose network also gives the variance of a step (Nichol & Dhariwal 2021, eq. 15; DiT).

    Twice the channels: the prediction, and v by which log variance = (v + 1) / 2 log beta + (1 - v) / 2 log beta~.
    """

    outputs = 2

    def __init__(self, mean: Prediction) -> None:
        self.mean = mean
        for optional in ("scaled", "compared", "clean_slope", "uses_rates"):
            if hasattr(mean, optional):
                setattr(self, optional, getattr(mean, optional))

    def target(self, *inputs: Any) -> Tensor:
        """The mean's."""
        return self.mean.target(*inputs)

    def clean(self, *inputs: Any) -> Tensor:
        """The mean's."""
        return self.mean.clean(*inputs)


class Parameterization:
    """A prediction on a path: the network's input, and what its output means."""

    def __init__(self, prediction: Prediction, path: Path) -> None:
        self.prediction, self.path = prediction, path
        self.outputs = int(getattr(prediction, "outputs", 1))  # channels out per channel of the latent
        self._rated = bool(getattr(prediction, "uses_rates", False))
        if self._rated:
            self.rates(path.quantile(torch.tensor([0.5], dtype=torch.float64)))  # refused where there are none

    def rates(self, times: Tensor) -> tuple[Rates, ...]:
        """What `target`, `clean` and `clean_slope` take besides alpha and sigma."""
        return (self.path.rates(times),) if self._rated else ()

    def slope(self, at: Noised) -> Tensor:
        """d clean / d output, (B, 1, 1, 1)."""
        if not hasattr(self.prediction, "clean_slope"):
            raise InputError(
                f"diffusion.weighting: {type(self.prediction).__name__} has no clean_slope, which weightings need."
            )
        return self.prediction.clean_slope(at.alpha, at.sigma, *self.rates(at.times))

    def scaled(self, x: Tensor, alpha: Any, sigma: Any) -> Tensor:
        """The network's input."""
        scaled = getattr(self.prediction, "scaled", None)
        return x if scaled is None else scaled(x, alpha, sigma)

    def compared(self, output: Tensor, alpha: Any, sigma: Any) -> Tensor:
        """What the target is compared with."""
        compared = getattr(self.prediction, "compared", None)
        return output if compared is None else compared(output, alpha, sigma)

    def split(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """The prediction and, where it is learned, the variance's part."""
        if self.outputs == 1:
            return output, None
        first, second = output.chunk(2, dim=1)
        return first, second

    def checked(self, output: Tensor, x: Tensor) -> Tensor:
        """The network's output, float32, of as many channels as the prediction takes."""
        if output.shape != (len(x), self.outputs * x.shape[1], *x.shape[2:]):
            raise InputError(
                f"the backbone turns latents of {tuple(x.shape[1:])} into {tuple(output.shape[1:])} (channels, height, "
                f"width), but {type(self.prediction).__name__} takes {self.outputs} x {x.shape[1]} channels of the "
                "same size; a learned variance needs prediction=LearnedVariance."
            )
        return output.float()

    def clean(self, x: Tensor, output: Tensor, level: Level) -> Tensor:
        """The clean estimate of a prediction (without its variance), as the prediction gives it."""
        more = self.rates(torch.tensor([level.time], dtype=torch.float64)) if self._rated else ()
        return self.prediction.clean(x, output, level, *more)


def begun(noise: Tensor, level: Level) -> Tensor:
    """Standard normal noise at the first level; sigma noise where the signal is never weakened, as on EDM's path."""
    if level.spread is not None:
        return level.spread * noise
    return level.sigma * noise if level.alpha == 1 else noise
