"""`ldmlab models`: what comes along with a checkout, and what can be fetched by name.

A name from the first list stands wherever a command takes a model: `ldmlab sample NAME "a caption"`.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has no options."""


def run(args: argparse.Namespace) -> None:
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
