"""Token routing of TREAD (Krause et al. 2025, arXiv 2501.04765): in training some patches skip a range of blocks.

They leave the sequence before the first block of the route and come back as they were after its last one. Shapes: B
batch, N tokens, K tokens that stay, D width, d width of a head.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ldmlab.errors import InputError
from ldmlab.nn.positions import Rotation


class TokenRoute(NamedTuple):
    """Blocks first .. last, from 1, that a share of the patches skips."""

    first: int
    last: int
    share: float

    def checked(self, depth: int) -> "TokenRoute":
        """InputError for blocks that there are not, and for a share of none or all."""
        if not (1 <= self.first <= self.last <= depth and 0 < self.share < 1):
            raise InputError(
                f"backbone.route={[self.first, self.last]}, route_share={self.share}: give two blocks of 1 .. {depth}, "
                "the first one first, and a share between 0 and 1."
            )
        return self

    def check_whole(self, block: int) -> None:
        """InputError for a block of the route, whose output lacks patches."""
        if self.first <= block <= self.last:
            raise InputError(
                f"alignment.block={block} is inside backbone.route={[self.first, self.last]}, where patches are "
                "missing; choose a block before or after it."
            )

    def kept(self, h: Tensor, joined: int) -> Tensor:
        """Numbers (B, K) of the tokens that stay: the first `joined`, and patches drawn anew for every image."""
        drawn = torch.rand(h.shape[:2], device=h.device)
        drawn[:, :joined] = 2.0
        patches = h.shape[1] - joined
        return drawn.argsort(dim=1, descending=True)[:, : joined + patches - int(self.share * patches)]


def taken(h: Tensor, rotation: Rotation | None, kept: Tensor) -> tuple[Tensor, Rotation | None]:
    """Tokens (B, N, D) and their rotations => (B, K, D), and rotations (B, 1, K, d)."""
    turns = None if rotation is None else (rotation[0][0, 0][kept][:, None], rotation[1][0, 0][kept][:, None])
    return h.gather(1, kept[..., None].expand(-1, -1, h.shape[2])), turns


def returned(whole: Tensor, h: Tensor, kept: Tensor) -> Tensor:
    """The tokens before the route (B, N, D), those that stayed as they are now."""
    return whole.scatter(1, kept[..., None].expand_as(h), h.to(whole.dtype))
