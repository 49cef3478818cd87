"""DPM-Solver++(2M) as a stochastic differential equation (Lu et al. 2022; Crowson, k-diffusion)."""

from ldmlab.samplers.dpmpp_3m_sde import Dpmpp3MSde


class Dpmpp2MSde(Dpmpp3MSde):
    """As `dpmpp_3m_sde` with one earlier estimate: of second order without noise."""

    depth = 2

    def __init__(
        self,
        eta: float = 1.0,  # 0: no fresh noise, DPM-Solver++(2M); 1: that of the reverse diffusion
        temperature: float = 1.0,
        midpoint: bool = True,  # the earlier estimate weighs (1 - e^-k) / 2, as is usual; false: phi_2
        lower_order_final: bool = False,  # the last of fewer than 15 steps is of first order
        euler_at_final: bool = False,  # the last step is of first order
        spacing: str = "log_snr",  # the default step rule
    ) -> None:
        super().__init__(eta, temperature, midpoint, lower_order_final, euler_at_final, spacing)
