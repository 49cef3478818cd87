"""`ldmlab export`: the weights of a run as a self-contained folder for ldmlab or other programs.

What is given away has a model card: `ldmlab card MODEL` writes card.yaml, whose fields a person fills in.
"""

import argparse
from pathlib import Path

from ldmlab.errors import InputError, one_of

FORMATS = """ldmlab       our model folder: model.yaml, NAME.safetensors, README.md (default)
safetensors  another name for ldmlab
compvis      the official latent diffusion code's: model.ckpt, config.yaml
diffusers    a pipeline of Hugging Face diffusers, or its modules where no pipeline exists
Both sides are run on the same input; a difference of 1e-4 or more writes nothing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", type=Path, help="run folder, checkpoint or model folder")
    add("out", type=Path, help="new folder")
    add("--format", default="ldmlab", metavar="NAME", help=FORMATS)
    add("--precision", default="float32", help="float32 | float16: half the size, ldmlab's format alone")
    add("--weights", default="averaged", help="averaged | raw | length of an average (averaged)")
    add("--without-card", action="store_true", help="for private use: no model card, which is stated in README.md")


def run(args: argparse.Namespace) -> None:
    from ldmlab.app.card_facts import NO_CARD, README, carry, collect, filled_in, write_card
    from ldmlab.interop.model_folders import FORMATS as WRITERS
    from ldmlab.interop.model_folders import card, check_new, halved, new_folder, write_ldmlab
    from ldmlab.model_files import model_folder, read_model

    check_new(args.out)
    one_of("--format", args.format, WRITERS)
    one_of("--precision", args.precision, ("float32", "float16"))
    given = model_folder(args.model)
    person = {} if args.without_card else filled_in(given, args.model)
    known = {} if args.without_card else collect(given)
    files = read_model(args.model, args.weights)
    if args.precision == "float16":
        if WRITERS[args.format] is not write_ldmlab:
            raise InputError(f"--precision float16 with --format {args.format}: only ldmlab's own format has it.")
        files = halved(files)
    weights = f"{files.weights} weights" + (f" of step {files.step}" if files.step is not None else "")
    with new_folder(args.out) as folder:
        written = WRITERS[args.format](files, folder)
        origin = f"exported by ldmlab: {weights}; {written.what}."
        differences = written.differences.items()
        facts = [f"- {part}: within {value:.1e} of the model it was exported from" for part, value in differences]
        facts += ["", written.note] if written.note else []
        head = card(files, origin, facts, written.usage)
        carry(given, folder)
        if args.without_card:
            (folder / README).write_text(f"{head}\n{NO_CARD}\n", encoding="utf-8")
        else:
            write_card(folder, head, person, known)
    print(f"{args.out}: {written.what} ({weights})")
    for part, value in differences:
        print(f"  {part}: largest difference {value:.1e}")
