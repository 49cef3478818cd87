"""A whole official file taken apart: networks, averaged weights, schedule and scale, each without its prefix."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldmlab.diffusion.schedule import Schedule
from ldmlab.errors import InputError
from ldmlab.interop.compvis import compvis_networks as networks
from ldmlab.interop.compvis.compvis_conditioners import MODULES
from ldmlab.interop.compvis.compvis_networks import AVERAGED, CONDITIONER, FIRST_STAGE, UNET, target_of
from ldmlab.interop.renaming import State, StateDict

_COUNTERS = ("decay", "num_updates")  # of the averaged weights


@dataclass(frozen=True)
class OfficialFile:
    """The tensors of a whole model or of a first stage alone."""

    unet: StateDict
    first_stage: StateDict
    conditioner: StateDict
    averages: StateDict  # names as in the file, flattened
    buffers: StateDict
    unknown: list[str]

    @property
    def is_first_stage(self) -> bool:
        """Whether this is an autoencoder on its own."""
        return not self.unet and not any(key.startswith(_flat(UNET)) for key in self.averages)

    def averaged(self, names: Iterable[str], prefix: str) -> StateDict | None:
        """The averaged weights of a network by their own names, or None where the file has none of it.

        The file deletes all dots from a name, which cannot be undone, so `names` come from the architecture; what is
        not there is left out.
        """
        flat = {name: _flat(prefix + name) for name in names}
        return {name: self.averages[key] for name, key in flat.items() if key in self.averages} or None

    def scale_factor(self, params: Mapping[str, Any]) -> float:
        """The stored factor where there is one (`scale_by_std`), else the configuration's."""
        if (stored := self.buffers.get("scale_factor")) is not None:
            return float(stored)
        if params.get("scale_by_std"):
            raise InputError("scale_by_std: the factor was measured in training but the file has no `scale_factor`.")
        return float(params.get("scale_factor", 1.0))


def _flat(name: str) -> str:
    """The name of a weight's average, or how those of a network begin."""
    return AVERAGED + name.removeprefix("model.").replace(".", "")


def take_apart(state: State) -> OfficialFile:
    """Sort tensors by their prefixes; a first stage alone has none."""
    groups: dict[str, StateDict] = {prefix: {} for prefix in (UNET, FIRST_STAGE, CONDITIONER)}
    averages, buffers, unknown = dict[str, Tensor](), dict[str, Tensor](), list[str]()
    alone = not any(key.startswith((UNET, FIRST_STAGE, AVERAGED + "diffusion_model")) for key in state)
    for key, tensor in state.items():
        prefix = next((prefix for prefix in groups if key.startswith(prefix)), "")
        name = key.removeprefix(prefix)
        if name.startswith(networks.LOSS) or (prefix == CONDITIONER and networks.is_table(key)):
            continue
        if key.startswith(AVERAGED):
            if key.removeprefix(AVERAGED) not in _COUNTERS:
                averages[key] = tensor
        elif key in networks.BUFFERS:
            buffers[key] = tensor
        elif prefix or alone:
            groups[prefix or FIRST_STAGE][name] = tensor
        else:
            unknown.append(key)
    return OfficialFile(groups[UNET], groups[FIRST_STAGE], groups[CONDITIONER], averages, buffers, unknown)


def check_schedule(file: OfficialFile, betas: Tensor) -> None:
    """Refuse a configuration whose schedule is not the one stored in the file."""
    stored = file.buffers.get("betas")
    if stored is None:
        return
    tolerance = 1e-5 if stored.dtype in (torch.float32, torch.float64) else 1e-2
    if stored.shape != betas.shape or not torch.allclose(stored.double(), betas, rtol=tolerance, atol=0):
        configured = f"{len(betas)} betas {float(betas[0]):.3g} .. {float(betas[-1]):.3g}"
        raise InputError(
            f"the file was trained with {len(stored)} betas {float(stored[0]):.3g} .. {float(stored[-1]):.3g}, the "
            f"configuration has {configured}; give the configuration that belongs to these weights."
        )


def schedule_params(file: OfficialFile, default: Mapping[str, Any]) -> dict[str, Any]:
    """The official schedule options that give the stored betas; `default` for a file that stores none."""
    stored = file.buffers.get("betas")
    if stored is None:
        return dict(default)
    digits = 6 if stored.dtype == torch.float32 else 3
    start, end = (float(f"{float(beta):.{digits}g}") for beta in (stored[0], stored[-1]))
    for official, name in networks.SCHEDULES.items():
        squared = (start**2, end**2) if name == "sqrt" else (start, end)
        try:
            check_schedule(file, Schedule(name, *squared, steps=len(stored)).betas)
        except InputError:
            continue
        params = {"linear_start": squared[0], "linear_end": squared[1], "timesteps": len(stored)}
        return params if official == "linear" else params | {"beta_schedule": official}
    raise InputError("the betas in the file belong to none of the supported schedules; give --config.")


Params = dict[str, Any]
_SD_BETAS = {"linear_start": 0.00085, "linear_end": 0.0120, "timesteps": 1000}
_SD_SCALE = 0.18215
_LARGE_TEXT = (320, 1280)  # width of the finest level and of the tokens: the 1.45 billion parameter model


def unet_params(state: State) -> Params:
    """`unet_config.params` without `num_heads` or `num_head_channels`."""
    if not {"input_blocks.0.0.weight", "out.2.weight"} <= state.keys():
        raise InputError("there is no complete U-Net in this file; give the file of the whole model.")
    levels = _count(r"output_blocks\.(\d+)\.[12]\.(?:conv|in_layers\.0)\.weight", state) + 1
    per_level = _count(r"output_blocks\.(\d+)\.0\.in_layers\.0\.weight", state) // levels  # residual blocks + 1
    first_blocks = [f"input_blocks.{1 + level * per_level}" for level in range(levels)]
    model_channels, in_channels = state["input_blocks.0.0.weight"].shape[:2]
    widths = [_rows(state, f"{block}.0.out_layers.3.weight") for block in first_blocks]
    params = {
        "in_channels": in_channels,
        "out_channels": _rows(state, "out.2.weight"),
        "model_channels": model_channels,
        "attention_resolutions": [2**i for i, block in enumerate(first_blocks) if f"{block}.1.norm.weight" in state],
        "num_res_blocks": per_level - 1,
        "channel_mult": _multiples(widths, model_channels, "U-Net"),
    }
    if depth := _count(r"middle_block\.1\.transformer_blocks\.(\d+)\.norm1\.weight", state):
        context = state["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1]
        params |= {"use_spatial_transformer": True, "transformer_depth": depth, "context_dim": context}
    if _rows(state, "input_blocks.1.0.emb_layers.1.weight") == 2 * widths[0]:
        params["use_scale_shift_norm"] = True
    if _count(r"output_blocks\.(\d+)\.[12]\.in_layers\.0\.weight", state):
        params["resblock_updown"] = True
    return params


def linear_projections(state: State) -> bool:
    """Whether spatial transformers project by linear layers (Stable Diffusion 2.x) instead of 1 x 1 convolutions."""
    return any(key.endswith(".proj_in.weight") and tensor.ndim == 2 for key, tensor in state.items())


def first_stage_params(state: State) -> Params:
    """`params` of a first stage; with a codebook it is a VQ model."""
    if not {"encoder.conv_in.weight", "encoder.conv_out.weight", "post_quant_conv.weight"} <= state.keys():
        raise InputError("there is no complete first stage in this file; give another file.")
    codebook = state.get("quantize.embedding.weight")
    levels = range(_count(r"encoder\.down\.(\d+)\.block\.0\.norm1\.weight", state))
    channels, out = (_rows(state, f"encoder.{layer}.weight") for layer in ("conv_in", "conv_out"))
    widths = [_rows(state, f"encoder.down.{level}.block.0.conv2.weight") for level in levels]
    attention = [level for level in levels if f"encoder.down.{level}.attn.0.norm.weight" in state]
    network = {
        "double_z": codebook is None,
        "z_channels": out if codebook is not None else out // 2,
        "resolution": networks.RESOLUTION,
        "in_channels": 3,
        "out_ch": 3,
        "ch": channels,
        "ch_mult": _multiples(widths, channels, "first stage"),
        "num_res_blocks": _count(r"encoder\.down\.0\.block\.(\d+)\.norm1\.weight", state),
        "attn_resolutions": [networks.RESOLUTION // 2**level for level in attention],
        "dropout": 0.0,
    }
    if "encoder.mid.attn_1.norm.weight" not in state:
        network["attn_type"] = "none"
    params: Params = {"embed_dim": state["post_quant_conv.weight"].shape[1], "ddconfig": network}
    return params if codebook is None else params | {"n_embed": len(codebook)}


def _count(pattern: str, state: State) -> int:
    """How many different numbers a pattern of names finds."""
    return len({found[1] for key in state if (found := re.fullmatch(pattern, key))})


def _rows(state: State, key: str) -> int:
    if key not in state:
        raise InputError(f"{key} is missing, so the network cannot be derived from shapes; give --config.")
    return state[key].shape[0]


def _multiples(widths: list[int], base: int, part: str) -> list[int]:
    if any(width % base for width in widths):
        raise InputError(f"the {part}'s widths {widths} are no multiples of {base}; give --config.")
    return [width // base for width in widths]


def config_of(file: OfficialFile, prediction: str | None) -> Params:
    """`{target, params}` as in an official YAML file; InputError where the weights do not determine it."""
    first_stage = first_stage_params(file.first_stage)
    stage_config = {"target": target_of(first_stage), "params": first_stage}
    if file.is_first_stage:
        return stage_config
    unet = unet_params(file.unet)
    heads, conditioner, prediction, size = _family(file, unet, prediction)
    hybrid = unet["in_channels"] == 2 * unet["out_channels"] + 1  # mask and masked latent: the inpainting models
    if unet["in_channels"] != unet["out_channels"] and not hybrid:
        raise InputError(f"a U-Net of {unet['in_channels']} input channels needs --config to name them.")
    params = {
        "channels": unet["out_channels"],
        "conditioning_key": "hybrid" if hybrid else "crossattn",
        "cond_stage_key": "txt",
        **schedule_params(file, _SD_BETAS),
        "cond_stage_config": conditioner,
        "parameterization": prediction,
        "image_size": size,
        "scale_factor": _SD_SCALE,
        "unet_config": {"params": unet | heads},
        "first_stage_config": stage_config,
    }
    return {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}


def _family(file: OfficialFile, unet: Params, prediction: str | None) -> tuple[Params, Params, str, int]:
    """Heads, conditioner, prediction and size of latents, by the names of the conditioner's tensors."""
    names = file.conditioner.keys()
    if any(name.startswith("transformer.text_model.") for name in names):
        return {"num_heads": 8}, {"target": MODULES + "FrozenCLIPEmbedder", "params": {}}, prediction or "eps", 64
    if "model.positional_embedding" in names and linear_projections(file.unet):
        if prediction is None:
            raise InputError(
                "Stable Diffusion 2.x files do not contain the kind of prediction; give --prediction eps (the 512 px "
                "base models) or --prediction v (768 px), or --config."
            )
        text = {"target": MODULES + "FrozenOpenCLIPEmbedder", "params": {"layer": "penultimate"}}
        return {"num_head_channels": 64}, text, prediction, 96 if prediction == "v" else 64
    if "transformer.token_emb.weight" in names and (unet["model_channels"], unet.get("context_dim")) == _LARGE_TEXT:
        depth = _count(r"transformer\.attn_layers\.layers\.(\d+)\.1\.to_q\.weight", file.conditioner)
        text = {"target": MODULES + "BERTEmbedder", "params": {"n_embed": _LARGE_TEXT[1], "n_layer": depth}}
        return {"num_heads": 8}, text, prediction or "eps", 32
    raise InputError(
        "weights alone do not determine this model's attention heads, schedule and conditions; give its YAML "
        "file with --config."
    )
