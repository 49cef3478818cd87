"""A low-resolution image, without resizing, concatenated to a latent of its size: super-resolution (section 4.4)."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ldmlab.conditioners import BaseConditioner
from ldmlab.contracts import Encode
from ldmlab.errors import InputError
from ldmlab.nn.pixels import to_float


class LowResolution(BaseConditioner):
    """The pixels of `low_resolution` in [-1, 1], (B, 3, h, w), or enlarged bicubically for a model of pixels."""

    idle_without = "factor: enlarge=null"
    reads = frozenset({"low_resolution"})
    slot = "spatial"

    def __init__(
        self,
        drop: float = 0.0,  # rate of grey images in training, for guidance
        enlarge: int | None = 1,  # 1: as it is; otherwise latent size / its size; None: factor / downsampling
        factor: int = 4,  # of the task: large image / small image
        downsampling: int = 4,  # of the first stage; derived in wiring
    ) -> None:
        super().__init__(drop, width=3)  # red, green, blue; grey is the null condition
        if enlarge is None and factor % downsampling:
            raise InputError(
                f"task.factor={factor} is no multiple of the first stage's factor {downsampling}, so that the small "
                "image does not fit the latent; choose another first_stage or task.factor."
            )
        enlarge = factor // downsampling if enlarge is None else enlarge
        if enlarge < 1:
            raise InputError(f"conditioner.low_resolution.enlarge={enlarge} must be at least 1, which changes nothing.")
        self.enlarge = enlarge

    def forward(self, batch: dict[str, Any], encode: Encode) -> Tensor:
        """uint8 (B, 3, h / enlarge, w / enlarge) => (B, 3, h, w) in [-1, 1]."""
        image = to_float(batch["low_resolution"])
        if self.enlarge == 1:
            return image
        return F.interpolate(image, scale_factor=self.enlarge, mode="bicubic").clamp(-1, 1)
