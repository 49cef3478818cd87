"""The towers of a CLIP model of open_clip, each alone: text to states per token, images with preprocessing."""

import math
from collections.abc import Mapping
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldmlab.errors import InputError, one_of
from ldmlab.nn.openclip import OpenClip, build_clip, clip_pixels, from_config

_NO_TEXT = {"context_length": 8, "vocab_size": 514, "width": 64, "heads": 1, "layers": 1}


class Tower(nn.Module):
    """One half of a CLIP model, under the names of open_clip's CLIP class but for what `clip_names` says."""

    kind: str

    def load_clip(self, tensors: Mapping[str, Tensor]) -> None:
        """Weights from the state dict of a whole CLIP model; the other half is left aside."""
        named = {name.removeprefix("text."): tensor for name, tensor in tensors.items()}
        names, shapes = self.clip_names(), {name: tensor.shape for name, tensor in self.state_dict().items()}
        missing = [c for name, c in names.items() if c not in named or named[c].shape != shapes[name]]
        if missing:
            raise InputError(f"the CLIP weights do not fit the {self.kind} tower ({missing[0]}); use its own config.")
        self.load_state_dict({name: named[c] for name, c in names.items()})

    def clip_names(self) -> dict[str, str]:
        """Name of each tensor here => its name in the state dict of open_clip's CLIP class."""
        return {name: name for name in self.state_dict()}


class TextTower(Tower):
    """The text half of a CLIP model up to its states per token; tensor names as in open_clip's CLIP class."""

    kind = "text"

    def __init__(self, clip: nn.Module, layer: str = "last", unused: bool = False) -> None:
        """layer: last | penultimate, each followed by the final norm | pooled, the last at the caption's end.

        Blocks that are not run are left out, or with `unused` kept under `unused.*` with the other idle weights.
        """
        super().__init__()
        text: Any = clip.text if isinstance(clip, open_clip.CustomTextCLIP) else clip
        if getattr(text, "cls_emb", None) is not None or not hasattr(text, "token_embedding"):
            raise InputError("the text tower of this model is not CLIP's; choose a CLIP model such as ViT-B-32.")
        one_of("conditioner.layer", layer, ("last", "penultimate", "pooled"))
        self.layer = layer
        self.token_embedding = text.token_embedding
        self.positional_embedding = text.positional_embedding
        self.transformer = text.transformer
        idle = self.transformer.resblocks[-1:] if layer == "penultimate" else []
        if layer == "penultimate":
            self.transformer.resblocks = self.transformer.resblocks[:-1]
        self.ln_final = text.ln_final
        self.unused = _Unused(clip, text, idle) if unused else None
        self.causal = text.attn_mask is not None
        self.context_length: int = text.context_length
        self.width: int = text.transformer.width

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (B, L) => states (B, L, width), pooled (B, 1, width)."""
        x = self.token_embedding(ids) + self.positional_embedding
        mask = torch.full((ids.shape[1],) * 2, -torch.inf, dtype=x.dtype, device=x.device).triu(1)
        states = self.ln_final(self.transformer(x, attn_mask=mask if self.causal else None))
        if self.layer != "pooled":
            return states
        ends = ids.argmax(1)  # the end token has the largest number
        return states[torch.arange(len(ids), device=ids.device), ends][:, None]

    def clip_names(self) -> dict[str, str]:
        idle = f"transformer.resblocks.{len(self.transformer.resblocks)}."
        return {n: n.replace("unused.blocks.0.", idle).removeprefix("unused.") for n in self.state_dict()}


class _Unused(nn.Module):
    """Weights of a published text tower that no output here depends on; frozen, so that none waits for a gradient."""

    def __init__(self, clip: nn.Module, text: Any, blocks: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.text_projection = text.text_projection
        self.logit_scale = clip.logit_scale
        self.requires_grad_(False)


def build_text_tower(config: Mapping[str, Any], layer: str = "last", unused: bool = False) -> TextTower:
    """The text tower of a configuration with fresh weights; the image tower is never built at its real size."""
    tiny = {"layers": 1, "width": 64, "head_width": 64, "patch_size": 32, "image_size": 32}
    return TextTower(from_config({**config, "vision_cfg": tiny}), layer, unused)


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
