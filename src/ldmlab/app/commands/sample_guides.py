"""The options of `ldmlab sample` for guidance besides classifier-free, and the guides they ask for."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ldmlab.errors import InputError

if TYPE_CHECKING:
    from ldmlab.diffusion.guidance import Guide
    from ldmlab.inference.model import LoadedModel


def add_guide_options(parser: argparse.ArgumentParser) -> None:
    """The options; nothing heavy is imported."""
    add = parser.add_argument
    add("--classifier", type=Path, help="guide by this stage=classifier run to the classes asked for")
    add("--classifier-scale", type=float, help="how strongly (10, the paper's)")
    add("--guide", help="squared | lpips: guide the decoded estimate to the low-resolution image, or --guide-image")
    add("--guide-weight", type=float, help="how strongly (1)")
    add("--guide-image", type=Path, help="an image for all samples to be guided to, no larger than they are")


def asked_guides(args: argparse.Namespace, model: "LoadedModel") -> "list[Guide]":
    """The classifier's guide before the image's, whose gradient goes through the network."""
    from ldmlab.app.guidance import classifier_guide, image_guide

    found: list[Guide] = []
    if args.classifier is not None:
        scale = {} if args.classifier_scale is None else {"scale": args.classifier_scale}
        found.append(classifier_guide(args.classifier, model, **scale))
    if args.guide is not None:
        weight = {} if args.guide_weight is None else {"weight": args.guide_weight}
        found.append(image_guide(args.guide, model, image=args.guide_image, **weight))
    return found


def check_guide_options(args: argparse.Namespace) -> None:
    """A strength without its guide is a mistake."""
    for option, needs in (("classifier_scale", "classifier"), ("guide_weight", "guide"), ("guide_image", "guide")):
        if getattr(args, option) is not None and getattr(args, needs) is None:
            given, missing = f"--{option.replace('_', '-')}", f"--{needs}"
            raise InputError(f"{given} {getattr(args, option)} does nothing without {missing}; add it.")
