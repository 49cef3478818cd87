"""Label maps, scaled down and mapped to a few channels, concatenated to the latent (section 4.3.2)."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldmlab.conditioners import BaseConditioner, check_classes
from ldmlab.contracts import Encode
from ldmlab.errors import InputError, one_of


class SpatialRescaler(BaseConditioner):
    """conv(resize(.. one_hot(labels))), (B, channels, h, w): `stages` resizes, then a 1 x 1 convolution."""

    idle_without = "bias: channels!=null, method multiplier: stages!=0"
    reads = frozenset({"segmentation"})
    slot = "spatial"

    def __init__(
        self,
        classes: int = 182,  # of the label maps, numbered from 0
        channels: int | None = 3,  # input channels of the denoiser; None: one a class, without the convolution
        stages: int | None = 2,  # resizes; multiplier^stages is one over the downsampling; None: as many as that takes
        multiplier: float = 0.5,  # of each resize
        method: str = "bilinear",  # nearest | bilinear | bicubic | area
        bias: bool = False,  # of the convolution
        drop: float = 0.0,  # rate of empty maps in training, for guidance
        downsampling: int = 4,  # of the first stage, where stages is None; derived in wiring
    ) -> None:
        super().__init__(drop, classes if channels is None else channels)
        stages = round(math.log(downsampling) / -math.log(multiplier)) if stages is None else stages
        one_of("conditioner.method", method, ("nearest", "bilinear", "bicubic", "area"))
        self.classes, self.stages, self.multiplier, self.method = classes, stages, multiplier, method
        self.channels = nn.Conv2d(classes, channels, 1, bias=bias) if channels is not None else None

    def forward(self, batch: dict[str, Any], encode: Encode) -> Tensor:
        """Label maps `segmentation` (B, H, W), 0 .. classes - 1 => (B, channels, h, w)."""
        labels = torch.as_tensor(batch["segmentation"])
        check_classes("segmentation", labels, "conditioner.classes", self.classes)
        if self.channels is None:
            return self.rescale(F.one_hot(labels.long(), self.classes).movedim(-1, 1).float())
        # The convolution and the resize commute; a table look-up first spares maps of `classes` channels.
        table = self.channels.weight.flatten(1).T  # (classes, channels)
        maps = self._resize(F.embedding(labels.long().to(table.device), table).movedim(-1, 1))
        return maps if self.channels.bias is None else maps + self.channels.bias[:, None, None]

    def check(self, fields: Mapping[str, Any]) -> None:
        """Refuse one image's label map (H, W) with numbers that are no class."""
        labels = torch.as_tensor(fields["segmentation"])
        unknown = labels[(labels < 0) | (labels >= self.classes)].unique().tolist()
        if unknown:
            listed = ", ".join(map(str, unknown[:3])) + (", ..." if len(unknown) > 3 else "")
            raise InputError(
                f"segmentation holds {listed}, but the classes of this model are 0 .. {self.classes - 1}; "
                "renumber the map."
            )

    def rescale(self, maps: Tensor) -> Tensor:
        """Any maps (B, classes, H, W), float => (B, channels, h, w): soft label maps."""
        maps = self._resize(maps)
        return maps if self.channels is None else self.channels(maps)

    def _resize(self, maps: Tensor) -> Tensor:
        for _ in range(self.stages):
            maps = F.interpolate(maps, scale_factor=self.multiplier, mode=self.method)
        return maps
