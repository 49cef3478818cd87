"""The options of `ldmlab sample` for guidance besides classifier-free, and the guiders they ask for."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ldmlab.errors import InputError

if TYPE_CHECKING:
    from ldmlab.diffusion.guidance import Guider
    from ldmlab.inference.model import LoadedModel


def add_guider_options(parser: argparse.ArgumentParser) -> None:
    """The options; nothing heavy is imported."""
    add = parser.add_argument
    add("--classifier", type=Path, help="guide by this stage=classifier run to the classes asked for")
    add("--classifier-scale", type=float, help="how strongly (10, the paper's)")
    add("--guider", help="squared | lpips: guide the decoded estimate to the low-resolution image, or --guider-image")
    add("--guider-weight", type=float, help="how strongly (1)")
    add("--guider-image", type=Path, help="an image for all samples to be guided to, no larger than they are")


def guiders_of(args: argparse.Namespace, model: "LoadedModel") -> "list[Guider]":
    """The classifier's guider before the image's, whose gradient goes through the network."""
    from ldmlab.app.guiders import classifier_guider, image_guider

    found: list[Guider] = []
    if args.classifier is not None:
        scale = {} if args.classifier_scale is None else {"scale": args.classifier_scale}
        found.append(classifier_guider(args.classifier, model, **scale))
    if args.guider is not None:
        weight = {} if args.guider_weight is None else {"weight": args.guider_weight}
        found.append(image_guider(args.guider, model, image=args.guider_image, **weight))
    return found


def check_guider_options(args: argparse.Namespace) -> None:
    """A strength without its guider is a mistake."""
    for option, needs in (("classifier_scale", "classifier"), ("guider_weight", "guider"), ("guider_image", "guider")):
        if getattr(args, option) is not None and getattr(args, needs) is None:
            given, missing = f"--{option.replace('_', '-')}", f"--{needs}"
            raise InputError(f"{given} {getattr(args, option)} does nothing without {missing}; add it.")
