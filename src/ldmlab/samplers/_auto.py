"""The default sampler of the model's path."""

from typing import Any

import yaml

from ldmlab.contracts import AfterStep, Denoise, Level, Noise, Path
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
