"""Guiders from options (conf/guiders, `ldmlab sample`), checked against their model."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldmlab.build import load_classifier
from ldmlab.checkpoints import fingerprint
from ldmlab.contracts import Guider
from ldmlab.diffusion.guidance import ClassifierGuider, ImageGuider, squared_error
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
    return [instantiate(node, where=f"guiders.{name}", model=model) for name, node in config.items()]


def guiders_by_option(options: Mapping[str, Any], model: "LoadedModel") -> list[Guider]:
    """Those of `ldmlab sample`: the classifier's first, since the image's gradient goes through the network."""
    found: list[Guider] = []
    if options["classifier"] is not None:
        scale = {} if options["classifier_scale"] is None else {"scale": options["classifier_scale"]}
        found.append(classifier_guider(options["classifier"], model, **scale))
    if options["guider"] is not None:
        weight = {} if options["guider_weight"] is None else {"weight": options["guider_weight"]}
        if "." in options["guider"]:
            image = {} if options["guider_image"] is None else {"image": options["guider_image"]}
            node = {"_target_": options["guider"], **weight, **image}
            found.append(instantiate(node, where="guiders.guider", model=model))
        else:
            found.append(image_guider(options["guider"], model, image=options["guider_image"], **weight))
    return found


def classifier_guider(run: Path | str, model: "LoadedModel", scale: float = 10.0) -> ClassifierGuider:
    """By the classifier of a stage=classifier run; one of other latents or another schedule is refused."""
    loaded = load_classifier(run)
    _check_same_latents(str(run), loaded.spec, model.diffusion)
    return ClassifierGuider(loaded.module.to(model.device), scale, name=str(run))


def _check_same_latents(run: str, spec: Mapping[str, Any], diffusion: "LatentDiffusion") -> None:
    """The classifier must have been trained on latents like those that are sampled."""
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
            f"classifier={run} was trained with another {' and '.join(found)} than the model; train one with the "
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
            f"guider={distance} needs an image, and low_resolution is no input of this model; name a file "
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
    raise InputError(f"guider={name} is unknown; choose {' or '.join(DISTANCES)}.")


def _read(path: Path) -> Tensor:
    """uint8 (3, h, w)."""
    from ldmlab.inference.inputs import row

    return row("guider_image", path)
