"""Muon for the matrices of hidden layers, AdamW for the rest, as one optimizer."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from ldmlab.errors import InputError, one_of
from ldmlab.sharded import is_sharded, laid_out
from ldmlab.training.optim import AdamW

Part = tuple[Callable[[list[nn.Parameter]], Optimizer], list[nn.Parameter]]  # what makes an optimizer, and of what
_SCALES = ("match_rms_adamw", "original", "spectral_unclamped")


def hidden_matrices(model: nn.Module) -> set[nn.Parameter]:
    """2-D weights of the layers that networks repeat: those inside an nn.ModuleList.

    First and last layers, embeddings of times and classes and tables of positions lie outside it; an nn.Embedding and
    matrices with a side of 1 never count. A convolution's kernel has four dimensions, which torch's Muon does not take.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    owners = [module for found in lists for module in found.modules() if not isinstance(module, nn.Embedding)]
    named = [named for owner in owners for named in owner.named_parameters(recurse=False)]
    return {p for name, p in named if name.endswith("weight") and p.ndim == 2 and min(p.shape) > 1}


@dataclass(frozen=True)
class MuonAdamW(AdamW):
    """Muon (Jordan et al. 2024) for hidden matrices, AdamW for all else; torch.optim.Muon, with its names.

    M <- momentum M + (1 - momentum) G; W <- (1 - lr decay) W - lr scale O(M), O: the nearest orthogonal matrix, by
    Newton-Schulz steps in bfloat16. scale for an (A, B) matrix: match_rms_adamw, 0.2 sqrt(max(A, B)), with which
    AdamW's rate and decay serve (Liu et al. 2025); original, sqrt(max(1, A / B)); spectral_unclamped, sqrt(A / B).
    """

    idle_without = "nesterov: momentum"
    matrix_learning_rate: float | None = None  # None: learning_rate
    momentum: float = 0.95
    nesterov: bool = True  # O(momentum M + (1 - momentum) G)
    ns_steps: int = 5
    adjust_lr_fn: Literal["match_rms_adamw", "original", "spectral_unclamped"] = "match_rms_adamw"

    def __post_init__(self) -> None:
        super().__post_init__()
        rate, steps = self.matrix_learning_rate, self.ns_steps
        if rate is not None and not 0 < rate < math.inf:
            raise InputError(f"optimizer.matrix_learning_rate={rate} must be a number above 0, or null.")
        if not 0 <= self.momentum < 1:
            raise InputError(f"optimizer.momentum={self.momentum} must be a number in [0, 1).")
        if not 1 <= steps < 100:
            raise InputError(f"optimizer.ns_steps={steps} must be a whole number from 1 to 99.")
        one_of("optimizer.adjust_lr_fn", self.adjust_lr_fn, _SCALES)

    def parts(self, parameters: list[nn.Parameter], hidden: set[nn.Parameter], group: str) -> list[Part]:
        """AdamW (this object's own call) with its parameters, then Muon with its; each parameter is in one of them."""
        matrices = [p for p in parameters if p in hidden]
        if not matrices:
            raise InputError(
                f"optimizer=muon updates 2-D weights inside an nn.ModuleList, and {group} has none (kernels of "
                "convolutions have four dimensions); use optimizer=adamw."
            )
        return [(self, [p for p in parameters if p not in hidden]), (self.muon, matrices)]

    def muon(self, matrices: list[nn.Parameter]) -> Optimizer:
        """torch's Muon of 2-D parameters."""
        rate = self.rate * (self.matrix_learning_rate or self.learning_rate) / self.learning_rate
        options: dict[str, Any] = {"nesterov": self.nesterov, "ns_steps": self.ns_steps}
        return WholeMatrices(
            matrices, rate, self.weight_decay, self.momentum, adjust_lr_fn=self.adjust_lr_fn, **options
        )

    def __str__(self) -> str:
        rate = "" if self.matrix_learning_rate is None else f", of matrices {self.matrix_learning_rate:g}"
        return f"Muon for hidden matrices; {super().__str__()}{rate}"


class WholeMatrices(torch.optim.Muon):
    """torch's Muon, also of sharded matrices.

    Each is gathered with its gradient and its momentum, one at a time, and updated alike by every process, which keeps
    its shard: what one process computes from the same gradient, bit for bit.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every matrix; a collective call where they are sharded."""
        groups, loss = self.param_groups, None
        if not any(is_sharded(p) for group in groups for p in group["params"]):
            return super().step(closure)
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for options, own in ((group, p) for group in groups for p in group["params"] if p.grad is not None):
            momentum = self.state[own].setdefault("momentum_buffer", torch.zeros_like(own.grad))
            whole = nn.Parameter(own.full_tensor())
            whole.grad, buffer = own.grad.full_tensor(), momentum.full_tensor()
            self.state[whole]["momentum_buffer"] = buffer
            self.param_groups = [{**options, "params": [whole]}]
            super().step()
            del self.state[whole]
            own.copy_(laid_out(whole, own))
            momentum.copy_(laid_out(buffer, momentum))
        self.param_groups = groups
        return loss


class Joined(Optimizer):
    """Several optimizers that step as one: their parameter groups one after the other, with one state."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = [(optimizer, len(optimizer.param_groups)) for optimizer in optimizers]
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The closure once, then the step of each on its groups, which a loaded state has replaced."""
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        first = 0
        for optimizer, count in self._optimizers:
            optimizer.param_groups, optimizer.state = self.param_groups[first : first + count], self.state
            optimizer.step()
            first += count
        return loss
