"""Single files without a configuration: Stable Diffusion 1.x and 2.x, and the paper's large text model.

Shapes tell the networks (`shapes`) but not into how many heads attention splits; that is the family's.
"""

import re
from collections.abc import Mapping
from typing import Any

from ldmlab.errors import InputError
from ldmlab.interop.compvis.first_stages import target_of
from ldmlab.interop.compvis.official_file import OfficialFile, schedule_params
from ldmlab.interop.compvis.shapes import first_stage_params, linear_projections, unet_params

Node = dict[str, Any]
_MODULES = "ldm.modules.encoders.modules."
_SD_BETAS = {"linear_start": 0.00085, "linear_end": 0.0120, "timesteps": 1000}
_SD_SCALE = 0.18215
_LARGE_TEXT = (320, 1280)  # width of the finest level and of the tokens: the 1.45 billion parameter model


def config_of(file: OfficialFile, prediction: str | None) -> Node:
    """`{target, params}` as an official YAML file would say it; InputError where the file cannot tell."""
    if file.is_first_stage:
        params = first_stage_params(file.first_stage)
        return {"target": target_of(params), "params": params}
    unet = unet_params(file.unet)
    first_stage = first_stage_params(file.first_stage)
    family = _family(file, unet, prediction)
    hybrid = unet["in_channels"] == 2 * unet["out_channels"] + 1  # mask and masked latent: the inpainting models
    if unet["in_channels"] != unet["out_channels"] and not hybrid:
        raise InputError(f"a U-Net of {unet['in_channels']} input channels needs --config to tell what they are.")
    params = {
        "channels": unet["out_channels"],
        "conditioning_key": "hybrid" if hybrid else "crossattn",
        "cond_stage_key": "txt",
        **schedule_params(file, _SD_BETAS),
        **{name: value for name, value in family.items() if name != "heads"},
        "scale_factor": _SD_SCALE,
        "unet_config": {"params": unet | family["heads"]},
        "first_stage_config": {"target": target_of(first_stage), "params": first_stage},
    }
    return {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}


def _family(file: OfficialFile, unet: Mapping[str, Any], prediction: str | None) -> Node:
    """Heads, conditioner, prediction and size of latents, told by the names of the conditioner's tensors."""
    names = file.conditioner.keys()
    if any(name.startswith("transformer.text_model.") for name in names):
        return {
            "heads": {"num_heads": 8},
            "cond_stage_config": {"target": _MODULES + "FrozenCLIPEmbedder", "params": {}},
            "parameterization": prediction or "eps",
            "image_size": 64,
        }
    if "model.positional_embedding" in names and linear_projections(file.unet):
        if prediction is None:
            raise InputError(
                "Stable Diffusion 2.x files do not tell what the network predicts; give --prediction eps (the 512 px "
                "base models) or --prediction v (768 px), or --config."
            )
        return {
            "heads": {"num_head_channels": 64},
            "cond_stage_config": {
                "target": _MODULES + "FrozenOpenCLIPEmbedder",
                "params": {"layer": "penultimate"},
            },
            "parameterization": prediction,
            "image_size": 96 if prediction == "v" else 64,
        }
    if "transformer.token_emb.weight" in names and (unet["model_channels"], unet.get("context_dim")) == _LARGE_TEXT:
        depth = len([name for name in names if re.fullmatch(r"transformer\.attn_layers\.layers\.\d+\.1\.to_q.*", name)])
        params = {"n_embed": _LARGE_TEXT[1], "n_layer": depth}
        return {
            "heads": {"num_heads": 8},
            "cond_stage_config": {"target": _MODULES + "BERTEmbedder", "params": params},
            "parameterization": prediction or "eps",
            "image_size": 32,
        }
    raise InputError(
        "the weights alone do not tell this model's attention heads, schedule and conditions; give its official YAML "
        "file with --config."
    )
