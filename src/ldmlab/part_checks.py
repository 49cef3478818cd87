"""What a part of each configuration group must have, checked when it is built."""

from functools import cache
from typing import Any, Protocol

from ldmlab import contracts
from ldmlab.errors import InputError

CONTRACTS: dict[str, type] = {  # configuration group => what its parts must have
    "first_stage": contracts.FirstStage,
    "data": contracts.Data,
    "backbone": contracts.Backbone,
    "conditioner": contracts.Conditioner,
    "schedule": contracts.Schedule,
    "prediction": contracts.Prediction,
    "time_sampling": contracts.TimeSampling,
    "weighting": contracts.Weighting,
    "diffusion_loss": contracts.DiffusionLoss,
    "sampler": contracts.NamedSampler,
    "guider": contracts.Guider,
    "task": contracts.Task,
    "loss": contracts.AutoencoderLoss,
    "metric": contracts.Metric,
    "features": contracts.FeatureExtractor,
    "encoder": contracts.PatchEncoder,
    "optimizer": contracts.OptimizerFactory,
    "lr_schedule": contracts.LrSchedule,
}


@cache
def members(contract: type) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names that a Protocol demands: methods, and attributes or properties."""
    bases = [base for base in contract.__mro__ if getattr(base, "_is_protocol", False) and base is not Protocol]
    every = ((name, value) for base in bases for name, value in vars(base).items())
    public = {name: value for name, value in every if not name.startswith("_") or name == "__call__"}
    methods = tuple(name for name, value in public.items() if callable(value))
    properties = (name for name, value in public.items() if isinstance(value, property))
    return methods, (*(name for base in bases for name in base.__annotations__), *properties)


def check_part(part: Any, contract: type, where: str, name: str) -> None:
    """InputError naming what the part lacks of its contract."""
    methods, attributes = members(contract)
    lacking = [f"{method}()" for method in methods if not callable(getattr(part, method, None))]
    lacking += [one for one in attributes if not (hasattr(type(part), one) or hasattr(part, one))]
    if lacking:
        raise InputError(
            f"{where}: {name} has no {', '.join(lacking)}, which every {contract.__name__} needs "
            "(see ldmlab.contracts and docs/extending.md)."
        )
