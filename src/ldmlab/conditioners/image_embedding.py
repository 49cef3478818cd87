"""An image to its embedding by a frozen CLIP image tower, instead of a caption's states: variations of images.

As in the published "image variations" models the projected embedding, not normalised, is one token of cross-attention,
and the null condition is zeros. Zeros need no weight of their own, so the whole conditioner stays frozen and outside of
checkpoints, and no embedding is near them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmlab.checkpoints import fingerprint, load_tensors
from ldmlab.conditioners import BaseConditioner
from ldmlab.contracts import Encode
from ldmlab.errors import InputError
from ldmlab.nn.openclip import check_source
from ldmlab.nn.openclip_towers import ImageTower, build_image_tower
from ldmlab.nn.pixels import to_float


class ImageEmbedding(BaseConditioner):
    """Tokens (B, L, D) of the images `reference`: uint8 (B, 3, H, W), or one (3, H, W) each of their own size."""

    reads = frozenset({"reference"})
    slot = "tokens"

    def __init__(self, tower: ImageTower, drop: float = 0.1) -> None:
        super().__init__(drop, tower.width)
        self.tower = tower
        self.node: dict[str, Any] = {}  # for model.yaml: what `open_clip_image` needs to rebuild it without a network
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "ImageEmbedding":
        """A frozen tower stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, batch: dict[str, Any], encode: Encode) -> Tensor:
        """In float32, also under autocast."""
        images = batch["reference"]
        device = next(self.parameters()).device
        with torch.autocast(device.type, enabled=False):
            if isinstance(images, Tensor):
                return self.tower(to_float(images.to(device)))
            return torch.cat([self.tower(to_float(image[None].to(device))) for image in images])

    def made_by(self) -> dict[str, Any]:
        """Everything that determines the tokens, as plain data; stored with them."""
        config = self.node.get("config", {})
        built = {name: config.get(name) for name in ("vision_cfg", "quick_gelu")}
        pixels = {"mean": list(self.tower.mean), "std": list(self.tower.std)}
        return {"layer": self.tower.layer, **built, **pixels, "weights": fingerprint(self.state_dict())}

    def null(self, batch: dict[str, Any], encode: Encode) -> Tensor:
        count = len(batch["reference"] if "reference" in batch else batch["position"])
        return torch.zeros(count, self.tower.length, self.tower.width, device=next(self.parameters()).device)


def open_clip_image(
    name: str | None = None,  # published architecture, such as ViT-L-14, or
    pretrained: str | None = None,  # with name: tag of its weights or path of a file
    config: Mapping[str, Any] | None = None,  # architecture of our own, as in the model.yaml of a CLIP run
    weights: str | None = None,  # with config: .safetensors of the CLIP model; None: loaded later
    layer: str = "embedding",  # embedding, one token | patches, the final state of each patch and of the class token
    drop: float = 0.1,
) -> ImageEmbedding:
    """The image conditioner of a published model or of a CLIP run of ours; exactly one of `name` and `config`."""
    if name is None and config is None:
        raise InputError("conditioner: give either name or config (in training: from_run, a CLIP run of yours).")
    check_source("conditioner", name, pretrained, config, weights)
    tower, full = build_image_tower(name, pretrained, config, layer)
    if weights is not None:
        tower.load_clip(load_tensors(Path(weights)))
    image = ImageEmbedding(tower, drop)
    kept = {"config": full, "layer": layer, "drop": drop}
    image.node = {"_target_": "ldmlab.conditioners.image_embedding.open_clip_image", **kept}
    return image
