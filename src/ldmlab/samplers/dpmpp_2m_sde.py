"""DPM-Solver++(2M) as a stochastic differential equation (Lu et al. 2022; Crowson, k-diffusion)."""

from ldmlab.samplers.dpmpp_3m_sde import Dpmpp3MSde


class Dpmpp2MSde(Dpmpp3MSde):
    """As `dpmpp_3m_sde` with one earlier estimate: of second order without noise."""

    depth = 2

    def __init__(self, eta: float = 1.0, temperature: float = 1.0, midpoint: bool = True) -> None:
        """midpoint: the earlier estimate weighs (1 - e^-k) / 2, as is usual; false: phi_2."""
        super().__init__(eta, temperature, midpoint)
