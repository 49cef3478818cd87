"""What others published: a list of it, downloads by name, files as model folders."""

import argparse
from pathlib import Path

from ldmlab.app.progress import bar
from ldmlab.errors import InputError


def run_models(args: argparse.Namespace) -> None:
    """What comes along with a checkout, and what can be fetched by name.

    A name from the first list stands wherever a command takes a model: `ldmlab sample NAME "a caption"`.
    """
    from ldmlab.interop.published_weights import CLIP, WEIGHTS, weights_folder
    from ldmlab.model_files import DESCRIPTION, MODELS, read_description

    print("comes along")
    found = sorted(path.parent for path in MODELS.rglob(DESCRIPTION))
    for folder in found:
        spec = read_description(folder)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**20
        inputs = ", ".join(spec.get("conditioners", ()))
        kind = spec["kind"].replace("_", " ") + (f" of {inputs}" if inputs else "")
        print(f"  {folder.relative_to(MODELS)!s:<12} {kind}, {spec['image_size']} px, {size:.0f} MiB")
    if not found:
        print("  nothing: an installed package has no models; clone the repository and run `ldmlab` there")
    print("\nfetched by name: ldmlab fetch NAME")
    for name, weights in WEIGHTS.items():
        here = ", here" if (weights_folder() / weights.file).is_file() else ""
        print(f"  {name:<12} {weights.used_for}, {weights.mib} MiB, {weights.licence}{here}")
    print(f"  {CLIP:<12} any open_clip model: --model ViT-B-32 --pretrained openai")
    print("\nmodels of other programs: ldmlab import FOLDER_OR_FILE OUT (docs/import.md)")


def add_fetch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="inception, lpips, wordpiece, clip; see --list")
    parser.add_argument("--list", action="store_true", help="what there is: size, licence, use, and whether it is here")
    parser.add_argument("--url", help="fetch from this address instead (a mirror); the checksum stays")
    parser.add_argument("--model", help="with clip: open_clip architecture (default: ViT-B-32)")
    parser.add_argument("--pretrained", help="with clip: tag of its weights (default: openai)")


def run_fetch(args: argparse.Namespace) -> None:
    """Published weights that a choice needs, checked, to one folder."""
    from ldmlab.interop.published_weights import CLIP, WEIGHTS, entry_of, fetch, fetch_clip, weights_folder

    if args.list or not args.names:
        print(f"folder: {weights_folder()} (LDMLAB_WEIGHTS chooses another)\n")
        for name, weights in WEIGHTS.items():
            here = "here" if (weights_folder() / weights.file).is_file() else "not here"
            print(f"{name:<10} {weights.mib} MiB, {weights.licence}, {here}\n{'':<10} {weights.used_for}")
        print(f"{CLIP:<10} any open_clip model: --model ViT-B-32 --pretrained openai")
        return
    if (args.model or args.pretrained) and CLIP not in args.names:
        raise InputError("--model and --pretrained are for clip, which is not among the names; leave them out.")
    if args.url is not None and (CLIP in args.names or len(args.names) > 1):
        raise InputError(f"--url {args.url} is the address of one file other than clip; fetch it by itself.")
    for name in args.names:
        if name != CLIP:
            entry_of(name)  # a wrong name is refused before anything is fetched
    for name in args.names:
        if name == CLIP:
            print(fetch_clip(args.model or "ViT-B-32", args.pretrained or "openai"))
            continue
        with bar(f"fetch {name}", "bytes") as advance:
            path = fetch(name, url=args.url, advance=advance)
        print(path)


_SOURCE = """official .ckpt, .pt or .safetensors (latent diffusion, a first stage, Stable Diffusion 1.x or 2.x),
a diffusers folder, or a denoiser without first stage (--format)"""
_FORMATS = "dit | sit | repa | lightningdit | edm | edm2: a class-conditional denoiser (default: recognised from SRC)"


def add_import(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", type=Path, metavar="SRC", help=_SOURCE)
    add("out", type=Path, metavar="OUT", help="new model folder")
    add("--format", metavar="NAME", help=_FORMATS)
    add("--config", type=Path, help="official YAML file of the weights; not needed for Stable Diffusion")
    add("--first-stage", type=Path, metavar="DIR", help="of a denoiser: a diffusers or model folder")
    add("--statistics", type=Path, metavar="FILE", help="of lightningdit: latents_stats.pt")
    add("--weights", choices=("averaged", "raw"), help="averaged | raw (averaged, where there are any)")
    add("--prediction", choices=("eps", "v"), help="what the network predicts, where neither file nor config has it")


def run_import(args: argparse.Namespace) -> None:
    """Published weights as a model folder, which sample, evaluate, encode and training take."""
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
        spec, parts = diffusers.read_folder(args.source)
        imported = ModelFiles(args.source, spec, parts, "raw", notes=diffusers.notes_of(spec))
    else:
        weights = args.weights or "averaged"
        imported = compvis.read(args.source, args.config, weights=weights, prediction=args.prediction)
    write_import(imported, args.out)
    for note in imported.notes:
        print(f"note: {note}")
    sizes = {name: sum(t.numel() for t in part.values()) / 1e6 for name, part in imported.parts.items()}
    shown = ", ".join(f"{name} {millions:.2f} M" for name, millions in sizes.items())
    print(f"{args.out}: {shown} ({imported.weights} weights)")
