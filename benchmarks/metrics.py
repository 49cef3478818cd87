"""Time and peak memory from features to all scores, ours beside torch-fidelity's: `python benchmarks/metrics.py`."""

import argparse
import multiprocessing
import resource
import time

import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics import MetricCollection

from ldmlab.metrics.frechet import FrechetDistance
from ldmlab.metrics.inception_score import InceptionScore
from ldmlab.metrics.kernel import KernelDistance
from ldmlab.metrics.precision_recall import PrecisionRecall


def features(count: int, width: int, seed: int) -> torch.Tensor:
    """Correlated and non-negative like pooled activations: (count, width)."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(64, width, generator=torch.Generator().manual_seed(0)) / 8
    return (
        torch.randn(count, 64, generator=generator) @ mixing + torch.randn(count, width, generator=generator)
    ).relu()


def ours(count: int, width: int) -> dict[str, float]:
    """Fed in batches of 64, as an evaluation does."""
    fid, rest = FrechetDistance(width), {"is": InceptionScore(), "kid": KernelDistance(), "pr": PrecisionRecall()}
    metrics = MetricCollection({"fid": fid, **rest})
    for real, seed in ((True, 1), (False, 2)):
        for part in features(count, width, seed).split(64):
            metrics.update(features=part, logits=part[:, :1008], real=real)
    return {name: float(value) for name, value in metrics.compute().items()}


def torch_fidelity(count: int, width: int) -> dict[str, float]:
    """The same scores from whole feature tensors, in its low-memory mode."""
    real, fake = features(count, width, 1), features(count, width, 2)
    fid = fid_statistics_to_metric(fid_features_to_statistics(fake), fid_features_to_statistics(real), False)
    score = isc_features_to_metric(fake[:, :1008])
    kid = kid_features_to_metric(fake, real, verbose=False)
    pr = prc_features_to_metric(fake, real, verbose=False, save_cpu_ram=True)
    return {**fid, **score, **kid, **pr}


def measured(program: str, count: int, width: int, threads: int) -> None:
    """Run in a process of its own, so that the peak belongs to it."""
    torch.set_num_threads(threads)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    values = {"ours": ours, "torch-fidelity": torch_fidelity}[program](count, width)
    seconds = time.perf_counter() - start
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    shown = "  ".join(f"{name} {value:.5g}" for name, value in values.items())
    print(f"{program:15s} {seconds:7.1f} s  {peak:7.0f} MiB   {shown}", flush=True)


def main() -> None:
    """Both programs, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="pictures a side")
    parser.add_argument("--width", type=int, default=2048, help="features a picture")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    print(f"{arguments.count} pictures a side, {arguments.width} features, {arguments.threads} threads")
    for program in ("ours", "torch-fidelity"):
        process = multiprocessing.get_context("spawn").Process(
            target=measured, args=(program, arguments.count, arguments.width, arguments.threads)
        )
        process.start()
        process.join()


if __name__ == "__main__":
    main()
