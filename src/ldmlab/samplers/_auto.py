"""The default sampler: of an imported model its own, else that of its path."""

import inspect
from collections.abc import Mapping
from typing import Any

import yaml

from ldmlab.contracts import AfterStep, Denoise, Level, Noise, Path, Solver
from ldmlab.errors import InputError
from ldmlab.instantiate import instantiate


class Auto:
    """`sampler=auto`: becomes DDIM on the paper's schedules, Euler on flows, Heun on EDM's path."""

    spacing = "auto"
    steps = None

    def along(self, path: Path) -> Any:
        """The sampler itself."""
        name, *words = path.solver.sampler.split(":")  # and options, as `sde:form=linear`
        options = {option: yaml.safe_load(value) for option, value in (word.split("=") for word in words)}
        target = f"ldmlab.samplers.{name}.{name.title().replace('_', '')}"
        return instantiate({"_target_": target, **options}, where="sampler")

    def __call__(
        self, denoise: Denoise, x: Any, grid: list[Level], *, noise: Noise, after_step: AfterStep | None = None
    ) -> Any:
        """Refused: the sampler follows from a path."""
        raise InputError("sampler=auto needs the path of a model; name a sampler, for instance ddim.")


def solver_of(path: Path, spec: Mapping[str, Any]) -> Solver:
    """What `sampler=auto` is for a model.yaml: the sampler there of an imported model, else the path's.

    The sampler of a run is that of its grids alone.
    """
    if "origin" not in spec or spec.get("sampler") is None:
        return path.solver
    node = spec["sampler"]
    sampler = instantiate(node, where="sampler")
    if isinstance(sampler, Auto):
        return path.solver
    home, name = str(node["_target_"]).rsplit(".", 2)[:2]
    name = name if home == "ldmlab.samplers" else str(node["_target_"])
    own = {name: known.default for name, known in inspect.signature(type(sampler)).parameters.items()}
    options = {k: v for k, v in node.items() if k not in ("_target_", "_partial_", "spacing") and v != own.get(k)}
    words = [
        f"{option}={str(value).lower() if isinstance(value, bool) else value}" for option, value in options.items()
    ]
    solver = path.solver._replace(sampler=":".join([name, *words]))
    return solver._replace(spacing=sampler.spacing) if hasattr(path, "steps") else solver  # others have their own
