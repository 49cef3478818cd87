"""The default sampler of the model's path."""

import importlib
from typing import Any

from ldmlab.contracts import AfterStep, Denoise, Level, Noise, Path
from ldmlab.errors import InputError


class Auto:
    """`sampler=auto`: becomes DDIM on the paper's schedules, Euler on flows, Heun on EDM's path."""

    spacing = "auto"
    steps = None

    def along(self, path: Path) -> Any:
        """The sampler itself."""
        name = path.solver.sampler
        return getattr(importlib.import_module(f"ldmlab.samplers.{name}"), name.title().replace("_", ""))()

    def __call__(
        self, denoise: Denoise, x: Any, grid: list[Level], *, noise: Noise, after_step: AfterStep | None = None
    ) -> Any:
        """Refused: the sampler follows from a path."""
        raise InputError("sampler=auto needs the path of a model; name a sampler, for instance ddim.")
