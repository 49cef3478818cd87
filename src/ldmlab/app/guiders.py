"""Guiders from options (conf/guiders, `ldmlab sample`), checked against their model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldmlab.build import load_classifier
from ldmlab.contracts import Guider
from ldmlab.diffusion.guidance import ClassifierGuider, ImageGuider, squared_error
from ldmlab.diffusion.schedule import as_path, same_path
from ldmlab.errors import InputError, one_of
from ldmlab.inference.input_images import row
from ldmlab.inference.model import LoadedModel
from ldmlab.inference.weak_model import of_other_latents
from ldmlab.instantiate import instantiate
from ldmlab.interop.published_weights import weights_path
from ldmlab.nn.lpips import LPIPS


def build_guiders(config: Mapping[str, Mapping[str, Any]], model: LoadedModel) -> list[Guider]:
    return [instantiate(node, where=f"guiders.{name}", model=model) for name, node in config.items()]


def guiders_by_option(options: Mapping[str, Any], model: LoadedModel) -> list[Guider]:
    """Those of `ldmlab sample`: the classifier's first, since the image's gradient goes through the network."""
    given = {name: value for name, value in options.items() if value is not None}
    found: list[Guider] = []
    if "classifier" in given:
        scale = {"scale": given["classifier_scale"]} if "classifier_scale" in given else {}
        found.append(classifier_guider(given["classifier"], model, **scale))
    if "guider" in given:
        own = {name: given[f"guider_{name}"] for name in ("weight", "image") if f"guider_{name}" in given}
        if "." in given["guider"]:
            found.append(instantiate({"_target_": given["guider"], **own}, where="guiders.guider", model=model))
        else:
            found.append(image_guider(given["guider"], model, **own))
    return found


def classifier_guider(run: Path | str, model: LoadedModel, scale: float = 10.0) -> ClassifierGuider:
    """By the classifier of a stage=classifier run; one of other latents or another schedule is refused."""
    loaded = load_classifier(run)
    spec, diffusion = loaded.spec, model.diffusion
    own = instantiate(spec["latent_scale"], where="latent_scale")
    path = as_path(instantiate(spec["schedule"], where="schedule"))
    found = of_other_latents(diffusion, spec["first_stage_fingerprint"], own)
    found += [] if same_path(path, diffusion.path) else ["noise schedule"]
    if found:
        raise InputError(
            f"classifier={run} was trained with another {' and '.join(found)} than the model; train one with the "
            "model's data.latents, stage.latent_scale and diffusion (python train.py stage=classifier)."
        )
    return ClassifierGuider(loaded.module.to(model.device), scale, name=str(run))


def image_guider(
    distance: str,  # squared | lpips
    model: LoadedModel,
    weight: float = 1.0,
    image: Path | str | None = None,  # one for all samples; None: each sample's low-resolution image
) -> ImageGuider:
    """By the distance of the decoded clean estimate, shrunk where need be, to an image."""
    if image is None and "low_resolution" not in model.reads:
        raise InputError(
            f"guider={distance} needs an image, and low_resolution is no input of this model; name a file "
            "(--guider-image FILE, or guiders.NAME.image=FILE)."
        )
    one_of("guider", distance, ("squared", "lpips"))
    target = None if image is None else row("guider_image", Path(image))  # uint8 (3, h, w)
    measure = squared_error if distance == "squared" else LPIPS(weights_path("lpips")).to(model.device)
    name = distance if image is None else f"{distance} to {image}"
    return ImageGuider(model.diffusion.pixels, measure, weight, target, name)
