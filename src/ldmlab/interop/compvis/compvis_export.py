"""Our model as an official file: tensors under official names and the official configuration.

Options that the official classes do not support are refused; training settings keep their official defaults.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldmlab.conditioners.class_label import ClassEmbedder
from ldmlab.conditioners.layout_tokens import LayoutTokens
from ldmlab.conditioners.low_resolution import LowResolution
from ldmlab.conditioners.mask import Mask, MaskedLatent
from ldmlab.conditioners.semantic_map import SpatialRescaler
from ldmlab.conditioners.text import OpenClipText, TransformerText
from ldmlab.diffusion.schedule import Schedule
from ldmlab.errors import InputError
from ldmlab.instantiate import instantiate
from ldmlab.interop.compvis import compvis_first_stages, compvis_unets
from ldmlab.interop.compvis.compvis_conditioners import arguments, official_config
from ldmlab.interop.compvis.compvis_config import LDM_HOLE, LDM_MASK, SD_HOLE, SD_MASK
from ldmlab.interop.compvis.compvis_networks import (
    CONDITIONER,
    FIRST_STAGE,
    SCHEDULES,
    UNET,
    StateDict,
    conditioner_part,
    first_stage_part,
    unet_part,
)

_IDENTITY = "ldmlab.first_stages.identity.Identity"
_MODEL = "ldm.models.diffusion.ddpm.LatentDiffusion"
_INPAINTING = "ldm.models.diffusion.ddpm.LatentInpaintDiffusion"
Node = Mapping[str, Any]
Parts = Mapping[str, Mapping[str, Tensor]]


def export(spec: Node, parts: Parts) -> tuple[StateDict, dict[str, Any]]:
    """(state dict, configuration) of the whole official file; a first stage alone has no prefix.

    `spec` is model.yaml, `parts` its tensors: first_stage, denoiser, conditioner.
    """
    if spec["kind"] == "first_stage":
        target, params = compvis_first_stages.params_of(spec["first_stage"])
        part = first_stage_part(spec["first_stage"])
        return part.to_official(parts["first_stage"]), {"model": {"target": target, "params": params}}
    if spec["kind"] != "latent_diffusion":
        raise InputError(f"a model of kind {spec['kind']} has no official format; export with --format ldmlab.")
    conditioners = {name: conditioner_part(node) for name, node in spec["conditioners"].items()}
    states: StateDict = {}
    for name, part in conditioners.items():
        states |= with_idle_head(part.to_official(_own(parts.get("conditioner", {}), name)))
    table = states.pop(compvis_unets.CLASS_TABLE, None)
    params = _params(spec, None if table is None else len(table))
    params |= conditioning_params({name: part.module for name, part in conditioners.items()}, states)
    state = {f"{UNET}{name}": tensor for name, tensor in _unet(spec, parts["denoiser"]).items()}
    state |= {f"{UNET}{compvis_unets.CLASS_TABLE}": table} if table is not None else {}
    if spec["first_stage"]["_target_"] != _IDENTITY:
        first_stage = first_stage_part(spec["first_stage"]).to_official(parts["first_stage"])
        state |= {f"{FIRST_STAGE}{name}": tensor for name, tensor in first_stage.items()}
    state |= {f"{CONDITIONER}{name}": tensor for name, tensor in states.items()}
    state |= schedule_buffers(instantiate(spec["diffusion"]["schedule"], where="diffusion.schedule"))
    target = _INPAINTING if params["conditioning_key"] == "hybrid" else _MODEL
    return state, {"model": {"target": target, "params": params}}


def _unet(spec: Node, state: Mapping[str, Tensor]) -> StateDict:
    """Official tensors, projections as in the file the model came from; Stable Diffusion 2.x has linear ones."""
    official = unet_part(spec["backbone"]).to_official(state)
    if not _linear(spec):
        return official
    ends = (".proj_in.weight", ".proj_out.weight")
    transformers = {name.rpartition(".transformer_blocks.")[0] for name in official if ".transformer_blocks." in name}
    projections = {block + end for block in transformers for end in ends}
    return {name: tensor.flatten(1) if name in projections else tensor for name, tensor in official.items()}


def _linear(spec: Node) -> bool:
    return bool(spec.get("origin", {}).get("linear_projection"))


def _params(spec: Node, classes: int | None) -> dict[str, Any]:
    """The `params` of the official model class; classes: rows of the U-Net's own table."""
    first_stage = spec["first_stage"]
    if first_stage["_target_"] == _IDENTITY:
        stage = {"target": "ldm.models.autoencoder.IdentityFirstStage", "params": {}}
        factor, channels = 1, 3
    else:
        target, stage_params = compvis_first_stages.params_of(first_stage)
        stage = {"target": target, "params": stage_params}
        factor, channels = 2 ** (len(first_stage["channel_mult"]) - 1), first_stage["latent_channels"]
    size = spec["image_size"]
    unet = compvis_unets.params_of(spec["backbone"], classes) | (
        {"use_linear_in_transformer": True} if _linear(spec) else {}
    )
    return {
        **_diffusion_params(spec["diffusion"]),
        "scale_factor": _factor(spec["latent_scale"]),
        "image_size": size // factor if isinstance(size, int) else [side // factor for side in size],
        "channels": channels,
        "first_stage_key": "image",
        "use_ema": False,  # averaged weights are in the place of the raw ones
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
        "first_stage_config": stage,
    }


def _diffusion_params(node: Node) -> dict[str, Any]:
    """Schedule, loss and parameterization under their official names."""
    schedule: Node = node.get("schedule", {})
    prediction = str(node["prediction"]["_target_"]).rpartition(".")[2]
    official = {"EpsPrediction": "eps", "VPrediction": "v"}
    if schedule.get("zero_terminal_snr"):
        raise InputError(
            "diffusion.schedule.zero_terminal_snr=true has no official counterpart; use --format diffusers."
        )
    if prediction not in official or not str(schedule.get("_target_")).endswith(".Schedule"):
        raise InputError(f"diffusion.prediction={prediction} has no official counterpart; export with --format ldmlab.")
    built: Schedule = instantiate(schedule, where="diffusion.schedule")
    params: dict[str, Any] = {
        "linear_start": schedule.get("start", 0.0015),
        "linear_end": schedule.get("end", 0.0195),
        "timesteps": built.steps,
        "log_every_t": 200,
        "loss_type": node.get("loss", "l2"),
        "parameterization": official[prediction],
    }
    name = next(official for official, ours in SCHEDULES.items() if ours == built.name)
    if name != "linear":
        params["beta_schedule"] = name
    return params | ({"cosine_s": schedule.get("cosine_offset", 8e-3)} if built.name == "cosine" else {})


def _factor(node: Node) -> float:
    """One over the latent scale; the official code has one factor and no shift."""
    scale = instantiate(node, where="latent_scale")
    if scale.std.numel() > 1 or bool((scale.shift != 0).any()):
        raise InputError("a latent scale per channel has no place in an official file; export with --format ldmlab.")
    std = node["std"][0] if isinstance(node.get("std"), (list, tuple)) else float(scale.std)
    candidates = (float(f"{1.0 / std:.{digits}g}") for digits in range(6, 18))  # the shortest that comes back
    return next((factor for factor in candidates if 1.0 / factor == std), 1.0 / std)


def _own(state: Mapping[str, Tensor], name: str) -> StateDict:
    """The tensors of one conditioner."""
    return {key.removeprefix(f"{name}."): tensor for key, tensor in state.items() if key.startswith(f"{name}.")}


def schedule_buffers(schedule: Schedule) -> StateDict:
    """The 12 tables that official files store: float64 arithmetic, float32 numbers (v_posterior 0)."""
    betas, bar = schedule.betas, schedule.alpha_bar
    before = torch.cat([torch.ones(1, dtype=bar.dtype), bar[:-1]])
    variance = betas * (1 - before) / (1 - bar)
    tables = {
        "betas": betas,
        "alphas_cumprod": bar,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": bar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - bar).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - bar).log(),
        "sqrt_recip_alphas_cumprod": (1 / bar).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / bar - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * before.sqrt() / (1 - bar),
        "posterior_mean_coef2": (1 - before) * (1 - betas).sqrt() / (1 - bar),
    }
    return {name: table.float() for name, table in tables.items()}


_USUAL_RATE = 0.1  # of Stability's ClassEmbedder
_READS = {  # class of ours => conditioning_key, cond_stage_key
    ClassEmbedder: ("crossattn", "class_label"),
    TransformerText: ("crossattn", "caption"),
    OpenClipText: ("crossattn", "txt"),
    LayoutTokens: ("crossattn", "coordinates_bbox"),
    SpatialRescaler: ("concat", "segmentation"),
}
Modules = Mapping[str, Any]
Params = dict[str, Any]


def conditioning_params(modules: Modules, official: Mapping[str, Tensor]) -> Params:
    """How the model is conditioned, for conditioners in their order and the one's tensors under their official names.

    A class table of the U-Net adds `adm` to the key; alone, the official class passes class numbers to the U-Net.
    """
    vectors = [name for name, module in modules.items() if module.slot == "vector"]
    if len(vectors) == 1 and isinstance(modules[vectors[0]], ClassEmbedder):
        rest = conditioning_params({name: m for name, m in modules.items() if name not in vectors}, official)
        return _with_classes(rest)
    kinds = [type(module) for module in modules.values()]
    if not kinds:
        return {"conditioning_key": None, "concat_mode": False, "cond_stage_config": "__is_unconditional__"}
    if kinds == [MaskedLatent, Mask]:
        _check_inpainting(modules, LDM_MASK, LDM_HOLE)
        return _way("concat", "masked_image", "__is_first_stage__")
    if kinds[:2] == [Mask, MaskedLatent] and len(kinds) == 3 and _READS.get(kinds[2], ("",))[0] == "crossattn":
        _check_inpainting(modules, SD_MASK, SD_HOLE)
        rest = conditioning_params(dict(list(modules.items())[2:]), official)
        return rest | {"conditioning_key": "hybrid", "concat_keys": ["mask", "masked_image"]}
    if kinds == [LowResolution]:
        return _way("concat", "LR_image", {"target": "torch.nn.Identity"})
    if len(kinds) != 1 or kinds[0] not in _READS:
        raise InputError(
            f"conditioners {', '.join(modules)} in this order have no official counterpart; use --format ldmlab."
        )
    return _way(*_READS[kinds[0]], _config(next(iter(modules.values())), official))


def _way(key: str, reads: str, stage: Any) -> Params:
    params = {"conditioning_key": key, "cond_stage_key": reads, "cond_stage_config": stage}
    return params | {"concat_mode": key == "concat", "cond_stage_trainable": False}


def _with_classes(rest: Params) -> Params:
    """The same plus the U-Net's class table."""
    ways = {None: "adm", "crossattn": "crossattn-adm"}
    way = rest["conditioning_key"]
    if way not in ways:
        raise InputError(
            f"classes as a vector with inputs of the kind {way} have no official counterpart; use --format ldmlab."
        )
    alone = _way("adm", "class_label", {"target": "torch.nn.Identity"}) if way is None else {}
    return rest | alone | {"conditioning_key": ways[way]}


def _check_inpainting(modules: Modules, mask: Mapping[str, float], hole: float) -> None:
    """The values of official code in masks and holes."""
    masks = next(module for module in modules.values() if isinstance(module, Mask))
    latents = next(module for module in modules.values() if isinstance(module, MaskedLatent))
    values, expected = (masks.keep, masks.hole, latents.hole), (mask["keep"], mask["hole"], hole)
    if values != expected:
        raise InputError(
            f"mask.keep, mask.hole and masked_latent.hole = {values}: the official values are {expected}; "
            "export with --format ldmlab."
        )


def _config(module: nn.Module, official: Mapping[str, Tensor]) -> Params:
    """`cond_stage_config`; refused where reading it again would give another conditioner."""
    if getattr(module, "slot", None) == "vector":
        raise InputError(
            "a vector that is not one class embedder's has no place in an official file; export with --format ldmlab."
        )
    config = official_config(module)
    if isinstance(module, ClassEmbedder) and config["params"]["n_classes"] != module.classes:
        read = arguments(config["target"], config["params"])
        config["params"] |= {} if read["null_row"] else {"ucg_rate": module.drop or _USUAL_RATE}
    again = arguments(config["target"], config["params"], official)
    pairs: dict[str, Any] = {}
    if isinstance(module, OpenClipText):
        own, read_text = module.node["config"]["text_cfg"], again["config"]["text_cfg"]
        pairs = {"padding": (module.node["padding"], again["padding"]), "heads": (own["heads"], read_text["heads"])}
    elif isinstance(module, ClassEmbedder):
        pairs = {"classes": (module.classes, again["classes"])}
    for name, (ours, official) in pairs.items():
        if ours != official:
            raise InputError(
                f"conditioner {name}={ours}: the official class has {official} here; export with --format ldmlab."
            )
    return config


def with_idle_head(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official text transformers have an unused output layer: zeros where the model has none."""
    table = official.get("transformer.token_emb.weight")
    if table is None or "transformer.to_logits.weight" in official:
        return dict(official)
    head = {"weight": torch.zeros_like(table), "bias": table.new_zeros(len(table))}
    return {**official, **{f"transformer.to_logits.{name}": tensor for name, tensor in head.items()}}
