"""DPM-Solver++(2M) as a stochastic differential equation (Lu et al. 2022; Crowson, k-diffusion)."""

import math

from torch import Tensor

from ldmlab.samplers.dpmpp_3m_sde import Dpmpp3MSde


class Dpmpp2MSde(Dpmpp3MSde):
    """As `dpmpp_3m_sde` with one earlier estimate: of second order without noise."""

    depth = 2

    def __init__(self, eta: float = 1.0, temperature: float = 1.0, midpoint: bool = True) -> None:
        """midpoint: the earlier estimate weighs (1 - e^-k) / 2, as is usual; false: phi_2."""
        super().__init__(eta, temperature)
        self.midpoint = midpoint

    def bend(self, clean: Tensor, past: list[tuple[float, Tensor]], length: float, whole: float) -> Tensor | float:
        """(1 - e^-k) / 2 (D - D_before) h / h_before."""
        if not (self.midpoint and past):
            return super().bend(clean, past, length, whole)
        return -0.5 * math.expm1(-whole) * length / past[0][0] * (clean - past[0][1])
