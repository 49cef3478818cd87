"""Scores while training: the parts that evaluate.py puts together, around a model that is still in training."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ldmlab.app.plans import Plan
from ldmlab.data.shard_data import ShardData
from ldmlab.errors import InputError
from ldmlab.instantiate import instantiate

if TYPE_CHECKING:
    from ldmlab.evaluation.in_training import Source

_OWN = ("protocol", "features", "batch_size", "keep_reference", "precision")  # the rest are the callback's


def scores_callback(node: Mapping[str, Any], plan: Plan, data: ShardData, rank: int, world: int) -> Any:
    """The callback of conf/callbacks/scores.yaml with its scorer."""
    from ldmlab.app.evaluate import build_extractor, build_metric
    from ldmlab.evaluation.in_training import InTrainingScorer
    from ldmlab.evaluation.protocol import Protocol
    from ldmlab.evaluation.reference_statistics import statistics_folder

    where = "callbacks.scores"
    for name in _OWN:
        if name not in node:
            raise InputError(f"{where}.{name} has no value; begin with callbacks=scores, which brings them all.")
    source = _source(plan, node["precision"])
    protocol: Protocol = instantiate(node["protocol"], where=f"{where}.protocol")
    extractor = build_extractor(node["features"])
    scorer = InTrainingScorer(
        source=source,
        data=replace(data, image_size=plan.spec["image_size"]),
        protocol=protocol,
        extractor=extractor,
        metrics={name: build_metric(name, metric, extractor.width) for name, metric in protocol.metrics.items()},
        batch_size=node["batch_size"],
        reference_folder=statistics_folder() if node["keep_reference"] else None,
        rank=rank,
        world=world,
    )
    own = {name: value for name, value in node.items() if name not in _OWN}
    return instantiate(own, where=where, scorer=scorer)


def _source(plan: Plan, precision: str) -> "Source":
    from ldmlab.evaluation.in_training import Reconstructions, Samples, lent

    kind = plan.spec["kind"]
    if kind == "latent_diffusion":
        return Samples(lent(plan.stage.diffusion, plan.spec["image_size"], precision))  # type: ignore[arg-type]
    if kind == "first_stage":
        return Reconstructions(plan.stage.first_stage)  # type: ignore[arg-type]
    raise InputError(f"callbacks=scores: stage={plan.stage.kind} makes no images to score; use callbacks=default.")
