"""Panels by all processes: each takes part of the images, and all run their networks equally often."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ldmlab import distributed
from ldmlab.errors import InputError
from ldmlab.training.data_module import Batch


def first_images(batches: Iterable[Batch], count: int, device: torch.device | None = None) -> Batch:
    """The first `count` images by position over all processes' batches, on every process (and its `device`)."""
    parts: list[Batch] = []
    for batch in batches:
        parts.append({name: value for name, value in batch.items() if name != "skipped"})
        if sum(len(part["position"]) for part in parts) >= count:
            break
    own = _selected(_joined(parts), range(count)) if parts else None
    if distributed.joined():
        own = _first_of_all(own, count, device)
    if own is None or not len(own["position"]):
        raise InputError(
            "the validation split is empty, so there is nothing to show in panels; give data.val, or callbacks=quiet."
        )
    return own


def slice_of_process(batch: Batch) -> Batch:
    """Images rank, rank + world, ... of a batch that all processes hold; from its start again where some have fewer."""
    rank, world, count = distributed.rank(), distributed.world_size(), len(batch["position"])
    return _selected(batch, [i % count for i in range(rank, rank + world * -(-count // world), world)])


def gathered(rows: Tensor, count: int) -> Tensor:
    """What the processes made of their slices, one row an image, as rows of the whole batch, on the CPU."""
    parts = distributed.gather(rows.cpu())
    return torch.stack([parts[i % len(parts)][i // len(parts)] for i in range(count)])


def _first_of_all(own: Batch | None, count: int, device: torch.device | None) -> Batch | None:
    """The images of the lowest positions among those of all processes."""
    mine = own["position"].tolist() if own is not None else []
    chosen = sorted(position for part in distributed.gather(mine) for position in part)[:count]
    sent = None
    if own is not None:
        rows = _selected(own, [i for i, position in enumerate(mine) if position in set(chosen)])
        sent = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in rows.items()}
    full = [part for part in distributed.gather(sent) if part is not None and len(part["position"])]
    if not full:
        return None
    batch = _joined(full)
    ordered = _selected(batch, batch["position"].argsort().tolist())
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in ordered.items()}


def _joined(parts: list[Batch]) -> Batch:
    joined: Batch = {}
    for name, value in parts[0].items():
        if isinstance(value, Tensor):
            with torch.autocast(value.device.type, enabled=False):  # which refuses float16 on a CPU: stored states are
                joined[name] = torch.cat([part[name] for part in parts])
        else:
            joined[name] = [item for part in parts for item in part[name]]
    return joined


def _selected(batch: Batch, rows: Iterable[int]) -> Batch:
    kept = [row for row in rows if row < len(batch["position"])]
    return {
        name: value[kept] if isinstance(value, Tensor) else [value[row] for row in kept]
        for name, value in batch.items()
    }
