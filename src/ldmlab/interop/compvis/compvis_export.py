"""Our model as an official file: tensors under official names and the official configuration.

Options that the official classes do not support are refused; training settings keep their official defaults.
"""

from collections.abc import Mapping
from typing import Any

import torch

from ldmlab.conditioners.class_label import ClassEmbedder
from ldmlab.conditioners.layout_tokens import LayoutTokens
from ldmlab.conditioners.low_resolution import LowResolution
from ldmlab.conditioners.mask import Mask, MaskedLatent
from ldmlab.conditioners.semantic_map import SpatialRescaler
from ldmlab.conditioners.text import OpenClipText, TransformerText
from ldmlab.diffusion.schedule import Schedule
from ldmlab.errors import InputError
from ldmlab.instantiate import instantiate
from ldmlab.interop.compvis import compvis_networks as networks
from ldmlab.interop.compvis.compvis_conditioners import arguments, official_config
from ldmlab.interop.compvis.compvis_config import BETAS, LDM_HOLE, LDM_MASK, PREDICTIONS, SD_HOLE, SD_MASK
from ldmlab.interop.renaming import Node, State, StateDict, with_unused_head

Modules = Mapping[str, Any]  # conditioners by name, in their order
Params = dict[str, Any]
_USUAL_RATE = 0.1  # of Stability's ClassEmbedder
_READS = {  # class of ours => conditioning_key, cond_stage_key
    ClassEmbedder: ("crossattn", "class_label"),
    TransformerText: ("crossattn", "caption"),
    OpenClipText: ("crossattn", "txt"),
    LayoutTokens: ("crossattn", "coordinates_bbox"),
    SpatialRescaler: ("concat", "segmentation"),
}


def export(spec: Node, parts: Mapping[str, State]) -> tuple[StateDict, dict[str, Any]]:
    """(state dict, configuration) of the whole official file; a first stage alone has no prefix.

    `spec` is model.yaml, `parts` its tensors: first_stage, denoiser, conditioner.
    """
    if spec["kind"] == "first_stage":
        target, params = networks.first_stage_params_of(spec["first_stage"])
        state = networks.first_stage_part(spec["first_stage"]).to_foreign(parts["first_stage"])
        return state, {"model": {"target": target, "params": params}}
    if spec["kind"] != "latent_diffusion":
        raise InputError(f"a model of kind {spec['kind']} has no official format; export with --format ldmlab.")
    modules, own = {}, StateDict()
    for name, node in spec["conditioners"].items():
        part, prefix = networks.conditioner_part(node), f"{name}."
        tensors = {k.removeprefix(prefix): t for k, t in parts.get("conditioner", {}).items() if k.startswith(prefix)}
        modules[name] = part.module
        own |= with_unused_head(part.to_foreign(tensors), "transformer.token_emb", "transformer.to_logits")
    table, linear = own.pop(networks.CLASS_TABLE, None), bool(spec.get("origin", {}).get("linear_projection"))
    params = _model_params(spec, None if table is None else len(table), linear)
    params |= _conditioning_params(modules, own)
    state = {networks.CONDITIONER + name: tensor for name, tensor in own.items()}
    unet = networks.unet_part(spec["backbone"], linear).to_foreign(parts["denoiser"])
    unet |= {} if table is None else {networks.CLASS_TABLE: table}
    state |= {networks.UNET + name: tensor for name, tensor in unet.items()}
    if "first_stage" in parts:
        stage = networks.first_stage_part(spec["first_stage"]).to_foreign(parts["first_stage"])
        state |= {networks.FIRST_STAGE + name: tensor for name, tensor in stage.items()}
    state |= schedule_buffers(instantiate(spec["diffusion"]["schedule"], where="diffusion.schedule"))
    kind = "LatentInpaintDiffusion" if params["conditioning_key"] == "hybrid" else "LatentDiffusion"
    return state, {"model": {"target": f"ldm.models.diffusion.ddpm.{kind}", "params": params}}


def _model_params(spec: Node, classes: int | None, linear: bool) -> Params:
    """The `params` of the official model class; classes: rows of the U-Net's own table."""
    first_stage, size = spec["first_stage"], spec["image_size"]
    factor, channels = 2 ** (len(first_stage.get("channel_mult", [1])) - 1), first_stage.get("latent_channels", 3)
    target, stage_params = "ldm.models.autoencoder.IdentityFirstStage", Params()
    if first_stage["_target_"] != "ldmlab.first_stages.identity.Identity":
        target, stage_params = networks.first_stage_params_of(first_stage)
    unet = networks.unet_params_of(spec["backbone"], classes)
    unet |= {"use_linear_in_transformer": True} if linear else {}
    return {
        **_diffusion_params(spec["diffusion"]),
        "scale_factor": _factor(spec["latent_scale"]),
        "image_size": size // factor if isinstance(size, int) else [side // factor for side in size],
        "channels": channels,
        "first_stage_key": "image",
        "use_ema": False,  # averaged weights are in the place of the raw ones
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
        "first_stage_config": {"target": target, "params": stage_params},
    }


def _diffusion_params(node: Node) -> Params:
    """Schedule, loss and parameterization under their official names."""
    schedule: Node = node.get("schedule", {})
    prediction = str(node["prediction"]["_target_"]).rpartition(".")[2]
    if schedule.get("zero_terminal_snr"):
        raise InputError(
            "diffusion.schedule.zero_terminal_snr=true has no official counterpart; use --format diffusers."
        )
    if prediction not in PREDICTIONS.values() or not str(schedule.get("_target_")).endswith(".Schedule"):
        raise InputError(f"diffusion.prediction={prediction} has no official counterpart; export with --format ldmlab.")
    built: Schedule = instantiate(schedule, where="diffusion.schedule")
    usual = {"start": 0.0015, "end": 0.0195, "steps": built.steps}  # ours
    return {
        **{official: schedule.get(ours, usual.get(ours, default)) for official, (ours, default) in BETAS.items()},
        "beta_schedule": next(official for official, ours in networks.SCHEDULES.items() if ours == built.name),
        "log_every_t": 200,
        "loss_type": node.get("loss", "l2"),
        "parameterization": next(official for official, ours in PREDICTIONS.items() if ours == prediction),
    }


def _factor(node: Node) -> float:
    """One over the latent scale; the official code has one factor and no shift."""
    scale = instantiate(node, where="latent_scale")
    if scale.std.numel() > 1 or bool((scale.shift != 0).any()):
        raise InputError("a latent scale per channel has no place in an official file; export with --format ldmlab.")
    std = node["std"][0] if isinstance(node.get("std"), (list, tuple)) else float(scale.std)
    candidates = (float(f"{1.0 / std:.{digits}g}") for digits in range(6, 18))  # the shortest that comes back
    return next((factor for factor in candidates if 1.0 / factor == std), 1.0 / std)


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


def _conditioning_params(modules: Modules, official: State) -> Params:
    """How the model is conditioned; `official`: the tensors of the one conditioner that has some, official names.

    A class table of the U-Net adds `adm` to the key; alone, the official class passes class numbers to the U-Net.
    """
    vectors = [name for name, module in modules.items() if module.slot == "vector"]
    if len(vectors) == 1 and isinstance(modules[vectors[0]], ClassEmbedder):
        rest = _conditioning_params({name: m for name, m in modules.items() if name not in vectors}, official)
        way = rest["conditioning_key"]
        if way not in (None, "crossattn"):
            raise InputError(
                f"classes as a vector with inputs of the kind {way} have no official counterpart; use --format ldmlab."
            )
        if way is None:
            return rest | _way("adm", "class_label", {"target": "torch.nn.Identity"})
        return rest | {"conditioning_key": "crossattn-adm"}
    kinds = [type(module) for module in modules.values()]
    if not kinds:
        return {"conditioning_key": None, "concat_mode": False, "cond_stage_config": "__is_unconditional__"}
    if kinds == [MaskedLatent, Mask]:
        masked, mask = modules.values()
        _check_inpainting(mask, masked, LDM_MASK, LDM_HOLE)
        return _way("concat", "masked_image", "__is_first_stage__")
    if kinds[:2] == [Mask, MaskedLatent] and len(kinds) == 3 and _READS.get(kinds[2], ("",))[0] == "crossattn":
        mask, masked, _ = modules.values()
        _check_inpainting(mask, masked, SD_MASK, SD_HOLE)
        rest = _conditioning_params(dict(list(modules.items())[2:]), official)
        return rest | {"conditioning_key": "hybrid", "concat_keys": ["mask", "masked_image"]}
    if kinds == [LowResolution]:
        return _way("concat", "LR_image", {"target": "torch.nn.Identity"})
    if len(kinds) != 1 or kinds[0] not in _READS:
        raise InputError(
            f"conditioners {', '.join(modules)} in this order have no official counterpart; use --format ldmlab."
        )
    return _way(*_READS[kinds[0]], _cond_stage_config(next(iter(modules.values())), official))


def _way(key: str, reads: str, stage: Any) -> Params:
    params = {"conditioning_key": key, "cond_stage_key": reads, "cond_stage_config": stage}
    return params | {"concat_mode": key == "concat", "cond_stage_trainable": False}


def _check_inpainting(mask: Mask, masked: MaskedLatent, official: Mapping[str, float], hole: float) -> None:
    """The values of official code in masks and holes."""
    values, expected = (mask.keep, mask.hole, masked.hole), (official["keep"], official["hole"], hole)
    if values != expected:
        raise InputError(
            f"mask.keep, mask.hole and masked_latent.hole = {values}: the official values are {expected}; "
            "export with --format ldmlab."
        )


def _cond_stage_config(module: Any, official: State) -> Params:
    """Refused where reading it again would give another conditioner."""
    if module.slot == "vector":
        raise InputError(
            "a vector that is not one class embedder's has no place in an official file; export with --format ldmlab."
        )
    config = official_config(module)
    target, params = config["target"], config["params"]
    if isinstance(module, ClassEmbedder) and params["n_classes"] != module.classes:
        params |= {} if arguments(target, params)["null_row"] else {"ucg_rate": module.drop or _USUAL_RATE}
    again = arguments(target, params, official)
    pairs: dict[str, tuple[Any, Any]] = {}
    if isinstance(module, OpenClipText):
        own, read_text = module.node["config"]["text_cfg"], again["config"]["text_cfg"]
        pairs = {"padding": (module.node["padding"], again["padding"]), "heads": (own["heads"], read_text["heads"])}
    elif isinstance(module, ClassEmbedder):
        pairs = {"classes": (module.classes, again["classes"])}
    for name, (ours, theirs) in pairs.items():
        if ours != theirs:
            raise InputError(
                f"conditioner {name}={ours}: the official class has {theirs} here; export with --format ldmlab."
            )
    return config
