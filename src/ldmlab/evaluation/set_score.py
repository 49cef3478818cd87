"""Score one set of images on disk against another: no model, no protocol."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torchmetrics import Metric

from ldmlab.errors import InputError
from ldmlab.evaluation.image_sets import ImageSet
from ldmlab.evaluation.record import FORMAT_VERSION, features_record, gathered
from ldmlab.evaluation.score import EvaluationPass, Numbered, OptionNames
from ldmlab.metrics.features import FeatureExtractor, Inception2015
from ldmlab.metrics.frechet import FrechetDistance
from ldmlab.provenance import provenance

OPTIONS = OptionNames(metrics="metrics", features="--features ")
Track = Callable[[Iterable[Numbered], int, str], Iterable[Numbered]]  # the same batches, shown


def score_sets(
    samples: ImageSet,
    reference: ImageSet,
    extractor: FeatureExtractor,
    metrics: Mapping[str, Metric],
    *,
    batch_size: int = 64,
    workers: int = 2,
    rank: int = 0,
    world: int = 1,
    track: Track = lambda items, count, title: items,
) -> dict[str, Any]:
    """The scores as plain data, on every process; statistics that the reference's file brings replace its images."""
    _check(samples, reference)
    seen = EvaluationPass(extractor, metrics, options=OPTIONS)
    given = _give_statistics(reference, extractor, metrics, first=rank == 0)
    if reference.count == 0 and (lost := sorted(metrics.keys() - given)):
        raise InputError(
            f"{reference.path} holds statistics and no images, which score {lost[0]} needs; leave it out of --metrics."
        )
    seen.check_counts(reference.count, samples.count, given)
    for one, real, title in ((reference, True, "reference"), (samples, False, "samples")):
        total = -(-one.count // (batch_size * world))
        if one.count and not (real and given >= metrics.keys()):
            seen.add_all(track(one.batches(batch_size, rank, world, workers), total, title), real=real)
    counts = [sum(gathered(seen.counts[real])) for real in (True, False)]
    scores = seen.compute((counts[0] or counts[1], counts[1]))
    return {
        "format_version": FORMAT_VERSION,
        "samples": samples.record(),
        "reference": reference.record() | {"given_statistics": sorted(given)},
        "features": features_record(extractor),
        "scores": {name: asdict(score) for name, score in scores.items()},
        "sample_curves": seen.curves(),
        "provenance": provenance(),
    }


def statistics_of(metrics: Mapping[str, Metric]) -> dict[str, tuple[Any, Any]]:
    """Mean and covariance of the samples by score, for an `.npz`; after `score_sets`."""
    found = {}
    for metric in metrics.values():
        if isinstance(metric, FrechetDistance):
            mean, covariance = metric.samples()
            found[metric.statistics_name] = (mean.cpu().numpy(), covariance.cpu().numpy())
    return found


def _check(samples: ImageSet, reference: ImageSet) -> None:
    if samples.count == 0:
        raise InputError(f"{samples.path} holds no images, so there is nothing to score.")
    if reference.size is not None and samples.size != reference.size:
        height, width = samples.size or (0, 0)
        raise InputError(
            f"{samples.path} has images of {height}x{width} px and {reference.path} of "
            f"{reference.size[0]}x{reference.size[1]}; bring both to one size by one rule (`ldmlab pack --size`)."
        )


def _give_statistics(
    reference: ImageSet, extractor: FeatureExtractor, metrics: Mapping[str, Metric], first: bool
) -> set[str]:
    """Means and covariances of the file to the Frechet distances; the names of the metrics that took one."""
    statistics, took = reference.statistics(), set()
    for name, metric in metrics.items():
        if isinstance(metric, FrechetDistance) and metric.statistics_name in statistics:
            if extractor.name != Inception2015.name:
                raise InputError(
                    f"{reference.path} brings statistics of {Inception2015.name}, which --features {extractor.name} "
                    "cannot be compared with; choose --features inception."
                )
            mean, covariance = (torch.as_tensor(part) for part in statistics[metric.statistics_name])
            metric.take_real(mean, covariance, first)
            took.add(name)
    return took
