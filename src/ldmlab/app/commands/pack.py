"""`ldmlab pack SOURCE OUT`: images and captions to image shards."""

import argparse
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from ldmlab.app.cli import at_least
from ldmlab.app.progress import bar
from ldmlab.data.annotation_files import annotated, image_names, read_annotations, with_maps
from ldmlab.data.image_parts import MAPS
from ldmlab.data.image_sources import LAYOUTS, Source, list_source
from ldmlab.data.opt_out import OptOut
from ldmlab.data.output_folder import BAD, Destination
from ldmlab.data.pack_images import FORMATS, Encoding
from ldmlab.data.pack_shards import PackOptions, pack
from ldmlab.data.splits import NEAR_BITS, SplitRule
from ldmlab.data.transforms import RULES, Transform, parse_colour
from ldmlab.data.workers import processors
from ldmlab.errors import InputError, check_fraction

_SHOWN = 10  # unreadable images named on the screen; the file names all
_KINDS = {"table": "in a table", "classes": "in a folder per class", "tars": "in tars", "plain": "without captions"}
_LAYOUT = """what SOURCE is: a table (metadata.jsonl, .csv) with images,
captions (.txt) next to images, a folder per class, plain (nested) folders, tars"""
_ANNOTATIONS = "boxes or captions by file name: COCO's JSON, OpenImages' CSV; may be given again"

_EXCLUDE = """opt-out list, an image a line: its URL (as in any field), the SHA-256 of
its file, or its perceptual hash (16 digits)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options in the order of the work: find and annotate, hold out, change and write."""
    add = parser.add_argument
    add("source", metavar="SOURCE", type=Path, help="folder of images or tars, or a .jsonl, .csv, .tsv or .tar file")
    add("out", metavar="OUT", help="new folder or address (s3://...); gets train/ and, with --val, val/")
    add("--layout", choices=LAYOUTS, default="auto", help=_LAYOUT)
    add("--file-field", metavar="NAME", help="column with the file names (default: file_name, file, image, path ...)")
    add("--caption-field", metavar="NAME", help="column or field of captions (default: caption or text; none: none)")
    add("--class-field", metavar="NAME", help="field whose sorted distinct values become class_id")
    add("--list", metavar="FILE", type=Path, help="take only the images this text file names, one a line")
    add("--min-side", metavar="PIXELS", type=int, default=0, help="leave out images with a shorter short side")
    add("--exclude", metavar="FILE", type=Path, help=_EXCLUDE)
    add("--exclude-distance", metavar="BITS", type=int, help="how far perceptual hashes may be off, of 64 bits (3)")
    add("--annotations", metavar="FILE", type=Path, action="append", default=[], help=_ANNOTATIONS)
    add("--classes", metavar="FILE", type=Path, help="of boxes: a class a line, its ids and its name")
    add("--label-maps", metavar="FOLDER", type=Path, help="label maps: a PNG of each image's name")
    add("--masks", metavar="FOLDER", type=Path, help="masks, white in the hole: a PNG of each image's name")
    add("--split", metavar="NAME", default="train", help="what the images that are not held out are called (train)")
    add("--val", metavar="SHARE", type=float, default=0.0, help="share of groups held out in val/ (0)")
    add("--val-least", metavar="N", type=int, default=1, help="least groups held out of each --stratify value (1)")
    add("--group", metavar="FIELD", help="images with one value of this field stay on one side")
    add("--group-strip", metavar="REGEX", help="cut this out of the value of --group first: what variants differ in")
    add("--stratify", metavar="FIELD", help="hold out the same share of each value of this field")
    add("--seed", type=int, default=0, help="which groups are held out (0)")
    add("--size", metavar="PIXELS", type=int, help="side of the packed images (256)")
    add("--crop", choices=RULES, default="centre", help="crop and resize rule (centre); see data/README.md")
    add("--background", metavar="COLOUR", default="white", help="of transparent pixels: name, #rrggbb, R,G,B (white)")
    add("--format", choices=FORMATS, default="webp", help="of packed images (webp: lossless unless --quality is given)")
    add("--quality", type=int, help="1 .. 100, for webp and jpg")
    add("--shard-size", metavar="N", type=int, default=1000, help="images a shard (1000)")
    add("--workers", metavar="N", type=int, default=processors(), help="processes (all cores)")
    add("--max-bad", metavar="SHARE", type=float, default=0.1, help="fail above this share of unreadable images (0.1)")
    add("--origin", metavar="TEXT", help="where the images come from, for the manifest (the name of SOURCE)")
    add("--licence", metavar="TEXT", default="", help="of the images, for the manifest")


def options_of(args: argparse.Namespace) -> PackOptions:
    if args.exclude_distance is not None and args.exclude is None:
        raise InputError(f"--exclude-distance {args.exclude_distance} is of an opt-out list; give --exclude FILE too.")
    held_out = {"group": None, "stratify": None, "val_least": 1, "seed": 0}
    if not args.val and (given := [name for name, default in held_out.items() if getattr(args, name) != default]):
        option = f"--{given[0].replace('_', '-')} {getattr(args, given[0])}"
        raise InputError(f"{option} is about which images are held out; give --val SHARE too.")
    distance = NEAR_BITS if args.exclude_distance is None else args.exclude_distance
    size = args.size if args.size is not None or args.crop == "keep" else 256
    return PackOptions(
        Transform(size, args.crop, parse_colour(args.background)),
        Encoding(args.format, args.quality),
        SplitRule(args.val, args.group, args.group_strip, args.stratify, args.val_least, args.seed, args.split),
        args.class_field,
        args.min_side,
        args.shard_size,
        None if args.exclude is None else OptOut.of(args.exclude, distance),
    )


def run(args: argparse.Namespace) -> None:
    options, console = options_of(args), Console(stderr=True)
    at_least(args, workers=1)
    check_fraction("--max-bad", args.max_bad)
    out = Destination.of(args.out)
    with console.status(f"listing {args.source}"):
        source = list_source(args.source, args.layout, args.file_field, args.caption_field, args.list)
    found = _KINDS.get(source.layout, "with captions next to them")
    console.print(f"{args.source}: {len(source.items)} images {found}")
    for note in source.notes:
        console.print(note, markup=False)
    if source.left_out:
        console.print(f"{source.left_out} more images have no row in the table and are left out")
    source = with_more(source, args, console)
    own = {"origin": args.origin or args.source.resolve().name, "licence": args.licence, "workers": args.workers}
    with bar("packing", "images") as progress:
        result = pack(source, out.folder, options, max_bad=args.max_bad, progress=progress, **own)
    with bar("sending", "files", quiet=out.address is None) as progress:
        out.send(progress)
    if result.complete_before:
        console.print(f"{args.out} is complete already; nothing to do")
    if result.bad:
        console.print(f"{len(result.bad)} images are left out; all are listed with the reason in {args.out}/*/{BAD}:")
        for name, reason in result.bad[:_SHOWN]:
            console.print(f"  {name}: {reason}", markup=False)
    if result.small:
        console.print(f"{result.small} images left out by --min-side")
    if options.exclude and not result.complete_before:
        console.print(_left_out(options.exclude, result.excluded), markup=False)
    for split, manifest in result.manifests.items():
        mebibytes = sum(shard.bytes for shard in manifest.shards) / 2**20
        console.print(
            f"{out.named(split)}: {manifest.total} images, {len(manifest.shards)} shards, {mebibytes:.1f} MiB"
        )


def _left_out(listed: OptOut, found: Mapping[str, int]) -> str:
    """How many images the opt-out list left out, and by what."""
    if not sum(found.values()):
        return (
            f"warning: --exclude {listed.path} ({listed.entries()} entries) matched no image; check that the images "
            "have the URLs of the list in a field, or that hashes are those of the files as they are packed"
        )
    ways = ", ".join(f"{count} by {way}" for way, count in sorted(found.items()))
    return f"{sum(found.values())} images left out by --exclude {listed.path} ({listed.entries()} entries): {ways}"


def with_more(source: Source, args: argparse.Namespace, console: Console) -> Source:
    """The images with the annotations, label maps and masks of other files."""
    if args.classes is not None and not args.annotations:
        raise InputError(f"--classes {args.classes} numbers the boxes of --annotations FILE; give that too.")
    if args.annotations:
        with console.status("reading annotations"):
            found = read_annotations(args.annotations, args.classes, image_names(source))
        source = annotated(source, found)
        if found.classes is not None:
            counts = [len(item.fields["boxes"]) for item in source.items]
            console.print(f"{sum(counts)} boxes of {len(found.classes)} classes; {counts.count(0)} images have none")
    for option, part, folder in (("label-maps", "segmentation", args.label_maps), ("masks", "mask", args.masks)):
        if folder is not None:
            source = with_maps(source, MAPS[part], folder, option)
    return source
