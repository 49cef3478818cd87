"""The image tower of a CLIP model, with its preprocessing."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ldmlab.errors import InputError, one_of
from ldmlab.nn.openclip import OpenClip, Tower, build_clip, clip_pixels

_NO_TEXT = {"context_length": 8, "vocab_size": 514, "width": 64, "heads": 1, "layers": 1}


class ImageTower(Tower):
    """Images to the states of a CLIP image tower; tensor names as in open_clip's CLIP class (`visual.*`)."""

    kind = "image"

    def __init__(self, clip: OpenClip, layer: str = "embedding") -> None:
        """layer: embedding, in the space shared with captions, not normalised | patches, the final states."""
        super().__init__()
        visual: Any = clip.model.visual
        one_of("conditioner.layer", layer, ("embedding", "patches"))
        if layer == "patches" and (
            getattr(visual, "attn_pool", None) is not None or not hasattr(visual, "class_embedding")
        ):
            raise InputError("conditioner.layer=patches needs a plain vision transformer; choose embedding.")
        self.visual, self.layer = visual, layer
        self.image_size, self.mean, self.std = clip.image_size, clip.mean, clip.std
        self.length = 1 + math.prod(visual.grid_size) if layer == "patches" else 1  # tokens
        self.width: int = visual.transformer.width if layer == "patches" else int(clip.config["embed_dim"])

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], any size => (B, 1, E); of `patches` (B, 1 + patches, width), class token first."""
        pixels = self.pixels(images)
        if self.layer == "embedding":
            found = self.visual(pixels)
            return (found[0] if isinstance(found, tuple) else found)[:, None]
        last = self.visual.forward_intermediates(
            pixels, indices=1, normalize_intermediates=True, intermediates_only=True, output_fmt="NLC",
            output_extra_tokens=True,
        )  # fmt: skip
        return torch.cat([last["image_intermediates_prefix"][-1], last["image_intermediates"][-1]], dim=1)

    def pixels(self, images: Tensor) -> Tensor:
        """As the tower was trained: short side resized, middle cut, normalised, (B, 3, image_size, image_size)."""
        size, short = self.image_size, min(images.shape[-2:])
        if images.shape[-1] != images.shape[-2]:
            sides = [size if side == short else int(size * side / short) for side in images.shape[-2:]]
            images = F.interpolate(images, sides, mode="bicubic", antialias=True).clamp(-1, 1)
            top, left = (round((side - size) / 2) for side in sides)
            images = images[..., top : top + size, left : left + size]
        return clip_pixels(images, size, self.mean, self.std)


def build_image_tower(
    name: str | None = None,  # of a published architecture, or
    pretrained: str | None = None,  # with name: tag of its weights or path of a file
    config: Mapping[str, Any] | None = None,  # an architecture of our own, fresh weights
    layer: str = "embedding",
) -> tuple[ImageTower, dict[str, Any]]:
    """The tower and the configuration that rebuilds it; of `config` no text tower of real size is built."""
    clip = build_clip(name, pretrained) if config is None else build_clip(config={**config, "text_cfg": _NO_TEXT})
    return ImageTower(clip, layer), {**clip.config, "text_cfg": dict(_NO_TEXT)}
