"""From features to all scores, and from images to features, ours beside torch-fidelity's.

    python benchmarks/metrics.py                     10,000 images a side; --count 50000 takes half an hour on a core

Seconds are those of the processor, which other jobs disturb little; each program runs in a process of its own, so that
the peak of memory is its own: features and what is made of them, without what importing took.
"""

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics import MetricCollection

from ldmlab.metrics.features import Inception2015
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


def ours(count: int, width: int, screening: bool = False) -> dict[str, float]:
    """Fed in batches of 64, as an evaluation does."""
    shares = PrecisionRecall(screening=screening)
    rest = {"is": InceptionScore(), "kid": KernelDistance(), "pr": shares}
    metrics = MetricCollection({"fid": FrechetDistance(width), **rest})
    for real, seed in ((True, 1), (False, 2)):
        for part in features(count, width, seed).split(64):
            metrics.update(features=part, logits=part[:, :1008], real=real)
    return {name: float(value) for name, value in metrics.compute().items()}


def screened(count: int, width: int) -> dict[str, float]:
    """With 8-bit products before float32 in precision and recall."""
    return ours(count, width, screening=True)


def torch_fidelity(count: int, width: int) -> dict[str, float]:
    """The same scores from whole feature tensors, in its low-memory mode."""
    real, fake = features(count, width, 1), features(count, width, 2)
    fid = fid_statistics_to_metric(fid_features_to_statistics(fake), fid_features_to_statistics(real), False)
    score = isc_features_to_metric(fake[:, :1008])
    kid = kid_features_to_metric(fake, real, verbose=False)
    pr = prc_features_to_metric(fake, real, verbose=False, save_cpu_ram=True)
    return {**fid, **score, **kid, **pr}


def extractors(folder: Path, device: torch.device) -> dict[str, Callable[[torch.Tensor], object]]:
    """Both on one file of random weights, on which the speed does not depend."""
    from torch_fidelity import feature_extractor_inceptionv3 as port

    class Random(port.FeatureExtractorInceptionV3):
        def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
            return None

    weights = folder / "inception.pth"
    torch.save({}, weights)
    names = ["2048", "logits_unbiased"]
    network = Random("inception-v3-compat", names, feature_extractor_weights_path=str(weights))
    torch.save(network.state_dict(), weights)
    theirs = port.FeatureExtractorInceptionV3("inception-v3-compat", names, feature_extractor_weights_path=str(weights))
    return {
        "ours": Inception2015(weights).to(device),
        "torch-fidelity": torch.inference_mode()(theirs.to(device).eval()),
    }


def extraction(images: int, rounds: int) -> None:
    """Images of 256 px to features and logits, in turns."""
    batch = torch.randint(0, 256, (images, 3, 256, 256), dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder:
        work = extractors(Path(folder), batch.device)
        seconds: dict[str, list[float]] = {name: [] for name in work}
        for i in range(rounds + 1):  # the first warms up
            for name in work if i % 2 else reversed(work):
                start = time.process_time()
                work[name](batch)
                if i:
                    seconds[name].append(time.process_time() - start)
    for name, taken in seconds.items():
        print(f"{name:20s} {images / statistics.median(taken):7.1f} images of 256 px a second to features")
    ratio = statistics.median(b / a for a, b in zip(seconds["ours"], seconds["torch-fidelity"], strict=True))
    print(f"ours is {ratio:.2f} times as fast")


PROGRAMS = {"ours": ours, "ours, screened": screened, "torch-fidelity": torch_fidelity}


def measured(program: str, count: int, width: int, threads: int, answer: Any) -> None:
    """Run in a process of its own, so that the peak belongs to it."""
    torch.set_num_threads(threads)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    values = PROGRAMS[program](count, width)
    seconds = time.process_time() - start
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    shown = "  ".join(f"{name} {value:.5g}" for name, value in values.items() if not name.endswith("_std"))
    print(f"{program:15s} {seconds:7.1f} s  {peak:7.0f} MiB   {shown}", flush=True)
    answer.put(seconds)


def main() -> None:
    """All programs, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="images a side")
    parser.add_argument("--width", type=int, default=2048, help="features an image")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--images", type=int, default=16, help="images a round to features; 0: not measured")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{arguments.count} images a side, {arguments.width} features, {arguments.threads} threads")
    context, seconds = multiprocessing.get_context("spawn"), {}
    for program in PROGRAMS:
        answer = context.SimpleQueue()
        options = (program, arguments.count, arguments.width, arguments.threads, answer)
        process = context.Process(target=measured, args=options)
        process.start()
        process.join()
        seconds[program] = answer.get()
    for program in ("ours", "ours, screened"):
        print(f"{program} is {seconds['torch-fidelity'] / seconds[program]:.2f} times as fast as torch-fidelity")
    if arguments.images:
        extraction(arguments.images, rounds=3)


if __name__ == "__main__":
    main()
