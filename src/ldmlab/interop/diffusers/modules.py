"""diffusers' configurations and weights in, our modules out.

A configuration is the content of `config.json`, with or without `_class_name`; tensors have the names of diffusers'
modules. Modules are built without memory; float32 tensors are taken over, not copied, others become float32.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ldmlab.backbones.unet import UNet
from ldmlab.checkpoints import fill, without_weights
from ldmlab.instantiate import instantiate
from ldmlab.interop.diffusers import first_stages, texts, unet_names, unets
from ldmlab.interop.mismatch import compare, refuse_mismatch

StateDict = Mapping[str, Tensor]
CLASS_TABLE = "class_embedding.weight"  # with num_class_embeds: rows are the U-Net's vector conditioning


def build_unet(config: Mapping[str, Any], state_dict: StateDict | None = None) -> UNet:
    """Our U-Net for a UNet2DConditionModel or UNet2DModel; without weights it is initialised afresh.

    A table of classes inside the network is no part of ours: its rows are given to it as `vector` conditioning.
    """
    arguments = unets.arguments(config)
    if state_dict is None:
        return UNet(**arguments)
    with without_weights():
        unet = UNet(**arguments)
    given = unet_names.modern_names(state_dict)
    if config.get("num_class_embeds") is not None:
        given.pop(CLASS_TABLE, None)
    linear = bool(config.get("use_linear_projection", False))
    expected = unet_names.to_diffusers(unet.state_dict(), arguments, linear_projection=linear)
    projections = [name for name in expected if name.endswith((".proj_in.weight", ".proj_out.weight"))]
    refuse_mismatch({unets.kind_of(config): compare(given, expected, projections)})
    fill(unet, unet_names.to_ours(given, arguments))
    return unet


def build_first_stage(config: Mapping[str, Any], state_dict: StateDict | None = None) -> nn.Module:
    """Our KL or VQ first stage for an AutoencoderKL or VQModel; without weights it is initialised afresh."""
    node = first_stages.arguments(config)
    if state_dict is None:
        return instantiate(node, where="first_stage")
    with without_weights():
        stage: nn.Module = instantiate(node, where="first_stage")
    given = first_stages.with_quant_convs(unet_names.modern_names(state_dict), config)
    expected = first_stages.to_diffusers(stage.state_dict(), node)
    linear = [name for name in expected if ".attentions." in name]
    refuse_mismatch({first_stages.kind_of(config): compare(given, expected, linear)})
    fill(stage, first_stages.to_ours(given, node))
    return stage


def build_text(
    config: Mapping[str, Any],
    state_dict: StateDict | None = None,
    padding: str = "end",  # CLIPTextModel: end as Stable Diffusion 1.x | zero as 2.x
) -> nn.Module:
    """Our text conditioner for a CLIPTextModel or an LDMBertModel (the paper's transformer)."""
    node = texts.node(config, padding=padding)
    if state_dict is None:
        return instantiate(node, where="conditioner")
    with without_weights():
        text: nn.Module = instantiate(node, where="conditioner")
    given = texts.to_ours(state_dict, node)
    wanted = {name: tensor.to("meta") for name, tensor in text.state_dict().items()}
    refuse_mismatch({f"text encoder {texts.kind_of(config)}": compare(given, wanted)})
    fill(text, given)
    return text
