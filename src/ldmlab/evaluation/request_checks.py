"""What is refused of requests before any work, and what a model cannot see of them."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ldmlab.diffusion.latent_diffusion import LatentDiffusion
from ldmlab.errors import InputError
from ldmlab.evaluation.request_fields import LOOKED_AT, boxes_of, implied_size, row


def check_requests(diffusion: LatentDiffusion, requests: Sequence[Mapping[str, Any]], enlargement: int) -> None:
    """Boxes, classes, label maps and masks that mean nothing to the model; the first one found is named."""
    conditioners = [c for _, c in diffusion.conditioners.items() if hasattr(c, "check")]
    for request in _different(requests):
        implied_size(request, enlargement)  # images that do not fit each other
        _check_mask(request)
        if LOOKED_AT in request:
            row(LOOKED_AT, request[LOOKED_AT])  # a file that is no image
        for conditioner in conditioners:
            if conditioner.reads <= request.keys():  # type: ignore[operator]
                conditioner.check({name: _as_read(name, request[name]) for name in conditioner.reads})  # type: ignore


def _as_read(name: str, value: Any) -> Any:
    if name == "boxes":
        return boxes_of(value)
    return row(name, value) if name == "segmentation" else value


def _check_mask(request: Mapping[str, Any]) -> None:
    if ("mask" in request) != ("image" in request):
        given, missing = ("mask", "image") if "mask" in request else ("image", "mask")
        raise InputError(f"{given} goes with {missing}: the image, and the hole in it; give both.")
    if "mask" in request and not row("mask", request["mask"]).any():
        told = f"mask={request['mask']}" if isinstance(request["mask"], str) else "the mask"
        raise InputError(f"{told} has no hole; paint white what is to be made anew.")


def _different(requests: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Without the repetitions that several images for one prompt make."""
    last: Mapping[str, Any] | None = None
    for request in requests:
        if request is not last:
            yield request
        last = request


def lost(diffusion: LatentDiffusion, request: Mapping[str, Any]) -> list[str]:
    """The ends of its captions that the model cannot read because they are too long."""
    conditioners = [c for _, c in diffusion.conditioners.items() if hasattr(c, "lost")]
    captions = [request[name] for name in ("caption", "negative") if request.get(name)]
    ends = [c.lost(caption) for c in conditioners for caption in captions]  # type: ignore[operator]
    return [end for end in ends if end]


def warn_of_lost(diffusion: LatentDiffusion, requests: Sequence[Mapping[str, Any]]) -> None:
    """A warning for every caption of which the model sees the beginning only."""
    for request in _different(requests):
        for end in lost(diffusion, request):
            warnings.warn(f'the model does not see the end of a caption that is too long: "{end}"', stacklevel=3)
