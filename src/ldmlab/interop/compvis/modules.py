"""Official configurations and weights in, our modules out.

State dicts have the official file's keys: with their prefix (a whole file will do) or without. Tensors that are float32
are taken over, not copied; others become float32.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldmlab.instantiate import instantiate
from ldmlab.interop.compvis import first_stages, unets
from ldmlab.interop.compvis.config import UNET_TARGET, conditioner_node
from ldmlab.interop.compvis.parts import (
    CONDITIONER,
    FIRST_STAGE,
    LOSS,
    UNET,
    build,
    conditioner_part,
    first_stage_part,
    is_table,
    of_part,
    unet_part,
)
from ldmlab.interop.compvis.reading import read
from ldmlab.interop.compvis.unets import CLASS_TABLE
from ldmlab.interop.mismatch import compare, refuse_mismatch

if TYPE_CHECKING:
    from ldmlab.inference.model import LoadedModel

State = Mapping[str, Tensor]


def build_unet(config_params: Mapping[str, Any], state_dict: State | None = None) -> nn.Module:
    """Our U-Net for `unet_config.params`; with fresh weights unless a state dict is given.

    A table of classes (`num_classes`) is no part of ours: `label_emb.weight[class_id]` is its `vector` conditioning,
    added to the time vector as it is. Of a whole file `read` and `load` make a ClassEmbedder of it.
    """
    node = {"_target_": UNET_TARGET, **unets.arguments(config_params)}
    if state_dict is None:
        return instantiate(node, where="backbone")
    given = of_part(state_dict, UNET)
    if (width := node.get("vector_width")) and (table := given.pop(CLASS_TABLE, None)) is not None:
        expected = torch.empty(config_params["num_classes"], width, device="meta")
        refuse_mismatch({"U-Net": compare({CLASS_TABLE: table}, {CLASS_TABLE: expected})})
    return build(unet_part(node), given)


def build_first_stage(
    config_params: Mapping[str, Any],
    state_dict: State | None = None,
    target: str | None = None,  # official class; None: VQ if the params name a codebook, else KL
) -> nn.Module:
    """Our first stage for `first_stage_config.params`; networks of its loss in the state dict are left aside."""
    node = first_stages.arguments(target or first_stages.target_of(config_params), config_params)
    if state_dict is None:
        return instantiate(node, where="first_stage")
    given = {key: tensor for key, tensor in of_part(state_dict, FIRST_STAGE).items() if not key.startswith(LOSS)}
    return build(first_stage_part(node), given)


def build_conditioner(target: str, config_params: Mapping[str, Any], state_dict: State | None = None) -> nn.Module:
    """Our conditioner for `cond_stage_config`; a text encoder may have the fields of `CLIPTextConfig` as params."""
    if state_dict is None:
        return instantiate(conditioner_node(target, config_params), where="conditioner")
    given = {key: tensor for key, tensor in of_part(state_dict, CONDITIONER).items() if not is_table(key)}
    return build(conditioner_part(conditioner_node(target, config_params, given)), given)


def load(
    checkpoint_path: Path | str,
    config_path: Path | str | None = None,  # official YAML; None: told by the weights, for Stable Diffusion
    weights: str = "averaged",  # averaged, where the file has them | raw
    *,
    prediction: str | None = None,  # eps | v, where neither configuration nor weights tell
    device: str = "auto",
) -> "LoadedModel":
    """A whole official model, ready to sample, as `ldmlab.load` gives it; nothing is written."""
    from ldmlab.interop.assembly import loaded_model

    return loaded_model(read(checkpoint_path, config_path, weights=weights, prediction=prediction), device)
