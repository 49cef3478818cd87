"""`ldmlab report`: the page of an evaluation again, or several evaluations side by side."""

import argparse
from pathlib import Path

from ldmlab.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `ldmlab report`."""
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="folders that evaluate.py wrote")
    parser.add_argument(
        "--format", choices=("text", "md", "latex", "html"), help="print the paper's tables with these rows of ours"
    )
    parser.add_argument("--table", help="with --format: only this table of the paper, such as text2img/coco-256")
    parser.add_argument("--out", type=Path, help="with several folders: where the comparison goes")


def run(args: argparse.Namespace) -> int:
    """One folder: its report is written again; several: one page for all."""
    from ldmlab.report.tradeoff_jobs import is_job

    if args.table is not None and args.format is None:
        raise InputError(f"--table {args.table} is for printing; add --format text|md|latex|html.")
    if args.format is not None:
        from ldmlab.report.pages import printed_tables

        print(printed_tables(args.folders, args.format, args.table), end="")
        return 0
    if not args.folders:
        raise InputError("FOLDER is missing: name what evaluate.py wrote; --format alone prints the paper's tables.")
    if any(map(is_job, args.folders)):  # jobs of the downsampling comparison
        from ldmlab.report.tradeoff_page import write_tradeoff

        print(write_tradeoff(args.folders, args.out or args.folders[0].parent / "comparison"))
        return 0
    from ldmlab.report.pages import write_comparison, write_report

    if len(args.folders) == 1 and args.out is None:
        print(write_report(args.folders[0]))
        return 0
    if args.out is None:
        raise InputError("--out is missing: several evaluations go to one page, so name its folder.")
    print(write_comparison(args.folders, args.out))
    return 0
