"""`ldmlab export`: the weights of a run as a self-contained folder for ldmlab or other programs."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ldmlab.errors import InputError

if TYPE_CHECKING:
    from ldmlab.interop.model_folders import Written
    from ldmlab.model_files import ModelFiles

FORMATS = """ldmlab       our model folder: model.yaml, NAME.safetensors, README.md (default)
safetensors  another name for ldmlab
compvis      the official latent diffusion code's: model.ckpt, config.yaml
diffusers    a pipeline of Hugging Face diffusers, or its modules where no pipeline exists
Both sides are run on the same input; a difference of 1e-4 or more writes nothing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `ldmlab export`."""
    parser.add_argument("model", type=Path, help="run folder, checkpoint or model folder")
    parser.add_argument("out", type=Path, help="new folder")
    parser.add_argument("--format", default="ldmlab", metavar="NAME", help=FORMATS)
    parser.add_argument("--weights", default="averaged", help="averaged | raw (averaged)")


def run(args: argparse.Namespace) -> int:
    """Read, write to a temporary folder, compare, then move into place."""
    from ldmlab.interop.model_folders import FORMATS as WRITERS
    from ldmlab.interop.model_folders import check_new, new_folder
    from ldmlab.model_files import read_model

    check_new(args.out)
    if args.format not in WRITERS:
        raise InputError(f"--format={args.format} is unknown; choose {', '.join(WRITERS)}.")
    files = read_model(args.model, args.weights)
    out: Path = args.out
    with new_folder(out) as folder:
        written = WRITERS[args.format](files, folder)
        (folder / "README.md").write_text(card(files, written), encoding="utf-8")
    print(f"{out}: {written.what} ({_weights(files)})")
    for part, difference in written.differences.items():
        print(f"  {part}: largest difference {difference:.1e}")
    return 0


def _weights(files: "ModelFiles") -> str:
    return f"{files.weights} weights" + (f" of step {files.step}" if files.step is not None else "")


def card(files: "ModelFiles", written: "Written") -> str:
    """The model card: description, origin, use."""
    spec = files.spec
    lines = [
        f"# {files.folder.resolve().name}",
        "",
        f"A {spec['kind'].replace('_', ' ')} for images of {spec['image_size']} px, exported by ldmlab: "
        f"{_weights(files)}; {written.what}.",
        "",
    ]
    if spec["kind"] == "latent_diffusion":
        inputs = ", ".join(spec["conditioners"]) or "nothing (unconditional)"
        guided = {True: "trained", False: "not trained", None: "unknown"}[spec["guidance_trained"]]
        lines += [
            f"- takes as input: {inputs}; classifier-free guidance: {guided}",
            f"- first stage: `{spec['first_stage']['_target_']}`, denoiser: `{spec['backbone']['_target_']}`",
            "",
        ]
    for part, difference in written.differences.items():
        lines.append(f"- {part}: within {difference:.1e} of the model it was exported from")
    if written.note:
        lines += ["", written.note]
    if written.usage:
        lines += ["", "```python", written.usage, "```"]
    return "\n".join([*lines, ""])
