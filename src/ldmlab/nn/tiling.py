"""Large maps in parts: where the parts lie, and how what they give becomes one map again without a seam.

A denoiser runs in overlapping windows of the training size: in every step each window is denoised on its own and the
clean estimates are averaged where windows overlap (Bar-Tal et al., "MultiDiffusion", ICML 2023, eq. 5, with weights
that fall towards the edges). The estimate is affine in the network's output, so averaging either is the same. The
windows grow together step by step: no seam is left to blend, and the network's memory is that of one window.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldmlab.contracts import Conditioning, Denoise, Level
from ldmlab.errors import InputError

Span = tuple[int, int]  # first, one past the last
Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class Window:
    """A part of a map, and the share that it has in every place of it; the shares of all parts add up to 1."""

    rows: slice
    columns: slice
    weight: Tensor  # (h, w) float32

    def of(self, x: Tensor) -> Tensor:
        """(..., H, W) => this part, a view (..., h, w)."""
        return x[..., self.rows, self.columns]


def latent_side(option: str, side: int, downsampling: int, least: int) -> int:
    """Side of a part in latent pixels, of one in pixels; InputError unless it is whole and at least `least`."""
    if side < least * downsampling or side % downsampling:
        near = max(round(side / downsampling), least) * downsampling
        raise InputError(
            f"{option}={side} is not at least {least} latent pixels of f={downsampling}; choose for instance {near}."
        )
    return side // downsampling


def spans(length: int, part: int, overlap: int) -> list[Span]:
    """Parts of one size, evenly spread over 0 .. length, neighbours sharing at least `overlap`."""
    if length <= part:
        return [(0, length)]
    count = -(-(length - overlap) // (part - overlap))  # rounded up
    starts = [round(k * (length - part) / (count - 1)) for k in range(count)]
    return [(start, start + part) for start in starts]


def windows(size: Size, part: int, overlap: int, scale: int = 1) -> list[Window]:
    """Square parts that cover a map of `size`; weights rise and fall in a line over `overlap`.

    With `scale` the windows of a map that is so many times larger, cut in the same places.
    """
    if part < 1 or not 0 <= overlap <= part // 2:
        raise InputError(
            f"parts of {part} overlapping by {overlap} do not fit; choose an overlap of up to half a part."
        )
    ways = [[(a * scale, b * scale) for a, b in spans(side, part, overlap)] for side in size]
    shares = [_shares(way, overlap * scale) for way in ways]
    return [
        Window(slice(*rows), slice(*columns), torch.outer(share_of_rows, share_of_columns))
        for rows, share_of_rows in zip(ways[0], shares[0], strict=True)
        for columns, share_of_columns in zip(ways[1], shares[1], strict=True)
    ]


def _shares(parts: Sequence[Span], overlap: int) -> list[Tensor]:
    """Trapezoids along one axis, divided by their sum."""
    shares, total = [], torch.zeros(parts[-1][1])
    for start, stop in parts:
        place = torch.arange(start, stop) + 0.5
        share = torch.ones(stop - start)
        if overlap and start > 0:
            share = share.minimum((place - start) / overlap)
        if overlap and stop < len(total):
            share = share.minimum((stop - place) / overlap)
        total[start:stop] += share
        shares.append(share)
    return [share / total[start:stop] for share, (start, stop) in zip(shares, parts, strict=True)]


def blended(give: Callable[[int], Tensor], parts: Sequence[Window]) -> Tensor:
    """The result of window i, (B, C, h, w) => the whole, (B, C, H, W), at least float32; one at a time."""
    whole: Tensor | None = None
    for i, window in enumerate(parts):
        part = give(i)
        if whole is None:
            size = max(p.rows.stop for p in parts), max(p.columns.stop for p in parts)
            exact = torch.promote_types(part.dtype, torch.float32)
            whole = torch.zeros(*part.shape[:2], *size, device=part.device, dtype=exact)
        window.of(whole).add_(part.to(whole.dtype) * window.weight.to(whole))
    assert whole is not None
    return whole


Bind = Callable[[Conditioning, Conditioning | None], Denoise]  # conditions, null conditions => denoiser


def latent_windows(size: tuple[int, int], window: int, downsampling: int) -> list[Window]:
    """Windows of `window` pixels over latents of (height, width), overlapping by a quarter."""
    part = latent_side("window", window, downsampling, least=4)
    return windows(size, part, part // 4)


def windowed(bind: Bind, parts: Sequence[Window]) -> Bind:
    """As `bind`, window by window; what is concatenated to the latent is cut with it."""

    def cut(conditioning: Conditioning, part: Window) -> Conditioning:
        spatial = conditioning.spatial
        return replace(conditioning, spatial=None if spatial is None else part.of(spatial))

    def bind_all(conditioning: Conditioning, null: Conditioning | None) -> Denoise:
        if conditioning.spatial is None:
            bound = [bind(conditioning, null)] * len(parts)
        else:
            bound = [bind(cut(conditioning, part), null and cut(null, part)) for part in parts]

        def denoise(x: Tensor, level: Level) -> Tensor:
            return blended(lambda i: bound[i](parts[i].of(x), level), parts)

        return denoise

    return bind_all
