"""Conditionings joined by slot, and checks of slots, sizes and guidance against a model."""

import math
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ldmlab.contracts import Conditioning
from ldmlab.errors import InputError


def check_slots(conditioners: Mapping[str, nn.Module], backbone: nn.Module) -> None:
    accepts: frozenset[str] = backbone.accepts  # type: ignore[assignment]
    for name, conditioner in conditioners.items():
        if conditioner.slot not in accepts:
            taken = ", ".join(sorted(accepts)) or "nothing"
            raise InputError(
                f"conditioner={name} fills the slot {conditioner.slot} but the backbone takes {taken}; "
                "choose another backbone or leave the conditioner out."
            )


def joined(values: Mapping[str, list[Tensor]]) -> Conditioning:
    """Several conditioners on one slot: tokens by length, spatial by channels, vectors summed."""
    slots: dict[str, Tensor] = {}
    sizes = {f"{part.shape[2]} x {part.shape[3]}" for part in values.get("spatial", [])}
    if len(sizes) > 1:
        raise InputError(f"spatial conditions come at {' and '.join(sorted(sizes))}; give images of one size.")
    for slot, parts in values.items():
        if len(parts) == 1:
            slots[slot] = parts[0]
        else:
            slots[slot] = torch.stack(parts).sum(0) if slot == "vector" else torch.cat(parts, dim=1)
    return Conditioning(**slots)


def check_size(conditioning: Conditioning, x: Tensor) -> None:
    """What is concatenated to the latent has its height and width, or is refused."""
    spatial = conditioning.spatial
    if spatial is not None and spatial.shape[2:] != x.shape[2:]:
        raise InputError(
            f"spatial conditions are {spatial.shape[2]} x {spatial.shape[3]}, the latent {x.shape[2]} x "
            f"{x.shape[3]}; give images of the size to be made, or a low resolution of the latent's size."
        )


def stacked(first: Conditioning, second: Conditioning) -> Conditioning:
    """Two conditionings as one batch of twice the size."""
    slots = {}
    for slot in ("tokens", "spatial", "vector"):
        pair = getattr(first, slot), getattr(second, slot)
        slots[slot] = None if pair[0] is None else torch.cat(pair)
    return Conditioning(**slots)


def check_guidance(guidance_scale: float, trained: bool | None, conditioned: bool) -> None:
    """Refuse guidance that the model was not trained for; warn where that is not recorded."""
    if not math.isfinite(guidance_scale):
        raise InputError(f"guidance_scale={guidance_scale} is no number; choose 1 (off) or for instance 3.")
    if guidance_scale == 1:
        return
    if not conditioned:
        raise InputError(
            f"guidance_scale={guidance_scale} needs conditions and this model has none; use guidance_scale=1."
        )
    if trained is False:
        raise InputError(
            f"guidance_scale={guidance_scale} needs a model trained with dropped conditions, unlike this one; "
            "use guidance_scale=1, or train with conditioner drop rates above 0."
        )
    if trained is None:
        warnings.warn(
            "nothing is known about dropped conditions in this model's training; guidance may not help.",
            stacklevel=3,
        )
