"""What a run gives to others: the average of a length, the model card, a folder in any format."""

import argparse
from pathlib import Path

from ldmlab.errors import InputError, one_of


def add_average(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run folder, or one of its checkpoints")
    add("out", type=Path, nargs="?", metavar="OUT", help="new model folder (RUN/averages/length_L-step_N)")
    add("--length", type=float, required=True, metavar="L", help="such as 0.10")


def run_average(args: argparse.Namespace) -> None:
    """The weights of a run as an average of any length, from its snapshots.

    A length is the standard deviation of the average's profile relative to the training so far, 0.05 to 0.20 for most
    runs (Karras et al. 2024). The run needs callbacks=power_averages; a checkpoint of it gives an earlier time.
    """
    from ldmlab.averaging import FOLDER, checked_length, snapshots
    from ldmlab.interop.model_folders import card, check_new, new_folder, write_ldmlab
    from ldmlab.model_files import read_model

    checked_length(args.length, "--length")
    files = read_model(args.run, args.length)
    out = args.out or files.folder / FOLDER / f"length_{args.length:g}-step_{files.step:08d}"
    check_new(out)
    used = [one for one in snapshots(files.folder) if files.step is None or one.step <= files.step]
    with new_folder(out) as folder:
        written = write_ldmlab(files, folder)
        origin = f"{files.weights} of step {files.step}, from {len(used)} snapshots; {written.what}."
        (folder / "README.md").write_text(card(files, origin, [], written.usage), encoding="utf-8")
    lengths = ", ".join(sorted({f"{one.length:g}" for one in used}))
    print(f"{out}: {files.weights} at step {files.step}, from {len(used)} snapshots of lengths {lengths}")


def add_card(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="run folder or model folder; gets README.md, card.yaml, card.json")
    add("more", type=Path, nargs="*", metavar="FOLDER", help="runs of its parts, evaluations, audits")


def run_card(args: argparse.Namespace) -> None:
    """The model card of a run or a model folder.

    README.md states how the model was trained, on which data, what it cost and how it scored; intended use, limits,
    risks, licence and attribution come from card.yaml, which the command writes for you to fill in. FOLDER adds what
    lies elsewhere: runs of the first stage and the CLIP, evaluations, an audit; card.json keeps it for the next time.
    """
    from ldmlab.app.card_facts import (
        PERSONS,
        README,
        collect,
        empty_fields,
        head_of,
        read_person,
        write_card,
        write_template,
    )
    from ldmlab.interop.model_folders import card, usage_of
    from ldmlab.model_files import ModelFiles, describe, model_folder

    spec, folder = describe(args.model), model_folder(args.model)
    person, facts = read_person(folder), collect(folder, args.more)
    files = ModelFiles(folder, spec, {}, "")
    write_template(folder)
    write_card(folder, head_of(folder) or card(files, "trained with ldmlab.", usage=usage_of(spec)), person, facts)
    count = f"{len(facts['runs'])} runs, {len(facts['evaluations'])} evaluations"
    print(f"{folder / README}: {count}{', an audit' if facts['audit'] else ''}")
    if empty := empty_fields(person):
        print(f"{folder / PERSONS}: fill in {', '.join(empty)}, and run the command again")


FORMATS = """ldmlab       our model folder: model.yaml, NAME.safetensors, README.md (default)
safetensors  another name for ldmlab
compvis      the official latent diffusion code's: model.ckpt, config.yaml
diffusers    a pipeline of Hugging Face diffusers, or its modules where no pipeline exists
Both sides are run on the same input; a difference of 1e-4 or more writes nothing."""


def add_export(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", type=Path, help="run folder, checkpoint or model folder")
    add("out", type=Path, help="new folder")
    add("--format", default="ldmlab", metavar="NAME", help=FORMATS)
    add("--precision", default="float32", help="float32 | float16: half the size, ldmlab's format alone")
    add("--weights", default="averaged", help="averaged | raw | length of an average (averaged)")
    add(
        "--first-stage",
        type=Path,
        metavar="RUN",
        help="a first stage of the same latents, with a tuned decoder",
    )
    add("--without-card", action="store_true", help="for private use: no model card, which is stated in README.md")


def run_export(args: argparse.Namespace) -> None:
    """The weights of a run as a self-contained folder for ldmlab or other programs.

    What is given away has a model card: `ldmlab card MODEL` writes card.yaml, whose fields a person fills in.
    """
    from ldmlab.app.card_facts import NO_CARD, README, carry, collect, filled_in, write_card
    from ldmlab.files import markdown_line
    from ldmlab.interop.model_folders import FORMATS as WRITERS
    from ldmlab.interop.model_folders import card, check_new, halved, new_folder, with_first_stage, write_ldmlab
    from ldmlab.model_files import model_folder, read_model

    check_new(args.out)
    one_of("--format", args.format, WRITERS)
    one_of("--precision", args.precision, ("float32", "float16"))
    given = model_folder(args.model)
    person, known = ({}, {}) if args.without_card else (filled_in(given, args.model), collect(given))
    files = read_model(args.model, args.weights)
    if args.first_stage:
        files = with_first_stage(files, args.first_stage)
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
        facts += [f"- first stage of `{markdown_line(args.first_stage.resolve().name)}`"] if args.first_stage else []
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
