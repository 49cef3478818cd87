"""`ldmlab export`: the weights of a run, alone and complete, as a model folder that anyone can load."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ldmlab.errors import InputError

if TYPE_CHECKING:
    from ldmlab.model_files import ModelFiles


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to export, and where to."""
    parser.add_argument("model", type=Path, help="run folder or checkpoint")
    parser.add_argument("out", type=Path, help="new folder: model.yaml, NAME.safetensors, README.md")
    parser.add_argument("--weights", default="averaged", help="averaged | raw (averaged)")


def run(args: argparse.Namespace) -> int:
    """Read, write, and read again to be sure."""
    if args.out.exists() and any(args.out.iterdir()):
        raise InputError(f"out={args.out} is not empty; choose a new folder.")

    from ldmlab.build import load
    from ldmlab.model_files import read_model, write_model_folder

    files = read_model(args.model, args.weights)
    parts = {name: part for name, part in files.parts.items() if name in PARTS}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "README.md").write_text(card(files), encoding="utf-8")
    write_model_folder(args.out, {**files.spec, "weights": files.weights, "step": files.step}, parts)
    if files.spec["kind"] == "latent_diffusion":
        load(args.out, device="cpu")
    print(f"{args.out}: {', '.join(sorted(parts))} ({files.weights} weights of step {files.step})")
    return 0


PARTS = ("first_stage", "denoiser", "conditioner", "clip")


def card(files: "ModelFiles") -> str:
    """The model card: what it is, where it comes from, how to use it."""
    spec = files.spec
    lines = [
        f"# {files.folder.name}",
        "",
        f"A {spec['kind'].replace('_', ' ')} for pictures of {spec['image_size']} px, trained with ldmlab: "
        f"{files.weights} weights after {files.step} steps.",
        "",
    ]
    if spec["kind"] == "latent_diffusion":
        told = ", ".join(spec["conditioners"]) or "nothing (unconditional)"
        guided = "trained" if spec["guidance_trained"] else "not trained"
        lines += [
            f"- told: {told}; classifier-free guidance: {guided}",
            f"- first stage: `{spec['first_stage']['_target_']}`, denoiser: `{spec['backbone']['_target_']}`",
            "",
            "```python",
            "import ldmlab",
            "",
            'model = ldmlab.load("THIS_FOLDER")',
            'pictures = model.sample(caption=["a red apple"])  # uint8 (B, H, W, 3)'
            if "text" in spec["conditioners"]
            else "pictures = model.sample(count=4)  # uint8 (B, H, W, 3)",
            "```",
            "",
        ]
    return "\n".join(lines)
