"""Parts of an evaluation from its options: extractor, metrics, reference data, the scores callback, the run behind."""

import csv
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldmlab.errors import InputError

if TYPE_CHECKING:
    from ldmlab.app.plans import Plan
    from ldmlab.data.shard_data import ShardData
    from ldmlab.evaluation.protocol import Protocol
    from ldmlab.evaluation.sources import Source
    from ldmlab.metrics.features import FeatureExtractor
    from ldmlab.nn.lpips import LPIPS

_OWN = ("protocol", "features", "batch_size", "keep_reference", "precision")  # the rest are the callback's
_CLIP_QUALITY = ("val/recall_1_of_50", "val/chance_recall_1_of_50", "val/recall_5_of_50", "val/chance_recall_5_of_50")


def build_extractor(node: Mapping[str, Any]) -> "FeatureExtractor":
    """The network whose features are compared; a CLIP run is read here."""
    from ldmlab.build import load_clip
    from ldmlab.instantiate import accepts, instantiate
    from ldmlab.interop.published_weights import weights_path

    if accepts(node, "clip", where="features"):
        extractor: FeatureExtractor = instantiate(node, where="features", clip=load_clip(node["run"]))
        extractor.quality = clip_quality(run_folder(Path(str(node["run"]))))  # type: ignore[attr-defined]
        return extractor
    if accepts(node, "weights", where="features") and node.get("weights") is None:
        node = {**node, "weights": weights_path("inception")}
    return instantiate(node, where="features")


def clip_quality(run: Path) -> dict[str, float]:
    """Validation recall of a CLIP run with its step, from metrics.csv; empty where it has none."""
    from ldmlab import format1
    from ldmlab.report.score_curves import read_curves

    try:
        columns = {format1.metric(name): points for name, points in read_curves(run / "metrics.csv").items()}
    except (OSError, ValueError, csv.Error):
        return {}
    found = {name.removeprefix("val/"): columns[name][-1] for name in _CLIP_QUALITY if columns.get(name)}
    steps = [step for step, _ in found.values()]
    return {name: value for name, (_, value) in found.items()} | ({"step": max(steps)} if steps else {})


def build_metric(name: str, node: Mapping[str, Any], width: int, group: str = "protocol.metrics") -> Any:
    """A score; `width` of the features for one that takes it. `group`: before its options' names."""
    from ldmlab.evaluation.scoring import OptionNames, in_words_of
    from ldmlab.instantiate import accepts, instantiate

    where = f"{group}.{name}"
    derived: dict[str, Any] = {"width": width} if accepts(node, "width", where=where) else {}
    with in_words_of(OptionNames(metrics=group)):
        return instantiate(node, where=where, **derived)


def build_all(kind: str, nodes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The evaluators or baselines of a protocol by name."""
    from ldmlab.instantiate import instantiate

    return {name: instantiate(node, where=f"protocol.{kind}.{name}") for name, node in nodes.items()}


def lpips() -> "LPIPS | None":
    """The perceptual distance; None, and a line, where its weights are missing."""
    from ldmlab import distributed
    from ldmlab.interop.published_weights import WEIGHTS, weights_folder
    from ldmlab.nn.lpips import LPIPS

    vgg = weights_folder() / WEIGHTS["lpips"].file
    if vgg.exists():
        return LPIPS(vgg)
    distributed.say("LPIPS is left out: its VGG weights are missing; download them with `ldmlab fetch lpips`.")
    return None


def reference_data(config: Mapping[str, Any], image_size: int) -> "ShardData":
    """The real images at the model's size: those of `data=`, or those the model's run was trained on."""
    from ldmlab.instantiate import instantiate

    node = config.get("data")
    if node is None:
        folder = run_folder(Path(config["model"]))
        node = run_config(folder).get("data")
        if not isinstance(node, Mapping):
            raise InputError(f"model={config['model']} records no data it was trained on; name the data with data=.")
    return instantiate({**node, "image_size": image_size}, where="data", seed=config["seed"])


# ---- scores while training


def scores_callback(node: Mapping[str, Any], plan: "Plan", data: "ShardData") -> Any:
    """The callback of conf/callbacks/scores.yaml with its scorer."""
    from ldmlab.evaluation.protocol import Protocol
    from ldmlab.evaluation.real_images import RealImages
    from ldmlab.evaluation.reference_statistics import statistics_folder
    from ldmlab.evaluation.run import TrainingScores
    from ldmlab.instantiate import instantiate

    where = "callbacks.scores"
    for name in _OWN:
        if name not in node:
            raise InputError(f"{where}.{name} has no value; start from callbacks=scores, which sets them all.")
    protocol: Protocol = instantiate(node["protocol"], where=f"{where}.protocol")
    data = replace(data, image_size=plan.spec["image_size"])
    source, limit = _source(plan, protocol, data, node["precision"])
    extractor = build_extractor(node["features"])
    folder = statistics_folder() if node["keep_reference"] else None
    scorer = TrainingScores(
        protocol=protocol,
        source=source,
        real=RealImages(data, extractor, folder, node["batch_size"]),
        metrics={name: build_metric(name, metric, extractor.width) for name, metric in protocol.metrics.items()},
        limit=limit,
    )
    own = {name: value for name, value in node.items() if name not in _OWN}
    return instantiate(own, where=where, scorer=scorer)


def _source(plan: "Plan", protocol: "Protocol", data: "ShardData", precision: str) -> tuple["Source", int | None]:
    """A stage's images, and the number of real images that they are compared with."""
    from ldmlab.evaluation.real_images import conditions
    from ldmlab.evaluation.sources import Reconstructions, Samples
    from ldmlab.inference.model import LoadedModel

    kind = plan.spec["kind"]
    if kind == "latent_diffusion":
        diffusion: Any = plan.stage.diffusion
        model = LoadedModel(diffusion, plan.spec["image_size"], {}, precision, frozen=False)
        known = conditions(data, protocol.reference, sorted(model.reads), protocol.reference_limit)
        return Samples(model, protocol, known), protocol.reference_limit
    if kind == "first_stage":
        source = Reconstructions(plan.stage.first_stage, data, protocol)  # type: ignore[arg-type]
        return source, source.limit
    raise InputError(f"callbacks=scores: stage={plan.stage.kind} makes no images to score; use callbacks=default.")


# ---- the run behind a model


def run_folder(model: Path) -> Path:
    """The folder that a checkpoint belongs to; of a run or a model folder, itself."""
    return model.parents[1] if model.suffix == ".ckpt" else model


def run_config(folder: Path) -> dict[str, Any]:
    """config.yaml of a run; empty for a model folder, which has none."""
    from ldmlab.model_files import read_config

    return read_config(folder) if (folder / "config.yaml").exists() else {}


def run_record(folder: Path) -> dict[str, Any]:
    """Seed and group of the run behind a model, and a hash of its other options; empty without a run."""
    config = run_config(folder)
    if not config:
        return {}
    run, apart = config.get("run"), ("seed", "run", "paths", "logger")
    run = run if isinstance(run, Mapping) else {}
    other = json.dumps({name: node for name, node in config.items() if name not in apart}, sort_keys=True, default=str)
    return {
        "training_seed": config.get("seed"),
        "group": run.get("group") or run.get("name"),
        "configuration": hashlib.sha256(other.encode()).hexdigest()[:12],
    }


def curves(model: Path) -> dict[str, Path]:
    """metrics.csv of the run, and of the runs its parts come from where they are still there."""
    config = run_config(model)
    found = {part: Path(run) / "metrics.csv" for part, run in _parts(config)}
    if config:
        found["denoiser"] = model / "metrics.csv"
    return {title: path for title, path in found.items() if path.is_file()}


def _parts(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if isinstance(run := config.get("from_run"), str) and run:
        yield "first stage", run
    conditioners = config.get("conditioner")
    for name, node in conditioners.items() if isinstance(conditioners, Mapping) else ():
        if isinstance(node, Mapping) and isinstance(run := node.get("from_run"), str) and run:
            yield f"conditioner {name}", run


def changed(node: Mapping[str, Any]) -> list[str]:
    """Options of a protocol that are not those of the file it is named after."""
    from ldmlab.app.compose import compose, group_choices, plain

    if node["name"] not in group_choices("protocol"):
        return []
    file = dict(_flat(plain(compose("evaluate", [f"protocol={node['name']}", "model=none"]).protocol)))
    ours = dict(_flat(node))
    return [
        f"{name}={ours.get(name, 'none')} (file: {file.get(name, 'none')})"
        for name in dict.fromkeys([*ours, *file])
        if ours.get(name) != file.get(name)
    ]


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Options by their full names."""
    for name, value in node.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif name != "_target_":
            yield f"{prefix}{name}", value
