"""`ldmlab index TARS...`: write the manifest of tars made by others."""

import argparse
from pathlib import Path

from rich.console import Console

from ldmlab.app.progress import bar
from ldmlab.data.index_tars import index_tars
from ldmlab.data.output_folder import BAD
from ldmlab.data.workers import processors
from ldmlab.errors import InputError

_SHOWN = 10  # samples named on the screen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The tars, and what is recorded in the manifest."""
    add = parser.add_argument
    add("tars", metavar="TARS", type=Path, nargs="+", help="tars of one folder, or that folder")
    add("--split", metavar="NAME", default="train", help="what these images are called (train)")
    add("--workers", metavar="N", type=int, default=processors(), help="processes (all cores)")
    add("--origin", metavar="TEXT", help="where the images come from, for the manifest (the folder's name)")
    add("--licence", metavar="TEXT", default="", help="of the images, for the manifest")


def run(args: argparse.Namespace) -> int:
    """Reads, writes, prints a summary."""
    console = Console(stderr=True)
    if args.workers < 1:
        raise InputError(f"workers={args.workers}; give at least 1.")
    first: Path = args.tars[0]
    folder = first if first.is_dir() else first.parent
    with bar("reading", "tars", console) as progress:
        found = index_tars(
            args.tars,
            split=args.split,
            origin=args.origin or folder.resolve().name,
            licence=args.licence,
            workers=args.workers,
            progress=progress,
        )
    for name, reason in found.bad[:_SHOWN]:
        console.print(f"  {name}: {reason}", markup=False)
    if found.bad:
        console.print(f"{len(found.bad)} samples will be skipped; all are listed in {folder / BAD}", markup=False)
    if found.without_caption:
        console.print(f"{found.without_caption} samples have no caption; runs that read captions skip them")
    manifest = found.manifest
    console.print(
        f"{folder}: {manifest.total} samples, {len(manifest.shards)} shards, fields {', '.join(manifest.fields)}"
    )
    return 0
