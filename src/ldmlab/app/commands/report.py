"""`ldmlab report`: the page of an evaluation again, or several evaluations side by side."""

import argparse
from pathlib import Path

from ldmlab.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, formats = parser.add_argument, ("text", "md", "latex", "html")
    add("folders", nargs="*", type=Path, metavar="FOLDER", help="folders that evaluate.py wrote")
    add("--format", choices=formats, help="print the paper's tables with these rows of ours")
    add("--table", help="with --format: only this table of the paper, such as text2img/coco-256")
    add("--out", type=Path, help="with several folders: where the comparison goes")


def run(args: argparse.Namespace) -> None:
    """One folder: its report is written again; several: one page for all."""
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
