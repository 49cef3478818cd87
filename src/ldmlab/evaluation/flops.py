"""Floating-point operations of a denoiser and a decoder, counted without computing anything (on the meta device).

A multiplication and an addition are two operations; convolutions, matrix products and attention count, the rest not.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ldmlab.contracts import Conditioning, LatentSpec
from ldmlab.instantiate import instantiate

TOKENS = 77  # length of token conditioning that is counted: a caption


@dataclass(frozen=True)
class DenoiserCost:
    """Cost of one image, independent of the device."""

    parameters: int
    forward: int  # FLOPs of one evaluation of the network
    training: int  # FLOPs of a forward and a backward pass

    def sampling(self, steps: int, guided: bool = False) -> int:
        """FLOPs of `steps` steps of a solver with one network evaluation a step; two with guidance."""
        return self.forward * steps * (2 if guided else 1)


def flops_of(call: Callable[[], object]) -> int:
    """FLOPs of everything that `call` does, backward passes included."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def denoiser_cost(node: Mapping[str, Any], latent: LatentSpec, widths: Mapping[str, int]) -> DenoiserCost:
    """Of the backbone of `node` (sizes filled in) on one latent; widths: of tokens, spatial and vector conditioning."""
    with torch.device("meta"):
        backbone = instantiate(node, where="backbone")
        x = torch.empty(1, latent.channels, latent.height, latent.width)
        t = torch.empty(1)
        conditioning = Conditioning(
            tokens=torch.empty(1, TOKENS, widths["tokens"]) if widths.get("tokens") else None,
            spatial=torch.empty(1, widths["spatial"], latent.height, latent.width) if widths.get("spatial") else None,
            vector=torch.empty(1, widths["vector"]) if widths.get("vector") else None,
            numbers=torch.empty(1, node["numbers"]) if node.get("numbers") else None,
        )

    def forward() -> Tensor:
        return backbone(x, t, conditioning)

    with torch.no_grad():
        once = flops_of(forward)
    parameters = sum(p.numel() for p in backbone.parameters())
    return DenoiserCost(parameters, once, flops_of(lambda: forward().sum().backward()))


def decoder_flops(node: Mapping[str, Any], latent: LatentSpec) -> int:
    """Of decoding one latent by the first stage of `node`."""
    with torch.device("meta"), torch.no_grad():
        first_stage = instantiate(node, where="first_stage")
        raw = torch.empty(1, latent.channels, latent.height, latent.width)
        return flops_of(lambda: first_stage.decode(raw))
