"""DPM-Solver with adaptive steps (Lu et al. 2022, "DPM-Solver", appendix C; Crowson, k-diffusion)."""

import math

import torch
from torch import Tensor

from ldmlab.contracts import Noise
from ldmlab.errors import InputError
from ldmlab.samplers.dpm_fast import Eps, Singlestep, solved

_FIRST, _SAFETY = 0.05, 0.81  # the first step in log-SNR; the least factor of a step's length that accepts the step


class DpmAdaptive(Singlestep):
    """The error of a step is the difference to the order below, relative to max(atol, rtol |y|).

    Steps depend on the root mean square error of a batch; a model samples its images one by one.
    """

    steps = 50
    one_image = True

    def __init__(
        self,
        order: int = 3,  # 2 | 3
        rtol: float = 0.05,
        atol: float = 0.0078,
        eta: float = 0.0,  # 0: no fresh noise .. 1: as much as DDPM
        temperature: float = 1.0,
    ) -> None:
        super().__init__(eta, temperature)
        if order not in (2, 3):
            raise InputError(f"sampler.order={order} is not 2 or 3.")
        if not (rtol > 0 and atol > 0):
            raise InputError(f"sampler.rtol={rtol} and atol={atol} must be above 0, for instance 0.05 and 0.0078.")
        self.degree, self.rtol, self.atol = order, rtol, atol
        self.order = None if eta > 0 else order

    def across(self, y: Tensor, ends: tuple[float, float], budget: int, eps: Eps, noise: Noise) -> Tensor:
        """Steps whose length is multiplied by 1 + atan(error^(-1 / order) - 1) after each."""
        start, last = ends
        before, known, length, accepted = y, eps(y, start), _FIRST, 0
        while start < last - 1e-5:
            end = min(last, start + length)
            quiet, fresh = self.split(start, end, last)
            lower, higher = solved(y, start, quiet, eps, known, self.degree)[-2:]
            scale = (self.rtol * torch.maximum(lower.abs(), before.abs())).clamp_min(self.atol)
            error = float(((lower - higher) / scale).square().mean().sqrt())
            if not math.isfinite(error):
                raise InputError("sampler=dpm_adaptive found no step: the network's values are not finite.")
            factor = 1 + math.atan((error + 1e-8) ** (-1 / (1.5 if self.eta else self.degree)) - 1)
            length *= factor
            if factor >= _SAFETY:
                y = higher + fresh * noise(accepted) if fresh > 0 else higher
                before, start, accepted = lower, end, accepted + 1
                known = eps(y, start) if start < last - 1e-5 else known
        return y
