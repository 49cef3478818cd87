"""The patches of a CLIP image tower: of a run of stage=clip, or a published one of open_clip."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ldmlab.encoders import FrozenEncoder
from ldmlab.errors import InputError
from ldmlab.nn.openclip_towers import build_image_tower


class ClipPatches(FrozenEncoder):
    """Final states of a tower's patches after its last norm, resized to the side that it was trained at."""

    idle_without = "pretrained: name"

    def __init__(
        self,
        name: str | None = None,  # a model of open_clip, such as ViT-B-16, or
        pretrained: str | None = None,  # with name: tag of its weights or path of a file
        config: Mapping[str, Any] | None = None,  # the architecture of a CLIP run; its weights are loaded later
    ) -> None:
        super().__init__()
        if (name is None) == (config is None) or (name is not None and pretrained is None):
            raise InputError(
                "encoder.clip needs weights: give encoder.clip.from_run=RUN, a run of stage=clip, or "
                "encoder.clip.name=ViT-B-16 with encoder.clip.pretrained=openai."
            )
        self.tower, kept = build_image_tower(name, pretrained, config, layer="patches")
        self.node = {"_target_": "ldmlab.encoders.clip_patches.ClipPatches", "config": kept}
        self.name = "CLIP of a run" if name is None else f"open_clip {name} {pretrained}"
        self.width = self.tower.width
        self.train(False)

    def maps(self, images: Tensor) -> Tensor:
        """The patches without the class token."""
        patches = self.tower(images)[:, 1:]  # (B, h' w', D)
        return patches.transpose(1, 2).unflatten(2, self.tower.visual.grid_size)
