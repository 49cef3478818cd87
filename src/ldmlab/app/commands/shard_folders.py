"""Shards of images: made up, made by others, and the sheet of what lies in them; latents of images."""

import argparse
import textwrap
from collections import Counter
from pathlib import Path

from rich.console import Console

from ldmlab.app.cli import at_least
from ldmlab.app.compose import compose, plain
from ldmlab.app.conf_files import check_added, check_effects, chosen_options
from ldmlab.app.progress import bar
from ldmlab.data.index_tars import index_tars
from ldmlab.data.manifest import read_manifest
from ldmlab.data.output_folder import BAD
from ldmlab.data.pack_images import FORMATS, Encoding
from ldmlab.data.scene_shards import CLASSES, MOST, SceneSettings, write_scenes
from ldmlab.data.workers import processors
from ldmlab.disks import disk_errors
from ldmlab.errors import InputError, did_you_mean
from ldmlab.files import write_json, write_text


def add_scenes(parser: argparse.ArgumentParser) -> None:
    add, names = parser.add_argument, textwrap.fill(", ".join(CLASSES), 80)
    objects = f"what objects may be, numbered in this order (all {len(CLASSES)}):\n{names}\n"
    add("out", metavar="OUT", type=Path, help="new folder; gets train/ and val/")
    add("--count", metavar="N", type=int, default=3000, help="scenes in train/ (3000)")
    add("--val", metavar="N", type=int, default=500, help="scenes in val/, other ones (500)")
    add("--size", metavar="PIXELS", type=int, default=64, help="side of the images (64)")
    add("--seed", type=int, default=0, help="which scenes (0)")
    add("--classes", metavar="NAME,NAME", help=f"{objects}or any caption of the emoji shards, such as 'red apple'")
    add("--objects", metavar="LEAST-MOST", default=f"1-{MOST}", help=f"objects a scene (1-{MOST})")
    add("--emoji", metavar="FOLDER", type=Path, default=Path("data/emoji-256/train"), help="shards of the objects")
    add("--format", choices=FORMATS, default="webp", help="of the images (webp: lossless unless --quality is given)")
    add("--quality", type=int, help="1 .. 100, for webp and jpg")
    add("--shard-size", metavar="N", type=int, default=1000, help="scenes a shard (1000)")
    add("--workers", metavar="N", type=int, default=processors(), help="processes (all cores)")


def run_scenes(args: argparse.Namespace) -> None:
    """Synthetic images with boxes and label maps, for layouts and semantic synthesis."""
    at_least(args, count=1, val=0, workers=1)
    classes = tuple(name.strip() for name in args.classes.split(",")) if args.classes is not None else tuple(CLASSES)
    least, _, most = args.objects.partition("-")
    if not least.isdecimal() or not (most or least).isdecimal():
        raise InputError(f"--objects {args.objects} is no range; write such as 1-{MOST} or 3.")
    settings = SceneSettings(str(args.emoji), args.size, args.seed, classes, int(least), int(most or least))
    counts = {"train": args.count} | ({"val": args.val} if args.val else {})
    written = {"encoding": Encoding(args.format, args.quality), "shard_size": args.shard_size}
    with bar("drawing", "scenes") as progress:
        manifests = write_scenes(args.out, counts, settings, workers=args.workers, progress=progress, **written)
    for split, manifest in manifests.items():
        print(f"{args.out / split}: {manifest.total} scenes of {len(classes)} classes, {len(manifest.shards)} shards")


_SHOWN = 10  # samples named on the screen


def add_index(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("tars", metavar="TARS", nargs="+", help="tars of one folder, or that folder; or one address or pattern")
    add("--split", metavar="NAME", default="train", help="what these images are called (train)")
    add("--workers", metavar="N", type=int, default=processors(), help="processes (all cores)")
    add("--origin", metavar="TEXT", help="where the images come from, for the manifest (the folder's name)")
    add("--licence", metavar="TEXT", default="", help="of the images, for the manifest")


def run_index(args: argparse.Namespace) -> None:
    """Write the manifest of tars made by others."""
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


def add_data_sheet(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("shards", metavar="SHARDS", nargs="+", type=Path, help="folders of image shards: train, val, more splits")
    add("--out", metavar="FOLDER", type=Path, help="where the sheet goes (into each folder of shards)")
    add("--licence-field", metavar="NAME", help="field with an image's licence (licence, license; else the manifest's)")
    add("--source-field", metavar="NAME", help="field with an image's source (source; else the manifest's)")
    add("--count", metavar="NAME", action="append", default=[], help="count the values of this field; may be repeated")
    add("--workers", metavar="N", type=int, default=processors(), help="processes (all cores)")


def run_data_sheet(args: argparse.Namespace) -> None:
    """What lies in image shards, for those who use them and those whose images they are.

    data_sheet.md and data_sheet.json go into each folder of shards, or to --out. Equal shards give an equal hash, which
    runs that train on them record and model cards print.
    """
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
    known = {name for _, manifest in found for name in manifest.fields}
    for name in args.count:
        if name not in known:
            hint = did_you_mean(name, known, f"there are {', '.join(sorted(known)) or 'none'}.")
            raise InputError(f"--count {name!r}: no image of SHARDS has this field; {hint}")
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


# Options of `data` that latents depend on, or their reading:
_READ = ("train", "val", "image_size", "fields", "flip", "workers", "sha256", "shard_cache", "shard_cache_gib")


def add_encode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options of conf/encode.yaml")


def run_encode(args: argparse.Namespace) -> None:
    """Hydra options like train.py's, since the images and their size come from `data=`.

    options are key=value, as for train.py; from_run and out must be given:
      ldmlab encode data=emoji from_run=runs/first_stage out=data/emoji-latents
      torchrun --nproc-per-node=8 -m ldmlab encode ...     several processes share the shards (or srun)
    with conditioner=text conditioner.text.from_run=CLIP the states of captions are stored too, and training reads them;
    conf/encode.yaml explains each option; an interrupted encode continues when the same command is run again.
    """
    config = plain(compose("encode", args.overrides))
    check_added("encode", args.overrides)
    check_effects(config, chosen := chosen_options(args.overrides))
    if unread := sorted(name for name in chosen if name.startswith("data.") and name[5:] not in _READ):
        raise InputError(f"{unread[0]} has no effect on latents; leave it out, or give it to the training on them.")
    from ldmlab.app.encode_splits import encode_splits

    encode_splits(config)
