"""`ldmlab score SAMPLES REFERENCE`: one set of images on disk against another, without a model."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldmlab.errors import InputError

EPILOG = """examples:
  ldmlab score outputs/samples data/celebahq/val --metrics fid,kid,precision_recall
  ldmlab score outputs/samples data/celebahq/val --metrics fid,fid_inf     also extrapolated to infinitely many samples
  ldmlab score samples.npz VIRTUAL_imagenet256_labeled.npz --metrics fid,sfid,is,precision_recall
  ldmlab score outputs/samples data/emoji/val --features clip_run features.run=runs/demo/clip --metrics kid
  torchrun --nproc-per-node 8 -m ldmlab score outputs/samples data/celebahq/val"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `ldmlab score`; nothing heavy is imported."""
    add = parser.add_argument
    parser.epilog = EPILOG
    add("samples", type=Path, metavar="SAMPLES", help="folder of images or of shards, or .npz of ADM's script")
    add("reference", type=Path, metavar="REFERENCE", help="the same; an .npz may hold statistics alone")
    add("options", nargs="*", metavar="KEY=VALUE", help="such as features.run=RUN or metrics.kid.subset_size=50")
    add("--features", default="inception", help="a file of conf/features (inception)")
    add("--metrics", default="fid,kid,precision_recall", help="files of conf/metric (fid,kid,precision_recall)")
    add("--out", type=Path, metavar="FILE", help="also write the scores as JSON")
    add("--npz", type=Path, metavar="FILE", help="also write SAMPLES as a batch for ADM's script, with its statistics")
    add("--batch-size", type=int, default=64, help="images at once; changes the speed only (64)")
    add("--workers", type=int, default=2, help="processes that decode images (2)")
    add("--max-bad", type=float, default=0.0, metavar="SHARE", help="share of unreadable images that is allowed (0)")
    add("--device", default="auto", help="auto | cpu | cuda (auto)")


def run(args: argparse.Namespace) -> int:
    """Checks, scores, prints and writes."""
    from ldmlab import distributed
    from ldmlab.app.compose import compose, plain
    from ldmlab.app.evaluate import track
    from ldmlab.app.evaluation_parts import build_extractor, build_metric
    from ldmlab.build import pick_device
    from ldmlab.evaluation.image_sets import image_set, score_sets
    from ldmlab.files import write_json

    if args.batch_size < 1 or args.workers < 0:
        raise InputError(f"--batch-size {args.batch_size} and --workers {args.workers} must be at least 1 and 0.")
    if not 0 <= args.max_bad < 1:
        raise InputError(f"--max-bad {args.max_bad} is not a share; choose 0 or more, below 1.")
    rank, world = distributed.join()
    if args.npz is not None and world > 1:
        raise InputError("--npz is written by one process; run the command without torchrun.")
    config: Mapping[str, Any] = plain(compose("score", overrides(args)))
    samples, reference = (image_set(path, args.workers, args.max_bad) for path in (args.samples, args.reference))
    extractor = build_extractor(config["features"]).to(pick_device(args.device))  # type: ignore[attr-defined]
    metrics = {name: build_metric(name, node, extractor.width, "metrics") for name, node in config["metrics"].items()}
    options: dict[str, Any] = {"track": track} if rank == 0 else {}
    result = score_sets(samples, reference, extractor, metrics, batch_size=args.batch_size, **options)
    if rank == 0:
        print(as_text(result))
        if args.out is not None:
            write_json(args.out, result)
    if args.npz is not None:
        _write_npz(args, samples, metrics)
    return 0


def overrides(args: argparse.Namespace) -> list[str]:
    """Overrides of conf/score.yaml."""
    from ldmlab.app.compose import group_choices

    names = [name for name in args.metrics.split(",") if name]
    known = group_choices("metric")
    if unknown := [name for name in names if name not in known] or ([""] if not names else []):
        raise InputError(f"--metrics {unknown[0]}: there is no such score; there are {', '.join(known)}.")
    chosen = [f"+metric@metrics.{name}={name}" for name in names]
    return [f"features={args.features}", *chosen, *args.options]


def as_text(result: Mapping[str, Any]) -> str:
    """Both sets, and a line for each score."""
    from ldmlab.app.evaluate import scores_text

    sides = [result[side] for side in ("samples", "reference")]
    lines = [f"{side['path']}: {_images(side)} ({side['kind']})" for side in sides]
    return "\n".join([*lines, scores_text(result)])


def _images(side: Mapping[str, Any]) -> str:
    if lost := side.get("unreadable"):
        return f"{side['images']} of {lost['of']} images could be read"
    return f"{side['images'] or 'statistics of'} images"


def _write_npz(args: argparse.Namespace, samples: Any, metrics: Mapping[str, Any]) -> None:
    from ldmlab.evaluation.image_sets import statistics_of
    from ldmlab.evaluation.npz import write_npz

    images = (part.permute(0, 2, 3, 1).numpy() for _, part in samples.images(args.batch_size))
    statistics = statistics_of(metrics) if args.features.startswith("inception") else None
    write_npz(args.npz, (samples.count - len(samples.lost), *samples.size), images, statistics)
    print(args.npz)
