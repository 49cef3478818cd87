"""The door of evaluation: compose, load the model, score it by a protocol, write the report."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ldmlab.app.doors import run_door

if TYPE_CHECKING:
    from ldmlab.data.shard_data import ShardData
    from ldmlab.metrics.features import FeatureExtractor
    from ldmlab.nn.lpips import LPIPS

OPENING = """usage: python evaluate.py model=RUN [protocol=name] [features=name] [key=value ...]

Draws samples, compares them with real images in one pass, writes metrics.json, report.md and report.html."""
EXAMPLES = """examples:
  python evaluate.py model=runs/demo/text_to_image protocol=demo_emoji features=clip_run features.run=runs/demo/clip
  python evaluate.py model=runs/ffhq-1a2b protocol=paper_ffhq            after `ldmlab fetch inception`
  python evaluate.py model=RUN "protocol.guidance_scale_curve=[1,1.5,2,3,5]"   scores over the guidance scale
  python evaluate.py model=RUN +metric@protocol.metrics.fid_inf=fid_inf  FID extrapolated to infinitely many samples
  torchrun --nproc-per-node=8 evaluate.py ...                            the GPUs share the work"""
T = TypeVar("T")


def main() -> None:
    """`python evaluate.py`."""
    sys.exit(run_door(_main))


def _main() -> int:
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
    """Score config["model"]; everything that can be refused is refused before the first image."""
    from ldmlab.app.evaluation_origin import changed
    from ldmlab.build import pick_device
    from ldmlab.evaluation import processes
    from ldmlab.evaluation.evaluate import check_out
    from ldmlab.evaluation.protocol import Protocol
    from ldmlab.instantiate import instantiate
    from ldmlab.model_files import read_description
    from ldmlab.report.pages import write_report
    from ldmlab.report.paper_table import paper_record

    rank, world = processes.join()
    model = Path(config["model"])
    folder = run_folder(model)
    out = Path(config["out"] or folder / "evaluation" / default_name(model, config["protocol"]["name"]))
    check_out(out)
    protocol: Protocol = instantiate({**config["protocol"], "changed": changed(config["protocol"])}, where="protocol")
    extractor = build_extractor(config["features"]).to(pick_device(config["device"]))  # type: ignore[attr-defined]
    parts = {
        "protocol": protocol,
        "extractor": extractor,
        "metrics": {name: build_metric(name, node, extractor.width) for name, node in protocol.metrics.items()},
        "out": out,
        "paper": paper_record,
        "batch_size": config["batch_size"],
        "curves": curves(folder),
        "track": track if rank == 0 else _untracked,
    }
    if read_description(folder).get("kind") == "first_stage":
        _rebuild(config, parts, rank, world)
    else:
        _draw(config, parts, rank, world)
    if rank == 0:
        write_report(out)
        print(f"{out / 'report.html'}\n{(out / 'report.md').read_text(encoding='utf-8')}")
        if config["wandb"]:
            from ldmlab.app.wandb_runs import send_scores

            send_scores(folder, out)


def run_folder(model: Path) -> Path:
    """The folder that a checkpoint belongs to; of a run or a model folder, itself."""
    return model.parents[1] if model.suffix == ".ckpt" else model


def default_name(model: Path, protocol: str) -> str:
    """Of an evaluation's folder: checkpoints of one run have one each."""
    return f"{protocol}-{model.stem}" if model.suffix == ".ckpt" else protocol


def _draw(config: Mapping[str, Any], parts: dict[str, Any], rank: int, world: int) -> None:
    """Samples of a diffusion model."""
    from ldmlab.app.agreement import scored_task
    from ldmlab.app.evaluation_origin import run_record
    from ldmlab.app.guiders import build_guiders
    from ldmlab.build import load
    from ldmlab.evaluation.evaluate import Evaluation
    from ldmlab.evaluation.reference_statistics import statistics_folder

    model = load(config["model"], weights=config["weights"], device=config["device"])
    model.info |= run_record(run_folder(Path(config["model"])))
    model.in_precision(config["precision"])
    model.with_guiders(*build_guiders(config["guiders"], model))
    extras = [(title, Path(path)) for title, path in config["images"]]
    size = parts["protocol"].image_size or max(model.image_size)
    data = reference_data(config, size).with_task(scored_task(model.diffusion.task, parts["protocol"], size))
    lpips = _lpips() if parts["protocol"].pairs else None
    Evaluation(
        model=model,
        data=data,
        judges=build_all("judges", parts["protocol"].judges),
        baselines=build_all("baselines", parts["protocol"].baselines),
        rank=rank,
        world=world,
        extras=extras,
        lpips=lpips and lpips.to(model.device),
        reference_folder=statistics_folder() if config["keep_reference"] else None,
        **parts,
    ).run()


def _rebuild(config: Mapping[str, Any], parts: dict[str, Any], rank: int, world: int) -> None:
    """Reconstructions of a first stage."""
    from ldmlab.app.evaluation_origin import run_record
    from ldmlab.build import load_first_stage, pick_device
    from ldmlab.evaluation.reconstruction import ReconstructionEvaluation

    loaded = load_first_stage(config["model"], config["weights"])
    ReconstructionEvaluation(
        first_stage=loaded.module.to(pick_device(config["device"])),
        info={
            "path": str(config["model"]),
            "weights": loaded.files.weights,
            "step": loaded.files.step,
            "fingerprint": loaded.fingerprint,
            **run_record(run_folder(Path(config["model"]))),
        },
        data=reference_data(config, loaded.image_size),
        lpips=_lpips(),
        rank=rank,
        world=world,
        **parts,
    ).run()


def _lpips() -> "LPIPS | None":
    """The perceptual distance, or a word that its weights are not here."""
    from ldmlab.interop.published_weights import WEIGHTS, weights_folder
    from ldmlab.nn.lpips import LPIPS

    vgg = weights_folder() / WEIGHTS["lpips"].file
    if vgg.exists():
        return LPIPS(vgg)
    print("LPIPS is left out: its VGG weights are not here; `ldmlab fetch lpips` brings them.", file=sys.stderr)
    return None


def build_extractor(node: Mapping[str, Any]) -> "FeatureExtractor":
    """The network whose features are compared; a CLIP run is read here."""
    from ldmlab.build import load_clip
    from ldmlab.instantiate import accepts, instantiate
    from ldmlab.interop.published_weights import weights_path

    if accepts(node, "clip", where="features"):
        return instantiate(node, where="features", clip=load_clip(node["run"]))
    if accepts(node, "weights", where="features") and node.get("weights") is None:
        node = {**node, "weights": weights_path("inception")}
    return instantiate(node, where="features")


def build_metric(name: str, node: Mapping[str, Any], width: int, group: str = "protocol.metrics") -> Any:
    """A score; one that must know the width of the features is told. `group`: what its options are called."""
    from ldmlab.evaluation.score import OptionNames, in_words_of
    from ldmlab.instantiate import accepts, instantiate

    where = f"{group}.{name}"
    told: dict[str, Any] = {"width": width} if accepts(node, "width", where=where) else {}
    with in_words_of(OptionNames(metrics=group)):
        return instantiate(node, where=where, **told)


def build_all(kind: str, nodes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The judges or baselines of a protocol by name."""
    from ldmlab.instantiate import instantiate

    return {name: instantiate(node, where=f"protocol.{kind}.{name}") for name, node in nodes.items()}


def reference_data(config: Mapping[str, Any], image_size: int) -> "ShardData":
    """The real images at the model's size: those of `data=`, or those the model's run was trained on."""
    import yaml

    from ldmlab.errors import InputError
    from ldmlab.instantiate import instantiate

    node = config.get("data")
    if node is None:
        path = run_folder(Path(config["model"])) / "config.yaml"
        if not path.exists():
            raise InputError(f"model={config['model']} does not say what it was trained on; name the data with data=.")
        node = yaml.safe_load(path.read_text(encoding="utf-8"))["data"]
    return instantiate({**node, "image_size": image_size}, where="data", seed=config["seed"])


def curves(model: Path) -> dict[str, Path]:
    """metrics.csv of the run, and of the runs its parts come from where they are still there."""
    import yaml

    found = {}
    if (model / "config.yaml").exists():
        config = yaml.safe_load((model / "config.yaml").read_text(encoding="utf-8"))
        for part, run in _parts(config):
            found[part] = Path(run) / "metrics.csv"
        found["denoiser"] = model / "metrics.csv"
    return {title: path for title, path in found.items() if path.exists()}


def _parts(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if config.get("from_run"):
        yield "first stage", config["from_run"]
    for name, node in config.get("conditioner", {}).items():
        if node.get("from_run"):
            yield f"conditioner {name}", node["from_run"]


def track(items: Iterable[T], count: int, title: str) -> Iterator[T]:
    """The same items under a progress bar."""
    from ldmlab.app.progress import bar

    with bar(title) as advance:
        for done, item in enumerate(items, 1):
            yield item
            advance(done, count)


def _untracked(items: Iterable[T], count: int, title: str) -> Iterable[T]:
    return items
