"""Official configurations and weights in, our modules out: CompVis/latent-diffusion and Stable Diffusion 1.x and 2.x.

State dicts have the official file's keys: with their prefix (a whole file will do) or without. Tensors that are float32
are taken over, not copied; others become float32.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ldmlab.instantiate import instantiate
from ldmlab.interop import compvis_first_stage, compvis_unet
from ldmlab.interop.compvis_parts import FIRST_STAGE, LOSS, UNET, build, first_stage_part, of_part, unet_part

State = Mapping[str, Tensor]
UNET_TARGET = "ldmlab.backbones.unet.UNet"


def build_unet(config_params: Mapping[str, Any], state_dict: State | None = None) -> nn.Module:
    """Our U-Net for `unet_config.params`; with fresh weights unless a state dict is given."""
    node = {"_target_": UNET_TARGET, **compvis_unet.arguments(config_params)}
    if state_dict is None:
        return instantiate(node, where="backbone")
    return build(unet_part(node), of_part(state_dict, UNET))


def build_first_stage(
    config_params: Mapping[str, Any],
    state_dict: State | None = None,
    target: str | None = None,  # official class; None: VQ if the params name a codebook, else KL
) -> nn.Module:
    """Our first stage for `first_stage_config.params`; networks of its loss in the state dict are left aside."""
    node = compvis_first_stage.arguments(target or compvis_first_stage.target_of(config_params), config_params)
    if state_dict is None:
        return instantiate(node, where="first_stage")
    given = {key: tensor for key, tensor in of_part(state_dict, FIRST_STAGE).items() if not key.startswith(LOSS)}
    return build(first_stage_part(node), given)
