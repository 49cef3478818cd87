"""Large images in parts: which parts, where nobody chose them.

Two things grow with an image: the feature maps of the first stage, and those of the denoiser. `tile` bounds the
first; the result is that of the whole but for rounding. `window` bounds the second; it changes the image, because
the denoiser no longer sees beyond a window.
"""

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from ldmlab.diffusion.latent_diffusion import LatentDiffusion
from ldmlab.diffusion.windowed import latent_windows
from ldmlab.errors import InputError
from ldmlab.evaluation.request_fields import SMALL
from ldmlab.evaluation.settings import SampleSettings
from ldmlab.first_stages.tiled import TiledFirstStage

LARGE = 1024 * 1024  # pixels; images above go through the first stage in parts
TILE = 512  # px


def with_parts(
    settings: SampleSettings,  # with a size
    diffusion: LatentDiffusion,
    trained: int,  # shorter side of the images it was trained on, px
    reads: frozenset[str],
) -> SampleSettings:
    """Settings with tile and window filled in, 0 where the whole is taken at once; what cannot be is refused."""
    assert isinstance(settings.size, tuple)
    size = settings.size
    tile = chosen_tile(settings.tile, size[0] * size[1])
    if tile:
        TiledFirstStage(diffusion.first_stage, tile, settings.tile_norms)
    window = settings.window
    if window is None:
        window = trained if SMALL in reads and max(size) > 2 * trained else 0
    if window:
        latent_windows(size, window, int(diffusion.first_stage.downsampling))  # type: ignore[arg-type]
        if "boxes" in reads:
            raise InputError(
                f"window={window} would draw all boxes in every window; leave it out and sample the whole at once."
            )
    return replace(settings, tile=tile, window=window)


def chosen_tile(tile: int | None, pixels: int) -> int:
    """The side asked for, or 512 for images above 1024 x 1024; 0: the whole at once."""
    return (TILE if pixels > LARGE else 0) if tile is None else tile


def in_parts(diffusion: LatentDiffusion, tile: int | None, norms: str = "shared") -> AbstractContextManager[Any]:
    """Inside, the model encodes and decodes in parts of `tile` pixels; 0 or None: at once."""
    return diffusion.through(TiledFirstStage(diffusion.first_stage, tile, norms) if tile else None)
