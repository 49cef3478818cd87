"""`ldmlab audit MODEL...`: which training images a model gives back, by generating and filtering.

examples:
  ldmlab audit runs/mine/text_to_image
  ldmlab audit runs/mine/text_to_image --captions 500 --samples 16 --features clip_run features.run=runs/mine/clip
  ldmlab audit runs/mine/text_to_image --checkpoints                      copies over training, and when to stop
  ldmlab audit runs/n100 runs/n300 runs/n1000 --checkpoints --out sizes   and over the number of training images
  ldmlab audit models/mine data=shards data.train=data/mine/train data.val=data/mine/val
  torchrun --nproc-per-node 8 -m ldmlab audit runs/mine/text_to_image

A stopped audit goes on where it was when the same command runs again; more models may be added to a finished one.
"""

import argparse
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldmlab.app.cli import at_least
from ldmlab.app.commands.sample import options_as_typed
from ldmlab.errors import InputError, check_fraction

if TYPE_CHECKING:
    from ldmlab.evaluation.protocol import Protocol

MOST_SAMPLES = 64  # of one caption, among which the largest clique is searched
_SETTINGS = "audit_settings.json"
_RESULT = "audit.json"
_SAME_RESULT = ("models", "checkpoints", "out", "batch_size", "device", "plugins", "config_dir")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "models", nargs="+", metavar="MODEL|KEY=VALUE", help="run folders, checkpoints, model folders; features.run=RUN"
    )
    add("--checkpoints", action="store_true", help="of each run folder every checkpoint that it kept")
    add("--captions", type=int, metavar="N", help="distinct training captions, drawn at random (all)")
    add("--samples", type=int, default=8, metavar="K", help="of each caption (8)")
    add("--clique", type=int, help="samples that must agree (half of --samples)")
    add("--quantile", type=float, default=0.01, help="share of held-out images that the threshold calls copies (0.01)")
    add("--features", default="pixels", help="a file of conf/features (pixels)")
    add("--steps", type=int, default=50, help="of the sampler (50)")
    add("--sampler", default="ddim", help="(ddim)")
    add("--guidance-scale", type=float, help="1: off (the model's usual one)")
    add("--seed", type=int, default=0, help="of noise and of the choice of captions (0)")
    add("--weights", default="averaged", help="averaged | raw | length of an average, for runs (averaged)")
    add("--max-bad", type=float, default=0.1, metavar="SHARE", help="share of unreadable images that is allowed (0.1)")
    add("--precision", default="float32", help="float32 | bfloat16 | float16 (float32)")
    add("--out", type=Path, help="folder of the page (audit in the first run)")
    add("--batch-size", type=int, default=32, help="images at once; changes the speed only (32)")
    add("--device", default="auto", help="auto | cpu | cuda (auto)")


@options_as_typed()
def run(args: argparse.Namespace) -> None:
    options = [word for word in args.models if "=" in word and not Path(word).exists()]
    folders = [Path(word) for word in args.models if word not in options]
    _check(args, folders)

    from ldmlab import distributed
    from ldmlab.app.compose import compose, plain
    from ldmlab.app.conf_files import check_compared, check_effects, chosen_options, without_size
    from ldmlab.disks import own_folder
    from ldmlab.evaluation.protocol import Protocol
    from ldmlab.model_files import model_folder

    words = [f"features={args.features}", *options]
    config: Mapping[str, Any] = plain(without_size(compose("audit", words)))
    check_effects(config, chosen := chosen_options(words))
    same = {name: getattr(args, name) for name in ("steps", "sampler", "guidance_scale", "seed", "max_bad")}
    protocol = Protocol(name="audit", reference="train", metrics={}, copy_quantile=args.quantile, **same)
    models = list(dict.fromkeys(_models(folders, args.checkpoints)))
    check = partial(check_compared, config, chosen, also=())
    out = args.out or model_folder(models[0]) / "audit"
    settings = {name: value for name, value in vars(args).items() if name not in _SAME_RESULT} | {"options": options}
    rank, _ = distributed.join(timeout_minutes=120)
    with own_folder(partial(_begun, out, settings, models, check), ".lock", "out={} is being written by another audit"):
        try:
            audits = _audits(args, models, config, protocol, out)
        except BaseException:
            if rank == 0 and not any(one.is_dir() for one in out.iterdir()):  # no model is begun: nothing to go on with
                (out / _SETTINGS).unlink(missing_ok=True)
            raise
        if rank == 0:
            _write(out, audits)


def _check(args: argparse.Namespace, models: Sequence[Path]) -> None:
    """Refuse options that no audit can have, and fill in `clique`."""
    at_least(args, captions=1, samples=2, clique=2, batch_size=1)
    check_fraction("--max-bad", args.max_bad)
    if not 0 < args.quantile < 1:
        raise InputError(f"--quantile {args.quantile} is not between 0 and 1; choose for instance 0.01.")
    if args.samples > MOST_SAMPLES:
        raise InputError(f"--samples {args.samples} is more than {MOST_SAMPLES}; choose fewer.")
    args.clique = args.clique or max(args.samples // 2, 2)
    if args.clique > args.samples:
        raise InputError(f"--clique {args.clique} is more than --samples {args.samples}; lower it.")
    if not models:
        raise InputError("ldmlab audit needs a MODEL: a run folder, a checkpoint or a model folder.")


def _models(folders: Sequence[Path], checkpoints: bool) -> Iterator[Path]:
    """The models to audit: with `checkpoints`, those that a run kept, oldest first."""
    from ldmlab.files import by_step

    for folder in folders:
        kept = by_step(folder / "checkpoints", ".ckpt") if checkpoints else []
        if checkpoints and not kept:
            raise InputError(f"{folder} has no checkpoints; leave --checkpoints out, or give a run folder.")
        yield from kept or [folder]


def _begun(out: Path, settings: Mapping[str, Any], models: Sequence[Path], check: Callable[[Any], None]) -> Path:
    """The folder of this audit, new or begun with the same settings."""
    from ldmlab.files import read_json, write_json
    from ldmlab.model_files import describe

    plain = {name: str(value) for name, value in settings.items()}
    before = read_json(out / _SETTINGS)
    if before is None:
        if out.exists() and (not out.is_dir() or any(one.name != ".lock" for one in out.iterdir())):
            raise InputError(f"--out {out} is no audit; choose a new folder.")
        for model in models:
            check(describe(model)["image_size"])  # before anything is made
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / _SETTINGS, plain)
    elif other := [name for name, value in plain.items() if before.get(name) != value]:
        name = other[0].replace("_", "-")
        raise InputError(
            f"--out {out} holds an audit with --{name} {before.get(other[0])}, and this one has --{name} "
            f"{plain[other[0]]}; choose another folder, or delete it."
        )
    return out


def _audits(
    args: argparse.Namespace, models: Sequence[Path], config: Mapping[str, Any], protocol: "Protocol", out: Path
) -> list[dict[str, Any]]:
    """The records of all models; finished ones are read."""
    from ldmlab import distributed
    from ldmlab.app.evaluate import build_extractor, reference_data
    from ldmlab.app.progress import track
    from ldmlab.build import load, pick_device
    from ldmlab.evaluation.extraction import FEATURES, Extraction
    from ldmlab.evaluation.reference_statistics import statistics_folder
    from ldmlab.evaluation.scoring import untracked
    from ldmlab.files import read_json, write_json
    from ldmlab.model_files import model_folder

    extractor = build_extractor(config["features"]).to(pick_device(args.device))  # type: ignore[attr-defined]
    same: dict[str, Any] = {
        **{"extractor": extractor, "protocol": protocol, "reference_folder": statistics_folder()},
        **{"each": args.samples, "clique": args.clique, "captions": args.captions, "batch_size": args.batch_size},
        "track": track if distributed.rank() == 0 else untracked,
    }
    audits = []
    for path in models:
        model = load(path, weights=args.weights, device=args.device).in_precision(args.precision)
        step = "" if model.info["step"] is None else f"-step_{model.info['step']}"
        label = f"{model_folder(path).resolve().name}{step}-{model.info['fingerprint'][:6]}"
        record = distributed.shared(partial(read_json, out / label / _RESULT))
        if record is None:
            distributed.say(f"{path}:")
            data = reference_data({**config, "model": str(path)}, max(model.image_size))
            record = Extraction(model=model, data=data, out=out / label, **same).run()
            record |= {"label": label, "run": str(model_folder(path))}
            if distributed.rank() == 0:
                write_json(out / label / _RESULT, record)
                shutil.rmtree(out / label / FEATURES)
        audits.append(record)
    return audits


def _write(out: Path, audits: Sequence[dict[str, Any]]) -> None:
    """audit.json with all records, the page, and the table on the terminal."""
    from ldmlab.disks import disk_errors
    from ldmlab.files import write_json
    from ldmlab.report.audit_page import stopping_advice, write_audit

    with disk_errors(out):
        write_json(out / _RESULT, {"advice": stopping_advice(audits), "audits": audits})
        print(write_audit(out, audits))
    print(out / "report.html")
