"""diffusers' classes with given weights, over our modules and called as there (read from version 0.42)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldmlab.contracts import Posterior
from ldmlab.interop.diffusers import diffusers_transformers as transformers
from ldmlab.interop.diffusers.diffusers_first_stages import arguments, kind_of
from ldmlab.interop.diffusers.diffusers_networks import first_stage_part, first_stage_tensors
from ldmlab.interop.diffusers.diffusers_transformers import Output
from ldmlab.interop.renaming import OfficialModule, State


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
