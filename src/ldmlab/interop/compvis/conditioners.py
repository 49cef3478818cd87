"""Tensors of the official conditioners (keys after `cond_stage_model.`) and ours, both ways.

Official classes are those of `ldm/modules/encoders/modules.py` in CompVis/latent-diffusion, CompVis/stable-diffusion
and Stability-AI/stablediffusion; what they are configured with is the matter of `conditioner_config`.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from ldmlab.conditioners.class_label import ClassEmbedder
from ldmlab.conditioners.layout import LayoutTokens
from ldmlab.conditioners.semantic import SpatialRescaler
from ldmlab.conditioners.text import OpenClipText
from ldmlab.conditioners.transformer_text import TransformerText
from ldmlab.errors import InputError
from ldmlab.interop.clip_names import from_hugging_face, to_hugging_face
from ldmlab.interop.compvis.unets import CLASS_TABLE

State = Mapping[str, Tensor]

_BLOCK = {  # of the paper's transformer: two official entries a block
    "norm_attention": "{even}.0",
    "attention.q": "{even}.1.to_q",
    "attention.k": "{even}.1.to_k",
    "attention.v": "{even}.1.to_v",
    "attention.out": "{even}.1.to_out",
    "norm_mlp": "{odd}.0",
    "expand": "{odd}.1.net.0.0",
    "shrink": "{odd}.1.net.2",
}
_ENDS = {"tokens": "token_emb", "positions": "pos_emb.emb", "norm": "norm", "unused_head": "to_logits"}


def to_ours(conditioner: nn.Module, official: State) -> dict[str, Tensor]:
    """Official tensors (no prefix) under our names; what our module has no place for keeps its official name."""
    if isinstance(conditioner, OpenClipText):
        return _clip_to_ours(conditioner, official)
    names = {theirs: ours for ours, theirs in names_of(conditioner).items()}
    return {names.get(key, key): tensor for key, tensor in official.items()}


def to_official(conditioner: nn.Module, state: State | None = None) -> dict[str, Tensor]:
    """Our tensors (of `state` or the module's own) under their official names (no prefix)."""
    state = conditioner.state_dict() if state is None else state
    if isinstance(conditioner, OpenClipText):
        return _clip_to_official(conditioner, state)
    names = names_of(conditioner)
    return {names[key]: tensor for key, tensor in state.items()}


def names_of(conditioner: nn.Module) -> dict[str, str]:
    """Our name => official name of every tensor, for conditioners whose tensors correspond one to one."""
    if isinstance(conditioner, ClassEmbedder):
        return {"embedding.weight": CLASS_TABLE if conditioner.slot == "vector" else "embedding.weight"}
    if isinstance(conditioner, SpatialRescaler):
        return {key: f"channel_mapper.{key.partition('.')[2]}" for key in conditioner.state_dict()}
    if isinstance(conditioner, (TransformerText, LayoutTokens)):
        return {key: _transformer_name(key) for key in conditioner.state_dict()}
    raise InputError(
        f"conditioner {type(conditioner).__name__} has no official counterpart with weights; "
        "export with --format ldmlab."
    )


def _transformer_name(ours: str) -> str:
    """transformer.blocks.3.expand.weight => transformer.attn_layers.layers.7.1.net.0.0.weight"""
    module, _, leaf = ours.removeprefix("transformer.").rpartition(".")
    if module in _ENDS:
        return f"transformer.{_ENDS[module]}.{leaf}"
    _, number, part = module.split(".", 2)
    place = _BLOCK[part].format(even=2 * int(number), odd=2 * int(number) + 1)
    return f"transformer.attn_layers.layers.{place}.{leaf}"


def _clip_to_ours(conditioner: OpenClipText, official: State) -> dict[str, Tensor]:
    """Hugging Face names (SD 1.x) or open_clip names (SD 2.x) under the tower's."""
    if not any(key.startswith("model.") for key in official):
        return {f"tower.{key}": tensor for key, tensor in from_hugging_face(official).items()}
    names = {theirs: ours for ours, theirs in conditioner.tower.clip_names().items()}
    plain = {key.removeprefix("model."): tensor for key, tensor in official.items()}
    return {f"tower.{names.get(key, key)}": tensor for key, tensor in plain.items()}


def _clip_to_official(conditioner: OpenClipText, state: State) -> dict[str, Tensor]:
    tower = {key.removeprefix("tower."): tensor for key, tensor in state.items()}
    if not conditioner.node["config"].get("quick_gelu"):  # Stable Diffusion 2.x, else 1.x
        names = conditioner.tower.clip_names()
        return {f"model.{names[key]}": tensor for key, tensor in tower.items()}
    return {f"transformer.text_model.{key}": tensor for key, tensor in to_hugging_face(tower).items()}
