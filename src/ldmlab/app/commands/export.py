"""`ldmlab export`: the weights of a run as a self-contained folder for ldmlab or other programs."""

import argparse
from pathlib import Path

from ldmlab.errors import one_of

FORMATS = """ldmlab       our model folder: model.yaml, NAME.safetensors, README.md (default)
safetensors  another name for ldmlab
compvis      the official latent diffusion code's: model.ckpt, config.yaml
diffusers    a pipeline of Hugging Face diffusers, or its modules where no pipeline exists
Both sides are run on the same input; a difference of 1e-4 or more writes nothing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="run folder, checkpoint or model folder")
    parser.add_argument("out", type=Path, help="new folder")
    parser.add_argument("--format", default="ldmlab", metavar="NAME", help=FORMATS)
    parser.add_argument("--weights", default="averaged", help="averaged | raw | length of an average (averaged)")


def run(args: argparse.Namespace) -> None:
    from ldmlab.interop.model_folders import FORMATS as WRITERS
    from ldmlab.interop.model_folders import card, check_new, new_folder
    from ldmlab.model_files import read_model

    check_new(args.out)
    one_of("--format", args.format, WRITERS)
    files = read_model(args.model, args.weights)
    weights = f"{files.weights} weights" + (f" of step {files.step}" if files.step is not None else "")
    with new_folder(args.out) as folder:
        written = WRITERS[args.format](files, folder)
        origin = f"exported by ldmlab: {weights}; {written.what}."
        differences = written.differences.items()
        facts = [f"- {part}: within {value:.1e} of the model it was exported from" for part, value in differences]
        facts += ["", written.note] if written.note else []
        (folder / "README.md").write_text(card(files, origin, facts, written.usage), encoding="utf-8")
    print(f"{args.out}: {written.what} ({weights})")
    for part, value in differences:
        print(f"  {part}: largest difference {value:.1e}")
