"""Whole official files at small widths: the released configurations shrunk, their tensors drawn from their names."""

import copy
import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drawn_weights import weight_by_rule
from ldmlab.diffusion.schedule import Schedule
from ldmlab.interop.compvis.compvis_config import latent_diffusion_spec
from ldmlab.interop.compvis.compvis_export import schedule_buffers
from ldmlab.interop.compvis.compvis_networks import conditioner_part, first_stage_part, unet_part

ASSETS = Path(__file__).parents[1] / "assets/reference"
LAYOUTS: dict[str, Any] = json.loads(gzip.decompress((ASSETS / "official_layouts.json.gz").read_bytes()))
MODELS = [name for name, layout in LAYOUTS.items() if "unet_config" in layout["config"]]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "app", "##le"]
_MODULES = "ldm.modules.encoders.modules."
State = dict[str, Tensor]


def small_config(name: str) -> dict[str, Any]:
    """A released configuration at width 32, one block a level, images of 32 px."""
    params = copy.deepcopy(LAYOUTS[name]["config"])
    unet, stage = params["unet_config"]["params"], params["first_stage_config"]["params"]
    unet |= {"model_channels": 32, "num_res_blocks": 1, "channel_mult": [1] + [2] * (len(unet["channel_mult"]) - 1)}
    unet |= {"context_dim": 32} if "context_dim" in unet else {}
    network = stage["ddconfig"]
    network |= {"ch": 32, "ch_mult": [1] * len(network["ch_mult"]), "num_res_blocks": 1}
    if "n_embed" in stage:
        stage["n_embed"] = 16
    params["image_size"] = 32 // 2 ** (len(network["ch_mult"]) - 1)
    stage = params["cond_stage_config"]
    if isinstance(stage, dict) and "params" in stage:
        stage["params"] |= {key: value for key, value in SMALL.items() if key in stage["params"]}
        if stage["target"].endswith("BERTEmbedder"):
            stage["params"]["vocab_size"] = 70
    return {"model": {"target": LAYOUTS[name]["target"], "params": params}}


SMALL = {"embed_dim": 32, "n_layer": 1}  # and n_embed of the text transformer, which a first stage has too
SMALL |= {"n_embed": 32}


def stable_diffusion(version: int, *, inpainting: bool = False, **more: Any) -> dict[str, Any]:
    """The configuration of Stable Diffusion 1.x or 2.x with narrow U-Net and first stage."""
    params = small_config("txt2img-1p4B-eval")["model"]["params"]
    unet = params["unet_config"]["params"] | {"context_dim": 64}
    kind, stage = "FrozenCLIPEmbedder", {}
    if version == 2:
        unet |= {"num_head_channels": 32, "use_linear_in_transformer": True}
        del unet["num_heads"]
        kind, stage = "FrozenOpenCLIPEmbedder", {"layer": "penultimate"}
    if inpainting:
        params |= {"conditioning_key": "hybrid", "finetune_keys": None}
        unet["in_channels"] = 9
    params |= {"unet_config": {"params": unet}, "cond_stage_key": "txt", **more}
    params["cond_stage_config"] = {"target": _MODULES + kind, "params": stage}
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}}


def text_tower(version: int) -> dict[str, list[int]]:
    """Names and shapes of a two-block text tower of width 64 in Stable Diffusion's files (no prefix)."""
    width, vocabulary, length = 64, 49408, 77
    if version == 1:
        root, block = "transformer.text_model.", "encoder.layers.{}."
        linear = {f"self_attn.{part}_proj": [width, width] for part in ("q", "k", "v", "out")}
        linear |= {"mlp.fc1": [256, width], "mlp.fc2": [width, 256]}
        norms, last = ("layer_norm1", "layer_norm2"), "final_layer_norm"
        tables = {"embeddings.token_embedding.weight": [vocabulary, width]}
        tables |= {"embeddings.position_embedding.weight": [length, width]}
    else:
        root, block = "model.", "transformer.resblocks.{}."
        linear = {"attn.out_proj": [width, width], "mlp.c_fc": [256, width], "mlp.c_proj": [width, 256]}
        norms, last = ("ln_1", "ln_2"), "ln_final"
        tables = {"token_embedding.weight": [vocabulary, width], "positional_embedding": [length, width]}
        tables |= {"text_projection": [width, width], "logit_scale": []}
    shapes = {root + key: shape for key, shape in tables.items()}
    for number in range(2):
        for key, shape in linear.items():
            shapes |= {f"{root}{block.format(number)}{key}.weight": shape}
            shapes |= {f"{root}{block.format(number)}{key}.bias": shape[:1]}
        for key in norms:
            shapes |= {f"{root}{block.format(number)}{key}.{leaf}": [width] for leaf in ("weight", "bias")}
        if version == 2:
            attention = f"{root}{block.format(number)}attn.in_proj_"
            shapes |= {f"{attention}weight": [3 * width, width], f"{attention}bias": [3 * width]}
    return shapes | {f"{root}{last}.{leaf}": [width] for leaf in ("weight", "bias")}


def official_state(config: Mapping[str, Any], *, averages: bool = True, tower: int | None = None) -> State:
    """Every tensor of the file; `tower` is Stable Diffusion's version, for its text encoder."""
    params = config["model"]["params"]
    stage = None if tower is None else {key: torch.empty(shape) for key, shape in text_tower(tower).items()}
    spec = latent_diffusion_spec(params, None, stage)
    shapes = {f"first_stage_model.{key}": t.shape for key, t in first_stage_part(spec["first_stage"]).expected.items()}
    unet = unet_part(spec["backbone"]).expected
    shapes |= {f"model.diffusion_model.{key}": tensor.shape for key, tensor in unet.items()}
    for node in spec["conditioners"].values():
        expected = conditioner_part(node).expected
        shapes |= {f"cond_stage_model.{key}": tensor.shape for key, tensor in (stage or expected).items() if expected}
    state = {key: weight_by_rule(key, shape) for key, shape in shapes.items()}
    if tower == 1:
        state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    if tower == 2:
        state = {key: t.flatten(1) if _projects(key) and t.shape[2:] == (1, 1) else t for key, t in state.items()}
    if averages:
        for key, tensor in unet.items():
            name = f"diffusion_model.{key}".replace(".", "")
            state[f"model_ema.{name}"] = weight_by_rule(key, tensor.shape, salt=1).reshape(
                state[f"model.diffusion_model.{key}"].shape
            )
        state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    if params.get("scale_by_std"):
        state["scale_factor"] = torch.tensor(0.7)
    betas = {name: params[key] for name, key in (("start", "linear_start"), ("end", "linear_end"))}
    return state | schedule_buffers(Schedule(steps=params["timesteps"], **betas))


def _projects(key: str) -> bool:
    """Into or out of a spatial transformer: linear in Stable Diffusion 2.x."""
    return key.startswith("model.diffusion_model.") and key.endswith((".proj_in.weight", ".proj_out.weight"))
