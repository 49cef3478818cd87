"""Input images: padding to a size that the model can take, sampling that starts from one, keeping a part of one.

Fields of a batch: init_image (B, 3, H, W), where sampling starts; image (B, 3, H, W) with mask (B, 1, H, W), not zero
in the hole: the rest stays, also for a model that reads neither.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldmlab.contracts import Level, Path
from ldmlab.diffusion.given_image import GivenImage, hole_of_latents, painted_over
from ldmlab.diffusion.latent_space import LatentSpace
from ldmlab.errors import InputError
from ldmlab.inference.inputs import ON_THE_IMAGE, SMALL
from ldmlab.nn.pixels import to_float


def started_at(grid: list[Level], strength: float, path: Path) -> list[Level]:
    """The levels of a grid up to that fraction of the path, and the end."""
    times = torch.tensor([level.time for level in grid[:-1]], dtype=torch.float64)
    inside = (path.position(times) <= strength + 1e-9).tolist()
    kept = [level for level, keep in zip(grid, [*inside, True], strict=True) if keep]
    if len(kept) < 2:
        raise InputError(f"strength={strength} leaves none of {len(grid) - 1} steps; raise the strength or the steps.")
    return kept


def on_canvas(
    batch: Mapping[str, Any], size: tuple[int, int], step: int, enlargement: int
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Height and width that can be sampled and hold `size`, and the batch's images, masks and maps padded to them.

    The last row and column are repeated.
    """
    unit = math.lcm(step, enlargement) if SMALL in batch else step
    canvas = math.ceil(size[0] / unit) * unit, math.ceil(size[1] / unit) * unit
    wider = dict(batch)
    for name in (*ON_THE_IMAGE, SMALL):
        if name in batch:
            values, factor = batch[name], enlargement if name == SMALL else 1
            rows, columns = (
                torch.arange(length // factor, device=values.device).clamp(max=side - 1)
                for length, side in zip(canvas, values.shape[-2:], strict=True)
            )
            wider[name] = values[..., rows[:, None], columns]
    return canvas, wider


def given_image(
    space: LatentSpace, batch: Mapping[str, Any], reads: frozenset[str], repeats: int | None
) -> GivenImage | None:
    """Start image and known part of a padded batch; a model with a mask input needs no known part."""
    source = space.encode(to_float(batch["init_image"])) if "init_image" in batch else None
    if "mask" not in batch or "mask" in reads:
        return None if source is None else GivenImage(source)
    known = space.encode(painted_over(to_float(batch["image"]), batch["mask"]))
    hole = hole_of_latents(batch["mask"], int(space.first_stage.downsampling))  # type: ignore[arg-type]
    return GivenImage(source, known, hole, repeats or 1)


def finished(images: Tensor, batch: Mapping[str, Any], size: tuple[int, int]) -> Tensor:
    """Generated uint8 (B, H, W, 3) without the padding; known pixels of uint8 `image` bit for bit."""
    images = images[:, : size[0], : size[1]]
    if "mask" not in batch or "image" not in batch:
        return images.contiguous()
    hole, image = (batch[name].cpu().permute(0, 2, 3, 1) for name in ("mask", "image"))
    return torch.where(hole != 0, images, image)
