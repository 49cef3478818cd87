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

from ldmlab.app.cli import at_least
from ldmlab.errors import InputError

EXTRA = "pages"  # of pyproject.toml


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("action", choices=("make", "serve", "report"), help="write a study, show it to raters, or evaluate answers")
    add("folders", nargs="+", type=Path, metavar="FOLDER", help="make: images or models; serve, report: studies")
    add("--out", type=Path, help="make: the study, a new folder; report: for the page (the first study)")
    add("--task", type=int, help="1: real or generated; 2: which fits better")
    add("--real", type=Path, metavar="FOLDER", help="real images, needed by task 1")
    add("--input", type=Path, metavar="FOLDER", help="inputs shown in the middle: low-resolution or masked images")
    add("--names", help="of the methods, such as ours,theirs (the folders' names)")
    add("--title", default="Which image?", help="of the page")
    add("--question", help="another question than the task's")
    add("--seconds", type=float, default=3.0, help="that images are shown; 0: until the answer (3, the paper's)")
    add("--per-session", type=int, default=50, help="items a rater sees (50)")
    add("--checks", type=int, default=4, help="attention checks a session: a whole against a damaged image (4)")
    add("--seed", type=int, default=0, help="of order, sides and samples (0)")
    add("--paper-table", help="where the result gets a row: user-study/sr-imagenet | user-study/inpaint-places")
    add("--prompts", type=Path, metavar="FILE", help="for models: samples are drawn for these first")
    add("--sample", default="", metavar="OPTIONS", help='for models: options of ldmlab sample, as "--steps 50"')
    add("--host", default="127.0.0.1", help="serve: address to listen on (127.0.0.1, this machine only)")
    add("--port", type=int, default=8400, help="serve: (8400)")


def run(args: argparse.Namespace) -> None:
    {"make": _make, "serve": _serve, "report": _report}[args.action](args)


def _make(args: argparse.Namespace) -> None:
    from ldmlab.report.paper_source import known_table
    from ldmlab.study.design import make_study, names_of

    at_least(args, per_session=1, checks=0)
    if args.out is None or args.task is None:
        raise InputError("ldmlab study make needs --task 1|2 and --out FOLDER; give both.")
    if not 0 <= args.seconds <= 60:
        raise InputError(f"--seconds {args.seconds} is outside 0 .. 60; choose 3, as the paper, or 0 for no limit.")
    if args.paper_table is not None:
        known_table(args.paper_table, "--paper-table ")
    sets = names_of(args.folders, args.names)
    sets = {name: _sampled(path, name, args) if _is_model(path) else path for name, path in sets.items()}
    study = make_study(
        args.out,
        sets,
        args.task,
        real=args.real,
        given=args.input,
        checks=args.checks,
        title=args.title,
        question=args.question,
        seconds=args.seconds,
        per_session=args.per_session,
        seed=args.seed,
        paper_table=args.paper_table,
    )
    print(f"{args.out}: {len(study.rated)} items; show it with `ldmlab study serve {args.out}`")


def _is_model(path: Path) -> bool:
    return path.is_file() or any((path / name).is_file() for name in ("model.yaml", "config.yaml", "model_index.json"))


def _sampled(model: Path, name: str, args: argparse.Namespace) -> Path:
    """The samples of a model, the same prompts and seed for all."""
    from ldmlab.app.cli import dispatch

    if args.prompts is None:
        raise InputError(f"{model} is a model, which needs --prompts FILE; or give a folder of its samples.")
    out = args.out.with_name(f"{args.out.name}-samples") / name
    seed = ["--seed", str(args.seed)]
    dispatch(
        ["sample", str(model), "--prompts", str(args.prompts), *seed, "--out", str(out), *shlex.split(args.sample)]
    )
    return out


def _serve(args: argparse.Namespace) -> None:
    try:
        import uvicorn

        from ldmlab.study.server import application
    except ModuleNotFoundError as error:
        raise InputError(f"ldmlab study serve needs {error.name}; run `pip install 'ldmlab[{EXTRA}]'`.") from error
    from ldmlab.disks import locked
    from ldmlab.study.design import read_study

    (folder,) = args.folders if len(args.folders) == 1 else [None]
    if folder is None:
        raise InputError("ldmlab study serve shows one study; give one folder.")
    study = read_study(folder)
    with locked(folder / ".serving", f"{folder} is served by another process", remove=True):
        print(
            f"http://{args.host}:{args.port}/ (stop with Ctrl-C; answers go to {folder / 'answers.jsonl'})", flush=True
        )
        config = uvicorn.Config(
            application(folder, study), host=args.host, port=args.port, access_log=False, log_level="warning"
        )
        uvicorn.Server(config).run()  # ends with 1 where the port is taken


def _report(args: argparse.Namespace) -> None:
    from ldmlab.study.results import write_results

    out = args.out or args.folders[0]
    print(write_results(args.folders, out), end="")
    print(out / "report.html")
