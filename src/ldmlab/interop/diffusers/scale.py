"""The latent scale inside a first stage's own weights, for programs that know one factor or none.

final = (raw - shift) / std, so the 1 x 1 convolution before the latent is divided by std and the one behind multiplied.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldmlab.errors import InputError


def scale_of(node: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """std and shift of a latent_scale node, each (1,) or (C,), float64."""
    std, shift = node.get("std", 1.0), node.get("shift", 0.0)
    std, shift = (torch.atleast_1d(torch.as_tensor(value, dtype=torch.float64)) for value in (std, shift))
    return std, shift


def single_factor(std: Tensor, shift: Tensor) -> float | None:
    """The official scale_factor, if one number is all; to 7 digits, as std is kept in float32."""
    if len(std.unique()) > 1 or bool(shift.any()):
        return None
    return float(f"{1 / float(std[0]):.7g}")


def folded(state: Mapping[str, Tensor], std: Tensor, shift: Tensor, channels: int) -> dict[str, Tensor]:
    """The weights (our names) of a first stage whose raw latents are the final latents of this one."""
    result = {name: tensor.double() if name.startswith(_CHANGED) else tensor for name, tensor in state.items()}
    std, shift = (value.expand(channels) for value in (std, shift))
    vq = "quantiser.codebook.weight" in state
    if vq and len(std.unique()) > 1:
        raise InputError(
            "latent_scale has a std per channel, under which the codebook would choose other vectors in diffusers; "
            "use --format ldmlab."
        )
    before = "to_latent" if vq else "to_moments"
    weight, bias = result[f"{before}.weight"].clone(), result[f"{before}.bias"].clone()
    weight[:channels] /= std[:, None, None, None]
    bias[:channels] = (bias[:channels] - shift) / std
    if vq:
        result["quantiser.codebook.weight"] = (result["quantiser.codebook.weight"] - shift) / std
    else:
        bias[channels:] -= 2 * std.log()  # of the log-variance
    behind = result["from_latent.weight"]  # (D, C, 1, 1)
    result |= {f"{before}.weight": weight, f"{before}.bias": bias}
    result["from_latent.bias"] = result["from_latent.bias"] + behind[:, :, 0, 0] @ shift
    result["from_latent.weight"] = behind * std[:, None, None]
    return {name: tensor.float() for name, tensor in result.items()}


_CHANGED = ("to_latent.", "to_moments.", "from_latent.", "quantiser.codebook.")
