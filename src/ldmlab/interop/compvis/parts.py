"""A network of an official file beside ours: which tensors the file must hold, and how they become our module."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ldmlab.checkpoints import fill, without_weights
from ldmlab.instantiate import instantiate
from ldmlab.interop.compvis import conditioners, first_stages, unets
from ldmlab.interop.mismatch import Mismatch, compare, refuse_mismatch

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
_TABLES = ("position_ids", "attn_mask")  # counters and masks that libraries stored beside a text encoder's weights
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

    def mismatch(self, given: Mapping[str, Tensor]) -> Mismatch:
        """How official tensors (no prefix) differ from the network's."""
        return compare(given, self.expected, self.either_rank)

    def filled(self, given: Mapping[str, Tensor]) -> nn.Module:
        """The module with official tensors that fit it."""
        fill(self.module, self.to_ours(given))
        return self.module


def unet_part(node: Mapping[str, Any]) -> Part:
    """From a backbone node of model.yaml (`_target_` and arguments)."""
    names = unets.names_of(node)
    module = _empty(node, "backbone")

    def to_official(state: Mapping[str, Tensor]) -> StateDict:
        return unets.to_official(state, names)

    expected = to_official(_meta(module))
    projections = frozenset(name for name in expected if name.endswith((".proj_in.weight", ".proj_out.weight")))
    return Part("U-Net", module, expected, lambda state: unets.to_ours(state, names), to_official, projections)


def first_stage_part(node: Mapping[str, Any]) -> Part:
    """From a first_stage node of model.yaml."""
    module = _empty(node, "first_stage")
    names = first_stages.names_of(module)
    return Part(
        "first stage",
        module,
        first_stages.to_official(_meta(module), names),
        lambda state: first_stages.to_ours(state, names),
        lambda state: first_stages.to_official(state, names),
    )


def conditioner_part(node: Mapping[str, Any]) -> Part:
    """From a conditioner node of model.yaml; its module may hold no tensors."""
    module = _empty(node, "conditioner")

    def to_official(state: Mapping[str, Tensor]) -> StateDict:
        return conditioners.to_official(module, state) if state else {}

    def to_ours(state: Mapping[str, Tensor]) -> StateDict:
        return conditioners.to_ours(module, state) if state else {}

    return Part("conditioner", module, to_official(_meta(module)), to_ours, to_official)


def _empty(node: Mapping[str, Any], where: str) -> nn.Module:
    with without_weights():
        return instantiate(node, where=where)


def _meta(module: nn.Module) -> StateDict:
    return {name: tensor.to("meta") for name, tensor in module.state_dict().items()}


def of_part(state: Mapping[str, Tensor], prefix: str) -> StateDict:
    """The tensors of one network without its prefix, out of its own state dict, with or without it, or a whole file.

    Of a state dict with prefixes, other networks and buffers that official files hold are left aside; any other tensor
    stays, under its name, to be told as unexpected.
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


def build(part: Part, given: Mapping[str, Tensor]) -> nn.Module:
    """The filled module, or one InputError that lists every tensor that is missing, unexpected or misshapen."""
    refuse_mismatch({part.title: part.mismatch(given)})
    return part.filled(given)
