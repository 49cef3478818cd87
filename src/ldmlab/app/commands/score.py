"""`ldmlab score SAMPLES REFERENCE`: one set of images on disk against another, without a model.

examples:
  ldmlab score outputs/samples data/celebahq/val --metrics fid,kid,precision_recall
  ldmlab score outputs/samples data/celebahq/val --metrics fid,fid_inf     also extrapolated to infinitely many samples
  ldmlab score samples.npz VIRTUAL_imagenet256_labeled.npz --metrics fid,sfid,is,precision_recall
  ldmlab score outputs/samples data/emoji/val --features clip_run features.run=runs/demo/clip --metrics kid
  torchrun --nproc-per-node 8 -m ldmlab score outputs/samples data/celebahq/val
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldmlab.app.cli import at_least
from ldmlab.app.compose import compose, plain
from ldmlab.app.conf_files import check_effects, chosen_options, group_choices
from ldmlab.app.progress import track
from ldmlab.errors import InputError, check_fraction

_USUAL = "fid,kid,precision_recall"  # of --metrics


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "samples",
        type=Path,
        metavar="SAMPLES",
        help="folder of images (grids of `sample` do not count) or shards, or .npz of ADM's",
    )
    add("reference", type=Path, metavar="REFERENCE", help="the same; an .npz may hold statistics alone")
    add("options", nargs="*", metavar="KEY=VALUE", help="such as features.run=RUN or metrics.kid.subset_size=50")
    add("--features", default="inception", help="a file of conf/features (inception)")
    add("--metrics", help="files of conf/metric (fid, where there are more images than features, kid,precision_recall)")
    add("--out", type=Path, metavar="FILE", help="also write the scores as JSON")
    add("--npz", type=Path, metavar="FILE", help="also write SAMPLES as a batch for ADM's script, with its statistics")
    add("--batch-size", type=int, default=64, help="images at once; changes the speed only (64)")
    add("--workers", type=int, default=2, help="processes that decode images (2)")
    add("--controls", type=int, default=1000, metavar="N", help="score at most N noise images beside SAMPLES (1000)")
    add("--max-bad", type=float, default=0.0, metavar="SHARE", help="share of unreadable images that is allowed (0)")
    add("--device", default="auto", help="auto | cpu | cuda (auto)")


def run(args: argparse.Namespace) -> None:
    from ldmlab import distributed
    from ldmlab.app.evaluate import build_extractor, build_metric
    from ldmlab.app.run_end import scores_text
    from ldmlab.build import pick_device
    from ldmlab.evaluation.image_sets import image_set, score_sets
    from ldmlab.evaluation.scoring import untracked
    from ldmlab.files import write_json

    at_least(args, batch_size=1, workers=0, controls=0)
    check_fraction("--max-bad", args.max_bad)
    _check_written(args)
    rank, world = distributed.join()
    if args.npz is not None and world > 1:
        raise InputError("--npz is written by one process; run the command without torchrun.")
    config: Mapping[str, Any] = plain(compose("score", overrides(args)))
    check_effects(config, chosen_options(args.options))
    samples, reference = (image_set(path, args.workers, args.max_bad) for path in (args.samples, args.reference))
    extractor = build_extractor(config["features"]).to(pick_device(args.device))  # type: ignore[attr-defined]
    nodes = config["metrics"]
    if args.metrics is None:
        nodes = fitting(nodes, min(samples.count, reference.count or samples.count), extractor.width)
    metrics = {name: build_metric(name, node, extractor.width, "metrics") for name, node in nodes.items()}
    options: dict[str, Any] = {"batch_size": args.batch_size, "track": track if rank == 0 else untracked}
    options["at_most"] = args.controls
    result = score_sets(samples, reference, extractor, metrics, **options)
    if rank == 0:
        for side in (result["samples"], result["reference"]):
            images = f"{side['images'] or 'statistics of'} images"
            if lost := side.get("unreadable"):
                images = f"{side['images']} of {lost['of']} images could be read"
            print(f"{side['path']}: {images} ({side['kind']})")
        print(scores_text(result))
        if args.out is not None:
            write_json(args.out, result)
    if args.npz is not None:
        _write_npz(args, samples, metrics)


def fitting(nodes: Mapping[str, Any], images: int, width: int) -> Mapping[str, Any]:
    """The usual scores, without the Frechet distance where the smaller set has fewer images than features."""
    from ldmlab import distributed

    if images >= width or nodes["fid"]["small_sample"]:
        return nodes
    distributed.say(
        f"fid is left out: {images:,} images are fewer than the {width:,} features, so it means little; "
        "metrics.fid.small_sample=true has it all the same."
    )
    return {name: node for name, node in nodes.items() if name != "fid"}


def overrides(args: argparse.Namespace) -> list[str]:
    typed, known = _USUAL if args.metrics is None else args.metrics, group_choices("metric")
    names = [name for name in typed.split(",") if name]
    if unknown := [name for name in names if name not in known] or ([""] if not names else []):
        raise InputError(f"--metrics {unknown[0]}: there is no such score; there are {', '.join(known)}.")
    return [f"features={args.features}", *(f"+metric@metrics.{name}={name}" for name in names), *args.options]


def _check_written(args: argparse.Namespace) -> None:
    """InputError before any work for a file that may be the user's own, or that cannot be written."""
    for option, path, ending in (("--out", args.out, ".json"), ("--npz", args.npz, ".npz")):
        if path is None:
            continue
        if path.suffix != ending:
            raise InputError(f"{option} {path} does not end in {ending}; give a name that does.")
        if path.exists() and not (path.is_file() and _is_scores(path)):
            raise InputError(f"{option} {path} is there already; give another name, or remove it first.")


def _is_scores(path: Path) -> bool:
    """Whether a file is of `ldmlab score`, which may be written again."""
    from ldmlab.files import read_json

    found = read_json(path)
    return isinstance(found, dict) and {"samples", "reference", "scores"} <= found.keys()


def _write_npz(args: argparse.Namespace, samples: Any, metrics: Mapping[str, Any]) -> None:
    from ldmlab.evaluation.image_sets import statistics_of
    from ldmlab.evaluation.npz import write_npz

    images = (part.permute(0, 2, 3, 1).numpy() for _, part in samples.images(args.batch_size))
    statistics = statistics_of(metrics) if args.features.startswith("inception") else None
    write_npz(args.npz, (samples.count - len(samples.lost), *samples.size), images, statistics)
    print(args.npz)
