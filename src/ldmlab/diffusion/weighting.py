"""Weights of the loss by noise level, each as the factor of the clean estimate's squared error.

SNR = (alpha / sigma)^2. A prediction whose output is off by e has a clean estimate off by (d clean / d output) e, so
the loss of the output is multiplied by weight * (d clean / d output)^2: the same weighting means the same for every
prediction. Min-SNR for instance becomes min(SNR, gamma) / SNR of the noise and min(SNR, gamma) / (SNR + 1) of v.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ldmlab.contracts import Weighting
from ldmlab.errors import InputError, one_of
from ldmlab.nn.magnitude import MPConv

Rates = Callable[[], tuple[Tensor, Tensor]]  # d alpha / d s and d sigma / d s


class MinSnr:
    """min(SNR, gamma) (Hang et al. 2023, eq. 8); soft: SNR gamma / (SNR + gamma) (Crowson et al. 2024, eq. 7)."""

    def __init__(self, gamma: float = 5.0, soft: bool = False) -> None:
        """gamma: 5 in the paper; k-diffusion's soft weight has 1 / sigma_data^2, 4."""
        self.gamma, self.soft = _positive("gamma", gamma), soft

    def __call__(self, alpha: Tensor, sigma: Tensor, rates: Rates) -> Tensor:
        ratio, gamma = (sigma / alpha).square(), self.gamma  # 1 / SNR
        return gamma / (1 + gamma * ratio) if self.soft else (1 / ratio).clamp_max(gamma)


class Snr:
    """SNR^power: 1 weighs the noise's error evenly; 0 the clean estimate's."""

    def __init__(self, power: float = 1.0) -> None:
        self.power = power

    def __call__(self, alpha: Tensor, sigma: Tensor, rates: Rates) -> Tensor:
        return (alpha / sigma).square() ** self.power


class P2:
    """SNR / (k + SNR)^gamma (Choi et al. 2022, eq. 8)."""

    def __init__(self, k: float = 1.0, gamma: float = 1.0) -> None:
        self.k, self.gamma = _positive("k", k), gamma

    def __call__(self, alpha: Tensor, sigma: Tensor, rates: Rates) -> Tensor:
        snr = (alpha / sigma).square()
        return snr / (self.k + snr) ** self.gamma


class EdmWeighting:
    """SNR + 1 / sigma_data^2 (Karras et al. 2022, table 1): 1 for the output of EDM's preconditioned network."""

    def __init__(self, sigma_data: float = 0.5) -> None:
        self.sigma_data = _positive("sigma_data", sigma_data)

    def __call__(self, alpha: Tensor, sigma: Tensor, rates: Rates) -> Tensor:
        return (alpha / sigma).square() + self.sigma_data**-2


class FlowWeighting:
    """SiT's: velocity weighs the velocity's error evenly, likelihood bounds the negative log-likelihood.

    With fall = sigma' alpha - sigma alpha': velocity (fall / sigma)^2, likelihood alpha fall / sigma^3.
    """

    of_flows = True  # not for discrete schedules

    def __init__(self, kind: str = "velocity") -> None:
        one_of("diffusion.weighting.kind", kind, ("velocity", "likelihood"))
        self.kind = kind

    def __call__(self, alpha: Tensor, sigma: Tensor, rates: Rates) -> Tensor:
        d_alpha, d_sigma = rates()
        fall = d_sigma * alpha - sigma * d_alpha
        return (fall / sigma).square() if self.kind == "velocity" else alpha * fall / sigma**3


class Sd3Weighting:
    """SD3's factors of the velocity's error on the linear path: sigma^-2, or 2 / (pi (1 - 2 sigma + 2 sigma^2))."""

    def __init__(self, kind: str = "cosmap") -> None:
        one_of("diffusion.weighting.kind", kind, ("cosmap", "sigma_sqrt"))
        self.kind = kind

    def __call__(self, alpha: Tensor, sigma: Tensor, rates: Rates) -> Tensor:
        s = sigma / (alpha + sigma)
        factor = s**-2 if self.kind == "sigma_sqrt" else 2 / (math.pi * (1 - 2 * s + 2 * s**2))
        return factor / s**2


class LearnedLogVariance(nn.Module):
    """loss / exp(u) + u with a learned u(time), equalising the noise levels (Karras et al. 2024, eq. 21).

    The loss of an image is the mean over its values; EDM2's code sums them, which is their number times this one.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, weighting: Weighting | None = None, channels: int = 128) -> None:
        """weighting: a fixed factor of the loss (EDM2: EDM's); channels: of the Fourier features of the time."""
        super().__init__()
        self.weighting, self.of_flows = weighting, getattr(weighting, "of_flows", False)
        if channels < 1:
            raise InputError(f"diffusion.weighting.channels={channels} learns nothing; choose 1 or more, such as 128.")
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(channels, generator=generator))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels, generator=generator))
        self.linear = MPConv(channels, 1)
        nn.init.normal_(self.linear.weight, generator=generator)

    def __call__(self, alpha: Tensor, sigma: Tensor, rates: Rates) -> Tensor:
        if self.weighting is None:
            raise InputError("diffusion.weighting.weighting=null is no weighting; choose for instance EdmWeighting.")
        if self.training:
            self.linear.force_normal()  # before `finished`, for which sharded weights are gathered
        return self.weighting(alpha, sigma, rates)

    def finished(self, loss: Tensor, times: Tensor) -> Tensor:
        """Losses after the fixed factor (B,) => (B,)."""
        u = self.log_variance(times)
        return loss / u.exp() + u

    def log_variance(self, times: Tensor) -> Tensor:
        """u, (B,), float32 under autocast too."""
        with torch.autocast(times.device.type, enabled=False):
            angles = times.float()[:, None] * self.frequencies + self.phases  # (B, channels)
            return self.linear(math.sqrt(2) * torch.cos(angles))[:, 0]


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise InputError(f"diffusion.weighting.{name}={value} must be above 0.")
    return value
