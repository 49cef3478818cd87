"""An official YAML file as a description of our model (`model.yaml`), by tables; nothing it names is imported."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from ldmlab.errors import InputError
from ldmlab.interop.compvis import compvis_conditioners, compvis_first_stages, compvis_unets
from ldmlab.interop.compvis.compvis_networks import SCHEDULES

Params = Mapping[str, Any]
Node = dict[str, Any]
UNET_TARGET = "ldmlab.backbones.unet.UNet"
CLASS_NAMES = {  # ours => name of the conditioner in model.yaml
    "ClassEmbedder": "class_label",
    "TransformerText": "text",
    "open_clip_text": "text",
    "LayoutTokens": "layout",
    "SpatialRescaler": "semantic",
}
# Inpainting inputs: Stable Diffusion's order, mask and colour of holes; the paper's model has them otherwise.
SD_MASK = {"keep": 0.0, "hole": 1.0}
SD_HOLE = 0.0
LDM_MASK = {"keep": -1.0, "hole": 1.0}
LDM_HOLE = -1.0
_REFUSED = {
    "given_betas": "betas of its own",
    "low_scale_config": "an upscaler of noised images",
    "depth_stage_config": "depth maps",
    "embedder_config": "an image embedder",
}


def read_config(path: Path) -> Node:
    """`{target, params}` of an official YAML file, read as plain data."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"config={path} cannot be read ({reason}); give the official YAML file.") from None
    return model_config(content, f"config={path}")


def model_config(content: Any, source: str = "config") -> Node:
    """`{target, params}` out of a whole official file, its `model` node, or the bare params."""
    node = content.get("model", content) if isinstance(content, Mapping) else None
    if isinstance(node, Mapping) and not isinstance(node.get("params"), Mapping):
        node = {"params": node, "target": node.get("target", "")}
    if not isinstance(node, Mapping) or not {"unet_config", "ddconfig"} & node["params"].keys():
        raise InputError(
            f"{source} describes no model of CompVis or Stable Diffusion; give the file published with its weights."
        )
    return {"target": str(node.get("target") or ""), "params": dict(node["params"])}


def is_first_stage(config: Params) -> bool:
    """Whether an official `{target, params}` is an autoencoder on its own."""
    return "ddconfig" in config["params"]


def first_stage_spec(config: Params) -> Node:
    """model.yaml of a first stage alone."""
    params = config["params"]
    target = config["target"] or compvis_first_stages.target_of(params)
    node = compvis_first_stages.arguments(target, params)
    return {"kind": "first_stage", "image_size": params["ddconfig"]["resolution"], "first_stage": node}


def latent_diffusion_spec(params: Params, prediction: str | None, tensors: Mapping[str, Tensor] | None) -> Node:
    """model.yaml of a whole model; `prediction` (eps | v) fills in or confirms `parameterization`.

    `tensors` are the conditioner's, official names without prefix.
    """
    for name, what in _REFUSED.items():
        if params.get(name):
            raise InputError(f"{name} ({what}) cannot be imported.")
    for name in ("unet_config", "first_stage_config", "cond_stage_config"):
        if name not in params:
            raise InputError(f"the configuration has no {name}; give the whole official file.")
    first_stage = _first_stage(params["first_stage_config"])
    factor = 2 ** (len(first_stage.get("channel_mult", [1])) - 1)
    conditioners = conditioner_nodes(params, factor, tensors)
    size = _sides(params.get("image_size", 256), factor)
    return {
        "kind": "latent_diffusion",
        "image_size": size,
        "first_stage": first_stage,
        "latent_scale": scale_node(params.get("scale_factor", 1.0)),
        "backbone": {"_target_": UNET_TARGET, **compvis_unets.arguments(params["unet_config"]["params"])},
        "conditioners": conditioners,
        "diffusion": diffusion_node(params, prediction),
        "guidance_trained": None if _nullable(conditioners) else False,
        "sampler": {"_target_": "ldmlab.samplers.ddim.Ddim", "eta": 0.0},
        **({"task": _inpainting(size)} if "masked_latent" in conditioners else {}),
    }


def _first_stage(node: Params) -> Node:
    if node["target"].endswith("IdentityFirstStage"):
        return {"_target_": "ldmlab.first_stages.identity.Identity"}
    return compvis_first_stages.arguments(node["target"], node["params"])


def _sides(latent: Any, factor: int) -> Any:
    """The official `image_size` counts latent pixels."""
    return [side * factor for side in latent] if isinstance(latent, list) else latent * factor


def _inpainting(size: Any) -> Node:
    """Known pixels are put back, as the official scripts do."""
    return {
        "_target_": "ldmlab.tasks.inpainting.Inpainting",
        "image_size": size if isinstance(size, int) else max(size),
    }


def _nullable(conditioners: Params) -> bool:
    """Whether any conditioner has a null input."""
    return any(node.get("null_row", True) for node in conditioners.values())


def scale_node(factor: float) -> Node:
    """The official `scale_factor`, by which raw latents are multiplied."""
    return {"_target_": "ldmlab.diffusion.latent_space.LatentScale", "std": [1.0 / factor], "shift": [0.0]}


def diffusion_node(params: Params, prediction: str | None) -> Node:
    """Loss, prediction and schedule, with the defaults of the official code."""
    named = params.get("parameterization", prediction or "eps")
    if prediction is not None and prediction != named:
        raise InputError(f"prediction={prediction} contradicts the configuration's parameterization: {named}.")
    classes = {"eps": "EpsPrediction", "v": "VPrediction"}
    if named not in classes:
        raise InputError(f"parameterization: {named} is not supported; supported: eps, v.")
    return {
        "_target_": "ldmlab.diffusion.latent_diffusion.LatentDiffusion",
        "loss": params.get("loss_type", "l2"),
        "prediction": {"_target_": f"ldmlab.diffusion.parameterization.{classes[named]}"},
        "schedule": {
            "_target_": "ldmlab.diffusion.schedule.Schedule",
            "name": SCHEDULES.get(name := params.get("beta_schedule", "linear"), name),
            "start": params.get("linear_start", 1e-4),
            "end": params.get("linear_end", 2e-2),
            "steps": params.get("timesteps", 1000),
            "cosine_offset": params.get("cosine_s", 8e-3),
        },
    }


def conditioner_nodes(params: Params, factor: int, tensors: Mapping[str, Tensor] | None) -> dict[str, Node]:
    """Our conditioners in the order of the official channels, and the U-Net's class table where it has one.

    `factor` is the first stage's downsampling.
    """
    way, unet = str(params.get("conditioning_key") or ""), params["unet_config"]["params"]
    classes = unet.get("num_classes")
    if (way.rpartition("-")[2] == "adm") != (classes is not None):
        raise InputError(
            f"conditioning_key: {way or None} with num_classes={classes}: a table of classes and a key that ends in "
            "adm go together; give the configuration that belongs to these weights."
        )
    if classes is None:
        return _conditioner_nodes(params, factor, tensors)
    others = _conditioner_nodes({**params, **_without_classes(way, params)}, factor, tensors)
    if CLASS_NAMES["ClassEmbedder"] in others:
        raise InputError(f"conditioning_key: {way} with two tables of classes cannot be imported.")
    options = {
        "classes": classes,
        "width": 4 * unet["model_channels"],
        "slot": "vector",
        "drop": 0.0,
        "null_row": False,
    }
    target = "ldmlab.conditioners.class_label.ClassEmbedder"
    return {**others, CLASS_NAMES["ClassEmbedder"]: {"_target_": target, **options}}


def _without_classes(way: str, params: Params) -> Node:
    """The conditioning besides the class table; without any, the official class passes class numbers to the U-Net."""
    if way == "crossattn-adm":
        return {"conditioning_key": "crossattn"}
    if way != "adm":
        raise InputError(f"conditioning_key: {way} cannot be imported.")
    stage = params["cond_stage_config"]
    target = stage["target"] if isinstance(stage, Mapping) else stage
    if str(target).rpartition(".")[2] not in ("Identity", "IdentityEncoder", "__is_unconditional__"):
        raise InputError(
            f"cond_stage_config: {target} in front of the U-Net's own class table; only an Identity can be."
        )
    return {"cond_stage_config": "__is_unconditional__"}


def _conditioner_nodes(params: Params, factor: int, tensors: Mapping[str, Tensor] | None) -> dict[str, Node]:
    """All but the class table."""
    stage, key = params["cond_stage_config"], params.get("cond_stage_key", "image")
    if stage == "__is_unconditional__":
        return {}
    way = params.get("conditioning_key") or ("concat" if params.get("concat_mode", True) else "crossattn")
    if stage == "__is_first_stage__":
        if (way, key) == ("concat", "masked_image"):
            return {"masked_latent": _masked_latent(LDM_HOLE), "mask": _mask(factor, LDM_MASK)}
        raise InputError(f"cond_stage_key: {key} through the first stage cannot be imported.")
    if not isinstance(stage, Mapping):
        raise InputError(f"cond_stage_config: {stage} is not known; give the official file.")
    target = str(stage["target"])
    if target.rpartition(".")[2] in ("Identity", "IdentityEncoder"):
        if way == "concat" and key.lower() in ("lr_image", "low_resolution"):
            return {"low_resolution": {"_target_": "ldmlab.conditioners.low_resolution.LowResolution"}}
        raise InputError(f"cond_stage_key: {key} as it is ({way}) cannot be imported.")
    node = conditioner_node(target, stage.get("params") or {}, tensors)
    name = CLASS_NAMES[node["_target_"].rpartition(".")[2]]
    if way == "hybrid":
        return _hybrid(params, factor) | {name: node}
    if way != ("concat" if name == "semantic" else "crossattn"):
        raise InputError(f"conditioning_key: {way} with {target} cannot be imported.")
    return {name: node}


def _hybrid(params: Params, factor: int) -> dict[str, Node]:
    """What Stable Diffusion's inpainting models concatenate, in addition to the text."""
    keys = tuple(params.get("concat_keys", ("mask", "masked_image")))
    if keys != ("mask", "masked_image"):
        raise InputError(f"conditioning_key: hybrid with {', '.join(keys)} cannot be imported.")
    return {"mask": _mask(factor, SD_MASK), "masked_latent": _masked_latent(SD_HOLE)}


def _mask(factor: int, values: Mapping[str, float]) -> Node:
    return {"_target_": "ldmlab.conditioners.mask.Mask", "downsampling": factor, **values}


def _masked_latent(hole: float) -> Node:
    return {"_target_": "ldmlab.conditioners.mask.MaskedLatent", "hole": hole}


def conditioner_node(target: str, params: Params, tensors: Mapping[str, Tensor] | None = None) -> Node:
    """One network conditioner; a text encoder may be described by the fields of transformers' `CLIPTextConfig`.

    `tensors` (official names, no prefix) determine the size of a text encoder that has no published one.
    """
    if "hidden_size" in params and target.endswith(("FrozenCLIPEmbedder", "CLIPTextModel")):
        from ldmlab.interop.common_names import clip_node

        fields = {"intermediate_size": 4 * params["hidden_size"], **params}
        return clip_node(fields, layer=params.get("layer", "last"), padding=params.get("padding", "end"))
    return compvis_conditioners.arguments(target, params, tensors)
