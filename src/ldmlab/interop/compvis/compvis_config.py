"""An official YAML file as a description of our model (`model.yaml`), by tables; nothing it names is imported."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldmlab.errors import InputError
from ldmlab.interop.compvis import compvis_networks as networks
from ldmlab.interop.compvis.compvis_conditioners import arguments
from ldmlab.interop.renaming import OPTIONS
from ldmlab.model_files import read_yaml

Params = Mapping[str, Any]
Node = dict[str, Any]
UNET_TARGET = "ldmlab.backbones.unet.UNet"
_HOME = "ldmlab.conditioners."
_NAMES, BETAS, _REFUSED = (OPTIONS["compvis"][name] for name in ("conditioner_names", "betas", "refused"))
# Inpainting inputs: Stable Diffusion's order, mask and colour of holes; the paper's model has them otherwise.
SD_MASK = {"keep": 0.0, "hole": 1.0}
SD_HOLE = 0.0
LDM_MASK = {"keep": -1.0, "hole": 1.0}
LDM_HOLE = -1.0
PREDICTIONS = {"eps": "EpsPrediction", "v": "VPrediction"}  # official => ours
_IDENTITIES = ("Identity", "IdentityEncoder")


def read_config(path: Path) -> Node:
    """`{target, params}` of an official YAML file, read as plain data."""
    try:
        content = read_yaml(path)
    except InputError as error:
        raise InputError(f"config={path}: {error}") from None
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


def first_stage_spec(config: Params) -> Node:
    """model.yaml of a first stage alone."""
    params = config["params"]
    node = networks.first_stage_arguments(config["target"] or networks.target_of(params), params)
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
    stage, latent = params["first_stage_config"], params.get("image_size", 256)
    if stage["target"].endswith("IdentityFirstStage"):
        first_stage = {"_target_": "ldmlab.first_stages.identity.Identity"}
    else:
        first_stage = networks.first_stage_arguments(stage["target"], stage["params"])
    factor = 2 ** (len(first_stage.get("channel_mult", [1])) - 1)
    conditioners = conditioner_nodes(params, factor, tensors)
    size = [side * factor for side in latent] if isinstance(latent, list) else latent * factor
    spec = {
        "kind": "latent_diffusion",
        "image_size": size,
        "first_stage": first_stage,
        "latent_scale": scale_node(params.get("scale_factor", 1.0)),
        "backbone": {"_target_": UNET_TARGET, **networks.unet_arguments(params["unet_config"]["params"])},
        "conditioners": conditioners,
        "diffusion": diffusion_node(params, prediction),
        "guidance_trained": None if any(node.get("null_row", True) for node in conditioners.values()) else False,
        "sampler": {"_target_": "ldmlab.samplers.ddim.Ddim", "eta": 0.0},
    }
    if "masked_latent" in conditioners:  # known pixels are put back, as the official scripts do
        side = max(size) if isinstance(size, list) else size
        spec["task"] = {"_target_": "ldmlab.tasks.inpainting.Inpainting", "image_size": side}
    return spec


def scale_node(factor: float) -> Node:
    """The official `scale_factor`, by which raw latents are multiplied."""
    return {"_target_": "ldmlab.diffusion.latent_space.LatentScale", "std": [1.0 / factor], "shift": [0.0]}


def diffusion_node(params: Params, prediction: str | None) -> Node:
    """Loss, prediction and schedule, with the defaults of the official code."""
    named = params.get("parameterization", prediction or "eps")
    if prediction is not None and prediction != named:
        raise InputError(f"prediction={prediction} contradicts the configuration's parameterization: {named}.")
    if named not in PREDICTIONS:
        raise InputError(f"parameterization: {named} is not supported; supported: eps, v.")
    schedule = params.get("beta_schedule", "linear")
    return {
        "_target_": "ldmlab.diffusion.latent_diffusion.LatentDiffusion",
        "loss": params.get("loss_type", "l2"),
        "prediction": {"_target_": f"ldmlab.diffusion.parameterization.{PREDICTIONS[named]}"},
        "schedule": {
            "_target_": "ldmlab.diffusion.schedule.Schedule",
            "name": networks.SCHEDULES.get(schedule, schedule),
            **{ours: params.get(official, default) for official, (ours, default) in BETAS.items()},
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
    name = _NAMES["ClassEmbedder"]
    others = _conditioner_nodes({**params, **_without_classes(way, params)}, factor, tensors)
    if name in others:
        raise InputError(f"conditioning_key: {way} with two tables of classes cannot be imported.")
    options = {"classes": classes, "width": 4 * unet["model_channels"], "slot": "vector", "drop": 0.0}
    return {**others, name: {"_target_": _HOME + "class_label.ClassEmbedder", **options, "null_row": False}}


def _without_classes(way: str, params: Params) -> Node:
    """The conditioning besides the class table; without any, the official class passes class numbers to the U-Net."""
    if way == "crossattn-adm":
        return {"conditioning_key": "crossattn"}
    if way != "adm":
        raise InputError(f"conditioning_key: {way} cannot be imported.")
    stage = params["cond_stage_config"]
    target = stage["target"] if isinstance(stage, Mapping) else stage
    if str(target).rpartition(".")[2] not in (*_IDENTITIES, "__is_unconditional__"):
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
    if target.rpartition(".")[2] in _IDENTITIES:
        if way == "concat" and key.lower() in ("lr_image", "low_resolution"):
            return {"low_resolution": {"_target_": _HOME + "low_resolution.LowResolution"}}
        raise InputError(f"cond_stage_key: {key} as it is ({way}) cannot be imported.")
    node = arguments(target, stage.get("params") or {}, tensors)
    name = _NAMES[node["_target_"].rpartition(".")[2]]
    if way == "hybrid":  # what Stable Diffusion's inpainting models concatenate, in addition to the text
        keys = tuple(params.get("concat_keys", ("mask", "masked_image")))
        if keys != ("mask", "masked_image"):
            raise InputError(f"conditioning_key: hybrid with {', '.join(keys)} cannot be imported.")
        return {"mask": _mask(factor, SD_MASK), "masked_latent": _masked_latent(SD_HOLE), name: node}
    if way != ("concat" if name == "semantic" else "crossattn"):
        raise InputError(f"conditioning_key: {way} with {target} cannot be imported.")
    return {name: node}


def _mask(factor: int, values: Mapping[str, float]) -> Node:
    return {"_target_": _HOME + "mask.Mask", "downsampling": factor, **values}


def _masked_latent(hole: float) -> Node:
    return {"_target_": _HOME + "mask.MaskedLatent", "hole": hole}
