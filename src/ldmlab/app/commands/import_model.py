"""`ldmlab import`: published weights as a model folder, which sample, evaluate, encode and training take."""

import argparse
from pathlib import Path

from ldmlab.errors import InputError

_SOURCE = """official .ckpt, .pt or .safetensors (latent diffusion, a first stage, Stable Diffusion 1.x or 2.x),
a diffusers folder, or a denoiser without first stage (--format)"""
_FORMATS = "dit | sit | repa | lightningdit | edm | edm2: a class-conditional denoiser (default: recognised from SRC)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", type=Path, metavar="SRC", help=_SOURCE)
    add("out", type=Path, metavar="OUT", help="new model folder")
    add("--format", metavar="NAME", help=_FORMATS)
    add("--config", type=Path, help="official YAML file of the weights; not needed for Stable Diffusion")
    add("--first-stage", type=Path, metavar="DIR", help="of a denoiser: a diffusers or model folder")
    add("--statistics", type=Path, metavar="FILE", help="of lightningdit: latents_stats.pt")
    add("--weights", choices=("averaged", "raw"), help="averaged | raw (averaged, where there are any)")
    add("--prediction", choices=("eps", "v"), help="what the network predicts, where neither file nor config has it")


def run(args: argparse.Namespace) -> None:
    """Read, check, write; a diffusers folder describes itself."""
    from ldmlab.interop import class_models, compvis, diffusers
    from ldmlab.interop.model_folders import check_new, write_import
    from ldmlab.model_files import ModelFiles, read_yaml

    check_new(args.out)
    if args.format is None and (args.first_stage or args.statistics):
        raise InputError("--first-stage and --statistics are for denoisers; add for instance --format dit.")
    if args.format is not None:
        if args.prediction is not None:
            raise InputError(f"--prediction={args.prediction}: --format {args.format} decides that; leave it out.")
        if args.statistics and args.format != "lightningdit":
            raise InputError(
                f"--statistics={args.statistics}: --format {args.format} has its own scale of latents; leave it out."
            )
        imported = class_models.read(
            args.source,
            args.format,
            args.first_stage,
            config=read_yaml(args.config) if args.config else None,
            weights=args.weights or "averaged",
            statistics=args.statistics,
        )
    elif args.source.is_dir():
        for option in ("config", "weights", "prediction"):
            if (value := getattr(args, option)) is not None:
                raise InputError(f"--{option}={value}: a diffusers folder contains that; leave it out.")
        imported = ModelFiles(args.source, *diffusers.read_folder(args.source), "raw")
    else:
        weights = args.weights or "averaged"
        imported = compvis.read(args.source, args.config, weights=weights, prediction=args.prediction)
    write_import(imported, args.out)
    for note in imported.notes:
        print(f"note: {note}")
    sizes = {name: sum(t.numel() for t in part.values()) / 1e6 for name, part in imported.parts.items()}
    shown = ", ".join(f"{name} {millions:.2f} M" for name, millions in sizes.items())
    print(f"{args.out}: {shown} ({imported.weights} weights)")
