"""`ldmlab report`: the page of an evaluation again, or several evaluations side by side."""

import argparse
from pathlib import Path

from ldmlab.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `ldmlab report`."""
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="folders that evaluate.py wrote")
    parser.add_argument("--out", type=Path, help="with several folders: where the comparison goes")


def run(args: argparse.Namespace) -> int:
    """One folder: its report is written again; several: one page for all."""
    from ldmlab.evaluation.report import write_comparison, write_report

    if len(args.folders) == 1 and args.out is None:
        print(write_report(args.folders[0]))
        return 0
    if args.out is None:
        raise InputError("--out is missing: several evaluations go to one page, so say into which folder.")
    print(write_comparison(args.folders, args.out))
    return 0
