"""Pixels, raw latents and final latents: a first stage and the latent scale, frozen.

Pixels (B, 3, H, W) are in [-1, 1]; only this file sees raw latents; final latents (B, C, h, w) are normalised.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from ldmlab.contracts import Conditioning, FirstStage, Posterior
from ldmlab.errors import InputError
from ldmlab.nn.pixels import to_float
from ldmlab.randomness import draw


class LatentScale(nn.Module):
    """final = (raw - shift) / std, one number or one per channel; both are saved with the model."""

    exact = True  # stays float32 in every precision of training
    std: Tensor
    shift: Tensor

    def __init__(self, std: float | Sequence[float] = 1.0, shift: float | Sequence[float] = 0.0) -> None:
        super().__init__()
        std_table, shift_table = (torch.atleast_1d(torch.as_tensor(v, dtype=torch.float32)) for v in (std, shift))
        if not bool((torch.isfinite(std_table) & (std_table > 0)).all()):
            raise InputError(f"the latent scale std={std} is not above zero; encode the images again to measure it.")
        self.register_buffer("std", std_table)  # (1,) or (C,)
        self.register_buffer("shift", shift_table)  # (1,) or (C,)

    @classmethod
    def fixed(cls, factor: float) -> "LatentScale":
        """The official `scale_factor`, by which raw latents are multiplied (0.18215, 1.0)."""
        return cls(1.0 / factor)

    @classmethod
    def measured(cls, statistics: Mapping[str, Any], per_channel: bool = False) -> "LatentScale":
        """From a latent manifest's statistics: one number as in the paper, or one per channel."""
        if per_channel:
            return cls(statistics["std"], statistics["mean"])
        return cls(statistics["overall_std"])

    def normalise(self, raw: Tensor) -> Tensor:
        """Raw latents (B, C, h, w) => final latents, float32."""
        return (raw.float() - self.shift.float()[:, None, None]) / self.std.float()[:, None, None]

    def denormalise(self, final: Tensor) -> Tensor:
        """Final latents (B, C, h, w) => raw latents, float32."""
        return final.float() * self.std.float()[:, None, None] + self.shift.float()[:, None, None]


class LatentSpace(nn.Module):
    """The space in which diffusion works: encode, decode, latents of training batches."""

    def __init__(self, first_stage: nn.Module, latent_scale: LatentScale) -> None:
        super().__init__()
        self.first_stage = first_stage.requires_grad_(False).eval()
        self.latent_scale = latent_scale
        self.encoder_precision = "float32"  # of images to latents: float32 | bfloat16
        self._instead: FirstStage | None = None

    def train(self, mode: bool = True) -> Self:
        """Training mode for all but the first stage, which never leaves evaluation."""
        super().train(mode)
        self.first_stage.eval()
        return self

    @torch.no_grad()
    def posterior(self, pixels: Tensor) -> Posterior:
        """Raw latents of pixels, in the encoder's precision also under autocast."""
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.encoder_precision == "bfloat16"):
            return self._stage.encode(pixels.float())

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] => final latents, the posterior's mean."""
        return self.latent_scale.normalise(self.posterior(pixels).mean)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Final latents (B, C, h, w) => pixels (B, 3, H, W) in about [-1, 1]."""
        return self._stage.decode(self.latent_scale.denormalise(latents))

    def quantised(self, latents: Tensor) -> Tensor:
        """Final latents whose raw ones are the nearest codebook vectors; in the input's dtype."""
        quantise = getattr(self.first_stage, "quantise", None)
        if quantise is None:
            name = type(self.first_stage).__name__
            raise InputError(f"sampler.quantize_x0=true: the first stage {name} has no codebook; leave it out.")
        return self.latent_scale.normalise(quantise(self.latent_scale.denormalise(latents))).to(latents.dtype)

    def pixels(self, latents: Tensor) -> Tensor:
        """As `decode` with the first stage itself, with gradients for the latents."""
        return self.first_stage.decode(self.latent_scale.denormalise(latents))  # type: ignore[operator]

    @torch.no_grad()
    def latents(self, batch: dict[str, Any], seed: int) -> Tensor:
        """Final latents of a training batch, sampled from the posterior by (seed, position); float32."""
        return self.latents_and_numbers(batch, seed)[0]

    @torch.no_grad()
    def latents_and_numbers(
        self, batch: dict[str, Any], seed: int, uniforms: Sequence[str] = (), noise: bool = False,
        offset: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """As `latents`, and random numbers by purpose, of one call: "noise" of their shape, and (B,) uniform.

        offset: normal numbers (B, C, 1, 1) too.
        """
        if "moments" in batch:
            posterior = Posterior.from_moments(batch["moments"].float(), self._stage.latent_channels)
        elif "image" in batch:
            posterior = self.posterior(to_float(batch["image"]))
        else:
            raise InputError("the batches hold neither latents nor images; choose data= with one of them.")
        purposes = ["posterior"] * (posterior.logvar is not None) + ["noise"] * noise
        shape = tuple(posterior.mean.shape[1:])
        shapes = dict.fromkeys(purposes, shape) | ({"offset": (shape[0], 1, 1)} if offset else {})
        numbers = draw(seed, batch["position"], shapes, uniforms)
        raw = posterior.sample(numbers["posterior"]) if "posterior" in numbers else posterior.mean
        return self.latent_scale.normalise(raw), numbers

    @contextmanager
    def through(self, first_stage: FirstStage | None) -> Iterator[None]:
        """Inside, images are encoded and decoded by this first stage, which works in tiles with the same latents."""
        before, self._instead = self._instead, first_stage
        try:
            yield
        finally:
            self._instead = before

    @property
    def _stage(self) -> FirstStage:
        return self._instead or self.first_stage  # type: ignore[return-value]


# ---- conditioning beside the latents


def joined(parts: Iterable[tuple[str, Tensor]]) -> Conditioning:
    """Values by slot, several on one joined: tokens by length, spatial by channels, vectors summed."""
    values: dict[str, list[Tensor]] = {}
    for slot, value in parts:
        values.setdefault(slot, []).append(value)
    sizes = {f"{part.shape[2]} x {part.shape[3]}" for part in values.get("spatial", [])}
    if len(sizes) > 1:
        raise InputError(f"spatial conditions come at {' and '.join(sorted(sizes))}; give images of one size.")
    slots = {slot: several[0] for slot, several in values.items()}
    for slot, several in values.items():
        if len(several) > 1:
            slots[slot] = torch.stack(several).sum(0) if slot == "vector" else torch.cat(several, dim=1)
    return Conditioning(**slots)


def check_size(conditioning: Conditioning, x: Tensor) -> None:
    """What is concatenated to the latent has its height and width, or is refused."""
    spatial = conditioning.spatial
    if spatial is not None and spatial.shape[2:] != x.shape[2:]:
        raise InputError(
            f"spatial conditions are {spatial.shape[2]} x {spatial.shape[3]}, the latent {x.shape[2]} x "
            f"{x.shape[3]}; give images of the size to be made, or a low resolution of the latent's size."
        )
