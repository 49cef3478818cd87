"""The `ldmlab` command: one subcommand a step of the flow; a subcommand's code is imported only when it runs."""

import argparse
import difflib
import importlib
import sys
from typing import NoReturn

from ldmlab.app.doors import run_door
from ldmlab.errors import InputError

COMMANDS = {
    "pack": "images and captions to image shards",
    "scenes": "made-up images with known boxes and label maps, of emoji on textures",
    "index": "write the manifest of tars made by others",
    "encode": "image shards to latent shards, with a trained first stage",
    "sample": "images from a model",
    "noise": "what noise leaves of an image's latents, with and without their rescaling",
    "score": "one set of images against another: folders, shards, .npz batches",
    "report": "a page about runs and their scores",
    "dashboard": "runs side by side while they train: one HTML page, or a view at W&B",
    "sweep-file": "the words of a Hydra multirun as a sweep file for W&B",
    "fetch": "download published weights that a command needs",
    "import": "weights that others published to a model folder",
    "export": "a run to a folder to give away: ours, the official code's or diffusers'",
    "config": "the final value of every option, and the file that set it",
    "demo": "the whole flow on the images shipped in the repository",
}
FILES = {"import": "import_model", "sweep-file": "sweep_file"}  # names that Python does not take

EPILOG = """training and evaluation have doors of their own, with Hydra's options:
  python train.py experiment=...        train a first stage, a CLIP or a denoiser (python train.py --help)
  python evaluate.py model=RUN          score a model (python evaluate.py --help)

`ldmlab COMMAND --help` explains one command."""


class Parser(argparse.ArgumentParser):
    """argparse, with the project's way of refusing: an InputError with the nearest name."""

    def error(self, message: str) -> NoReturn:
        known = [option for action in self._actions for option in action.option_strings]
        unknown = message.removeprefix("unrecognized arguments: ").split() if message.startswith("unrecognized") else []
        near = [match for word in unknown for match in difflib.get_close_matches(word.split("=")[0], known, n=1)]
        hint = f"did you mean {near[0]}?" if near else f"`{self.prog} --help` lists the options."
        raise InputError(f"{self.prog}: {message}; {hint}")


def main() -> None:
    """The console script."""
    sys.exit(run_door(lambda: dispatch(sys.argv[1:])))


def dispatch(arguments: list[str]) -> int:
    """Find the subcommand, parse its options, run it."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        print(_version())
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}."
        raise InputError(f"{name}: there is no such command; {hint}")
    module = importlib.import_module(f"ldmlab.app.commands.{FILES.get(name, name)}")
    parser = Parser(prog=f"ldmlab {name}", description=COMMANDS[name], formatter_class=argparse.RawTextHelpFormatter)
    module.add_arguments(parser)
    parser.add_argument(
        "--plugins", metavar="NAMES", help="packages of yours whose classes folders may name: mylab,other"
    )
    args = parser.parse_intermixed_args(rest)
    if args.plugins is not None:
        from ldmlab.plugins import allow

        allow(args.plugins, "--plugins")
    return int(module.run(args) or 0)


def _help() -> str:
    lines = [f"  {name:<10} {what}" for name, what in COMMANDS.items()]
    return "\n".join(["usage: ldmlab COMMAND [options]", "", "commands:", *lines, "", EPILOG])


def _version() -> str:
    from importlib.metadata import version

    return f"ldmlab {version('ldmlab')}"
