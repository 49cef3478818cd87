"""Sharded networks against one process: weights, norms and averages of ten steps, and resuming."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import forked
import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from toy_stages import TwoGroups, options, train

from ldmlab.backbones.dit import DiT
from ldmlab.backbones.unet import UNet
from ldmlab.checkpoints import load_checkpoint
from ldmlab.conditioners.class_label import ClassEmbedder
from ldmlab.conditioners.text import TransformerText
from ldmlab.diffusion.latent_diffusion import LatentDiffusion
from ldmlab.diffusion.latent_space import LatentScale
from ldmlab.diffusion.parameterization import EpsPrediction
from ldmlab.diffusion.schedule import Schedule, ddim_grid
from ldmlab.errors import InputError
from ldmlab.first_stages.identity import Identity
from ldmlab.nn import compiling
from ldmlab.samplers.ddim import Ddim
from ldmlab.training.diffusion_module import DiffusionStage
from ldmlab.training.stage import Stage

_STEPS = 10


class Captions(TransformerText):
    """Trained states of what stands for captions: token numbers made of the class."""

    reads = frozenset({"class_id"})

    def __init__(self) -> None:
        super().__init__(width=6, depth=2, length=4, vocab_size=9, heads=1, drop=0.2)

    def forward(self, batch: dict[str, Any], encode: Any) -> torch.Tensor:
        return self.transformer(batch["class_id"][:, None] + torch.arange(4))

    def null(self, batch: dict[str, Any], encode: Any) -> torch.Tensor:
        return self.transformer(torch.full((1, 4), 8)).expand(len(batch["class_id"]), -1, -1)


def descent(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Momentum that does not divide by small gradients, whose rounding would show."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def stage(network: str, told: str, recompute: bool = False, **changes: Any) -> DiffusionStage:
    torch.manual_seed(0)
    width: dict[str, Any] = {"vector_width": 16} if told == "vector" else {"context_width": 6}
    if network == "unet":
        backbone: nn.Module = UNet(3, 3, 32, [1, 2], 1, [2], heads=2, gradient_checkpointing=recompute, **width)
    else:
        backbone = DiT(3, 3, 16, 2, heads=2, gradient_checkpointing=recompute, **width)
    told_by = Captions() if told == "text" else ClassEmbedder(4, 16 if told == "vector" else 6, drop=0.2, slot=told)
    with torch.no_grad():
        for parameter in [*backbone.parameters(), *told_by.parameters()]:  # layers that start at zero hide everything
            parameter.add_(0.02 * torch.randn_like(parameter))
    model = LatentDiffusion(
        Identity(), LatentScale(1.0), backbone, {"told": told_by}, Schedule("scaled_linear"), EpsPrediction(),
        guidance_trained=True,
    )  # fmt: skip
    given = {"max_steps": _STEPS, "optimizer": descent, "gradient_clip": 0.5, "averaging_decay": 0.9, **changes}
    return DiffusionStage(diffusion=model, sampler=Ddim(), grid=ddim_grid(model.schedule, 2), **options(**given))


class Watched(pl.Callback):
    """Norms of every step; and that no process holds more than its part."""

    def __init__(self, path: Path, sharded: bool) -> None:
        self.path, self.sharded = path, sharded
        self.norms: list[torch.Tensor] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        tensors = [p.grad for p in pl_module._groups["denoiser"] if p.grad is not None]
        tensors += [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v) and v.ndim]
        tensors += pl_module.average.weights().values()
        assert all(isinstance(t, DTensor) for t in tensors) == self.sharded
        norm = nn.utils.get_total_norm([p.grad for p in pl_module._groups["denoiser"] if p.grad is not None])
        self.norms.append(norm.full_tensor() if self.sharded else norm)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        torch.save(torch.stack(self.norms), self.path)


def member(
    rank: int, world: int, folder: Path, make: Callable[[], Stage], strategy: str, local: int | None, options: Any
) -> None:
    if local:
        os.environ.update(LOCAL_WORLD_SIZE=str(local), LOCAL_RANK=str(rank % local))
    compiling.BACKEND = "eager"  # its graphs without the compiler
    sharded = strategy in ("fsdp", "hsdp") and world > 1
    watched = [Watched(folder.with_suffix(f".{rank}.pt"), sharded)]
    train(make(), folder, 8 // world, world, rank, watched, strategy=strategy, validate_every=5, **options)


def run(
    folder: Path, make: Callable[[], Stage], world: int, strategy: str, local: int | None = None, **options: Any
) -> Any:
    """The last checkpoint's content and the norms."""
    arguments = (folder, make, strategy, local, options)
    if world == 1:
        member(0, 1, *arguments)
    else:
        codes = forked.finish(*forked.group(world, member, *arguments, log=folder.with_suffix(".log")))
        assert codes == [0] * world, folder.with_suffix(".log").read_text()
    path = max((folder / "checkpoints").glob("step_*.ckpt"))
    return load_checkpoint(path), torch.load(folder.with_suffix(".0.pt"))


def close(one: Any, other: Any, path: str = "") -> None:
    """Assert that two checkpoint parts hold the same numbers but for the order of sums."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for name in one:
            close(one[name], other[name], f"{path}/{name}")
    elif torch.is_tensor(one):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5, msg=lambda text: f"{path}: {text}")


def compare(tmp_path: Path, make: Callable[[], Stage], world: int, strategy: str, **options: Any) -> None:
    one, norms = run(tmp_path / "one", make, 1, "auto")
    many, other = run(tmp_path / "many", make, world, strategy, **options)
    assert len(norms) == len(other) == _STEPS
    assert norms.max() > 0.5  # some are clipped
    torch.testing.assert_close(norms, other, rtol=0, atol=1e-5)
    close(one["modules"], many["modules"])
    close(one["averaged"], many["averaged"])
    close(one["optimizers"]["denoiser"]["state"], many["optimizers"]["denoiser"]["state"])


@pytest.mark.parametrize(
    ("network", "told", "recompute", "accumulate", "compiled"),
    [("unet", "text", True, 1, False), ("dit", "vector", False, 2, True)],
)
def test_two_processes_train_as_one(
    network: str, told: str, recompute: bool, accumulate: int, compiled: bool, tmp_path: Path
) -> None:
    """Every kind of unit: blocks told by tokens, a trained text transformer, a class embedding."""
    make = partial(stage, network, told, recompute, accumulate=accumulate)
    compare(tmp_path, make, 2, "fsdp", compile=compiled)


def test_what_cannot_be_sharded_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="strategy=hsdp shards denoisers and latent classifiers, and stage=toy"):
        train(TwoGroups(), tmp_path / "run", strategy="hsdp")
    assert not list((tmp_path / "run").glob("*"))
