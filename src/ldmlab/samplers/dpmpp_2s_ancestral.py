"""DPM-Solver++(2S) (Lu et al. 2022, "DPM-Solver++", algorithm 1), ancestral: the clean estimate halfway of a step."""

from torch import Tensor

from ldmlab.contracts import Level
from ldmlab.samplers._stepwise import first_order
from ldmlab.samplers.dpm_2 import Dpm2


class Dpmpp2SAncestral(Dpm2):
    """Two evaluations a step, and as much fresh noise as DDPM."""

    def __init__(self, eta: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__(eta, temperature)

    def second(self, x: Tensor, guess: Tensor, clean: Tensor, levels: tuple[Level, Level, Level]) -> Tensor:
        """sigma'/sigma x + alpha' (1 - e^-h) D with the middle's D."""
        return first_order(x, clean.to(x.dtype), levels[0], levels[2])
