"""The `ldmlab` command: one subcommand a step of the flow; a subcommand's code is imported only when it runs.

A file of commands/ has add_arguments(parser), if there are any, for which nothing heavy may be imported, and run(args),
which may return an exit code; its docstring but for the first sentence stands below the options in the help. A file of
several commands has add_NAME and run_NAME, and the docstring of run_NAME stands there.
"""

import argparse
import errno
import importlib
import importlib.metadata
import inspect
import os
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from itertools import takewhile
from typing import Any, NoReturn

from ldmlab.app.compose import plain, searching
from ldmlab.app.conf_files import check_added, check_effects, chosen_options, conf_dir, group_choices, without_size
from ldmlab.app.hydra_main import hydra_main
from ldmlab.errors import InputError, did_you_mean, lost_loader, memory_ran_out, shown
from ldmlab.plugins import VARIABLE, allow, check_variable

COMMANDS = {
    "pack": "images and captions to image shards",
    "scenes": "made-up images with known boxes and label maps, of emoji on textures",
    "index": "write the manifest of tars made by others",
    "data-sheet": "sources, licences, captions and duplicates of image shards",
    "plan": "memory, time and cost of a training run, before a GPU is paid for",
    "train": "train a first stage, a CLIP or a denoiser (the same as python train.py)",
    "encode": "image shards to latent shards, with a trained first stage",
    "sample": "images from a model",
    "noise": "what noise leaves of an image's latents, with and without their rescaling",
    "evaluate": "score a model by a protocol (the same as python evaluate.py)",
    "first-stage": "a first stage's reconstructions, latents, and a small denoiser trained on them",
    "score": "one set of images against another: folders, shards, .npz batches",
    "audit": "which training images a model gives back, and when to stop training",
    "report": "a page about runs and their scores",
    "dashboard": "runs side by side while they train: one HTML page, or a view at W&B",
    "sweep-file": "the words of a Hydra multirun as a sweep file for W&B",
    "doctor": "what this machine has for ldmlab, and what is wrong with it",
    "play": "a page on which a model, or two side by side, can be tried",
    "study": "which images people prefer: a page with pairs, answers, shares with intervals",
    "verify": "whether images carry the marks of generated ones",
    "models": "what comes along with a checkout, and what can be fetched by name",
    "fetch": "download published weights that a command needs",
    "import": "weights that others published to a model folder",
    "average": "the weights of a run as an average of any length, from its snapshots",
    "card": "the model card of a run: data, cost, scores, and what you write about its use",
    "export": "a run to a folder to give away: ours, the official code's or diffusers'",
    "config": "the final value of every option, and the file that set it",
    "demo": "the whole flow on the images shipped in the repository",
}
FILES = {  # of another name
    **dict.fromkeys(("scenes", "index", "data-sheet", "encode"), "shard_folders"),
    **dict.fromkeys(("models", "fetch", "import"), "published"),
    **dict.fromkeys(("average", "card", "export"), "given_away"),
    **dict.fromkeys(("report", "dashboard"), "comparisons"),
    "first-stage": "first_stage",
    "sweep-file": "sweep_file",
    "verify": "verify_images",
}
WITH_HYDRA = {"train", "evaluate"}  # verbs whose whole command line is Hydra's
COMPOSING = {"audit", "config", "encode", "first-stage", "plan", "score", "sweep-file"}  # take options of conf/

EPILOG = """options of train, evaluate and encode are Hydra's: group=file and key=value
  ldmlab train experiment=...           in a checkout also: python train.py experiment=...
  ldmlab evaluate model=RUN             in a checkout also: python evaluate.py model=RUN

`ldmlab COMMAND --help` explains one command."""

_NAMES_SHOWN = 12  # of one group, before "... and N more"
_WITHOUT_PATH = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)  # the user's to mend even where none is named
_PATH_ERRORS = (errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EEXIST, errno.ELOOP, errno.ENODEV, errno.EIO)
_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some disk space and run the command again"),
    **dict.fromkeys((errno.EACCES, errno.EROFS), "choose a folder that you may write to"),
    **dict.fromkeys(_PATH_ERRORS, "choose another path"),
}
_NUMBERS = {  # environment variables that libraries read while they are imported, and ignore or fail at if malformed
    **dict.fromkeys(("RANK", "LOCAL_RANK", "SLURM_PROCID"), (r"\d+", "start with torchrun or srun")),
    **dict.fromkeys(
        ("OMP_NUM_THREADS", "MKL_NUM_THREADS"),
        (r"0*[1-9]\d{0,4}(,0*[1-9]\d{0,4})*", "give a number of threads, or unset it"),
    ),
}


def main(*first: str) -> None:
    """The console script; `first`: words before those of the command line."""
    sys.exit(run_command(lambda: dispatch([*first, *sys.argv[1:]])))


def run_command(command: Callable[[], int | None]) -> int:
    """The exit code of `command`: 2 with one sentence on stderr for user errors, 130 for Ctrl-C."""
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    try:
        for name, (pattern, way_out) in _NUMBERS.items():
            if (value := os.environ.get(name)) is not None and not re.fullmatch(pattern, value.strip()):
                raise InputError(f"the environment variable {name}={value} is no number; {way_out}.")
        return command() or 0
    except InputError as error:
        sentence, code = str(error), 2
    except KeyboardInterrupt:
        sentence, code = "stopped.", 130
    except BrokenPipeError:  # `ldmlab ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, EOFError, RuntimeError, MemoryError) as error:
        sentence, code = _of_files(error) or _of_machines(error), 2
        if not sentence:
            raise
    print(f"ldmlab: {sentence}", file=sys.stderr)
    return code


def _of_files(error: Exception) -> str:
    """The sentence for a file that cannot be read or written; empty for any other fault."""
    if not isinstance(error, OSError) or error.errno not in (_ADVICE if error.filename else _WITHOUT_PATH):
        return ""
    return f"{error.strerror}{f' ({error.filename})' if error.filename else ''}; {_ADVICE[error.errno or 0]}."


def _of_machines(error: Exception) -> str:
    """The sentence for a process that was lost and for exhausted memory; empty for any other fault."""
    distributed = sys.modules.get("ldmlab.distributed")  # imported by commands that several processes share
    reason = " ".join((str(error) or type(error).__name__).split())[:200].rstrip(".")
    if memory_ran_out(error):
        return f"memory ran out ({reason}); use a smaller batch size, or smaller images."
    if ended := lost_loader(error) or (reason if type(error).__name__ == "BrokenProcessPool" else ""):
        return f"a loader process ended ({ended}); run the command again, with fewer workers if memory ran out."
    lost = distributed.lost(error) if distributed else None
    return f"another process of this command ended ({lost}); run the command again." if lost else ""


class _Once(argparse.Action):
    """Stores a value; InputError where the option was given before with another one."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        assert isinstance(parser, Parser)
        before = parser.given.setdefault(self.dest, values)
        if option_string and before is not values and before != values:
            pair = f"{shown(str(before))}, {shown(str(values))}"
            raise InputError(f"{option_string} is given twice ({pair}), and takes one value; leave one of them out.")
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """argparse with the project's errors: an InputError with the nearest name, also for an option given twice."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register("action", None, _Once)
        self.register("action", "store", _Once)

    def parse_known_args(self, *words: Any, **options: Any) -> Any:
        self.given = dict[str, Any]()  # by name, of this command line
        return super().parse_known_args(*words, **options)

    def error(self, message: str) -> NoReturn:
        known = [option for action in self._actions for option in action.option_strings]
        unknown = message.removeprefix("unrecognized arguments: ").split() if message.startswith("unrecognized") else []
        near = [hint for word in unknown if (hint := did_you_mean(word.split("=")[0], known))]
        raise InputError(f"{self.prog}: {message}; {[*near, f'`{self.prog} --help` lists the options.'][0]}")


def dispatch(arguments: list[str]) -> int:
    """Find the subcommand, parse its options, run it."""
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        lines = [f"  {command:<10} {what}" for command, what in COMMANDS.items()]
        print("\n".join(["usage: ldmlab COMMAND [options]", "", "commands:", *lines, "", EPILOG]))
        return 0
    if name == "--version":
        print(f"ldmlab {importlib.metadata.version('ldmlab')}")
        return 0
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS, f"there are {', '.join(COMMANDS)}.")
        raise InputError(f"{name}: there is no such command; {hint}")
    if os.environ.get(VARIABLE):
        check_variable()
    if name in WITH_HYDRA:
        several = {"-m", "--multirun"} & set(rest)
        lengths = re.compile(r"weights=([\d.]+(,[\d.]+)+)")  # of averages, in one evaluation
        sys.argv[1:] = rest if several else [lengths.sub(r"weights=[\1]", word) for word in rest]  # Hydra reads it
        if {"-h", "--help"} & set(rest):
            print(hydra_help(name))
        else:
            hydra_main(name, _train if name == "train" else _evaluate)
        return 0
    parser, run = parser_of(name)
    args = parser.parse_intermixed_args(rest)
    if args.plugins:
        allow(args.plugins, "--plugins")
    folder = getattr(args, "config_dir", None)
    with searching(["--config-dir", folder]) if folder else nullcontext():
        return run(args) or 0


def parser_of(name: str) -> tuple[Parser, Callable[[argparse.Namespace], int | None]]:
    """A command's options, with those for a user's own packages and files; and what runs it."""
    module, own = importlib.import_module(f"ldmlab.app.commands.{FILES.get(name, name)}"), name.replace("-", "_")
    run, add = getattr(module, f"run_{own}", None), getattr(module, f"add_{own}", None)
    text = module if run is None else run
    run, add = run or module.run, add or getattr(module, "add_arguments", None)
    parser = Parser(prog=f"ldmlab {name}", description=COMMANDS[name], formatter_class=argparse.RawTextHelpFormatter)
    parser.epilog = (inspect.getdoc(text) or "").partition("\n\n")[2].strip()
    if add is not None:
        add(parser)
    parser.add_argument("--plugins", metavar="NAMES", help="packages of yours that folders may name: mylab,other")
    if name in COMPOSING:
        parser.add_argument("--config-dir", metavar="FOLDER", help="groups of your own: FOLDER/backbone/mine.yaml")
    return parser, run


def at_least(args: argparse.Namespace, **least: int) -> None:
    """InputError for an option below its bound."""
    for name, bound in least.items():
        if (value := getattr(args, name)) is not None and value < bound:
            raise InputError(f"--{name.replace('_', '-')} {value} must be at least {bound}.")


def _train(config: Any) -> str:
    """The run's folder; of stage=all that of the denoiser."""
    content = plain(config)
    if content["stage"]["name"] == "all":
        check_effects(content, chosen_options())
        from ldmlab.app.all_stages import train_all_stages

        return str(train_all_stages(content).denoiser)
    from ldmlab.app.wiring import train

    return str(train(content, chosen=chosen_options()))


def _evaluate(config: Any) -> None:
    check_added("evaluate", sys.argv[1:])
    content = plain(without_size(config))
    check_effects(content, chosen := chosen_options())
    from ldmlab.app.evaluate import check_read, evaluate

    check_read(content, chosen)
    evaluate(content)


def hydra_help(program: str) -> str:
    """Usage, the groups with their choices and the options with their comments."""
    lines = (conf_dir() / f"{program}.yaml").read_text().splitlines()
    head = [line[2:] for line in takewhile(lambda line: line.startswith("#"), lines)]
    opening, _, examples = "\n".join(head).partition("\n\nexamples:")
    text = "\n".join(lines[len(head) :])
    always = f"""and always:
  --cfg job --resolve          print the whole configuration
  -m, --multirun a=1,2 b=x,y   run every combination
  --config-dir FOLDER          groups of your own: FOLDER/backbone/mine.yaml, then backbone=mine
  conf/{program}.yaml and the files of the groups explain each option next to its value."""
    with searching(sys.argv[1:]):
        return "\n\n".join(
            [opening, "\n".join(_groups(text)), "\n".join(_options(text)), always, f"examples:{examples}"]
        )


def _groups(text: str) -> list[str]:
    lines = ["choose a file of each group (group=name, several as group=[a,b]); the first shown is the default:"]
    for group, default, comment in re.findall(r"^  - (\w+): (\S+)(?:[ \t]+# (.*))?$", text, re.MULTILINE):
        names = sorted(group_choices(group), key=lambda name: name != default)
        more = f" ... and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
        lines.append(f"  {group:<13} {' '.join(names[:_NAMES_SHOWN])}{more}")
        lines += [f"  {'':<13} {comment}"] if comment else []
    return lines


def _options(text: str) -> list[str]:
    lines, section = ["set an option (key=value):"], ""
    for raw in text.split("_self_")[-1].split("\nhydra:")[0].splitlines():
        if match := re.match(r"^( *)(\w+):[ \t]*([^#\n]*?)[ \t]*(?:# (.*))?$", raw):
            indent, key, value, comment = match.groups()
            section = section if indent else ("" if value else f"{key}.")
            if value or indent:
                lines.append(f"  {(section if indent else '') + key + '=' + value:<28} {comment or ''}".rstrip())
    return lines
