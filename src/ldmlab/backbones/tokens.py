"""What the transformers share: patches as tokens, norms, modulation, the block that is aligned, and token routing.

Routing is TREAD's (Krause et al. 2025, arXiv 2501.04765): in training some patches skip a range of blocks. They leave
the sequence before the first block of the route and come back as they were after its last one. Shapes: B batch, N
tokens, K tokens that stay, D width, d width of a head, C channels, p side of a patch.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldmlab.errors import InputError
from ldmlab.nn.blocks import LayerNorm, RMSNorm
from ldmlab.nn.positions import Rotation

EPSILON = 1e-6  # of every norm but LayerNorm on queries and keys, which has 1e-5
TIME_CHANNELS = 256


def modulate(x: Tensor, shift: Tensor | None, scale: Tensor) -> Tensor:
    """x (B, N, D), shift and scale (B, D) => x (1 + scale) + shift."""
    x = x * (1 + scale[:, None])
    return x if shift is None else x + shift[:, None]


def unpatched(tokens: Tensor, p: int, rows: int, columns: int) -> Tensor:
    """(B, rows columns, p p C) => (B, C, p rows, p columns)."""
    out = tokens.unflatten(2, (p, p, -1)).unflatten(1, (rows, columns))  # (B, rows, columns, p, p, C)
    return out.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def plain_norm(width: int, eps: float = EPSILON) -> nn.Module:
    return LayerNorm(width, eps=eps, elementwise_affine=False)


def gained_norm(width: int) -> nn.Module:
    return RMSNorm(width, eps=EPSILON)


def chosen_block(depth: int, block: int | None) -> int:
    """The number, from 1, of a transformer's block; None: 2 / 7 of the depth, rounded up."""
    block = -(-2 * depth // 7) if block is None else block
    if not 1 <= block <= depth:
        raise InputError(f"alignment.block={block} is no block of 1 .. {depth}; choose one of them.")
    return block


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
