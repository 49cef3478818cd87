"""Denoising of large latents in overlapping windows of the training size.

In every step each window is denoised on its own and the clean estimates are averaged where windows overlap (Bar-Tal et
al., "MultiDiffusion", ICML 2023, eq. 5, with weights that fall towards the edges). The estimate is affine in the
network's output, so averaging either is the same. The windows grow together step by step: no seam is left to blend,
and the network's memory is that of one window.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from ldmlab.contracts import Conditioning, Denoise, Level
from ldmlab.nn.tiling import Window, blended, latent_side, windows

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
