"""`ldmlab scenes OUT`: synthetic images with boxes and label maps, for layouts and semantic synthesis."""

import argparse
import textwrap
from pathlib import Path

from ldmlab.app.cli import at_least
from ldmlab.app.progress import bar
from ldmlab.data.pack_images import FORMATS, Encoding
from ldmlab.data.scene_shards import CLASSES, MOST, SceneSettings, write_scenes
from ldmlab.data.workers import processors
from ldmlab.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
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


def run(args: argparse.Namespace) -> None:
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
