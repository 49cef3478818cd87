"""`ldmlab dashboard`: comparison of runs, as a file or at W&B."""

import argparse
from pathlib import Path

from ldmlab.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, or folders of run folders")
    parser.add_argument("--out", type=Path, help="the page (default: dashboard.html)")
    parser.add_argument("--wandb", metavar="ENTITY/PROJECT", help="a saved view at W&B instead of a page")
    parser.add_argument("--title", default="Runs side by side", help="default: Runs side by side")


def run(args: argparse.Namespace) -> None:
    from ldmlab.app import dashboard_page
    from ldmlab.app.dashboard_page import dashboard
    from ldmlab.app.run_records import read_runs
    from ldmlab.report.render import write_page

    if args.wandb is None:
        out = args.out or Path("dashboard.html")
        print(write_page(out, dashboard(read_runs(args.runs), args.title), f"{out.stem}_points.csv"))
        return
    if args.out is not None:
        raise InputError(f"--out {args.out} is for a page, and --wandb saves a view instead; leave one of them out.")
    entity, _, project = args.wandb.partition("/")
    if not (entity and project) or "/" in project:
        raise InputError(f"--wandb {args.wandb} must be ENTITY/PROJECT, as in the address of the project's page.")
    print(dashboard_page.save_view(dashboard_page.workspace(read_runs(args.runs), entity, project, args.title)))
