"""`ldmlab fetch`: published weights that a choice needs, checked, to one folder."""

import argparse

from ldmlab.app.progress import bar
from ldmlab.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="inception, lpips, wordpiece, clip; see --list")
    parser.add_argument("--list", action="store_true", help="what there is: size, licence, use, and whether it is here")
    parser.add_argument("--url", help="fetch from this address instead (a mirror); the checksum stays")
    parser.add_argument("--model", help="with clip: open_clip architecture (default: ViT-B-32)")
    parser.add_argument("--pretrained", help="with clip: tag of its weights (default: openai)")


def run(args: argparse.Namespace) -> None:
    from ldmlab.interop.published_weights import CLIP, WEIGHTS, entry_of, fetch, fetch_clip, weights_folder

    if args.list or not args.names:
        print(f"folder: {weights_folder()} (LDMLAB_WEIGHTS chooses another)\n")
        for name, weights in WEIGHTS.items():
            here = "here" if (weights_folder() / weights.file).is_file() else "not here"
            print(f"{name:<10} {weights.mib} MiB, {weights.licence}, {here}\n{'':<10} {weights.used_for}")
        print(f"{CLIP:<10} any open_clip model: --model ViT-B-32 --pretrained openai")
        return
    if (args.model or args.pretrained) and CLIP not in args.names:
        raise InputError("--model and --pretrained are for clip, which is not among the names; leave them out.")
    if args.url is not None and (CLIP in args.names or len(args.names) > 1):
        raise InputError(f"--url {args.url} is the address of one file other than clip; fetch it by itself.")
    for name in args.names:
        if name != CLIP:
            entry_of(name)  # a wrong name is refused before anything is fetched
    for name in args.names:
        if name == CLIP:
            print(fetch_clip(args.model or "ViT-B-32", args.pretrained or "openai"))
            continue
        with bar(f"fetch {name}", "bytes") as advance:
            path = fetch(name, url=args.url, advance=advance)
        print(path)
