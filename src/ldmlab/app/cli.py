"""The `ldmlab` command: one subcommand a step of the flow; a subcommand's code is imported only when it runs."""

import argparse
import difflib
import errno
import importlib
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NoReturn

from ldmlab.errors import InputError, memory_ran_out

COMMANDS = {
    "pack": "images and captions to image shards",
    "scenes": "made-up images with known boxes and label maps, of emoji on textures",
    "index": "write the manifest of tars made by others",
    "train": "train a first stage, a CLIP or a denoiser (the same as python train.py)",
    "encode": "image shards to latent shards, with a trained first stage",
    "sample": "images from a model",
    "noise": "what noise leaves of an image's latents, with and without their rescaling",
    "evaluate": "score a model by a protocol (the same as python evaluate.py)",
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
WITH_HYDRA = {"train", "evaluate"}  # verbs whose whole command line is Hydra's
COMPOSING = {"encode", "score", "config", "sweep-file"}  # commands that take options of conf/

EPILOG = """options of train, evaluate and encode are Hydra's: group=file and key=value
  ldmlab train experiment=...           in a checkout also: python train.py experiment=...
  ldmlab evaluate model=RUN             in a checkout also: python evaluate.py model=RUN

`ldmlab COMMAND --help` explains one command."""

_PATH_ERRORS = (errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EEXIST, errno.ELOOP, errno.ENODEV, errno.EIO)


def main() -> None:
    """The console script."""
    sys.exit(run_command(lambda: dispatch(sys.argv[1:])))


def run_command(command: Callable[[], int | None]) -> int:
    """The exit code of `command`: 2 with one sentence on stderr for user errors, 130 for Ctrl-C."""
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    try:
        return command() or 0
    except InputError as error:
        return _refused(str(error), 2)
    except KeyboardInterrupt:
        return _refused("stopped.", 130)
    except BrokenPipeError:  # `ldmlab ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _refused(f"{error.strerror}{place}; free some disk space and run the command again.", 2)
        if error.errno in (errno.EACCES, errno.EROFS):
            return _refused(f"{error.strerror}{place}; choose a folder that you may write to.", 2)
        if error.errno in _PATH_ERRORS and error.filename:
            return _refused(f"{error.strerror}{place}; choose another path.", 2)
        raise
    except (RuntimeError, MemoryError) as error:
        if (sentence := _of_machines(error)) is None:
            raise
        return _refused(sentence, 2)


def _of_machines(error: Exception) -> str | None:
    """The sentence for a process that was lost and for exhausted memory; None for any other fault."""
    distributed = sys.modules.get("ldmlab.distributed")  # imported by commands that several processes share
    reason = " ".join((str(error) or type(error).__name__).split())[:200].rstrip(".")
    if memory_ran_out(error):
        return f"memory ran out ({reason}); use a smaller batch size."
    if "DataLoader worker" in reason:
        return f"a loader process ended ({reason}); run the command again, with fewer workers if memory ran out."
    lost = distributed.lost(error) if distributed else None
    return lost and f"another process of this command ended ({lost}); run the command again."


def _refused(sentence: str, code: int) -> int:
    print(f"ldmlab: {sentence}", file=sys.stderr)
    return code


class Parser(argparse.ArgumentParser):
    """argparse with the project's errors: an InputError with the nearest name."""

    def error(self, message: str) -> NoReturn:
        known = [option for action in self._actions for option in action.option_strings]
        unknown = message.removeprefix("unrecognized arguments: ").split() if message.startswith("unrecognized") else []
        near = [match for word in unknown for match in difflib.get_close_matches(word.split("=")[0], known, n=1)]
        hint = f"did you mean {near[0]}?" if near else f"`{self.prog} --help` lists the options."
        raise InputError(f"{self.prog}: {message}; {hint}")


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
    if name in WITH_HYDRA:
        sys.argv = [f"ldmlab {name}", *rest]  # Hydra reads it
        return int(importlib.import_module(f"ldmlab.app.{name}").run() or 0)
    module = importlib.import_module(f"ldmlab.app.commands.{FILES.get(name, name)}")
    parser = Parser(prog=f"ldmlab {name}", description=COMMANDS[name], formatter_class=argparse.RawTextHelpFormatter)
    module.add_arguments(parser)
    add_own_options(parser, name)
    args = parser.parse_intermixed_args(rest)
    with _own_parts(args):
        return int(module.run(args) or 0)


def add_own_options(parser: argparse.ArgumentParser, name: str) -> None:
    """Options for a user's own packages and files, the same for every command."""
    parser.add_argument("--plugins", metavar="NAMES", help="packages of yours that folders may name: mylab,other")
    if name in COMPOSING:
        parser.add_argument("--config-dir", metavar="FOLDER", help="groups of your own: FOLDER/backbone/mine.yaml")


def _own_parts(args: argparse.Namespace) -> AbstractContextManager[None]:
    """Allow the packages of --plugins; inside, the folder of --config-dir is searched."""
    if args.plugins is not None:
        from ldmlab.plugins import allow

        allow(args.plugins, "--plugins")
    if getattr(args, "config_dir", None) is None:
        return nullcontext()
    from ldmlab.app.compose import searching

    return searching(["--config-dir", args.config_dir])


def _help() -> str:
    lines = [f"  {name:<10} {what}" for name, what in COMMANDS.items()]
    return "\n".join(["usage: ldmlab COMMAND [options]", "", "commands:", *lines, "", EPILOG])


def _version() -> str:
    from importlib.metadata import version

    return f"ldmlab {version('ldmlab')}"
