"""Sharded networks against one process: weights, norms and averages of ten steps, and resuming."""

import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import forked
import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from toy_stages import TwoGroups, image_batch, options, toy_alignment, train, unreadable_batch

from ldmlab import distributed
from ldmlab.backbones.dit import DiT
from ldmlab.backbones.edm2_unet import EDM2UNet
from ldmlab.backbones.edm_unet import EdmUNet
from ldmlab.backbones.mmdit import MMDiT
from ldmlab.backbones.unet import UNet
from ldmlab.checkpoints import load_checkpoint
from ldmlab.conditioners.class_label import ClassEmbedder
from ldmlab.conditioners.text import TransformerText
from ldmlab.diffusion.latent_diffusion import LatentDiffusion
from ldmlab.diffusion.latent_space import LatentScale
from ldmlab.diffusion.parameterization import EdmPrediction, EpsPrediction
from ldmlab.diffusion.paths import EdmPath
from ldmlab.diffusion.schedule import Schedule
from ldmlab.diffusion.time_sampling import LogNormalSigma
from ldmlab.diffusion.weighting import EdmWeighting, LearnedLogVariance, Snr
from ldmlab.errors import InputError
from ldmlab.first_stages.identity import Identity
from ldmlab.inference.model import LoadedModel, generate
from ldmlab.inference.sample_settings import SampleSettings
from ldmlab.nn import compiling
from ldmlab.nn.magnitude import MPConv
from ldmlab.samplers.ddim import Ddim
from ldmlab.training import sharded_start, strategies
from ldmlab.training.callbacks.panels import Panels
from ldmlab.training.diffusion_module import DiffusionStage
from ldmlab.training.optim import AdamW, Constant
from ldmlab.training.stage import Stage


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
    elif network == "edm":
        backbone = EdmUNet(3, 3, 16, "song", [1, 2], 1, [2], head_channels=16, dropout=0.0, encoder="residual",
                           gradient_checkpointing=recompute, **width)  # fmt: skip
    elif network == "edm2":
        backbone = EDM2UNet(3, 3, 16, [1, 2], 1, [2], head_channels=16, gradient_checkpointing=recompute, **width)
    else:
        kind: Any = DiT if network == "dit" else MMDiT
        backbone = kind(3, 3, 16, 2, heads=2, gradient_checkpointing=recompute, **width)
    told_by = Captions() if told == "text" else ClassEmbedder(4, 16 if told == "vector" else 6, drop=0.2, slot=told)
    with torch.no_grad():
        for parameter in [*backbone.parameters(), *told_by.parameters()]:  # layers that start at zero hide everything
            parameter.add_(0.02 * torch.randn_like(parameter))
    path, prediction, weighting = (  # diffusion=edm, or the paper's
        (EdmPath(), EdmPrediction(1.0), EdmWeighting(1.0))
        if network == "edm"
        else (Schedule("scaled_linear"), EpsPrediction(), Snr())
    )
    model = LatentDiffusion(
        Identity(), LatentScale(1.0), backbone, {"told": told_by}, path, prediction, guidance_trained=True,
        time_sampling=LogNormalSigma(-0.4, 1.0) if network == "edm" else None,
        weighting=LearnedLogVariance(weighting) if told == "vector" else None,
    )  # fmt: skip
    given = {"optimizer": descent, "gradient_clip": 0.5, "averaging_decay": 0.9, **changes}
    if network == "dit" or (recompute and network != "edm"):
        given["alignment"] = toy_alignment(backbone, manifold=1.0)
    return DiffusionStage(diffusion=model, sampler=Ddim(), grid=model.path.grid(2), **options(**given))


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
        """Norms, and this process's part of five samples: the last batch is not one of every process."""
        model = LoadedModel(pl_module.diffusion, 8, {}, frozen=False)
        inputs, settings = [{"class_id": i % 4} for i in range(5)], SampleSettings(steps=2, size=(8, 8))
        world, rank = distributed.world_size(), distributed.rank()
        with pl_module.evaluating():
            parts = [*generate(model, inputs, settings, batch_size=2, rank=rank, world=world)]
        images = {n: image for numbers, images in parts for n, image in zip(numbers, images, strict=True)}
        torch.save({"norms": torch.stack(self.norms), "images": images}, self.path)


def member(
    rank: int, world: int, folder: Path, make: Callable[[], Stage], strategy: str, local: int | None, options: Any
) -> None:
    if local:
        os.environ.update(LOCAL_WORLD_SIZE=str(local), LOCAL_RANK=str(rank % local))
    compiling.BACKEND = "eager"  # its graphs without the compiler
    sharded = strategy in ("fsdp", "hsdp") and world > 1
    watched: list[Any] = [Watched(folder.with_suffix(f".{rank}.pt"), sharded)]
    watched += [Panels(every=100)]

    def val() -> list[dict[str, Any]]:  # unequally many, some processes have none, and of some no image can be read
        unreadable = [unreadable_batch()]
        return unreadable + [image_batch(range(4 * i, 4 * i + 4)) for i in range(rank, 3, world)] + unreadable * rank

    options = {"validate_every": 2, **options}
    made: Any = make()
    if sharded:  # the denoiser as built sharded, its conditioners whole until training begins
        distributed.join()
        sharded_start.cut(made.diffusion.backbone, strategies.mesh_of("cpu", strategy == "hsdp"))
    train(made, folder, 8 // world, world, rank, watched, val, strategy=strategy, **options)


def run(
    folder: Path, make: Callable[[], Stage], world: int, strategy: str, local: int | None = None, **options: Any
) -> Any:
    """The last checkpoint's content, and what `Watched` saved on all processes."""
    arguments = (folder, make, strategy, local, options)
    if world == 1:
        member(0, 1, *arguments)
    else:
        codes = forked.finish(*forked.group(world, member, *arguments, log=folder.with_suffix(".log")))
        assert codes == [0] * world, folder.with_suffix(".log").read_text()
    path = max((folder / "checkpoints").glob("step_*.ckpt"))
    seen = [torch.load(folder.with_suffix(f".{rank}.pt")) for rank in range(world)]
    return load_checkpoint(path), seen[0]["norms"], {n: i for part in seen for n, i in part["images"].items()}


def close(one: Any, other: Any, tolerance: float = 1e-5, path: str = "") -> None:
    """Assert that two checkpoint parts hold the same numbers but for the order of sums."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for name in one:
            close(one[name], other[name], tolerance, f"{path}/{name}")
    elif torch.is_tensor(one):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance, msg=lambda text: f"{path}: {text}")


def compare(tmp_path: Path, make: Callable[..., Stage], world: int, strategy: str, steps: int, **options: Any) -> None:
    one, norms, images = run(tmp_path / "one", partial(make, max_steps=steps), 1, "auto")
    many, other, others = run(tmp_path / "many", partial(make, max_steps=steps), world, strategy, **options)
    assert images.keys() == others.keys() == set(range(5))
    assert all((image.int() - others[n].int()).abs().max() <= 1 for n, image in images.items())
    assert one["notes"]["val"]["loss"] == pytest.approx(many["notes"]["val"]["loss"], abs=1e-5)
    assert len(norms) == len(other) == steps
    assert norms.max() > 0.5  # some are clipped
    torch.testing.assert_close(norms, other, rtol=0, atol=1e-5)
    close(one["modules"], many["modules"])
    close(one["averaged"], many["averaged"])
    close(one["optimizers"]["denoiser"]["state"], many["optimizers"]["denoiser"]["state"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "told", "recompute", "accumulate", "compiled"),
    [
        ("unet", "text", True, 1, False),
        ("dit", "vector", False, 3, True),
        pytest.param("edm", "vector", True, 1, True, marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_as_one(
    network: str, told: str, recompute: bool, accumulate: int, compiled: bool, tmp_path: Path
) -> None:
    """Every kind of unit: blocks told by tokens, a trained text transformer, a class embedding, a learned weighting."""
    make = partial(stage, network, told, recompute, accumulate=accumulate)
    compare(tmp_path, make, 2, "fsdp", 4, compile=compiled)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "hsdp"])
@pytest.mark.parametrize(
    ("network", "told", "recompute", "accumulate"),
    [
        *(("unet", "text", False, 3), ("unet", "tokens", True, 1), ("dit", "text", True, 3)),
        *(("mmdit", "text", False, 1), ("edm2", "vector", True, 3), ("edm", "vector", True, 3)),
    ],
)
def test_four_processes_train_as_one(
    strategy: str, network: str, told: str, recompute: bool, accumulate: int, tmp_path: Path
) -> None:
    """HSDP: two machines of two processes."""
    make = partial(stage, network, told, recompute, accumulate=accumulate)
    compare(tmp_path, make, 4, strategy, 10, local=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "told", "tolerance"),
    [("dit", "vector", 1e-6), ("unet", "text", 1e-4)],  # here the order of float32 sums moves some rounding to bfloat16
)
def test_half_precision_is_that_of_ddp(network: str, told: str, tolerance: float, tmp_path: Path) -> None:
    """Blocks are gathered in bfloat16, in which autocast computes; gradients are summed in float32."""
    make = partial(stage, network, told, max_steps=5)
    one, _, _ = run(tmp_path / "one", make, 2, "ddp", precision="bf16-mixed")
    other, _, _ = run(tmp_path / "other", make, 2, "fsdp", precision="bf16-mixed")
    close(one["modules"], other["modules"], tolerance)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "dit": partial(DiT, 3, 3, 16, 2, heads=2, vector_width=16),
    "mmdit": partial(MMDiT, 3, 3, 16, 2, heads=2, context_width=6),
    "unet": partial(UNet, 3, 3, 32, [1, 2], 1, [2], heads=2, context_width=6),
    "edm": partial(EdmUNet, 3, 3, 16, "song", [1, 2], 1, [2], head_channels=16, encoder="residual", vector_width=16),
    "edm2": partial(EDM2UNet, 3, 3, 16, [1, 2], 1, [2], head_channels=16, vector_width=16),
}
TRAINER = {"strategy": "fsdp", "accelerator": "cpu"}


def whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def built(rank: int, world: int) -> None:
    distributed.join()
    for make in NETWORKS.values():
        torch.manual_seed(1)
        plain, after = make(), torch.rand(3)
        torch.manual_seed(1)
        network = sharded_start.built_sharded(TRAINER, make)
        assert torch.equal(torch.rand(3), after)
        assert all(isinstance(parameter, DTensor) for parameter in network.parameters())
        strategies.shard(network, strategies.mesh_of("cpu", by_machine=False), None)
        found = network.state_dict()
        assert found.keys() == plain.state_dict().keys()
        for name, value in plain.state_dict().items():
            assert torch.equal(whole(found[name]), value), name
        held = sum(p.to_local().numel() for p in network.parameters())  # type: ignore[attr-defined]
        assert held < 0.6 * sum(p.numel() for p in plain.parameters())


@pytest.mark.slow
def test_networks_that_are_built_sharded_have_the_same_weights(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert forked.finish(*forked.group(2, built, log=log)) == [0, 0], log.read_text()


class Mixed(nn.Module):
    """A network whose constructor reorders rows of a weight that is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 6)
        nn.init.zeros_(self.inner.weight[:3])


def mixed(rank: int, world: int) -> None:
    distributed.join()
    with pytest.raises(InputError, match=r"trainer\.strategy=fsdp: a network's constructor takes aten\.slice"):
        sharded_start.built_sharded(TRAINER, Mixed)


def test_rows_that_a_constructor_mixes_are_refused(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert forked.finish(*forked.group(2, mixed, log=log)) == [0, 0], log.read_text()


def peak() -> int:
    """MiB, of this process since its fork."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) // 1024


def started(rank: int, world: int, sharded: bool) -> None:
    """Prints what a start adds to the memory of a process, in parts of all weights."""
    distributed.join()
    for width in (16, 512):  # the first one brings what is loaded once
        before = peak()
        make = partial(DiT, 4, 8, width, 12, heads=2, vector_width=width)
        network = sharded_start.built_sharded(TRAINER, make) if sharded else make()
        strategies.shard(network, strategies.mesh_of("cpu", by_machine=False), None)
    weights = sum(p.numel() for p in network.parameters()) * 4 / 2**20
    print(f"{weights:.0f} MiB of weights: {(peak() - before) / weights:.2f}")


@pytest.mark.slow
def test_no_process_holds_all_weights_at_the_start(tmp_path: Path) -> None:
    found = {}
    for sharded in (False, True):
        log = tmp_path / f"log.{sharded}"
        code = f"""
            import sys
            from pathlib import Path
            sys.path[:0] = {[str(Path(__file__).parents[1]), str(Path(__file__).parent)]!r}
            import forked
            from test_sharding import started
            assert forked.finish(*forked.group(2, started, {sharded}, log=Path({str(log)!r}))) == [0, 0]
        """  # a fork of this process would have its freed memory at hand
        new = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=600)
        assert new.returncode == 0, new.stderr + log.read_text()
        lines = [line for line in log.read_text().splitlines() if "of weights" in line]
        print(*lines, sep="\n")
        found[sharded] = max(float(line.rpartition(" ")[2]) for line in lines)
    assert found[True] < 0.75 < 0.9 < found[False]  # half of them, and the largest module in full


class Normal(pl.Callback):
    """That every pass sees stored filters of unit magnitude, but for the 1e-4 that keeps a division from zero."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        layers = [module.weight for module in pl_module.modules() if isinstance(module, MPConv)]
        assert len(layers) > 20
        assert sum(isinstance(weight, DTensor) for weight in layers) > 20
        for weight in layers:
            local = weight.to_local() if isinstance(weight, DTensor) else weight
            torch.testing.assert_close(local.flatten(1).square().mean(1), torch.ones(len(local)), rtol=0, atol=1e-3)


def normal(rank: int, world: int, folder: Path) -> None:
    made = stage("edm2", "vector", optimizer=AdamW(0.1), lr_schedule=Constant(), max_steps=3, accumulate=2)
    train(made, folder, 2, world, rank, [Normal()], strategy="fsdp")


@pytest.mark.slow
def test_sharded_weights_are_made_normal_after_every_update(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert forked.finish(*forked.group(2, normal, tmp_path / "run", log=log)) == [0, 0], log.read_text()


@pytest.mark.slow
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    """With units inside the network, and AdamW; `test_sharded_checkpoints.py` has other numbers of processes."""
    make = partial(stage, "dit", "text", optimizer=AdamW(1e-3), max_steps=4)
    whole, _, _ = run(tmp_path / "whole", make, 2, "fsdp", checkpoint_every=2)
    step = "checkpoints/step_00000002.ckpt"
    shutil.copytree(tmp_path / "whole" / step, tmp_path / "again" / step)
    again, _, _ = run(tmp_path / "again", make, 2, "fsdp", checkpoint_every=2)
    for part in ("modules", "averaged", "optimizers", "rng"):
        forked.same(whole[part], again[part], part)


def waiting(rank: int, world: int, met: Path) -> None:
    """In the group of its machine, and in that of the writing threads, the last process never comes."""
    os.environ.update(LOCAL_WORLD_SIZE="2", LOCAL_RANK=str(rank % 2))
    distributed.join(timeout_minutes=0.05)
    mesh = strategies.mesh_of("cpu", by_machine=True)
    assert mesh.mesh.tolist() == [[0, 1], [2, 3]]
    for number, group in enumerate([*mesh.get_all_groups(), distributed.subgroup([[0, 1, 2, 3]], "gloo")]):
        if rank < 3:
            inside = 3 in torch.distributed.get_process_group_ranks(group)
            with pytest.raises(RuntimeError) if inside else nullcontext():
                torch.distributed.all_reduce(torch.ones(1), group=group)
            met.with_suffix(f".{number}.{rank}").touch()
        while not all(met.with_suffix(f".{number}.{r}").exists() for r in range(3)):
            time.sleep(0.01)
    distributed.forget()
    os._exit(0)


@pytest.mark.slow
def test_the_groups_of_hsdp_have_the_timeout_of_the_run(tmp_path: Path) -> None:
    log = tmp_path / "log"
    codes = forked.finish(*forked.group(4, waiting, tmp_path / "met", log=log), seconds=60)
    assert codes == [0] * 4, log.read_text()


def test_what_cannot_be_sharded_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="strategy=hsdp shards first stages, denoisers and latent classifiers, and stage=toy"
    ):
        train(TwoGroups(), tmp_path / "run", strategy="hsdp")
    assert not list((tmp_path / "run").glob("*"))
