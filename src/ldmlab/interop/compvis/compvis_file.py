"""A whole official file taken apart: networks, averaged weights, schedule and scale, each without its prefix."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldmlab.diffusion.schedule import Schedule
from ldmlab.errors import InputError
from ldmlab.interop.compvis.compvis_networks import (
    AVERAGED,
    BUFFERS,
    CONDITIONER,
    FIRST_STAGE,
    LOSS,
    SCHEDULES,
    UNET,
    is_table,
)
from ldmlab.interop.renaming import State, StateDict

_COUNTERS = ("decay", "num_updates")  # of the averaged weights


@dataclass(frozen=True)
class OfficialFile:
    """The tensors of a whole model or of a first stage alone."""

    unet: StateDict
    first_stage: StateDict
    conditioner: StateDict
    averages: StateDict  # names as in the file, flattened
    buffers: StateDict
    unknown: list[str]

    @property
    def is_first_stage(self) -> bool:
        """Whether this is an autoencoder on its own."""
        return not self.unet and not any(key.startswith(_flat(UNET)) for key in self.averages)

    def averaged(self, names: Iterable[str], prefix: str) -> StateDict | None:
        """The averaged weights of a network by their own names, or None where the file has none of it.

        The file deletes all dots from a name, which cannot be undone, so `names` come from the architecture; what is
        not there is left out.
        """
        flat = {name: _flat(prefix + name) for name in names}
        return {name: self.averages[key] for name, key in flat.items() if key in self.averages} or None


def _flat(name: str) -> str:
    """The name of a weight's average, or how those of a network begin."""
    return AVERAGED + name.removeprefix("model.").replace(".", "")


def take_apart(state: State) -> OfficialFile:
    """Sort tensors by their prefixes; a first stage alone has none."""
    groups: dict[str, StateDict] = {prefix: {} for prefix in (UNET, FIRST_STAGE, CONDITIONER)}
    averages, buffers, unknown = dict[str, Tensor](), dict[str, Tensor](), list[str]()
    alone = not any(key.startswith((UNET, FIRST_STAGE, AVERAGED + "diffusion_model")) for key in state)
    for key, tensor in state.items():
        prefix = next((prefix for prefix in groups if key.startswith(prefix)), "")
        name = key.removeprefix(prefix)
        if name.startswith(LOSS) or (prefix == CONDITIONER and is_table(key)):
            continue
        if key.startswith(AVERAGED):
            if key.removeprefix(AVERAGED) not in _COUNTERS:
                averages[key] = tensor
        elif key in BUFFERS:
            buffers[key] = tensor
        elif prefix or alone:
            groups[prefix or FIRST_STAGE][name] = tensor
        else:
            unknown.append(key)
    return OfficialFile(groups[UNET], groups[FIRST_STAGE], groups[CONDITIONER], averages, buffers, unknown)


def check_schedule(file: OfficialFile, betas: Tensor) -> None:
    """Refuse a configuration whose schedule is not the one stored in the file."""
    stored = file.buffers.get("betas")
    if stored is None:
        return
    tolerance = 1e-5 if stored.dtype in (torch.float32, torch.float64) else 1e-2
    if stored.shape != betas.shape or not torch.allclose(stored.double(), betas, rtol=tolerance, atol=0):
        configured = f"{len(betas)} betas {float(betas[0]):.3g} .. {float(betas[-1]):.3g}"
        raise InputError(
            f"the file was trained with {len(stored)} betas {float(stored[0]):.3g} .. {float(stored[-1]):.3g}, the "
            f"configuration has {configured}; give the configuration that belongs to these weights."
        )


def schedule_params(file: OfficialFile, default: Mapping[str, Any]) -> dict[str, Any]:
    """The official schedule options that give the stored betas; `default` for a file that stores none."""
    stored = file.buffers.get("betas")
    if stored is None:
        return dict(default)
    digits = 6 if stored.dtype == torch.float32 else 3
    start, end = (float(f"{float(beta):.{digits}g}") for beta in (stored[0], stored[-1]))
    for official, name in SCHEDULES.items():
        squared = (start**2, end**2) if name == "sqrt" else (start, end)
        try:
            check_schedule(file, Schedule(name, *squared, steps=len(stored)).betas)
        except InputError:
            continue
        params = {"linear_start": squared[0], "linear_end": squared[1], "timesteps": len(stored)}
        return params if official == "linear" else params | {"beta_schedule": official}
    raise InputError("the betas in the file belong to none of the supported schedules; give --config.")


def scale_factor(file: OfficialFile, params: Mapping[str, Any]) -> float:
    """The stored factor where there is one (`scale_by_std`), else the configuration's."""
    stored = file.buffers.get("scale_factor")
    if stored is not None:
        return float(stored)
    if params.get("scale_by_std"):
        raise InputError("scale_by_std: the factor was measured in training but the file has no `scale_factor`.")
    return float(params.get("scale_factor", 1.0))
