"""What a training step costs, from its configuration alone: no weights, no data, no network."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ldmlab.app.meta_stages import Config, Parts, build
from ldmlab.evaluation.flops import BACKWARD, COPIES, StepCost
from ldmlab.instantiate import instantiate, trust_typed
from ldmlab.nn import attention
from ldmlab.nn.compiling import regions
from ldmlab.plugins import allow
from ldmlab.training.engine import check_graphs
from ldmlab.training.settings import TrainerSettings, trainer_node
from ldmlab.training.stage import Stage
from ldmlab.training.strategies import shards

_MACHINE = 8  # GPUs
_UNITS = "gathered units"  # of sharded networks, in half precision in place of copies of all weights

GRADIENTS, OPTIMIZER, AVERAGES = "gradients", "optimizer", "averaged weights"  # kinds of memory


@dataclass(frozen=True)
class Estimate:
    """Of one process; memory in bytes."""

    parameters: dict[str, int]  # by module, trained and frozen
    fixed: dict[str, int]  # held all the time, by kind
    step: StepCost

    @property
    def flops(self) -> float:
        """Of training on one image: forward, backward, and what checkpointing computes again."""
        return self.step.flops / self.step.images

    @property
    def trained(self) -> int:
        """Bytes of trained weights, as many of gradients, optimizer and averages."""
        return sum(self.fixed.get(kind, 0) for kind in (GRADIENTS, GRADIENTS, OPTIMIZER, AVERAGES))

    def memory(self, micro_batch: int) -> dict[str, int]:
        """By kind, at the moment at which most is held."""
        found = self.fixed | self.step.peak(micro_batch)
        return {kind: size for kind, size in found.items() if kind != COPIES or _UNITS not in found}


def estimate(config: Config, settings: TrainerSettings, step: int | None = None, devices: int = 1) -> Estimate:
    """Build the stage without weights; run the step after `step` (None: the last) on a batch without values.

    devices: over which `trainer.strategy` shards, if it does; what training refuses for them is refused.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    stage, parts, batch = build(config, settings)
    local = min(devices, settings.devices or _MACHINE)
    stage.sharded = shards(stage, settings, devices, local)
    check_graphs(settings.compile, stage)
    with FakeTensorMode(allow_non_fake_inputs=True), attention_of_a_gpu():
        for module in (stage, *parts.values()):  # a frozen encoder is no part of the stage
            filled(module)
        found = measured(stage, parts, batch, settings, step)
    if stage.sharded:
        processes = local if settings.strategy == "hsdp" else devices
        return replace(found, fixed=_in_parts(found.fixed, parts, stage, settings, processes))
    return found


def _in_parts(
    fixed: dict[str, int], parts: Parts, stage: Stage, settings: TrainerSettings, processes: int
) -> dict[str, int]:
    """Memory of one process with sharded networks: its shards, the two largest units gathered, a gradient of one."""
    networks = [network for network, _ in stage.networks()]
    split = {parameter for network in networks for parameter in network.parameters()} - set(stage.whole())
    trained = [parameter for parameters in stage.groups().values() for parameter in parameters]
    share = _bytes(p for p in trained if p in split) / max(_bytes(trained), 1)  # of gradients and what follows them
    made = {
        kind: size if kind.startswith("weights of") else size - (own := round(size * share)) + own // processes
        for kind, size in fixed.items()
    }
    for name, part in parts.items():
        own = _bytes(parameter for parameter in part.parameters() if parameter in split)
        if own:  # a part without weights has no row
            made[f"weights of the {name}"] -= own - own // processes
    found = [sorted(_bytes(u.parameters()) for u, _ in regions(network)) for network in networks]
    units = [*chain(*found), *(_bytes(n.parameters()) - sum(own) for n, own in zip(networks, found, strict=True))]
    largest = sorted(units)[-2:]
    return made | {_UNITS: sum(largest) // (2 if settings.precision.endswith("-mixed") else 1) + largest[-1]}


@contextmanager
def attention_of_a_gpu() -> Iterator[None]:
    """Inside, attention holds what a GPU's kernels hold: scores only where a GPU would form them."""
    choice = attention.by_products
    attention.by_products = lambda _, *sizes: choice("cuda", *sizes)
    try:
        yield
    finally:
        attention.by_products = choice


def filled(module: nn.Module) -> None:
    """Memory for the weights that were built without, convolutions as on a GPU: channels-last."""
    made: dict[int, Tensor] = {}
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, old in table.items():
                if old is None or not old.is_meta:
                    continue
                if id(old) not in made:
                    layout = torch.channels_last if old.ndim == 4 else torch.contiguous_format
                    new = torch.empty(old.shape, dtype=old.dtype, memory_format=layout)
                    made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                table[name] = made[id(old)]  # type: ignore[assignment]


def measured(
    stage: Stage, parts: Parts, batch: dict[str, Any], settings: TrainerSettings, step: int | None = None
) -> Estimate:
    """The step of a stage in memory, as the Trainer makes it: gradients are held between micro-batches."""
    groups, held, batch = prepared(stage, batch, settings)
    stage.step = settings.max_steps if step is None else step
    cost = StepCost(parts, held, len(batch["position"]))
    with cost.counting():
        train_step(stage, batch, settings, lambda: cost.owned_by(BACKWARD))
    weights = {name: _bytes(part.parameters()) + _bytes(part.buffers()) for name, part in parts.items()}
    averaged = stage.saved().get(stage.averaged or "") if settings.averaging_decay is not None else None
    fixed = {f"weights of the {name}": size for name, size in weights.items() if size}
    fixed[GRADIENTS] = sum(_bytes(own) for own in groups.values())
    fixed[OPTIMIZER] = sum(
        round(_bytes(own) * _states(make)) for name, group in groups.items() for make, own in stage.parts(name, group)
    )
    if averaged is not None:
        fixed[AVERAGES] = _bytes(p for p in averaged.parameters() if p.requires_grad)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    return Estimate({name: count for name, count in counts.items() if count}, fixed, cost)


def prepared(
    stage: Stage, batch: dict[str, Any], settings: TrainerSettings
) -> tuple[dict[str, list[nn.Parameter]], list[Tensor], dict[str, Any]]:
    """Optimizer groups with gradients, as between two micro-batches; all that is held by then; the batch in memory."""
    groups = stage._groups = stage.groups()
    for parameter in (parameter for own in groups.values() for parameter in own):
        parameter.grad = torch.zeros_like(parameter)
    stage.train()
    stage.step = settings.max_steps
    held = [*stage.parameters(), *stage.buffers(), *(p.grad for p in stage.parameters() if p.grad is not None)]
    copied = {name: value.clone() if isinstance(value, Tensor) else value for name, value in batch.items()}
    return groups, held, copied


def train_step(
    stage: Stage, batch: dict[str, Any], settings: TrainerSettings, backward: Callable[[], Any] = nullcontext
) -> None:
    """Forward and backward pass of every group on one micro-batch, as `Stage.training_step` makes them."""
    for group in filter(stage.active, stage.groups()):
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision.endswith("-mixed")), stage._only(group):
            total = stage.losses(group, batch).total
            with backward():
                (total / stage.accumulate).backward()


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _states(factory: Any) -> float:
    """Bytes of optimizer state for a byte of weights, by one step on a small matrix with values."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily(), torch.enable_grad():
        weight = nn.Parameter(torch.ones(64, 64))
        optimizer = factory([weight])
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        states = [v for v in optimizer.state[weight].values() if isinstance(v, Tensor) and v.ndim]
        return _bytes(states) / _bytes([weight])


def main() -> None:
    """FLOPs of training on an image, for a configuration and a step on stdin: a process of its own beside a run."""
    given = json.load(sys.stdin)
    allow(given["config"].get("plugins"))
    trust_typed(given["config"])
    config = given["config"]
    config["from_run"] = config["from_run"] or config["data"]["latents"] is None  # images are encoded as they come
    settings = instantiate(trainer_node(config["trainer"]), where="trainer")
    print(estimate(config, settings, given["step"]).flops)


if __name__ == "__main__":
    main()
