"""Guiders from choices (conf/guiders, `ldmlab sample`), checked against the model that they are to guide."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldmlab.build import load_classifier
from ldmlab.checkpoints import fingerprint
from ldmlab.diffusion.guidance import ClassifierGuider, Guider, ImageGuider, squared_error
from ldmlab.diffusion.schedule import levels_of
from ldmlab.errors import InputError
from ldmlab.instantiate import instantiate

if TYPE_CHECKING:
    from ldmlab.diffusion.latent_diffusion import LatentDiffusion
    from ldmlab.inference.model import LoadedModel

DISTANCES = ("squared", "lpips")
_SAME_SCALE = 0.01  # relative; a classifier does not notice less, and two measurements of one scale may differ so


def build_guiders(config: Mapping[str, Mapping[str, Any]], model: "LoadedModel") -> list[Guider]:
    """The guiders of conf/guiders, in their order."""
    return [instantiate(node, where=f"guidance.{name}", model=model) for name, node in config.items()]


def classifier_guider(run: Path | str, model: "LoadedModel", scale: float = 10.0) -> ClassifierGuider:
    """By the classifier of a stage=classifier run; one of other latents or another schedule is refused."""
    loaded = load_classifier(run)
    _check_same_latents(str(run), loaded.spec, model.diffusion)
    return ClassifierGuider(loaded.module.to(model.device), scale, name=str(run))


def _check_same_latents(run: str, spec: Mapping[str, Any], diffusion: "LatentDiffusion") -> None:
    """The classifier must have learned on what the sampler shows it."""
    scale = instantiate(spec["latent_scale"], where="latent_scale")
    ours = diffusion.latent_scale
    theirs, levels = (levels_of(s) for s in (instantiate(spec["schedule"], where="schedule"), diffusion.schedule))
    differs = {
        "first stage": spec["first_stage_fingerprint"] != fingerprint(diffusion.first_stage.state_dict()),
        "latent scale": not (_near(scale.std, ours.std) and _near(scale.shift, ours.shift, ours.std)),
        "noise schedule": not all(map(torch.equal, theirs, levels)),
    }
    if found := [name for name, yes in differs.items() if yes]:
        raise InputError(
            f"classifier={run} has learned with another {' and '.join(found)} than the model; train one with the "
            "model's data.latents, stage.latent_scale and diffusion (python train.py stage=classifier)."
        )


def _near(first: Tensor, second: Tensor, unit: Tensor | None = None) -> bool:
    """Within a hundredth of the second, or of the unit."""
    first, second = first.cpu(), second.cpu()
    return bool(((first - second).abs() <= _SAME_SCALE * (second if unit is None else unit.cpu()).abs()).all())


def image_guider(
    distance: str,  # squared | lpips
    model: "LoadedModel",
    weight: float = 1.0,
    image: Path | str | None = None,  # one for all samples; None: each sample's low-resolution image
) -> ImageGuider:
    """By the distance of the decoded clean estimate, shrunk where need be, to an image."""
    if image is None and "low_resolution" not in model.reads:
        raise InputError(
            f"guider={distance} needs an image to go by, and this model is given no low-resolution ones; name a file "
            "(--guider-image FILE, or guiders.NAME.image=FILE)."
        )
    target = None if image is None else _read(Path(image))
    name = distance if image is None else f"{distance} to {image}"
    return ImageGuider(model.diffusion.pixels, _distance(distance, model), weight, target, name)


def _distance(name: str, model: "LoadedModel") -> Callable[[Tensor, Tensor], Tensor]:
    if name == "squared":
        return squared_error
    if name == "lpips":
        from ldmlab.interop.published_weights import weights_path
        from ldmlab.nn.lpips import LPIPS

        return LPIPS(weights_path("lpips")).to(model.device)
    raise InputError(f"guider={name} is no distance; choose {' or '.join(DISTANCES)}.")


def _read(path: Path) -> Tensor:
    """uint8 (3, h, w)."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except OSError as error:
        raise InputError(f"the guider's image {path} cannot be read ({error}); give a PNG, JPEG or WebP.") from None
