"""Memory and floating-point operations, counted without computing anything.

Networks run on the meta device, a training step in `FakeTensorMode` (or on a processor, to compare): no workspace of
kernels, no fragmentation of the allocator, and nothing that a compiler would fuse. A multiplication and an addition are
two operations; convolutions, matrix products and attention count, the rest not.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from ldmlab.contracts import Conditioning, LatentSpec
from ldmlab.instantiate import instantiate

TOKENS = 77  # length of token conditioning that is counted: a caption


@dataclass(frozen=True)
class DenoiserCost:
    """Cost of one image, independent of the device."""

    parameters: int
    forward: int  # FLOPs of one evaluation of the network
    training: int  # FLOPs of a forward and a backward pass

    def sampling(self, steps: int, guided: bool = False) -> int:
        """FLOPs of `steps` steps of a solver with one network evaluation a step; two with guidance."""
        return self.forward * steps * (2 if guided else 1)


def flops_of(call: Callable[[], object]) -> int:
    """FLOPs of everything that `call` does, backward passes included."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def denoiser_cost(node: Mapping[str, Any], latent: LatentSpec, widths: Mapping[str, int]) -> DenoiserCost:
    """Of the backbone of `node` (sizes filled in) on one latent; widths: of tokens, spatial and vector conditioning."""
    with torch.device("meta"):
        backbone = instantiate(node, where="backbone")
        x = torch.empty(1, latent.channels, latent.height, latent.width)
        t = torch.empty(1)
        conditioning = Conditioning(
            tokens=torch.empty(1, TOKENS, widths["tokens"]) if widths.get("tokens") else None,
            spatial=torch.empty(1, widths["spatial"], latent.height, latent.width) if widths.get("spatial") else None,
            vector=torch.empty(1, widths["vector"]) if widths.get("vector") else None,
            numbers=torch.empty(1, node["numbers"]) if node.get("numbers") else None,
        )

    def forward() -> Tensor:
        return backbone(x, t, conditioning)

    with torch.no_grad():
        once = flops_of(forward)
    parameters = sum(p.numel() for p in backbone.parameters())
    return DenoiserCost(parameters, once, flops_of(lambda: forward().sum().backward()))


def decoder_flops(node: Mapping[str, Any], latent: LatentSpec) -> int:
    """Of decoding one latent by the first stage of `node`."""
    with torch.device("meta"), torch.no_grad():
        first_stage = instantiate(node, where="first_stage")
        raw = torch.empty(1, latent.channels, latent.height, latent.width)
        return flops_of(lambda: first_stage.decode(raw))


IMAGES = 31  # of the counted batch: a prime that divides no width of a network, so what it divides grows with the batch
BACKWARD, LOSS, COPIES = "backward pass", "loss and batch", "bfloat16 copies"


class StepCost(TorchDispatchMode):
    """What is allocated inside by owner, and FLOPs, for a batch of `images`; then the peak of any other batch."""

    def __init__(self, parts: Mapping[str, nn.Module], held: Sequence[Tensor], images: int = IMAGES) -> None:
        """parts: modules by the name of what their forward pass allocates; held: tensors that are counted elsewhere."""
        super().__init__()
        self.images, self.flops = images, 0
        self._parts = parts
        self._owners = [LOSS]
        self._held = {tensor.untyped_storage()._cdata for tensor in held}
        self._live: dict[int, tuple[str, int]] = {}  # storage => owner, bytes
        self._events: list[tuple[str, int]] = []  # owner, bytes; negative where they are freed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it, and count its FLOPs and what its results hold."""
        out = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += int(formula(*args, **(kwargs or {}), out_val=out))
        copy = func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self._held
        owner = COPIES if copy else self._owners[-1]
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in self._live and storage._cdata not in self._held:
                self._live[storage._cdata] = owner, storage.nbytes()
                self._events.append((owner, storage.nbytes()))
                weakref.finalize(storage, self._freed, storage._cdata)
        return out

    def _freed(self, key: int) -> None:
        owner, size = self._live.pop(key)
        self._events.append((owner, -size))

    @contextmanager
    def owned_by(self, name: str) -> Iterator[None]:
        """Inside, what no part allocates is this owner's."""
        self._owners.append(name)
        try:
            yield
        finally:
            self._owners.pop()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Inside, everything is counted."""
        with ExitStack() as stack:
            for name, part in self._parts.items():
                for module in part.modules():
                    before = module.register_forward_pre_hook(partial(self._enter, name))
                    after = module.register_forward_hook(self._leave, always_call=True)
                    stack.callback(before.remove)
                    stack.callback(after.remove)
            stack.enter_context(self)
            yield

    def _enter(self, name: str, *_: Any) -> None:
        self._owners.append(name)

    def _leave(self, *_: Any) -> None:
        self._owners.pop()

    def peak(self, images: int) -> dict[str, int]:
        """Bytes by owner at the moment at which a batch of `images` holds most."""
        sizes = np.array([size for _, size in self._events], dtype=np.float64)
        grown = np.where(sizes % self.images == 0, sizes / self.images * images, sizes)
        at = int(np.argmax(np.cumsum(grown))) + 1
        found: dict[str, float] = {}
        for (owner, _), size in zip(self._events[:at], grown[:at], strict=True):
            found[owner] = found.get(owner, 0.0) + float(size)
        return {owner: round(size) for owner, size in found.items() if size >= 1}
