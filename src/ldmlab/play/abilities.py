"""What loaded models can do, as plain data: the page shows a control for these things and for nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ldmlab.errors import InputError
from ldmlab.inference.model import LoadedModel
from ldmlab.inference.sample_settings import SAMPLERS, STRENGTH, SampleSettings


@dataclass(frozen=True)
class Limits:
    """Bounds of one request; the person who starts the server chooses them."""

    upload_bytes: int = 10 << 20
    images: int = 8
    side: int = 1024  # px, of a result
    steps: int = 1000
    swept: int = 12  # values
    waiting: int = 16  # requests in the queue


def abilities(models: Sequence[LoadedModel], names: Sequence[str], limits: Limits, marks: str) -> dict[str, Any]:
    """What all of the models can do; InputError for two that take different inputs."""
    first = models[0]
    for other, name in zip(models[1:], names[1:], strict=True):
        if other.reads != first.reads:
            here, there = (", ".join(sorted(one.reads)) or "nothing" for one in (first, other))
            raise InputError(f"{names[0]} takes {here}, {name} takes {there}; compare models with the same inputs.")
    guided = all(_works(one, guidance_scale=2.0) for one in models)
    auto = first.resolved(SampleSettings())
    height, width = first.image_size
    return {
        "models": list(names),
        "reads": sorted(first.reads),
        "size": [height, width],
        "step": first.diffusion.size_step,
        "enlargement": first.enlargement,
        "guidance": first.diffusion.usual_guidance if guided else None,
        "samplers": ["auto", *(name for name in SAMPLERS if all(_works(one, sampler=name) for one in models))],
        "auto": {"sampler": auto.sampler, "steps": auto.steps},
        "strength": STRENGTH,
        "classes": _classes(first),
        "same_noise": len({one.diffusion.latent_shape((height, width)) for one in models}) == 1,
        "limits": {name: getattr(limits, name) for name in Limits.__dataclass_fields__},
        "marks": marks,
    }


def _works(model: LoadedModel, **settings: Any) -> bool:
    try:
        model.resolved(SampleSettings(**settings))
    except InputError:
        return False
    return True


def _classes(model: LoadedModel) -> dict[str, Any]:
    """Number and names of the classes of each input that has some."""
    found = {}
    for _, conditioner in model.diffusion.conditioners.items():
        for name in conditioner.reads & {"class_id", "boxes", "segmentation"}:  # type: ignore[operator]
            names = list(getattr(conditioner, "numbers", ()))
            found[name] = {"count": conditioner.classes, "names": names}
    return found
