"""`ldmlab index TARS...`: write the manifest of tars made by others."""

import argparse
from pathlib import Path

from rich.console import Console

from ldmlab.app.cli import at_least
from ldmlab.app.progress import bar
from ldmlab.data.index_tars import index_tars
from ldmlab.data.output_folder import BAD
from ldmlab.data.workers import processors

_SHOWN = 10  # samples named on the screen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("tars", metavar="TARS", type=Path, nargs="+", help="tars of one folder, or that folder")
    add("--split", metavar="NAME", default="train", help="what these images are called (train)")
    add("--workers", metavar="N", type=int, default=processors(), help="processes (all cores)")
    add("--origin", metavar="TEXT", help="where the images come from, for the manifest (the folder's name)")
    add("--licence", metavar="TEXT", default="", help="of the images, for the manifest")


def run(args: argparse.Namespace) -> None:
    at_least(args, workers=1)
    first: Path = args.tars[0]
    folder = first if first.is_dir() else first.parent
    origin, own = args.origin or folder.resolve().name, {"split": args.split, "licence": args.licence}
    with bar("reading", "tars") as progress:
        found = index_tars(args.tars, origin=origin, workers=args.workers, progress=progress, **own)
    console, manifest = Console(stderr=True), found.manifest
    for name, reason in found.bad[:_SHOWN]:
        console.print(f"  {name}: {reason}", markup=False)
    if found.bad:
        console.print(f"{len(found.bad)} samples will be skipped; all are listed in {folder / BAD}", markup=False)
    if found.without_caption:
        console.print(f"{found.without_caption} samples have no caption; runs that read captions skip them")
    fields = ", ".join(manifest.fields)
    console.print(f"{folder}: {manifest.total} samples, {len(manifest.shards)} shards, fields {fields}")
