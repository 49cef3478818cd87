"""What runs are compared by: factor, kind of first stage, latent channels, codebook, parameters."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ldmlab.instantiate import instantiate

_MAIN = {"first_stage": "first_stage", "clip": "clip", "latent_diffusion": "backbone", "classifier": "classifier"}


def comparison_fields(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a model.yaml by which runs are grouped and plotted; None where a model has no such thing."""
    with torch.device("meta"):  # sizes only: nothing is allocated
        main = _module(spec, _MAIN[spec["kind"]])
        first_stage = _module(spec, "first_stage") if "first_stage" in spec else None
    node = spec.get("first_stage", {})
    return {
        "downsampling": getattr(first_stage, "downsampling", None),
        "first_stage_kind": node["_target_"].split(".")[-2] if node else None,  # kl | vq | identity
        "latent_channels": getattr(first_stage, "latent_channels", None),
        "codebook_size": node.get("codebook_size"),
        "image_size": spec.get("image_size"),
        "conditioned_on": "+".join(spec.get("conditioners") or {}) or None,
        "parameters": sum(p.numel() for p in main.parameters()),  # of the network that the stage trains
    }


def _module(spec: Mapping[str, Any], name: str) -> nn.Module:
    built = instantiate(spec[name], where=name)
    return built if isinstance(built, nn.Module) else built.model  # a CLIP comes with its tokenizer
