"""diffusers' configurations and weights in, our modules out; needs no diffusers installed.

A configuration is the content of `config.json` with or without `_class_name`; tensors have the names of diffusers'
modules. Modules are built without memory and take the given tensors as they are.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldmlab.backbones.unet import UNet
from ldmlab.errors import InputError
from ldmlab.instantiate import instantiate
from ldmlab.interop import diffusers_first_stage as first_stages
from ldmlab.interop import diffusers_unet as unets
from ldmlab.interop import diffusers_unet_names as unet_names
from ldmlab.interop.diffusers_keys import check_keys

StateDict = Mapping[str, Tensor]


def build_unet(config: Mapping[str, Any], state_dict: StateDict | None = None) -> UNet:
    """Our U-Net for a UNet2DConditionModel or UNet2DModel; without weights it is initialised afresh."""
    arguments = unets.arguments(config)
    if state_dict is None:
        return UNet(**arguments)
    with torch.device("meta"):
        unet = UNet(**arguments)
    given = unet_names.modern_names(state_dict)
    linear = bool(config.get("use_linear_projection", False))
    expected = unet_names.to_diffusers(unet.state_dict(), arguments, linear_projection=linear)
    check_keys(given, expected, unets.kind_of(config))
    unet.load_state_dict(unet_names.to_ours(given, arguments), assign=True)
    return unet


def build_first_stage(config: Mapping[str, Any], state_dict: StateDict | None = None) -> nn.Module:
    """Our KL or VQ first stage for an AutoencoderKL or VQModel; without weights it is initialised afresh."""
    node = first_stages.arguments(config)
    if state_dict is None:
        return instantiate(node, where="first_stage")
    with torch.device("meta"):
        stage: nn.Module = instantiate(node, where="first_stage")
    given = first_stages.with_quant_convs(unet_names.modern_names(state_dict), config)
    check_keys(given, first_stages.to_diffusers(stage.state_dict(), node), first_stages.kind_of(config))
    stage.load_state_dict(first_stages.to_ours(given, node), assign=True)
    return stage


__all__ = ["InputError", "build_first_stage", "build_unet"]
