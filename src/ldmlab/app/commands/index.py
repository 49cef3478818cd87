"""`ldmlab index TARS...`: write the manifest of tars made by others."""

import argparse

from rich.console import Console

from ldmlab.app.cli import at_least
from ldmlab.app.progress import bar
from ldmlab.data.index_tars import index_tars
from ldmlab.data.output_folder import BAD
from ldmlab.data.workers import processors

_SHOWN = 10  # samples named on the screen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("tars", metavar="TARS", nargs="+", help="tars of one folder, or that folder; or one address or pattern")
    add("--split", metavar="NAME", default="train", help="what these images are called (train)")
    add("--workers", metavar="N", type=int, default=processors(), help="processes (all cores)")
    add("--origin", metavar="TEXT", help="where the images come from, for the manifest (the folder's name)")
    add("--licence", metavar="TEXT", default="", help="of the images, for the manifest")


def run(args: argparse.Namespace) -> None:
    at_least(args, workers=1)
    own = {"split": args.split, "origin": args.origin, "licence": args.licence}
    with bar("reading", "tars") as progress:
        found = index_tars(args.tars, workers=args.workers, progress=progress, **own)
    console, manifest = Console(stderr=True), found.manifest
    for name, reason in found.bad[:_SHOWN]:
        console.print(f"  {name}: {reason}", markup=False)
    if found.bad:
        console.print(f"{len(found.bad)} samples will be skipped; all are listed in {found.folder}/{BAD}", markup=False)
    if found.without_caption:
        console.print(f"{found.without_caption} samples have no caption; runs that read captions skip them")
    fields = ", ".join(manifest.fields)
    console.print(f"{found.folder}: {manifest.total} samples, {len(manifest.shards)} shards, fields {fields}")
