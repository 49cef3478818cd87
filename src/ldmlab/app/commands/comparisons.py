"""Pages of finished evaluations and of runs side by side."""

import argparse
from pathlib import Path

from ldmlab.errors import InputError


def add_report(parser: argparse.ArgumentParser) -> None:
    add, formats = parser.add_argument, ("text", "md", "latex", "html")
    add("folders", nargs="*", type=Path, metavar="FOLDER", help="folders that evaluate.py wrote")
    add("--format", choices=formats, help="print the paper's tables with these rows of ours")
    add("--table", help="with --format: only this table of the paper, such as text2img/coco-256")
    add("--out", type=Path, help="with several folders: where the comparison goes")


def run_report(args: argparse.Namespace) -> None:
    """The page of an evaluation again, or several evaluations side by side."""
    from ldmlab.report.pages import printed_tables, write_comparison, write_report
    from ldmlab.report.tradeoff_jobs import is_job
    from ldmlab.report.tradeoff_page import write_tradeoff

    if args.table is not None and args.format is None:
        raise InputError(f"--table {args.table} is for printing; add --format text|md|latex|html.")
    if args.format is not None and args.out is not None:
        raise InputError(f"--out {args.out} is for pages, and --format {args.format} prints; leave one of them out.")
    if args.format is not None:
        print(printed_tables(args.folders, args.format, args.table), end="")
    elif not args.folders:
        raise InputError("FOLDER is missing: name what evaluate.py wrote; --format alone prints the paper's tables.")
    elif any(map(is_job, args.folders)):  # jobs of the downsampling comparison
        print(write_tradeoff(args.folders, args.out or args.folders[0].parent / "comparison"))
    elif args.out is not None:
        print(write_comparison(args.folders, args.out))
    elif len(args.folders) == 1:
        print(write_report(args.folders[0]))
    else:
        raise InputError("--out is missing: several evaluations go to one page, so name its folder.")


def add_dashboard(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, or folders of run folders")
    parser.add_argument("--out", type=Path, help="the page (default: dashboard.html)")
    parser.add_argument("--wandb", metavar="ENTITY/PROJECT", help="a saved view at W&B instead of a page")
    parser.add_argument("--title", default="Runs side by side", help="default: Runs side by side")


def run_dashboard(args: argparse.Namespace) -> None:
    """Comparison of runs, as a file or at W&B."""
    from ldmlab.app.dashboard_page import dashboard, save_view, workspace
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
    print(save_view(workspace(read_runs(args.runs), entity, project, args.title)))
