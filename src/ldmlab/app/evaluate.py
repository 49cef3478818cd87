"""The evaluation command: compose, load the model, score it by a protocol, write the report."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ldmlab.app.cli import run_command

OPENING = """usage: python evaluate.py model=RUN [protocol=name] [features=name] [key=value ...]

Generates samples, compares them with real images in one pass, writes metrics.json, report.md and report.html."""
EXAMPLES = """examples:
  python evaluate.py model=runs/demo/text_to_image protocol=demo_emoji features=clip_run features.run=runs/demo/clip
  python evaluate.py model=runs/ffhq-1a2b protocol=paper_ffhq            after `ldmlab fetch inception`
  python evaluate.py model=RUN "protocol.guidance_scale_curve=[1,1.5,2,3,5]"   scores over the guidance scale
  python evaluate.py model=RUN +metric@protocol.metrics.fid_inf=fid_inf  FID extrapolated to infinitely many samples
  torchrun --nproc-per-node=8 evaluate.py ...                            the GPUs share the work"""
T = TypeVar("T")


def main() -> None:
    """`python evaluate.py`."""
    sys.exit(run_command(run))


def run() -> int:
    """Hydra's command line, or its help."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        from ldmlab.app.help import hydra_help

        print(hydra_help("evaluate", OPENING, EXAMPLES))
        return 0
    from ldmlab.app.compose import hydra_main

    hydra_main("evaluate", job)
    return 0


def job(config: Any) -> None:
    """One evaluation from its composed configuration."""
    from ldmlab.app.compose import plain

    evaluate(plain(config))


def evaluate(config: Mapping[str, Any]) -> None:
    """Score config["model"]; all checks are made before the first image."""
    from ldmlab import distributed
    from ldmlab.app.evaluation_parts import build_extractor, build_metric, changed, curves, run_folder
    from ldmlab.build import pick_device
    from ldmlab.evaluation.protocol import Protocol
    from ldmlab.evaluation.reference_statistics import statistics_folder
    from ldmlab.evaluation.run import check_out
    from ldmlab.instantiate import instantiate
    from ldmlab.model_files import read_description
    from ldmlab.report.paper_table import paper_record

    rank, _ = distributed.join()
    model = Path(str(config["model"]))
    folder = run_folder(model)
    out = Path(config["out"] or folder / "evaluation" / default_name(model, config["protocol"]["name"]))
    if distributed.shared(lambda: _only_report_missing(out)):
        return _report(config, folder, out, "holds the scores of an evaluation whose report was not written")
    check_out(out)
    protocol: Protocol = instantiate({**config["protocol"], "changed": changed(config["protocol"])}, where="protocol")
    extractor = build_extractor(config["features"]).to(pick_device(config["device"]))  # type: ignore[attr-defined]
    parts = {
        "protocol": protocol,
        "extractor": extractor,
        "metrics": {name: build_metric(name, node, extractor.width) for name, node in protocol.metrics.items()},
        "out": out,
        "batch_size": config["batch_size"],
        "curves": curves(folder),
        "track": track if rank == 0 else _untracked,
        "paper": paper_record,
        "reference_folder": statistics_folder() if config["keep_reference"] else None,
    }
    if read_description(folder).get("kind") == "first_stage":
        _reconstructions(config, parts)
    else:
        _samples(config, parts)
    _report(config, folder, out)


def _only_report_missing(out: Path) -> bool:
    """Whether a full disk or a kill left the scores of an evaluation without their pages."""
    return (out / "metrics.json").exists() and not (out / "report.html").exists()


def _report(config: Mapping[str, Any], folder: Path, out: Path, reason: str = "") -> None:
    """The pages of a finished evaluation, its scores on the terminal, and at W&B if the run has a run there."""
    from ldmlab import distributed
    from ldmlab.files import disk_errors
    from ldmlab.report.metrics_json import read_evaluation
    from ldmlab.report.pages import write_report

    if distributed.rank() != 0:
        return
    if reason:
        distributed.say(f"{out} {reason}; writing it. Delete the folder to evaluate anew.")
    with disk_errors(out):
        write_report(out)
    result = read_evaluation(out)
    print(f"{scores_text(result)}\n{out / 'report.html'}")
    if config["wandb"]:
        from ldmlab.app.wandb_runs import send_scores

        send_scores(folder, out)


def scores_text(result: Mapping[str, Any]) -> str:
    """A line for each score with its spread and caveats, and how many images it rests on."""
    reference, lines = result["reference"], []
    lost = reference.get("unreadable")
    total = f" of {lost['of']:,}" if lost else ""
    if "sampling" in result:
        lines.append(f"{result['sampling']['images']:,} images against {reference['images']:,}{total} real ones")
    lines.append(f"features: {result['features']['name']}{_quality(result['features'].get('quality'))}")
    for name, score in result["scores"].items():
        spread = "" if score.get("spread") is None else f" +- {score['spread']:.3g}"
        lines.append(f"{name:<16} {score['value']:.6g}{spread}{''.join(f'  ({mark})' for mark in score['marks'])}")
        points = (result.get("sample_curves") or {}).get(name, ())
        lines += [f"{'':<16} {point['value']:.6g} at {point['images']:,.0f} samples" for point in points]
    return "\n".join(lines)


def _quality(found: Mapping[str, float] | None) -> str:
    """Retrieval scores of the CLIP model of the features."""
    if not found or "recall_1_of_50" not in found:
        return ""
    chance = f", by chance {found['chance_recall_1_of_50']:.0%}" if "chance_recall_1_of_50" in found else ""
    return f" (finds the caption among 50 for {found['recall_1_of_50']:.0%} of validation images{chance})"


def default_name(model: Path, protocol: str) -> str:
    """Of an evaluation's folder: checkpoints of one run have one each."""
    return f"{protocol}-{model.stem}" if model.suffix == ".ckpt" else protocol


def _samples(config: Mapping[str, Any], parts: dict[str, Any]) -> None:
    """Samples of a diffusion model."""
    from ldmlab.app.conditioning import scored_task
    from ldmlab.app.evaluation_parts import build_all, lpips, reference_data, run_folder, run_record
    from ldmlab.app.guiders import build_guiders
    from ldmlab.build import load
    from ldmlab.evaluation.model_evaluation import Evaluation

    model = load(config["model"], weights=config["weights"], device=config["device"])
    model.info |= run_record(run_folder(Path(config["model"])))
    model.in_precision(config["precision"])
    model.with_guiders(*build_guiders(config["guiders"], model))
    protocol = parts["protocol"]
    size = protocol.image_size or max(model.image_size)
    data = reference_data(config, size).with_task(scored_task(model.diffusion.task, protocol, size))
    distance = lpips() if protocol.pairs else None
    Evaluation(
        model=model,
        data=data,
        evaluators=build_all("evaluators", protocol.evaluators),
        baselines=build_all("baselines", protocol.baselines),
        extras=[(title, Path(path)) for title, path in config["images"]],
        lpips=distance and distance.to(model.device),
        **parts,
    ).run()


def _reconstructions(config: Mapping[str, Any], parts: dict[str, Any]) -> None:
    """Reconstructions of a first stage."""
    from ldmlab.app.evaluation_parts import lpips, reference_data, run_folder, run_record
    from ldmlab.build import load_first_stage, pick_device
    from ldmlab.evaluation.model_evaluation import ReconstructionEvaluation

    loaded = load_first_stage(config["model"], config["weights"])
    record = {"weights": loaded.files.weights, "step": loaded.files.step, "fingerprint": loaded.fingerprint}
    ReconstructionEvaluation(
        model=loaded.module.to(pick_device(config["device"])),
        info={"path": str(config["model"]), **record, **run_record(run_folder(Path(config["model"])))},
        data=reference_data(config, loaded.image_size),
        lpips=lpips(),
        **parts,
    ).run()


def track(items: Iterable[T], count: int, title: str) -> Iterator[T]:
    """The same items under a progress bar."""
    from ldmlab.app.progress import bar

    with bar(title) as advance:
        for done, item in enumerate(items, 1):
            yield item
            advance(done, count)


def _untracked(items: Iterable[T], count: int, title: str) -> Iterable[T]:
    return items
