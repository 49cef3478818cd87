"""Names of the tensors of diffusers' and transformers' modules, and ours; its autoencoders over our modules.

Our attention over pixels keeps q, k, v of every head in one product, and our 1 x 1 projections are linear layers;
diffusers has three products, and convolutions unless `use_linear_projection`. Classes are called as in version 0.42.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldmlab.contracts import Posterior
from ldmlab.interop import renaming
from ldmlab.interop.diffusers import diffusers_transformers as transformers
from ldmlab.interop.diffusers.diffusers_first_stages import arguments, kind_of
from ldmlab.interop.diffusers.diffusers_texts import BERT, BERT_TARGET, CLIP
from ldmlab.interop.diffusers.diffusers_transformers import Output
from ldmlab.interop.renaming import Node, OfficialModule, Part, State, StateDict

CLASS_TABLE = "class_embedding.weight"  # with num_class_embeds: rows are the U-Net's vector conditioning
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # before diffusers 0.15


def unet_part(node: Node, title: str, *, linear_projection: bool) -> Part:
    """UNet2DConditionModel or UNet2DModel, from a backbone node of model.yaml."""
    module = renaming.unfilled(node, "backbone")
    attention = "unet_of_pixels" if node.get("context_width") is None else "unet_with_tokens"
    names = renaming.renamed(module.state_dict(), renaming.names_of("diffusers", "unet", attention))
    projections = () if linear_projection else (".proj_in.weight", ".proj_out.weight")
    axes = {name: 4 for name in names if name.endswith(projections)}
    heads = {name: module.get_submodule(name.rsplit(".", 2)[0]).heads for name in names if ".qkv." in name}
    return Part(title, module, names, axes, heads)


def first_stage_part(node: Node, title: str) -> Part:
    """A first stage, from its node; diffusers' attention has linear layers, ours convolutions."""
    module = renaming.unfilled(node, "first_stage")
    if title == "AutoencoderDC":  # tensors have its names
        products = (".to_q.weight", ".to_k.weight", ".to_v.weight", ".to_out.weight")
        same: renaming.Names = {name: (name,) for name in module.state_dict()}
        return Part(title, module, same, {name: 2 for name in same if name.endswith(products)})
    tensors = filter(renaming.named_as_theirs, module.state_dict())
    names = renaming.renamed(tensors, renaming.names_of("diffusers", "first_stage"))
    linear = [name for name in names if ".attention" in name and name.endswith(".weight") and ".norm." not in name]
    return Part(title, module, names, dict.fromkeys(linear, 2))


def text_part(node: Node) -> Part:
    """LDMBertModel or CLIPTextModel (names without a prefix), from a text conditioner's node."""
    module = renaming.unfilled(node, "conditioner")
    if node["_target_"] == BERT_TARGET:
        names = renaming.renamed(module.state_dict(), renaming.names_of("diffusers", "text"))
        return Part(f"text encoder {BERT}", module, names)
    return Part(f"text encoder {CLIP}", module, renaming.clip_names(module.state_dict(), ""))


def text_tensors(state: State, length: int) -> StateDict:
    """A text encoder's without prefixes, a counter that older releases stored and unused positions after `length`."""
    plain = {key.removeprefix("transformer.").removeprefix("text_model."): tensor for key, tensor in state.items()}
    plain.pop("embeddings.position_ids", None)
    for positions in ("embeddings.position_embedding.weight", "model.embed_positions.weight"):
        if positions in plain:
            plain[positions] = plain[positions][:length]
    return plain


def unet_tensors(state: State, config: Mapping[str, Any]) -> StateDict:
    """A U-Net's, for a time embedding whose cosines come first and without the class table."""
    tensors, key = modern_names(state), "time_embedding.linear_1.weight"
    if not config.get("flip_sin_to_cos", True) and key in tensors:
        sines, cosines = tensors[key].chunk(2, dim=1)
        tensors[key] = torch.cat([cosines, sines], dim=1)
    if config.get("num_class_embeds") is not None:
        tensors.pop(CLASS_TABLE, None)
    return tensors


def first_stage_tensors(state: State, config: Mapping[str, Any]) -> StateDict:
    """An autoencoder's; with a convolution on one side of the latent alone, the other is the identity."""
    tensors, channels = modern_names(state), config.get("latent_channels", 4)
    used = {name: config.get(f"use_{name}", True) for name in ("quant_conv", "post_quant_conv")}
    for name, width in (("quant_conv", 2 * channels), ("post_quant_conv", channels)):
        if any(used.values()) and not used[name]:
            tensors |= {f"{name}.weight": torch.eye(width)[:, :, None, None], f"{name}.bias": torch.zeros(width)}
    return tensors


def modern_names(state: State) -> dict[str, Tensor]:
    """Tensors of files written before diffusers 0.15, whose attention over pixels had other names."""
    result = {}
    for key, tensor in state.items():
        *parents, module, leaf = key.split(".") if key.count(".") > 1 else ("", "", key)
        if "attentions" in parents and module in _OLD_NAMES:
            key = ".".join([*parents, _OLD_NAMES[module], leaf])
        result[key] = tensor
    return result


def as_official(config: Mapping[str, Any], state_dict: State) -> OfficialModule:
    """diffusers' class of the configuration with these weights, called as there; `.sample` or [0] is the output.

    AutoencoderKL, VQModel, AutoencoderDC: `model.encode(x)` and `model.decode(z)`. DiTTransformer2DModel: `model(x,
    timestep=, class_labels=)`. SD3Transformer2DModel: `model(x, encoder_hidden_states=, pooled_projections=,
    timestep=)`.
    InputError: the weights are not the configuration's.
    """
    if config.keys() & {"latent_channels", "block_out_channels", "encoder_block_out_channels"}:
        part = first_stage_part(arguments(config), kind_of(config))
        part.filled(first_stage_tensors(state_dict, config))
        return OfficialAutoencoder({"stage": part}).eval()
    return transformers.as_official(config, state_dict)


class LatentDistribution(NamedTuple):
    """What AutoencoderKL's `encode` gives: a diagonal Gaussian over raw latents, each (B, C, h, w)."""

    mean: Tensor
    logvar: Tensor

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    @property
    def var(self) -> Tensor:
        return torch.exp(self.logvar)

    def mode(self) -> Tensor:
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        device = None if generator is None else generator.device
        return self.mean + self.std * torch.randn(self.mean.shape, generator=generator, device=device).to(self.mean)


class Encoded(NamedTuple):
    """AutoencoderKL's output of `encode`."""

    latent_dist: LatentDistribution


class Latents(NamedTuple):
    """VQModel's: vectors before the codebook."""

    latents: Tensor


class Latent(NamedTuple):
    """AutoencoderDC's."""

    latent: Tensor


class OfficialAutoencoder(OfficialModule):
    """Our first stage behind the signatures of diffusers' autoencoders; raw latents."""

    stage: Any

    def encode(self, x: Tensor) -> Encoded | Latents | Latent:
        """(B, 3, H, W) in [-1, 1]."""
        posterior: Posterior = self.stage.encode(x)
        if posterior.logvar is None:
            return (Latents if hasattr(self.stage, "quantiser") else Latent)(posterior.mean)
        return Encoded(LatentDistribution(posterior.mean, posterior.logvar))

    def decode(self, z: Tensor) -> Output:
        """(B, C, h, w) => (B, 3, H, W)."""
        return Output(self.stage.decode(z))

    def forward(self, sample: Tensor) -> Output:
        """The reconstruction from the posterior's mean."""
        encoded = self.encode(sample)
        return self.decode(encoded[0].mean if isinstance(encoded, Encoded) else encoded[0])
