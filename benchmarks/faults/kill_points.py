"""Points at which `kills.py` stops a training process until it is killed, and the models that it trains."""

import itertools
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from toy_stages import autoencoder, diffusion_stage, options

from ldmlab import averaging, checkpoints, files
from ldmlab.averaging import AveragedWeights
from ldmlab.backbones.dit import DiT
from ldmlab.conditioners.class_label import ClassEmbedder
from ldmlab.diffusion.latent_diffusion import LatentDiffusion
from ldmlab.diffusion.latent_space import LatentScale
from ldmlab.diffusion.parameterization import EpsPrediction
from ldmlab.diffusion.schedule import Schedule, ddim_grid
from ldmlab.diffusion.weighting import LearnedLogVariance, Snr
from ldmlab.first_stages.identity import Identity
from ldmlab.samplers.ddim import Ddim
from ldmlab.training import checkpointing, loggers
from ldmlab.training.diffusion_module import DiffusionStage
from ldmlab.training.muon import MuonAdamW
from ldmlab.training.optimizer_groups import OptimizerGroups
from ldmlab.training.run_folder import RunFolder
from ldmlab.training.stage import Stage

PATIENCE_SECONDS = 150  # torch connects twice before it gives up
RESUMING = "checkpoint chosen for resuming"
# point => whose function (None: the stage's), its name, and when: before, after, or with half of its file on the disk
POINTS: dict[str, tuple[Any, str, str]] = {
    "new run folder": (RunFolder, "_begin", "after"),
    "first micro-batch's gradients": (Stage, "_backward", "after"),
    "gradients clipped": (Stage, "on_before_optimizer_step", "after"),
    "weights updated, averages not": (AveragedWeights, "update", "before"),
    "step complete, no row yet": (Stage, "_update", "after"),
    "row written": (loggers.RunFiles, "log_metrics", "after"),
    "table of rows rewritten": (loggers, "write_text", "before"),
    "validation": (None, "validation_step", "after"),
    "validation's end": (None, "validation_metrics", "before"),
    "snapshot of averages": (averaging, "save_tensors", "before"),
    "checkpoint copied, nothing written": (checkpointing.Files, "_write", "before"),
    "shard not begun": (checkpointing, "save_tensors", "before"),
    "half a file of tensors": (safetensors.torch, "save_file", "half"),
    "shard written, no checksum": (checkpointing, "mark", "before"),
    "half a state": (checkpoints, "_torch_save", "half"),
    "state written, folder not renamed": (checkpointing, "put", "before"),
    "checkpoint written, old ones not deleted": (checkpointing.Checkpoints, "prune", "before"),
    "best not linked": (checkpointing, "link", "before"),
    "small file written": (files, "write_atomically", "after"),
    "old one renamed, not deleted": (files.shutil, "rmtree", "before"),
    RESUMING: (Stage, "restore", "before"),
    "resumed, optimizers not": (OptimizerGroups, "on_fit_start", "before"),
    "incomplete files not swept": (checkpointing.Checkpoints, "sweep", "before"),
}


def denoiser() -> DiffusionStage:
    """Regions, each a unit of FSDP, and a learned weighting, which is another network."""
    torch.manual_seed(0)
    model = LatentDiffusion(
        Identity(), LatentScale(1.0), DiT(3, 3, 16, 2, heads=2, vector_width=16),
        {"class": ClassEmbedder(4, 16, drop=0.2, slot="vector")}, Schedule("scaled_linear"), EpsPrediction(),
        guidance_trained=True, weighting=LearnedLogVariance(Snr()),
    )  # fmt: skip
    return DiffusionStage(diffusion=model, sampler=Ddim(), grid=ddim_grid(model.schedule, 2), **options(accumulate=2))


MODELS: dict[str, Callable[[], Stage]] = {
    "denoiser": denoiser,
    "dropout": lambda: diffusion_stage(dropout=0.3, layers=2, accumulate=2, optimizer=MuonAdamW(1e-3)),
    "autoencoder with adversary": autoencoder,
}


def arm(name: str, turns: set[int], reached: Path, calls: Counter[str], stage: type) -> None:
    """Count the calls of a point's function; at one of `turns` write `reached` and wait for the kill."""
    owner, attribute, when = POINTS[name]
    owner = owner or stage
    function, numbers = getattr(owner, attribute), itertools.count(1)

    def watched(*args: Any, **kwargs: Any) -> Any:
        calls[name] = number = next(numbers)
        if number not in turns:
            return function(*args, **kwargs)
        result = None if when == "before" else function(*args, **kwargs)
        if when == "half":
            file = next(part for part in args if isinstance(part, Path))
            os.truncate(file, file.stat().st_size // 2)
        reached.touch()
        time.sleep(2 * PATIENCE_SECONDS)
        return result

    setattr(owner, attribute, watched)
