"""`ldmlab import`: published weights as a model folder, which sample, evaluate, encode and training take."""

import argparse
from pathlib import Path

from ldmlab.errors import InputError

_SOURCE = """official .ckpt, .pt or .safetensors (latent diffusion, a first stage, Stable Diffusion 1.x or 2.x),
or a diffusers folder"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", type=Path, metavar="SRC", help=_SOURCE)
    add("out", type=Path, metavar="OUT", help="new model folder")
    add("--config", type=Path, help="official YAML file of the weights; not needed for Stable Diffusion")
    add("--weights", choices=("averaged", "raw"), help="averaged | raw (averaged, where there are any)")
    add("--prediction", choices=("eps", "v"), help="what the network predicts, where neither file nor config has it")


def run(args: argparse.Namespace) -> None:
    """Read, check, write; a diffusers folder describes itself."""
    from ldmlab.interop import compvis, diffusers
    from ldmlab.interop.model_folders import check_new, write_import
    from ldmlab.model_files import ModelFiles

    check_new(args.out)
    if args.source.is_dir():
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
