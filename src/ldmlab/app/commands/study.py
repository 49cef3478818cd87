"""`ldmlab study make|serve|report`: which images people prefer, as in the paper's user study.

examples:
  ldmlab study make samples --real data/val-images --task 1 --out study1          which is real
  ldmlab study make samples-a samples-b --task 2 --names ours,theirs --out study2  which fits better
  ldmlab study make runs/a runs/b --prompts prompts.txt --sample "--steps 50" --task 2 --out study3
  ldmlab study make upscaled --real photos --input small --task 1 --out study4
  ldmlab study serve study2 --port 8400
  ldmlab study report study1 study2

Images of one input have one file name in every folder. `serve` listens on this machine only unless --host says
otherwise; answers are lines of STUDY/answers.jsonl and hold nothing about persons.
"""

import argparse
import shlex
from pathlib import Path
from typing import Any

from ldmlab.app.cli import at_least
from ldmlab.errors import InputError, check_text

EXTRA = "pages"  # of pyproject.toml

_MOST_CHECKS = 100
_SET_HERE = ("--prompts", "--seed", "--out", "--sweep")  # options of sample

_MAKE: dict[str, dict[str, Any]] = {
    "task": {"type": int, "help": "1: real or generated; 2: which fits better"},
    "real": {"type": Path, "metavar": "FOLDER", "help": "real images, needed by task 1"},
    "input": {"type": Path, "metavar": "FOLDER", "help": "inputs shown in the middle: low-resolution or masked images"},
    "names": {"help": "of the methods, such as ours,theirs (the folders' names)"},
    "title": {"help": "of the page (Which image?)"},
    "question": {"help": "another question than the task's"},
    "seconds": {"type": float, "help": "that images are shown; 0: until the answer (3, the paper's)"},
    "per-session": {"type": int, "help": "items a rater sees (50)"},
    "checks": {"type": int, "help": "attention checks a session: a whole against a damaged image (4)"},
    "seed": {"type": int, "help": "of order, sides and samples (0)"},
    "paper-table": {"help": "where the result gets a row: user-study/sr-imagenet | user-study/inpaint-places"},
    "prompts": {"type": Path, "metavar": "FILE", "help": "for models: samples are drawn for these first"},
    "sample": {"metavar": "OPTIONS", "help": 'for models: options of ldmlab sample, as "--steps 50"'},
}
_SERVE: dict[str, dict[str, Any]] = {
    "host": {"help": "address to listen on (127.0.0.1, this machine only)"},
    "port": {"type": int, "help": "(8400)"},
}
_READ_BY = {**dict.fromkeys(_MAKE, ("make",)), **dict.fromkeys(_SERVE, ("serve",)), "out": ("make", "report")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("action", choices=("make", "serve", "report"), help="write a study, show it to raters, or evaluate answers")
    add("folders", nargs="+", type=Path, metavar="FOLDER", help="make: images or models; serve, report: studies")
    add("--out", type=Path, help="make: the study, a new folder; report: for the page (the first study)")
    for title, options in (("make", _MAKE), ("serve", _SERVE)):
        group = parser.add_argument_group(f"options of {title}")
        for name, option in options.items():
            group.add_argument(f"--{name}", **option)


def run(args: argparse.Namespace) -> None:
    for name, actions in _READ_BY.items():
        if args.action not in actions and (value := getattr(args, name.replace("-", "_"))) is not None:
            raise InputError(f"--{name} {value} is an option of study {' and '.join(actions)}; leave it out.")
    {"make": _make, "serve": _serve, "report": _report}[args.action](args)


def _make(args: argparse.Namespace) -> None:
    from ldmlab.disks import disk_errors, locked
    from ldmlab.files import clear_unfinished
    from ldmlab.study.design import IMAGES, check_new, names_of
    from ldmlab.study.results import check_table

    if args.out is None or args.task is None:
        raise InputError("ldmlab study make needs --task 1|2 and --out FOLDER; give both.")
    args.seed, args.sample = args.seed or 0, args.sample or ""
    args.per_session = 50 if args.per_session is None else args.per_session
    args.checks = 4 if args.checks is None else args.checks
    args.seconds = 3.0 if args.seconds is None else args.seconds
    _check_settings(args)
    sets = names_of(args.folders, args.names)
    if args.paper_table is not None:
        check_table(args.paper_table, args.task, len(sets))
    if (args.prompts or args.sample) and not any(map(_is_model, args.folders)):
        raise InputError("--prompts and --sample are for models, and all folders hold images; leave them out.")
    check_new(args.out)  # before hours of sampling
    place = args.out.absolute()
    with disk_errors(args.out):
        place.parent.mkdir(parents=True, exist_ok=True)
    with locked(place.with_name(f".{place.name}.lock"), f"--out {args.out} is being written", remove=True):
        check_new(args.out)  # another process may have been first
        for folder in (args.out, args.out / IMAGES):
            clear_unfinished(folder)
        _write(args, sets)


def _write(args: argparse.Namespace, sets: dict[str, Path]) -> None:
    """The samples of models, then the study."""
    from ldmlab.study.design import make_study

    sets = {name: _sampled(path, name, args) if _is_model(path) else path for name, path in sets.items()}
    study = make_study(
        args.out,
        sets,
        args.task,
        real=args.real,
        given=args.input,
        checks=args.checks,
        title=args.title or "Which image?",
        question=args.question,
        seconds=args.seconds,
        per_session=args.per_session,
        seed=args.seed,
        paper_table=args.paper_table,
    )
    print(f"{args.out}: {len(study.rated)} items; show it with `ldmlab study serve {shlex.quote(str(args.out))}`")


def _check_settings(args: argparse.Namespace) -> None:
    """InputError for numbers and texts that no study can have."""
    at_least(args, per_session=1, checks=0, seed=0)
    if args.checks > _MOST_CHECKS:
        raise InputError(f"--checks {args.checks} are too many for a rater; choose at most {_MOST_CHECKS}.")
    for option in ("title", "question", "names"):
        if (text := getattr(args, option)) is not None:
            check_text(f"--{option}", text)
            if not text.strip():
                raise InputError(f"--{option} {text!r} is empty; give a text, or leave it out.")
    if not 0 <= args.seconds <= 60:
        raise InputError(f"--seconds {args.seconds} is outside 0 .. 60; choose 3, as the paper, or 0 for no limit.")


def _is_model(path: Path) -> bool:
    return path.is_file() or any((path / name).is_file() for name in ("model.yaml", "config.yaml", "model_index.json"))


def _sampled(model: Path, name: str, args: argparse.Namespace) -> Path:
    """The samples of a model, the same prompts and seed for all."""
    from ldmlab.app.cli import dispatch

    if args.prompts is None:
        raise InputError(f"{model} is a model, which needs --prompts FILE; or give a folder of its samples.")
    out = args.out.with_name(f"{args.out.name}-samples") / name
    try:
        options = shlex.split(args.sample)
    except ValueError as error:
        raise InputError(f"--sample {args.sample} is no list of options ({error}); close each quote.") from error
    for word in options:
        if (option := word.partition("=")[0]) in _SET_HERE:
            raise InputError(f"--sample {args.sample} holds {option}, which study make sets itself; leave that out.")
    dispatch(
        ["sample", str(model), *options, "--prompts", str(args.prompts), "--seed", str(args.seed), "--out", str(out)]
    )
    return out


def _serve(args: argparse.Namespace) -> None:
    try:
        import uvicorn

        from ldmlab.study.server import application
    except ModuleNotFoundError as error:
        raise InputError(f"ldmlab study serve needs {error.name}; run `pip install 'ldmlab[{EXTRA}]'`.") from error
    from ldmlab.app.listening import address_of, listening_at
    from ldmlab.disks import locked
    from ldmlab.study.design import read_study

    if len(args.folders) != 1:
        raise InputError("ldmlab study serve shows one study; give one folder.")
    (folder,), host = args.folders, "127.0.0.1" if args.host is None else args.host
    port, study = 8400 if args.port is None else args.port, read_study(args.folders[0])
    with locked(folder / ".serving", f"{folder} is served by another process", remove=True):
        app, listening = application(folder, study), listening_at(host, port)
        shown = address_of(listening, host)
        print(f"{shown} (stop with Ctrl-C; answers go to {folder / 'answers.jsonl'})", flush=True)
        config = uvicorn.Config(app, access_log=False, log_level="warning")
        uvicorn.Server(config).run([listening])


def _report(args: argparse.Namespace) -> None:
    from ldmlab.study.results import write_results

    out = args.out or args.folders[0]
    print(write_results(args.folders, out), end="")
    print(out / "report.html")
