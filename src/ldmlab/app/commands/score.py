"""`ldmlab score SAMPLES REFERENCE`: one set of images on disk against another, without a model."""

import argparse
import json
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
    add("--device", default="auto", help="auto | cpu | cuda (auto)")


def run(args: argparse.Namespace) -> int:
    """Refuses what cannot work, looks, prints and writes."""
    from ldmlab.app.compose import compose, plain
    from ldmlab.app.evaluate import build_extractor, build_metric, track
    from ldmlab.build import pick_device
    from ldmlab.evaluation import processes
    from ldmlab.evaluation.image_sets import image_set
    from ldmlab.evaluation.set_score import score_sets

    if args.batch_size < 1 or args.workers < 0:
        raise InputError(f"--batch-size {args.batch_size} and --workers {args.workers} must be at least 1 and 0.")
    rank, world = processes.join()
    if args.npz is not None and world > 1:
        raise InputError("--npz is written by one process; run the command without torchrun.")
    config: Mapping[str, Any] = plain(compose("score", overrides(args)))
    samples, reference = image_set(args.samples), image_set(args.reference)
    extractor = build_extractor(config["features"]).to(pick_device(args.device))  # type: ignore[attr-defined]
    metrics = {name: build_metric(name, node, extractor.width, "metrics") for name, node in config["metrics"].items()}
    options: dict[str, Any] = {"batch_size": args.batch_size, "workers": args.workers, "rank": rank, "world": world}
    options |= {"track": track} if rank == 0 else {}
    result = score_sets(samples, reference, extractor, metrics, **options)
    if rank == 0:
        print(as_text(result))
        if args.out is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
    if args.npz is not None:
        _write_npz(args, samples, metrics)
    return 0


def overrides(args: argparse.Namespace) -> list[str]:
    """What Hydra composes conf/score.yaml with."""
    from ldmlab.app.compose import group_choices

    names = [name for name in args.metrics.split(",") if name]
    known = group_choices("metric")
    if unknown := [name for name in names if name not in known] or ([""] if not names else []):
        raise InputError(f"--metrics {unknown[0]}: there is no such score; there are {', '.join(known)}.")
    chosen = [f"+metric@metrics.{name}={name}" for name in names]
    return [f"features={args.features}", *chosen, *args.options]


def as_text(result: Mapping[str, Any]) -> str:
    """A line a score."""
    sides = [result[side] for side in ("samples", "reference")]
    lines = [f"{side['path']}: {side['images'] or 'statistics of'} images ({side['kind']})" for side in sides]
    lines.append(f"features: {result['features']['name']}")
    for name, score in result["scores"].items():
        spread = "" if score["spread"] is None else f" +- {score['spread']:.3g}"
        lines.append(f"{name:<12} {score['value']:.6g}{spread}{''.join(f'  ({mark})' for mark in score['marks'])}")
        points = result["sample_curves"].get(name, ())
        lines += [f"{'':<12} {point['value']:.6g} at {point['images']:,.0f} samples" for point in points]
    return "\n".join(lines)


def _write_npz(args: argparse.Namespace, samples: Any, metrics: Mapping[str, Any]) -> None:
    from ldmlab.evaluation.npz import write_npz
    from ldmlab.evaluation.set_score import statistics_of

    batches = samples.batches(args.batch_size, workers=args.workers)
    images = (part.permute(0, 2, 3, 1).numpy() for _, part in batches)
    statistics = statistics_of(metrics) if args.features.startswith("inception") else None
    write_npz(args.npz, (samples.count, *samples.size), images, statistics)
    print(args.npz)
