"""`ldmlab import`: published weights as a model folder, which sample, evaluate, encode and training take."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ldmlab.errors import InputError

if TYPE_CHECKING:
    from ldmlab.model_files import ModelFiles


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `ldmlab import`."""
    parser.add_argument(
        "source",
        type=Path,
        metavar="SRC",
        help="official .ckpt, .pt or .safetensors (latent diffusion, a first stage, Stable Diffusion 1.x or 2.x),\n"
        "or a diffusers folder",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="new model folder")
    parser.add_argument(
        "--config", type=Path, help="official YAML file of the weights; not needed for Stable Diffusion"
    )
    parser.add_argument("--weights", choices=("averaged", "raw"), help="averaged | raw (averaged, where there are any)")
    parser.add_argument(
        "--prediction",
        choices=("eps", "v"),
        help="what the network predicts, where neither file nor config determines it",
    )


def run(args: argparse.Namespace) -> int:
    """Read, check, write."""
    from ldmlab.interop.model_folders import check_new, write_import

    check_new(args.out)
    imported = _from_folder(args) if args.source.is_dir() else _from_file(args)
    write_import(imported, args.out)
    for note in imported.notes:
        print(f"note: {note}")
    sizes = {name: sum(t.numel() for t in part.values()) / 1e6 for name, part in imported.parts.items()}
    parts = ", ".join(f"{name} {millions:.2f} M" for name, millions in sizes.items())
    print(f"{args.out}: {parts} ({imported.weights} weights)")
    return 0


def _from_file(args: argparse.Namespace) -> "ModelFiles":
    from ldmlab.interop import compvis

    return compvis.read(args.source, args.config, weights=args.weights or "averaged", prediction=args.prediction)


def _from_folder(args: argparse.Namespace) -> "ModelFiles":
    """A diffusers folder describes itself."""
    for option in ("config", "weights", "prediction"):
        if getattr(args, option) is not None:
            raise InputError(f"--{option}={getattr(args, option)}: a diffusers folder contains that; leave it out.")
    from ldmlab.interop import diffusers
    from ldmlab.model_files import ModelFiles

    return ModelFiles(args.source, *diffusers.read_folder(args.source), "raw")
