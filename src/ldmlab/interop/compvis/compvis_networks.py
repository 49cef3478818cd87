"""A network of an official file and ours: the required tensors, and their conversion to our module.

Official conditioners (keys after `cond_stage_model.`) are those of `ldm/modules/encoders/modules.py` in
CompVis/latent-diffusion, CompVis/stable-diffusion and Stability-AI/stablediffusion;
`compvis_conditioners` has their options.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ldmlab.checkpoints import fill, without_weights
from ldmlab.conditioners.class_label import ClassEmbedder
from ldmlab.conditioners.layout_tokens import LayoutTokens
from ldmlab.conditioners.semantic_map import SpatialRescaler
from ldmlab.conditioners.text import OpenClipText, TransformerText
from ldmlab.errors import InputError
from ldmlab.instantiate import instantiate
from ldmlab.interop.common_names import from_hugging_face, to_hugging_face
from ldmlab.interop.compvis import compvis_first_stages, compvis_unets
from ldmlab.interop.compvis.compvis_unets import CLASS_TABLE
from ldmlab.interop.imported import Mismatch, compare, refuse_mismatch

UNET = "model.diffusion_model."
FIRST_STAGE = "first_stage_model."
CONDITIONER = "cond_stage_model."
AVERAGED = "model_ema."
LOSS = "loss."  # discriminator and perceptual network of a first stage's training
SCHEDULE = (
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
    *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
    *("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
)
SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "cosine", "sqrt": "sqrt"}  # official => ours
BUFFERS = (*SCHEDULE, "scale_factor", "logvar", "cond_ids", "lvlb_weights")
StateDict = dict[str, Tensor]
_TABLES = ("position_ids", "attn_mask")  # counters and masks that libraries stored with a text encoder's weights
Rename = Callable[[Mapping[str, Tensor]], StateDict]


@dataclass(frozen=True)
class Part:
    """One network: without weights until `filled`."""

    title: str  # in messages
    module: nn.Module
    expected: StateDict  # official names (no prefix) and shapes, on the meta device
    to_ours: Rename
    to_official: Rename
    either_rank: frozenset[str] = frozenset()  # tensors that files hold as 1 x 1 convolution or as linear layer

    def mismatch(self, tensors: Mapping[str, Tensor]) -> Mismatch:
        """How official tensors (no prefix) differ from the network's."""
        return compare(tensors, self.expected, self.either_rank)

    def filled(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The module with official tensors that fit it."""
        fill(self.module, self.to_ours(tensors))
        return self.module


def unet_part(node: Mapping[str, Any]) -> Part:
    """From a backbone node of model.yaml (`_target_` and arguments)."""
    names = compvis_unets.names_of(node)
    module = _empty(node, "backbone")

    def to_official(state: Mapping[str, Tensor]) -> StateDict:
        return compvis_unets.to_official(state, names)

    expected = to_official(_meta(module))
    projections = frozenset(name for name in expected if name.endswith((".proj_in.weight", ".proj_out.weight")))
    return Part("U-Net", module, expected, lambda state: compvis_unets.to_ours(state, names), to_official, projections)


def first_stage_part(node: Mapping[str, Any]) -> Part:
    """From a first_stage node of model.yaml."""
    module = _empty(node, "first_stage")
    names = compvis_first_stages.names_of(module)
    return Part(
        "first stage",
        module,
        compvis_first_stages.to_official(_meta(module), names),
        lambda state: compvis_first_stages.to_ours(state, names),
        lambda state: compvis_first_stages.to_official(state, names),
    )


def conditioner_part(node: Mapping[str, Any]) -> Part:
    """From a conditioner node of model.yaml; its module may hold no tensors."""
    module = _empty(node, "conditioner")

    def to_official(state: Mapping[str, Tensor]) -> StateDict:
        return conditioner_to_official(module, state) if state else {}

    def to_ours(state: Mapping[str, Tensor]) -> StateDict:
        return conditioner_to_ours(module, state) if state else {}

    return Part("conditioner", module, to_official(_meta(module)), to_ours, to_official)


def _empty(node: Mapping[str, Any], where: str) -> nn.Module:
    with without_weights():
        return instantiate(node, where=where)


def _meta(module: nn.Module) -> StateDict:
    return {name: tensor.to("meta") for name, tensor in module.state_dict().items()}


def of_part(state: Mapping[str, Tensor], prefix: str) -> StateDict:
    """The tensors of one network, without prefix, from its own state dict (with or without prefix) or a full file.

    Of a state dict with prefixes, other networks and buffers that official files hold are left aside; any other tensor
    stays, under its name, and is then reported as unexpected.
    """
    if not any(key.startswith(prefix) for key in state):
        return dict(state)
    others = ("model.", FIRST_STAGE, CONDITIONER, AVERAGED)
    return {
        key.removeprefix(prefix): tensor
        for key, tensor in state.items()
        if key.startswith(prefix) or not (key.startswith(others) or key in BUFFERS)
    }


def is_table(key: str) -> bool:
    """Whether a conditioner's tensor is no weight."""
    return key.rpartition(".")[2] in _TABLES


def build(part: Part, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The filled module, or one InputError that lists every tensor that is missing, unexpected or misshapen."""
    refuse_mismatch({part.title: part.mismatch(tensors)})
    return part.filled(tensors)


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


def conditioner_to_ours(conditioner: nn.Module, official: State) -> dict[str, Tensor]:
    """Official tensors (no prefix) under our names; tensors that our module lacks keep their official names."""
    if isinstance(conditioner, OpenClipText):
        return _clip_to_ours(conditioner, official)
    names = {official: ours for ours, official in conditioner_names(conditioner).items()}
    return {names.get(key, key): tensor for key, tensor in official.items()}


def conditioner_to_official(conditioner: nn.Module, state: State | None = None) -> dict[str, Tensor]:
    """Our tensors (of `state` or the module's own) under their official names (no prefix)."""
    state = conditioner.state_dict() if state is None else state
    if isinstance(conditioner, OpenClipText):
        return _clip_to_official(conditioner, state)
    names = conditioner_names(conditioner)
    return {names[key]: tensor for key, tensor in state.items()}


def conditioner_names(conditioner: nn.Module) -> dict[str, str]:
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
    names = {official: ours for ours, official in conditioner.tower.clip_names().items()}
    plain = {key.removeprefix("model."): tensor for key, tensor in official.items()}
    return {f"tower.{names.get(key, key)}": tensor for key, tensor in plain.items()}


def _clip_to_official(conditioner: OpenClipText, state: State) -> dict[str, Tensor]:
    tower = {key.removeprefix("tower."): tensor for key, tensor in state.items()}
    if not conditioner.node["config"].get("quick_gelu"):  # Stable Diffusion 2.x, else 1.x
        names = conditioner.tower.clip_names()
        return {f"model.{names[key]}": tensor for key, tensor in tower.items()}
    return {f"transformer.text_model.{key}": tensor for key, tensor in to_hugging_face(tower).items()}
