"""Lightning's Trainer for processes that torchrun or srun started, and the compilation of a stage's networks."""

import inspect
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import ClusterEnvironment
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from ldmlab import distributed
from ldmlab.errors import InputError
from ldmlab.nn import numerics
from ldmlab.nn.compiling import TrainingChoice, compile_regions, seconds, wanted
from ldmlab.training import precision
from ldmlab.training.settings import TrainerSettings
from ldmlab.training.stage import Stage
from ldmlab.training.strategies import strategy_of

_EXPECTED_WARNINGS = (
    ".*eval mode at the start.*",
    ".*does not have many workers.*",
    ".*`max_epochs` was not set.*",
    ".*GPU available but not used.*",
    ".*`training_step` returned `None`.*",
    ".*LeafSpec.*",
    ".*smaller than the logging interval.*",
    ".*You have overridden `transfer_batch_to_device`.*",
    ".*`broadcast_buffers` is deprecated.*",  # its successor is unknown to older torch
    ".*sync_dist=True.*",  # metrics are means over processes already
    ".*returned a view tensor.*",  # of a conditioner, which nothing changes in place
    ".*callbacks used to create the checkpoint.*",  # a changed callback is reported by the comparison
)
_DECIDING = {"GradientAccumulationScheduler", "BatchSizeFinder", "LearningRateFinder", "StochasticWeightAveraging"}


class Launched(ClusterEnvironment):
    """The processes exist already; Lightning starts none and reads no scheduler's variables."""

    creates_processes_externally = True
    main_address = property(lambda self: os.environ.get("MASTER_ADDR", "127.0.0.1"))
    main_port = property(lambda self: int(os.environ.get("MASTER_PORT", "0")))

    @staticmethod
    def detect() -> bool:
        return True

    def world_size(self) -> int:
        return distributed.world_size()

    def set_world_size(self, size: int) -> None:
        pass

    def global_rank(self) -> int:
        return distributed.rank()

    def set_global_rank(self, rank: int) -> None:
        pass

    def local_rank(self) -> int:
        """Number of this process's device among those it sees: 0 where srun gave each task its own."""
        return distributed.local_rank() % (torch.cuda.device_count() or distributed.local_world_size())

    def node_rank(self) -> int:
        return distributed.rank() // max(distributed.local_world_size(), 1)


def make_trainer(
    stage: Stage,
    settings: TrainerSettings,
    callbacks: Sequence[Any] = (),
    loggers: Sequence[Any] = (),
    plugins: Sequence[Any] = (),
    folder: Any = None,
) -> pl.Trainer:
    """A Trainer for `stage`; InputError where Lightning's arguments contradict each other."""
    _quiet()
    numerics.fast()
    chosen = dict(settings.lightning)
    more, own = chosen.pop("plugins", []), precision.plugin(settings.precision)
    more = more if isinstance(more, list | tuple) else [more]
    ours = {
        "accelerator": settings.accelerator,
        **_processes(settings, chosen),
        "strategy": strategy_of(stage, settings),
        "precision": settings.precision if own is None else None,
        "plugins": [Launched(), *plugins, *([] if own is None else [own]), *more],
        "callbacks": list(callbacks),
        "logger": list(loggers),
        "max_steps": stage.max_steps,
        "max_epochs": -1,
        "log_every_n_steps": settings.log_every,
        "val_check_interval": settings.validate_every * stage.accumulate,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "enable_progress_bar": any(isinstance(part, pl.callbacks.ProgressBar) for part in callbacks),
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    try:
        trainer = pl.Trainer(**{**ours, **chosen})
    except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
        raise InputError(f"trainer: Lightning refuses these options: {error}") from error
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign] # ours are in place
    return trainer


def _quiet() -> None:
    """Lightning prints errors, and what a profiler or a model summary found; expected warnings are left out."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("profilers", "callbacks.model_summary"):
        logging.getLogger(f"pytorch_lightning.{name}").setLevel(logging.INFO)
    for pattern in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", pattern)


def _processes(settings: TrainerSettings, chosen: dict[str, Any]) -> dict[str, Any]:
    """Devices and nodes as launched; a typed number must be the same."""
    local, world = distributed.local_world_size(), distributed.world_size()
    if settings.devices is not None and settings.devices != local:
        raise InputError(
            f"trainer.devices={settings.devices} but {local} process(es) were started here; "
            f"launch with torchrun --nproc_per_node={settings.devices} train.py ..."
        )
    nodes = max(world // local, 1)
    if chosen.pop("num_nodes", nodes) != nodes:
        raise InputError(
            f"trainer.num_nodes={settings.lightning['num_nodes']} but the launcher started processes on {nodes}; "
            "leave it out, and give torchrun --nnodes or srun --nodes."
        )
    visible = torch.cuda.device_count() if settings.accelerator != "cpu" else 0
    return {"devices": min(local, visible or local) if world > 1 else 1, "num_nodes": nodes}


_HOOKS = [name for name, _ in inspect.getmembers(pl.Callback, inspect.isfunction) if not name.startswith("_")]
_KINDS = {  # group => what a part of it must have, and the class that has it
    "callbacks": (_HOOKS, "pytorch_lightning.Callback"),
    "logger": (["log_metrics", "log_hyperparams", "save", "finalize"], "pytorch_lightning.loggers.Logger"),
}


def checked(group: str, parts: Sequence[tuple[str, Any]]) -> list[Any]:
    """Callbacks or loggers by (option, part): Lightning's, of either of its two packages."""
    members, base = _KINDS[group]
    for where, part in parts:
        name = type(part).__qualname__
        if missing := [member for member in members if not callable(getattr(part, member, None))]:
            raise InputError(
                f"{where}: {name} has no {missing[0]}(); derive it from {base} (docs/extending.md, section 4)."
            )
        if {kind.__name__ for kind in type(part).__mro__} & _DECIDING:
            raise InputError(
                f"{where}: {name} changes how Lightning steps the optimizer, which the stage does itself; remove it, "
                "and set trainer.accumulate, trainer.micro_batch or optimizer.learning_rate."
            )
    return [part for _, part in parts]


def summary(stage: Stage, settings: TrainerSettings) -> str:
    """One line: parameters of each module and images a step."""
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in stage.saved().items()}
    parts = ", ".join(f"{name} {size / 1e6:.3g}M parameters" for name, size in sizes.items() if size)
    world = distributed.world_size()
    images = settings.micro_batch * settings.accumulate * world
    how = f"micro_batch {settings.micro_batch} x accumulate {settings.accumulate} x {world} processes"
    how += f", sharded by {settings.strategy}" if settings.strategy in ("fsdp", "hsdp") and world > 1 else ""
    return f"{stage.kind}: {parts}; {images} images a step ({how}), {stage.max_steps} steps, {settings.precision}"


def rates_line(stage: Stage) -> str:
    """The learning rates that will be used, and how many tensors (and values) each optimizer of a group updates."""
    lines = []
    for group, parameters in stage.groups().items():
        owned = [own for _, own in stage.parts(group, parameters)]
        sizes = [f"{len(own)} ({sum(p.numel() for p in own) / 1e6:.3g}M values)" for own in reversed(owned)]
        counts = f", {sizes[0]} by Muon, {sizes[1]} by AdamW" if len(sizes) > 1 else ""
        lines.append(f"{group}: {stage.factory(group)}{counts}")
    return "; ".join(lines)


def check_graphs(choice: TrainingChoice, stage: Any) -> None:
    """InputError where passes of a stage cannot be replayed, since its weights move or parts of them run twice."""
    if choice == "cuda_graphs" and (stage.sharded or len(stage.groups()) > 1):
        why = "trainer.strategy shards the weights" if stage.sharded else "an adversary runs parts of a pass twice"
        raise InputError(f"trainer.compile=cuda_graphs: {why}; use trainer.compile=true.")


class Compiled(pl.Callback):
    """Compiles all networks of the stage, region by region, and prints what the first step has cost."""

    def __init__(self, choice: TrainingChoice, say: Callable[[str], None]) -> None:
        self.choice, self.say, self.count = choice, say, 0
        self.replayed = choice == "cuda_graphs"

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """The weights are on their device."""
        if not wanted(self.choice, pl_module.device):
            return
        self.count = compile_regions(pl_module, cuda_graphs=self.replayed)
        if not self.count:
            self.say("trainer.compile: no network here declares a region, so nothing is compiled (docs/extending.md).")

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """Marks where a step begins: what recorded passes gave, gradients of micro-batches too, is kept until then."""
        if self.replayed and pl_module.step_complete:
            torch.compiler.cudagraph_mark_step_begin()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """After the first step; later ones compile only what comes later, such as validation."""
        if self.count and pl_module.step_complete:
            self.say(f"compiled {self.count} blocks in {seconds():.1f} s of the first step")
            self.count = 0
