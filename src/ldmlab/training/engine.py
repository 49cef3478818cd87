"""Lightning as the engine: devices, precision and processes, with its own counters and output switched off."""

import logging
import os
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import ClusterEnvironment
from pytorch_lightning.strategies import DDPStrategy

from ldmlab import distributed
from ldmlab.errors import InputError
from ldmlab.training.lightning_parts import LightningCallbacks
from ldmlab.training.settings import TrainerSettings
from ldmlab.training.stage import Stage

_EXPECTED_WARNINGS = (
    ".*eval mode at the start.*",
    ".*does not have many workers.*",
    ".*`max_epochs` was not set.*",
    ".*GPU available but not used.*",
    ".*`training_step` returned `None`.*",
    ".*LeafSpec.*",
    ".*`broadcast_buffers` is deprecated.*",  # its successor is unknown to older torch
)


class Launched(ClusterEnvironment):
    """The processes exist already; Lightning starts none and reads no scheduler's variables."""

    creates_processes_externally = True
    main_address = property(lambda self: os.environ.get("MASTER_ADDR", "127.0.0.1"))
    main_port = property(lambda self: int(os.environ.get("MASTER_PORT", "0")))

    @staticmethod
    def detect() -> bool:
        """Always: torchrun, srun or a single process."""
        return True

    def world_size(self) -> int:
        """Number of processes."""
        return distributed.world_size()

    def set_world_size(self, size: int) -> None:
        """Fixed at launch."""

    def global_rank(self) -> int:
        """Rank over all machines."""
        return distributed.rank()

    def set_global_rank(self, rank: int) -> None:
        """Fixed at launch."""

    def local_rank(self) -> int:
        """Rank on this machine."""
        return distributed.local_rank()

    def node_rank(self) -> int:
        """Number of this machine."""
        return distributed.rank() // max(distributed.local_world_size(), 1)


class SeveralGroups(DDPStrategy):
    """Processes without DDP's wrapper, which expects every parameter in every backward pass; the stage syncs."""

    def configure_ddp(self) -> None:
        """All processes start from the first one's weights."""
        assert self.model is not None
        if distributed.joined():
            for tensor in [*self.model.parameters(), *self.model.buffers()]:
                torch.distributed.broadcast(tensor.data, 0)


def make_trainer(
    stage: Stage, settings: TrainerSettings, loop: pl.Callback, lightning: LightningCallbacks | None = None
) -> pl.Trainer:
    """A Trainer that runs until the loop stops it."""
    _quieten()
    world, local = distributed.world_size(), distributed.local_world_size()
    if settings.devices not in (None, local):
        raise InputError(
            f"trainer.devices={settings.devices} but {local} process(es) were started here; "
            f"launch with torchrun --nproc_per_node={settings.devices} train.py ..."
        )
    assert settings.precision != "auto"  # decided when the settings were made
    trainer = pl.Trainer(
        accelerator=settings.accelerator,
        devices=local if world > 1 else 1,
        num_nodes=max(world // local, 1),
        strategy=_strategy(stage) if world > 1 else "auto",
        precision=settings.precision,
        plugins=[Launched()],
        callbacks=[*(lightning.callbacks if lightning else []), loop],  # Lightning's first: the loop writes the row
        log_every_n_steps=settings.log_every,
        max_steps=-1,  # the loop stops at Stage.max_steps: Lightning counts the steps of every optimizer
        max_epochs=-1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=lightning.logger if lightning else False,
    )
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign] # ours are in place
    return trainer


def _strategy(stage: Stage) -> DDPStrategy:
    if len(stage.groups()) > 1:
        return SeveralGroups()
    return DDPStrategy(find_unused_parameters=False, gradient_as_bucket_view=True, broadcast_buffers=False)


def _quieten() -> None:
    """No banners, tips or warnings about intended choices."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for pattern in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", pattern)


def summary(stage: Stage, settings: TrainerSettings) -> str:
    """One line: parameters of each module and images a step."""
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in stage.saved().items()}
    parts = ", ".join(f"{name} {size / 1e6:.3g}M parameters" for name, size in sizes.items() if size)
    world = distributed.world_size()
    images = settings.micro_batch * settings.accumulate * world
    how = f"micro_batch {settings.micro_batch} x accumulate {settings.accumulate} x {world} processes"
    return f"{stage.kind}: {parts}; {images} images a step ({how}), {stage.max_steps} steps, {settings.precision}"


def rates_line(stage: Stage) -> str:
    """The learning rates that will be used."""
    optimizers: dict[str, Any] = {group: stage.factory(group) for group in stage.groups()}
    return "; ".join(f"{group}: {optimizer}" for group, optimizer in optimizers.items())
