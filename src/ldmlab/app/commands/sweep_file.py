"""`ldmlab sweep-file`: the file that `wandb sweep` reads, from the words of a Hydra multirun."""

import argparse
import re
from pathlib import Path

from ldmlab.errors import InputError

METHODS = ("grid", "random", "bayes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `ldmlab sweep-file`."""
    parser.add_argument(
        "overrides",
        nargs="+",
        metavar="KEY=VALUE",
        help="as after `python train.py -m`: experiment=NAME seed=0,1,2\n"
        "optimizer.learning_rate=interval(1e-5,1e-3) or tag(log,interval(1e-5,1e-3))",
    )
    parser.add_argument("--out", type=Path, default=Path("sweep.yaml"), help="the file (default: sweep.yaml)")
    parser.add_argument("--name", help="of the sweep, and group of its runs (default: the file's)")
    parser.add_argument("--method", choices=METHODS, default="grid", help="default: grid, every combination")
    parser.add_argument("--metric", default="val/loss", help="a column of metrics.csv (default: val/loss)")
    parser.add_argument("--goal", choices=("minimize", "maximize"), default="minimize", help="default: minimize")
    parser.add_argument("--processes", type=int, default=1, help="GPUs of each run, by torchrun (default: 1)")
    parser.add_argument("--runs", type=int, help="random and bayes: how many")


def run(args: argparse.Namespace) -> int:
    """Write the file and say what to type next."""
    import yaml

    from ldmlab.app.wandb_sweep import SweepOptions, sweep_file

    name = args.name or args.out.stem
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
        raise InputError(f"--name {name!r} becomes a group's name; use letters, digits, dots, dashes.")
    for option, value in (("--processes", args.processes), ("--runs", args.runs)):
        if value is not None and value < 1:
            raise InputError(f"{option} {value} must be at least 1.")
    options = SweepOptions(name, args.method, args.metric, args.goal, args.processes, args.runs)
    content = sweep_file(args.overrides, options)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(yaml.safe_dump(content, sort_keys=False, width=1000), encoding="utf-8")
    print(f"{args.out}: start it with `wandb sweep --project ldmlab {args.out}`, then run the agent it names")
    return 0
