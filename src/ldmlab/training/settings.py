"""Settings of training that do not depend on the stage: ours, and every argument of Lightning's Trainer."""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

import pytorch_lightning as pl
import torch

from ldmlab import distributed
from ldmlab.argument_types import check_types
from ldmlab.errors import InputError, shown
from ldmlab.instantiate import instantiate
from ldmlab.nn.compiling import TrainingChoice
from ldmlab.training.precision import Precision

_MOST = 10**12  # steps, images
_CHOICES = {
    "precision": get_args(Precision),
    "accelerator": ("auto", "cpu", "gpu"),
    "strategy": ("auto", "ddp", "fsdp", "hsdp"),
}
_ALSO = {"accumulate_grad_batches": "accumulate", "gradient_clip_val": "gradient_clip"}  # Lightning's name => ours
_REPLACED = {  # arguments of the Trainer that contradict what a run does => the way out
    **dict.fromkeys(("max_epochs", "min_epochs"), "training counts steps; use trainer.max_steps"),
    "min_steps": "training goes to trainer.max_steps unless a callback or max_time ends it; leave it out",
    **dict.fromkeys(("val_check_interval", "check_val_every_n_epoch"), "use trainer.validate_every, in steps"),
    "log_every_n_steps": "use trainer.log_every",
    "callbacks": "use the group callbacks, such as +callbacks.NAME._target_=...",
    "logger": "use the group logger, such as +logger.NAME._target_=...",
    "default_root_dir": "use run.dir",
    "enable_checkpointing": "a run is resumed by its checkpoints; trainer.fast_dev_run=1 leaves none behind",
    "use_distributed_sampler": "every process reads its own part of the global order already",
    "barebones": "it switches off what a run is recorded by; use trainer.fast_dev_run=1 for a trial",
    **dict.fromkeys(("limit_test_batches", "limit_predict_batches"), "training neither tests nor predicts"),
    **dict.fromkeys(("enable_autolog_hparams", "model_registry"), "the loggers get the whole configuration already"),
}


@dataclass
class TrainerSettings:
    """The choices of conf/trainer; steps are optimizer updates of the main network."""

    max_steps: int  # where training ends
    micro_batch: int  # images a process takes at a time
    accumulate: int = 1  # micro-batches a step
    global_batch: int | None = None  # images a step of all processes, from which accumulate follows
    gradient_clip: float | None = None  # largest norm of the gradient
    skip_nonfinite: int = 0  # steps in a row that are left out where a gradient is not finite; 0: the run stops
    gradient_alarm: float | None = 10.0  # say where a gradient's norm is so many times its median; None: never
    averaging_decay: float | None = 0.9999  # of the averaged weights; None: none
    averaging_warmup: tuple[float, float] | float | None = None  # as of `AveragedWeights`; None: the paper's
    averaging_start: int = 0  # step until which the average is a copy of the weights
    precision: Precision = "bf16-mixed"  # auto becomes what the processor computes fast
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int | None = None  # processes on this machine; None: as many as torchrun or srun started
    strategy: Any = "auto"  # auto | ddp | fsdp | hsdp, or a strategy of Lightning by its _target_
    timeout_minutes: float | None = None  # how long a process waits for another one; None: torch's own
    compile: TrainingChoice = "auto"  # torch.compile all networks, block by block; auto: on a GPU
    log_every: int = 50  # steps between two rows of metrics.csv
    validate_every: int = 1000  # steps between two evaluations on validation images
    checkpoint_every: int = 1000  # steps between two checkpoints
    checkpoint_every_minutes: float | None = None  # and by the clock
    keep: int = 2  # newest checkpoints to keep; the best one is kept too
    fast_dev_run: bool | int = False  # a trial of so many steps (true: 1) that leaves nothing behind
    lightning: Mapping[str, Any] = field(default_factory=dict)  # other arguments of pytorch_lightning.Trainer

    def __post_init__(self) -> None:
        if self.fast_dev_run < 0:
            raise InputError(f"trainer.fast_dev_run={self.fast_dev_run} must be at least 1, or false for a whole run.")
        if self.fast_dev_run:
            self.max_steps = self.validate_every = int(self.fast_dev_run)
            self.lightning = {"limit_val_batches": self.max_steps, **self.lightning}
        counts = ("max_steps", "micro_batch", "accumulate", "log_every", "validate_every", "checkpoint_every", "keep")
        for name in counts:
            if (value := getattr(self, name)) < 1:
                raise InputError(f"trainer.{name}={value} must be at least 1.")
            if value > _MOST:
                raise InputError(
                    f"trainer.{name}={shown(value)} is more than any run can count; choose at most {_MOST}."
                )
        for name, choices in _CHOICES.items():
            if isinstance(value := getattr(self, name), str) and value not in choices:
                raise InputError(f"trainer.{name}={value} is unknown; choose {' or '.join(choices)}.")
        if self.skip_nonfinite < 0:
            raise InputError(f"trainer.skip_nonfinite={self.skip_nonfinite} must be 0 or more steps.")
        for name in ("gradient_clip", "gradient_alarm", "timeout_minutes", "checkpoint_every_minutes"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise InputError(f"trainer.{name}={value} must be above 0, or null for none.")
        if self.global_batch is not None:
            self._accumulate(self.global_batch)
        self._check_averaging()
        if self.precision == "auto":
            self.precision = fast_precision(self.accelerator)

    def _check_averaging(self) -> None:
        decay, warmup = self.averaging_decay, self.averaging_warmup
        if decay is not None and not 0 <= decay < 1:
            raise InputError(f"trainer.averaging_decay={decay} must lie in [0, 1), or null for none.")
        if self.averaging_start < 0 or (self.averaging_start and decay is None):
            raise InputError(
                f"trainer.averaging_start={self.averaging_start} must be 0 or a step after which averages of "
                f"trainer.averaging_decay={decay} begin."
            )
        if warmup is None:
            return
        if isinstance(warmup, Sequence):
            given, fits = shown([*warmup]), len(warmup) == 2 and all(0 < v < math.inf for v in warmup)
        else:
            given, fits = shown(warmup), 0 <= warmup < math.inf
        if decay is None or not fits:
            raise InputError(
                f"trainer.averaging_warmup={given} must be two numbers above 0, inv_gamma "
                "and power of the warm-up of trainer.averaging_decay, such as [1,0.75]; or a ratio of EDM's, such as "
                "0.05; or null."
            )

    def check_device(self) -> None:
        """InputError where this machine cannot compute what was chosen; a plan for another machine does not ask."""
        if self.accelerator == "gpu" and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
            raise InputError(
                "trainer.accelerator=gpu: torch finds no GPU here; use trainer.accelerator=cpu or auto, or check the "
                "driver with nvidia-smi."
            )
        if self.accelerator != "cpu" and torch.cuda.is_available():
            return
        if self.precision == "16-mixed":
            raise InputError("trainer.precision=16-mixed needs a CUDA GPU; use bf16-mixed or 32-true on a CPU.")
        if self.compile == "cuda_graphs":
            raise InputError("trainer.compile=cuda_graphs needs a CUDA GPU; use true or false on a CPU.")

    def _accumulate(self, images: int) -> None:
        """As many micro-batches as global_batch needs; InputError where accumulate says otherwise."""
        if images < 1:
            raise InputError(f"trainer.global_batch={images} must be a whole number of at least 1, or null.")
        needed, given = accumulated(images, self.micro_batch, distributed.world_size()), self.accumulate
        if given not in (1, needed):
            raise InputError(
                f"trainer.accumulate={given} and trainer.global_batch={images} contradict each other: the batch takes "
                f"{needed} micro-batches of {self.micro_batch} on {distributed.world_size()} process(es); leave "
                "trainer.accumulate out."
            )
        self.accumulate = needed


def trainer_node(node: Mapping[str, Any]) -> dict[str, Any]:
    """The node of conf/trainer for `TrainerSettings`; InputError for what the Trainer does not take."""
    known, ours = inspect.signature(pl.Trainer).parameters, {part.name: part for part in fields(TrainerSettings)}
    found = {name: value for name, value in node.items() if name in ours or name == "_target_"}
    lightning = {}
    for name, value in node.items():
        if name in found:
            continue
        if name in _REPLACED:
            raise InputError(f"trainer.{name}={value}: {_REPLACED[name]}.")
        if name not in known:
            raise InputError(
                f"trainer.{name}: there is no such option; there are those of conf/trainer/default.yaml and the "
                "arguments of pytorch_lightning.Trainer."
            )
        if name not in _ALSO:
            lightning[name] = _built(value, f"trainer.{name}")
            continue
        same = _ALSO[name]
        if found.get(same, value) not in (value, ours[same].default):
            raise InputError(
                f"trainer.{name}={value} and trainer.{same}={found[same]} are two values of one option; give one."
            )
        found[same] = value
    check_types(pl.Trainer, lightning, "trainer")
    return {**found, **({"lightning": lightning} if lightning else {})}


def images_a_step(trainer: Mapping[str, Any], processes: int) -> int:
    """Of a node of conf/trainer: its global_batch, or micro_batch x accumulate x processes."""
    return int(trainer.get("global_batch") or trainer["micro_batch"] * (trainer.get("accumulate") or 1) * processes)


def accumulated(images: int, micro_batch: int, processes: int) -> int:
    """Micro-batches that make a step of so many images; InputError with the nearest numbers where none do."""
    each = images // processes
    if images < processes or images % processes:
        near = sorted({max(each, 1) * processes, (each + 1) * processes})
        raise InputError(
            f"trainer.global_batch={images} cannot be shared by {processes} processes; use "
            f"{' or '.join(map(str, near))}, or a number of processes that divides it."
        )
    if each % micro_batch:
        fit = [size for size in range(1, each + 1) if each % size == 0]
        near = [*[size for size in fit if size < micro_batch][-1:], *[size for size in fit if size > micro_batch][:1]]
        raise InputError(
            f"trainer.global_batch={images} is not made of micro-batches of {micro_batch} on {processes} process(es); "
            f"use trainer.micro_batch={' or '.join(map(str, near))}."
        )
    return each // micro_batch


def _built(value: Any, where: str) -> Any:
    """An argument of the Trainer; a part by its `_target_`, such as a profiler, or several, such as plugins."""
    if isinstance(value, list):
        return [_built(part, where) for part in value]
    return instantiate(value, where=where) if isinstance(value, Mapping) and "_target_" in value else value


def fast_precision(accelerator: str) -> Literal["bf16-mixed", "32-true"]:
    """bf16-mixed where the GPU or the processor has instructions for bfloat16, 32-true where it would emulate them.

    A processor without them trains about ten times slower in bf16-mixed than in 32-true.
    """
    if accelerator != "cpu" and torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if native else "32-true"
