"""How an image is sampled: everything but the model and the conditions."""

from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

from ldmlab.contracts import Sampler
from ldmlab.diffusion.latent_diffusion import LatentDiffusion
from ldmlab.diffusion.windowed import latent_windows
from ldmlab.errors import InputError
from ldmlab.first_stages.tiled import TiledFirstStage
from ldmlab.inference.inputs import SMALL
from ldmlab.samplers import sampler_by_name


@dataclass(frozen=True)
class SampleSettings:
    """Written into every image and every score."""

    steps: int | None = None  # None: the sampler's own, 50 for DDIM, every level of the schedule for DDPM
    guidance_scale: float | None = None  # None: 3 if the model was trained for it, else 1 (off)
    eta: float | None = None  # fresh noise per step: 0 none, 1 as DDPM; None: the sampler's own
    seed: int = 0
    size: int | tuple[int, int] | None = None  # side, or height and width, px; None: as trained
    sampler: str = "ddim"  # a file of ldmlab/samplers/
    spacing: str | None = None  # official | linspace | trailing | karras | log_snr; None: the sampler's own
    strength: float | None = None  # share of the schedule walked from init_image; None: 0.6 if there is one
    repeats: int | None = None  # of each step, to fill a hole by a model not trained for it; None: 5 where it is so
    tile: int | None = None  # side of the first stage's parts, px; 0: the whole at once; None: 512 above 1024x1024
    tile_norms: str = "shared"  # shared | separate: group-norm statistics of the parts
    window: int | None = None  # side of windows that are denoised one by one, px; 0: the whole; None: see parts.py

    def filled(
        self, *, guidance_scale: float, size: tuple[int, int], levels: int, strength: float | None, repeats: int | None
    ) -> "SampleSettings":
        """Without any None but what a given image alone asks for; the sampler's own options are checked."""
        sampler = self.build_sampler()
        if not 0 <= self.seed < 2**64:
            raise InputError(f"seed={self.seed} is outside 0 .. 2^64 - 1; choose a non-negative integer.")
        usual = getattr(sampler, "steps", None) or levels
        steps = usual if self.steps is None else self.steps
        spacing = self.spacing or getattr(sampler, "spacing", "linspace")
        eta = getattr(sampler, "eta", 0.0)
        known: dict[str, Any] = {
            "steps": steps,
            "guidance_scale": guidance_scale,
            "size": size,
            "spacing": spacing,
            "eta": eta,
        }
        return replace(self, strength=strength, repeats=repeats, **known)

    def build_sampler(self) -> Sampler:
        """With eta, if it asks for another than the sampler's own; samplers that have none take 0 as said already."""
        sampler = sampler_by_name(self.sampler)
        if self.eta is None or self.eta == getattr(sampler, "eta", 0.0):
            return sampler
        return sampler_by_name(self.sampler, eta=self.eta)

    def as_text(self) -> dict[str, Any]:
        """Plain values for files; the size as height x width; nothing of images or parts where there are none."""
        values = asdict(self)
        absent = [name for name in ("tile", "window", "strength", "repeats") if not values[name]]
        absent += ["tile_norms"] * (not self.tile)
        values = {name: value for name, value in values.items() if name not in absent}
        if isinstance(self.size, tuple):
            values["size"] = f"{self.size[0]}x{self.size[1]}"
        return values


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
