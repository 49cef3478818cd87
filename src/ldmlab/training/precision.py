"""The precisions of training: Lightning's plugins, with what our stages need of them.

In 64-true, bf16-true and 16-true the trained networks have that dtype. What is frozen or must stay exact (encoders of
the data, the latent scale, codebooks) keeps float32, random numbers and noise levels are float32, and networks cast
what they are given. In 16-mixed the factor of the loss changes once a step, after the updates of all groups.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, Literal

import torch
from pytorch_lightning.plugins import precision as plugins
from torch import nn

SCALED_ON = "cuda"  # where 16-mixed runs
Precision = Literal[
    "auto", "bf16-mixed", "16-mixed", "32-true", "64-true", "bf16-true", "16-true",
    "transformer-engine", "transformer-engine-float16",
]  # fmt: skip


class _Trained:
    """Only what is trained is converted; nothing is cast outside the networks."""

    dtype: torch.dtype

    def convert_module(self, module: nn.Module) -> nn.Module:
        for part in _trained(module):
            part._apply(lambda t: t.to(self.dtype) if t.is_floating_point() else t, recurse=False)
        return module

    def convert_input(self, data: Any) -> Any:
        return data

    def forward_context(self) -> Any:
        return nullcontext()


def _trained(module: nn.Module) -> Iterator[nn.Module]:
    parameters = list(module.parameters())
    frozen = parameters and not any(parameter.requires_grad for parameter in parameters)
    if frozen or getattr(module, "exact", False):
        return
    yield module
    for child in module.children():
        yield from _trained(child)


class Half(_Trained, plugins.HalfPrecision):
    """bf16-true | 16-true."""

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self._desired_input_dtype


class Double(_Trained, plugins.DoublePrecision):
    """64-true."""

    dtype = torch.float64


class StepScaler(torch.amp.GradScaler):
    """The factor of float16 losses, one for all optimizers of a step: they share its gradients' scale."""

    def update(self, new_scale: Any = None) -> None:
        """After a single optimizer: not yet."""

    def end_step(self) -> None:
        """All optimizers have made their update, or left it out where a gradient overflowed."""
        super().update()


def plugin(name: Precision) -> plugins.Precision | None:
    """Our plugin for a precision; None: Lightning's own."""
    match name:
        case "64-true":
            return Double()
        case "bf16-true" | "16-true":
            return Half(name)
        case "16-mixed":
            return plugins.MixedPrecision("16-mixed", SCALED_ON, StepScaler(SCALED_ON))
    return None
