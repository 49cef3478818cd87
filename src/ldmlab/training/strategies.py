"""Strategies of several processes: DDP, gradients averaged by the stage, and networks sharded by FSDP2 or HSDP.

FSDP2 shards every weight, gradient, optimizer state and average over the processes. A unit, one for each region of a
network (`nn/compiling.py`) and one for the rest of it, is gathered only while it runs. HSDP shards within a machine and
averages gradients between machines. In mixed precision the weights of a region's linear layers and convolutions are
gathered in half precision.
"""

from collections.abc import Callable, Sequence, Set
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils._pytree import register_dataclass

from ldmlab import distributed
from ldmlab.errors import InputError
from ldmlab.nn.blocks import Grow
from ldmlab.nn.compiling import regions
from ldmlab.sharded import is_sharded
from ldmlab.training.settings import TrainerSettings
from ldmlab.training.stage import Stage
from ldmlab.values import Reconstruction

register_dataclass(Reconstruction)  # its tensors tell FSDP2 when a backward pass begins
_HALF = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_PRODUCTS = (nn.Linear, nn.Conv2d)  # autocast computes these in half precision


class SeveralGroups(DDPStrategy):
    """Several optimizer groups: the stage averages gradients, since DDP expects every parameter in every backward."""

    def configure_ddp(self) -> None:
        """All processes start from the first one's weights."""
        assert self.model is not None
        if distributed.joined():
            for tensor in [*self.model.parameters(), *self.model.buffers()]:
                if not is_sharded(tensor):
                    dist.broadcast(tensor.data, 0)


class Sharded(SeveralGroups):
    """The stage's networks as units of `fully_shard`, over all processes or over those of each machine."""

    shards = True  # all processes must run the networks equally often

    def __init__(self, precision: str = "32-true", by_machine: bool = False) -> None:
        super().__init__()
        self._dtype, self._by_machine = _HALF.get(precision), by_machine

    def configure_ddp(self) -> None:
        """Shard the networks, once their weights are on the device and in their layout."""
        super().configure_ddp()
        stage: Any = self.lightning_module
        mesh = mesh_of(self.root_device.type, self._by_machine)
        for network, methods in stage.networks():
            shard(network, mesh, self._dtype, set(stage.whole()))
            _as_forward(network, methods)

    def pre_backward(self, closure_loss: Tensor) -> None:
        """Reduce-scatter after every micro-batch; all-reduce between machines after the last one of a step."""
        super().pre_backward(closure_loss)
        stage: Any = self.lightning_module
        for network, _ in stage.networks():
            network.set_requires_all_reduce(stage._micro_batches + 1 == stage.accumulate)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Every process writes its shards; a collective call."""
        self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)

    def teardown(self) -> None:
        """As DDP's, but the sharded weights stay on their device."""
        for part in (self.cluster_environment, self.precision_plugin, self.accelerator, self.checkpoint_io):
            if part is not None:
                part.teardown()


def mesh_of(device: str, by_machine: bool) -> DeviceMesh:
    """(machines, parts) or (parts,): the processes, by what they do with a weight; groups with the run's timeout."""
    if not by_machine:
        return init_device_mesh(device, (distributed.world_size(),), mesh_dim_names=("parts",))
    ranks = torch.arange(distributed.world_size()).view(-1, distributed.local_world_size())
    groups = [distributed.subgroup(rows.tolist()) for rows in (ranks.T, ranks)]
    return DeviceMesh.from_group(groups, device, ranks, mesh_dim_names=("machines", "parts"))


def shard(
    network: nn.Module, mesh: DeviceMesh, dtype: torch.dtype | None, whole: Set[nn.Parameter] = frozenset()
) -> None:
    """Shard a network's weights over the processes of `mesh`, but for those `whole`.

    dtype: of linear layers and convolutions while they compute; None: their own.
    """
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True, "ignored_params": set(whole)}
    kept = _taken_out(network)
    for parameter in network.parameters():
        parameter.data = parameter.data.contiguous()  # the only layout that can be gathered
    for unit, method in [*regions(network)]:
        if method == "forward" and unit is not network:
            fully_shard(unit, mp_policy=_policy(unit, dtype), **options)
    fully_shard(network, **options)  # resharded too, else averaged weights would miss a gathered one
    network.load_state_dict(kept, strict=False, assign=True)
    if force := getattr(network, "force_normal", None):  # before a pass gathers the weights, not on its copies
        network.register_forward_pre_hook(lambda *_: force() if network.training else None, prepend=True)
        network.force_normal = lambda again=False: None  # type: ignore[assignment]
    if prepare := getattr(network, "prepare", None):
        running: list[bool] = []
        network.register_forward_pre_hook(lambda *_: running.append(True))
        network.register_forward_hook(lambda *_: running.clear(), always_call=True)
        # outside of a forward pass the weights are sharded, so each pass prepares the conditions itself
        network.prepare = lambda given: prepare(given) if running else given  # type: ignore[assignment]


def _as_forward(network: nn.Module, methods: Sequence[str]) -> None:
    """Gather the weights for these methods too, once where one of them calls another."""
    running: list[bool] = []

    def outermost(bare: Callable[..., Any], gathering: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if running:
                return bare(*args, **options)
            running.append(True)
            try:
                return gathering(*args, **options)
            finally:
                running.clear()

        return call

    for method in methods:
        bare = getattr(network, method)
        register_fsdp_forward_method(network, method)
        setattr(network, method, outermost(bare, getattr(network, method)))


def _taken_out(network: nn.Module) -> dict[str, Tensor]:
    """The weights of a network that was built sharded, which has weights on the meta device in their place."""
    found = {name: parameter for name, parameter in network.named_parameters() if is_sharded(parameter)}
    for name, parameter in found.items():
        module, _, own = name.rpartition(".")
        bare = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"), parameter.requires_grad)
        network.get_submodule(module)._parameters[own] = bare
    return {name: parameter.detach().contiguous() for name, parameter in found.items()}


def _policy(unit: nn.Module, dtype: torch.dtype | None) -> MixedPrecisionPolicy:
    """Casts the weights that autocast casts; norms stay float32."""
    if dtype is None or isinstance(unit, Grow):
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    products = {p for module in unit.modules() if isinstance(module, _PRODUCTS) for p in module.parameters(False)}
    return MixedPrecisionPolicy(
        param_dtype=dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
        param_dtype_override_fn=lambda parameter: None if parameter in products else parameter.dtype,
    )


def shards(stage: Stage, settings: TrainerSettings, world: int, local: int) -> bool:
    """Whether the stage's networks are sharded over `world` processes, `local` of them on each machine.

    InputError where the strategy cannot shard them.
    """
    if (name := settings.strategy) not in ("fsdp", "hsdp"):
        return False
    if not stage.networks():
        raise InputError(
            f"trainer.strategy={name} shards first stages, denoisers and latent classifiers, and stage={stage.kind} "
            "trains none of them; use trainer.strategy=ddp."
        )
    if settings.precision in _HALF and "param_dtype_override_fn" not in {f.name for f in fields(MixedPrecisionPolicy)}:
        raise InputError(
            f"trainer.strategy={name} with trainer.precision={settings.precision} needs torch 2.15 or newer, this "
            f"is {torch.__version__}; use trainer.precision=32-true, or trainer.strategy=ddp."
        )
    if name == "hsdp" and world % local:
        raise InputError(
            f"trainer.strategy=hsdp needs equally many processes on every machine, and {local} of {world} are on "
            "one; use trainer.strategy=fsdp."
        )
    return world > 1


def strategy_of(stage: Stage, settings: TrainerSettings) -> Any:
    """Lightning's strategy for a stage; InputError where its networks cannot be sharded."""
    world = distributed.world_size()
    sharded = shards(stage, settings, world, distributed.local_world_size())
    if not isinstance(settings.strategy, str):
        return settings.strategy
    if world == 1:
        return "auto"
    if not torch.cuda.is_available() and any(isinstance(part, nn.SyncBatchNorm) for part in stage.modules()):
        raise InputError(
            f"batch norm over {world} processes needs GPUs; use one process, first_stage.decoder_norm_types=rms_norm, "
            "or loss.adversary.discriminator.norm=group."
        )
    if sharded:
        return Sharded(settings.precision, by_machine=settings.strategy == "hsdp")
    if len(stage.groups()) > 1:
        return SeveralGroups()
    return DDPStrategy(find_unused_parameters=False, gradient_as_bucket_view=True, broadcast_buffers=False)
