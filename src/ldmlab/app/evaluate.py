"""An evaluation from its options: the model scored by a protocol, the report, scores while training."""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ldmlab import distributed
from ldmlab.app.compose import compose, plain
from ldmlab.app.conditioning import scored_task
from ldmlab.app.conf_files import check_compared, group_choices, leaves
from ldmlab.app.dashboard_page import send_scores
from ldmlab.app.guiders import build_guiders
from ldmlab.app.lengths import lengths_in
from ldmlab.app.plans import Plan
from ldmlab.app.progress import track
from ldmlab.app.run_end import evaluated
from ldmlab.build import load, load_clip, load_first_stage, pick_device
from ldmlab.contracts import FeatureExtractor
from ldmlab.data.shard_data import ShardData
from ldmlab.disks import disk_errors
from ldmlab.errors import InputError
from ldmlab.evaluation.model_evaluation import Evaluation, ReconstructionEvaluation
from ldmlab.evaluation.protocol import Protocol
from ldmlab.evaluation.real_images import RealImages, conditions
from ldmlab.evaluation.reference_statistics import statistics_folder
from ldmlab.evaluation.run import TrainingScores, check_out
from ldmlab.evaluation.scoring import OptionNames, in_words_of, untracked
from ldmlab.evaluation.sources import Kept, Reconstructions, Samples, Source
from ldmlab.inference.model import LoadedModel
from ldmlab.inference.sample_settings import SampleSettings
from ldmlab.instantiate import accepts, instantiate, instantiate_with
from ldmlab.interop.published_weights import WEIGHTS, weights_folder, weights_path
from ldmlab.model_files import named, read_config, read_description
from ldmlab.nn.compiling import compile_regions, wanted
from ldmlab.nn.lpips import LPIPS
from ldmlab.report.metrics_json import read_evaluation
from ldmlab.report.pages import lengths_page, write_report
from ldmlab.report.paper_table import paper_record
from ldmlab.report.score_curves import read_curves

_OWN = ("protocol", "features", "batch_size", "keep_reference", "precision")  # the rest are the callback's
_OF_SAMPLES = {one.name for one in fields(SampleSettings)} | {  # options of a protocol
    *("sampling", "conditions", "classes", "at_most", "task", "pairs", "neighbours", "copy_quantile"),
    *("sweep", "sweep_seeds", "class_field", "also_against", "evaluators", "baselines"),
}
_CLIP_QUALITY = ("recall_1_of_50", "chance_recall_1_of_50", "recall_5_of_50", "chance_recall_5_of_50")


def evaluate(config: Mapping[str, Any], kept: Kept | None = None) -> None:
    """Score config["model"]; all checks are made before the first image. kept: samples that several calls share."""
    rank, _ = distributed.join()
    folder, out = run_folder(Path(str(config["model"]))), out_folder(config)
    if isinstance(config["weights"], list):
        with lengths_in(config, folder, out):
            return lengths_page(out, {length: _of_length(config, out, length) for length in config["weights"]})
    # a full disk or a kill left the scores without their pages
    if distributed.shared(lambda: (out / "metrics.json").exists() and not (out / "report.html").exists()):
        distributed.say(
            f"{out} holds the scores of an evaluation whose report was not written; writing it. Delete the folder to "
            "evaluate anew."
        )
        return _report(config, folder, out)
    check_out(out)
    score = _reconstructions if read_description(folder).get("kind") == "first_stage" else _samples
    protocol: Protocol = instantiate({**config["protocol"], "changed": changed(config["protocol"])}, where="protocol")
    extractor = build_extractor(config["features"]).to(pick_device(config["device"]))  # type: ignore[attr-defined]
    shared = {
        "protocol": protocol,
        "extractor": extractor,
        "metrics": {name: build_metric(name, node, extractor.width) for name, node in protocol.metrics.items()},
        "out": out,
        "batch_size": config["batch_size"],
        "curves": curves(folder),
        "track": track if rank == 0 else untracked,
        "paper": paper_record,
        "reference_folder": statistics_folder() if config["keep_reference"] else None,
    }
    if score is _samples:
        shared["kept"] = kept
    score(config, run_record(folder), shared)
    _report(config, folder, out)


def check_read(config: Mapping[str, Any], chosen: Collection[str]) -> None:
    """InputError for an option of `chosen` that the scores do not read."""
    spec = read_description(run_folder(Path(str(config["model"]))))
    also = ("object_background",) if spec["kind"] == "first_stage" else ()
    check_compared(config, chosen, config["protocol"].get("image_size") or spec["image_size"], also)
    for name in sorted(chosen) if spec["kind"] == "first_stage" else ():
        group, option, *_ = [*name.split("."), ""]
        if group in ("guiders", "precision", "images") or (group == "protocol" and option in _OF_SAMPLES):
            raise InputError(f"{name}: model={config['model']} is a first stage and samples nothing; leave it out.")


def out_folder(config: Mapping[str, Any]) -> Path:
    """Where the scores go: of one run, checkpoints and lengths of averages have a folder each."""
    model, weights = Path(str(config["model"])), config["weights"]
    ckpt = f"-{model.stem}" if model.suffix == ".ckpt" else ""
    length = "-lengths" if isinstance(weights, list) else f"-length_{weights:g}" if isinstance(weights, float) else ""
    return Path(config["out"] or run_folder(model) / "evaluation" / f"{config['protocol']['name']}{ckpt}{length}")


def _of_length(config: Mapping[str, Any], out: Path, length: float) -> Path:
    """The finished evaluation of an average of one length; one that exists is kept."""
    folder = out / f"length_{length:g}"
    if not distributed.shared((folder / "report.html").exists):
        evaluate({**config, "weights": length, "out": str(folder)})
    return folder


def _report(config: Mapping[str, Any], folder: Path, out: Path) -> None:
    """The pages of a finished evaluation, its scores on the terminal, and at W&B if the run has a run there."""
    if distributed.rank() == 0:
        with disk_errors(out):
            write_report(out)
        print(evaluated(read_evaluation(out), out))
        if config["wandb"]:
            send_scores(folder, out)


def _samples(config: Mapping[str, Any], record: Mapping[str, Any], shared: Mapping[str, Any]) -> None:
    protocol: Protocol = shared["protocol"]
    model = load(config["model"], weights=config["weights"], device=config["device"])
    model.info |= record
    model.in_precision(config["precision"]).compiled(config["compile"])
    model.with_guiders(*build_guiders(config["guiders"], model))
    size = protocol.image_size or max(model.image_size)
    distance = lpips() if protocol.pairs else None
    Evaluation(
        model=model,
        data=reference_data(config, size).with_task(scored_task(model.diffusion.task, protocol, size)),
        evaluators=build_all("evaluators", protocol.evaluators),
        baselines=build_all("baselines", protocol.baselines),
        extras=[(title, Path(path)) for title, path in config["images"]],
        lpips=distance and distance.to(model.device),
        **shared,
    ).run()


def _reconstructions(config: Mapping[str, Any], record: Mapping[str, Any], shared: Mapping[str, Any]) -> None:
    loaded = load_first_stage(config["model"], config["weights"])
    module = loaded.module.to(pick_device(config["device"]))
    if wanted(config["compile"], pick_device(config["device"])):
        compile_regions(module)
    files = {"weights": loaded.files.weights, "step": loaded.files.step, "fingerprint": loaded.fingerprint}
    ReconstructionEvaluation(
        model=module,
        info={"path": str(config["model"]), **files, **record},
        data=reference_data(config, shared["protocol"].image_size or loaded.image_size),
        lpips=lpips(),
        **shared,
    ).run()


def build_extractor(node: Mapping[str, Any]) -> FeatureExtractor:
    """The network whose features are compared; a CLIP run is read here."""
    if accepts(node, "clip", where="features"):
        extractor: FeatureExtractor = _with_clip(node, "features")
        extractor.quality = clip_quality(run_folder(Path(str(node["run"]))))  # type: ignore[attr-defined]
        return extractor
    if accepts(node, "weights", where="features") and node.get("weights") is None:
        node = {**node, "weights": weights_path("inception")}
    return instantiate(node, where="features")


def clip_quality(run: Path) -> dict[str, float]:
    """Validation recall of a CLIP run with its step, from metrics.csv; empty where it has none."""
    try:
        columns = read_curves(run / "metrics.csv")
    except InputError:
        return {}
    found = {name: columns[f"val/{name}"][-1] for name in _CLIP_QUALITY if columns.get(f"val/{name}")}
    step = {"step": max(step for step, _ in found.values())} if found else {}
    return {name: value for name, (_, value) in found.items()} | step


def build_metric(name: str, node: Mapping[str, Any], width: int, group: str = "protocol.metrics") -> Any:
    """A score; `width` of the features for one that takes it. `group`: before its options' names."""
    with in_words_of(OptionNames(metrics=group)):
        return instantiate_with(node, where=f"{group}.{name}", width=width)


def build_all(kind: str, nodes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {name: _with_clip(node, f"protocol.{kind}.{name}") for name, node in nodes.items()}


def _with_clip(node: Mapping[str, Any], where: str) -> Any:
    """A part; one that takes a `clip` gets that of its `run`."""
    clip: dict[str, Any] = {"clip": load_clip(node["run"])} if accepts(node, "clip", where=where) else {}
    return instantiate(node, where=where, **clip)


def lpips() -> LPIPS | None:
    """The perceptual distance; None, and a line, where its weights are missing."""
    vgg = weights_folder() / WEIGHTS["lpips"].file
    if vgg.exists():
        return LPIPS(vgg)
    distributed.say("LPIPS is left out: its VGG weights are missing; download them with `ldmlab fetch lpips`.")
    return None


def reference_data(config: Mapping[str, Any], image_size: int) -> ShardData:
    """The real images at the model's size: those of `data=`, or those the model's run was trained on."""
    node = config.get("data") or run_config(run_folder(Path(config["model"]))).get("data")
    if not isinstance(node, Mapping):
        raise InputError(f"model={config['model']} records no data it was trained on; name the data with data=.")
    return instantiate({**node, "image_size": image_size}, where="data", seed=config["seed"])


def scores_callback(node: Mapping[str, Any], plan: Plan, data: ShardData) -> Any:
    """The callback of conf/callbacks/scores.yaml with its scorer."""
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


def _source(plan: Plan, protocol: Protocol, data: ShardData, precision: str) -> tuple[Source, int | None]:
    """A stage's images, and the number of real images that they are compared with."""
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


def run_folder(model: Path) -> Path:
    """The folder that a checkpoint belongs to; of a run, a model folder or a shipped model, its own."""
    return model.parents[1] if model.suffix == ".ckpt" else named(model)


def run_config(folder: Path) -> dict[str, Any]:
    """config.yaml of a run; empty for a model folder, which has none."""
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
    """metrics.csv of the run, and of the runs its parts come from where they are still there; damaged: InputError."""
    config = run_config(model)
    nodes = config["conditioner"] if isinstance(config.get("conditioner"), Mapping) else {}
    runs = {"first stage": config.get("from_run")}
    runs |= {f"conditioner {name}": node.get("from_run") for name, node in nodes.items() if isinstance(node, Mapping)}
    found = {part: Path(run) / "metrics.csv" for part, run in runs.items() if isinstance(run, str) and run}
    if config:
        found["denoiser"] = model / "metrics.csv"
    return {title: path for title, path in found.items() if path.is_file() and read_curves(path)}


def changed(node: Mapping[str, Any]) -> list[str]:
    """Options of a protocol that are not those of the file it is named after."""
    if node["name"] not in group_choices("protocol"):
        return []
    file = plain(compose("evaluate", [f"protocol={node['name']}", "model=none"]).protocol)
    theirs, ours = (
        {name: value for name, value in leaves(options) if value != {} and not name.endswith("_target_")}
        for options in (file, node)
    )
    return [
        f"{name}={ours.get(name, 'none')} (file: {theirs.get(name, 'none')})"
        for name in dict.fromkeys([*ours, *theirs])
        if ours.get(name) != theirs.get(name)
    ]
