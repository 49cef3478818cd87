"""`ldmlab data-sheet SHARDS...`: what lies in image shards, for those who use them and those whose images they are.

data_sheet.md and data_sheet.json go into each folder of shards, or to --out. Equal shards give an equal hash, which
runs that train on them record and model cards print.
"""

import argparse
from collections import Counter
from pathlib import Path

from ldmlab.app.cli import at_least
from ldmlab.app.progress import bar
from ldmlab.data.manifest import read_manifest
from ldmlab.data.workers import processors
from ldmlab.disks import disk_errors
from ldmlab.files import write_json, write_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("shards", metavar="SHARDS", nargs="+", type=Path, help="folders of image shards: train, val, more splits")
    add("--out", metavar="FOLDER", type=Path, help="where the sheet goes (into each folder of shards)")
    add("--licence-field", metavar="NAME", help="field with an image's licence (licence, license; else the manifest's)")
    add("--source-field", metavar="NAME", help="field with an image's source (source; else the manifest's)")
    add("--count", metavar="NAME", action="append", default=[], help="count the values of this field; may be repeated")
    add("--workers", metavar="N", type=int, default=processors(), help="processes (all cores)")


def run(args: argparse.Namespace) -> None:
    from ldmlab.data.data_sheet import LICENCES, SHEET, SOURCES, data_sheet
    from ldmlab.report.model_card import sheet_markdown

    at_least(args, workers=1)
    found = [(folder, read_manifest(folder, "SHARDS")) for folder in dict.fromkeys(args.shards)]
    twice = Counter(manifest.split for _, manifest in found)
    parent = {split: twice[split] > 1 for split in twice}
    splits = {
        f"{folder.resolve().parent.name}/{folder.name}" if parent[manifest.split] else manifest.split: (
            folder,
            manifest,
        )
        for folder, manifest in found
    }
    named = {
        "licences": LICENCES if args.licence_field is None else (args.licence_field,),
        "sources": SOURCES if args.source_field is None else (args.source_field,),
    }
    if args.out:
        with disk_errors(args.out):
            args.out.mkdir(parents=True, exist_ok=True)
    with bar("looking", "images") as progress:
        sheet = data_sheet(splits, **named, counted=args.count, workers=args.workers, progress=progress)
    for folder in [args.out] if args.out else [folder for folder, _ in found]:
        write_text((folder / SHEET).with_suffix(".md"), sheet_markdown(sheet))
        write_json(folder / SHEET, sheet)
        print(folder / SHEET)
    print(f"hash {sheet['hash']}")
