"""UniPC (Zhao et al. 2023, "UniPC: a unified predictor-corrector framework"), on clean estimates, in log-SNR.

With h = lambda' - lambda, D(u) the clean estimate on the way, u = 0 .. 1:
    x' = sigma'/sigma x + alpha' h int_0^1 exp(-h (1 - u)) D(u) du
D(u) = D_0 + sum_m (D_m - D_0) p_m(u) through estimates at u = r_m: earlier ones for the predictor, and the one at the
step's end, which the next step needs anyway, for the corrector.
"""

import math

import torch
from torch import Tensor

from ldmlab.contracts import Level
from ldmlab.errors import InputError
from ldmlab.samplers._stepwise import Step, Stepwise, first_order, log_snr

Known = tuple[float, Tensor]  # log-SNR, clean estimate there


class Unipc(Stepwise):
    """One evaluation a step; the corrector lifts the predictor's order by one.

    A step to or from an infinite log-SNR is of first order.
    """

    spacing = "log_snr"
    extrapolates = True
    steps = 20

    def __init__(
        self,
        predictor_order: int = 2,  # 1 | 2 | 3; 2 is the choice with guidance
        corrector: bool = True,  # False: the predictor alone
    ) -> None:
        if predictor_order not in (1, 2, 3):
            raise InputError(f"predictor_order={predictor_order} is not 1, 2 or 3; 2 is the choice with guidance.")
        self.predictor_order, self.corrector = predictor_order, corrector
        self.order = min(predictor_order, 2) + corrector  # one estimate to begin with lets order 3 be no more than 2

    def step(self, x: Tensor, clean: Tensor, step: Step) -> Tensor:
        """The corrector of the step before, now that its end is known, then a first-order step and the predictor."""
        known: list[Known] = []  # newest first
        if step.past:
            known, predicted = step.past  # of the step that led here
            if self.corrector and predicted is not None:
                x = x + (_bend([*known, (log_snr(step.here), clean)], step.here) - predicted)
        known = [(log_snr(step.here), clean), *known][: self.predictor_order]
        known = [pair for pair in known if math.isfinite(pair[0])]
        x = first_order(x, clean, step.here, step.there)
        predicted = _bend(known, step.there) if known and math.isfinite(log_snr(step.there)) else None
        step.past[:] = known, predicted
        return x if predicted is None else x + predicted


def _bend(known: list[Known], there: Level) -> Tensor:
    """alpha' sum_m c_m (D_m - D_0) beyond the first-order step, with sum_m c_m r_m^k = moment k for k = 1, 2, ..."""
    start, clean = known[0]
    length = log_snr(there) - start  # h
    if len(known) == 1:
        return torch.zeros_like(clean)
    places = torch.tensor([(place - start) / length for place, _ in known[1:]], dtype=torch.float64)  # r_m
    powers = torch.arange(1, len(known), dtype=torch.float64)
    moments = torch.tensor([moment(length, k) for k in range(1, len(known))], dtype=torch.float64)
    weights = torch.linalg.solve(places[None, :] ** powers[:, None], moments).tolist()  # c_m
    parts = [weight * (estimate - clean) for weight, (_, estimate) in zip(weights, known[1:], strict=True)]
    return there.alpha * torch.stack(parts).sum(0)


def moment(length: float, power: int) -> float:
    """h int_0^1 exp(-h (1 - u)) u^k du."""
    if length < 1:  # the series; what follows loses its digits here
        terms = ((-length) ** j * math.factorial(power) / math.factorial(power + j + 1) for j in range(20))
        return length * sum(terms)
    value = -math.expm1(-length)
    for k in range(1, power + 1):  # by parts
        value = 1 - k / length * value
    return value
