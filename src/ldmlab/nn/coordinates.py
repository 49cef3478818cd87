"""Two channels that say where each cell of a feature map is (Liu et al., NeurIPS 2018, "CoordConv")."""

import torch
from torch import Tensor

COORDINATES = 2


def with_coordinates(x: Tensor) -> Tensor:
    """x (B, C, h, w) => (B, C + 2, h, w): after x, row and column of each cell's centre from -1 to 1 at the borders."""
    height, width = x.shape[2:]
    centres = [(2 * torch.arange(side, device=x.device) + 1) / side - 1 for side in (height, width)]
    places = torch.stack(torch.meshgrid(centres, indexing="ij")).to(x.dtype)  # (2, h, w)
    return torch.cat([x, places.expand(len(x), -1, -1, -1)], dim=1)
