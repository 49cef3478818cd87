"""Models of few steps: guidance is inside the network, in one pass, at a fixed scale or at one that it is given.

A scale w reaches the network as 1 - 1 / w in the units of its time, so that all above 1 lie within one path's length.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ldmlab.contracts import Conditioning, Prepared, Solver
from ldmlab.diffusion.guidance import Guidance
from ldmlab.diffusion.latent_diffusion import LatentDiffusion
from ldmlab.errors import InputError

Scales = float | tuple[float, float]  # a fixed scale, 1: none; or the range of scales that the network is given


class FewSteps(LatentDiffusion):
    """What MeanFlow and consistency models share: the guidance scale, and the sampler of their own."""

    spans: ClassVar[int] = 0  # numbers that the network is given before the scale

    def __init__(self, guidance: Scales, solver: Solver, **parts: Any) -> None:
        """solver: the sampler, spacing and steps of `sampler=auto`; parts: arguments of LatentDiffusion."""
        super().__init__(**parts)
        self.guidance, self.range = guidance, scales_of(guidance)
        known = bool(self.conditioners)
        if not known and guidance != 1:
            raise InputError(f"diffusion.guidance={guidance} needs conditions and this model has none; use 1.")
        if self.numbers({"guidance": guidance}) and "numbers" not in self.backbone.accepts:  # type: ignore[operator]
            raise InputError(
                f"the backbone {type(self.backbone).__name__} takes no numbers beside the time, which this diffusion "
                "gives it; choose one of ldmlab's, or a consistency model of one fixed guidance."
            )
        self.guidance_trained = self.range is not None
        self.path = copy.copy(self.path)
        self.path.solver = solver
        ends = self.path.time(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
        self.unit = abs(ends[1] - ends[0])  # the network's time from one end of the path to the other

    @classmethod
    def numbers(cls, node: Mapping[str, Any]) -> int:
        """How many numbers the network of a configuration is given beside the time."""
        return cls.spans + (scales_of(node.get("guidance", 1.0)) is not None)

    def scales(self, u: Tensor) -> Tensor:
        """Uniform numbers (B,) => guidance scales (B,), 1 / w uniform over the range; the fixed one without a range."""
        if self.range is None:
            return torch.full_like(u, float(self.guidance), dtype=torch.float32)  # type: ignore[arg-type]
        low, high = self.range
        return (1 / torch.lerp(u.new_tensor(1 / high), u.new_tensor(1 / low), u)).float()

    def numbered(self, given: Any, scale: Tensor, *spans: Tensor) -> Any:
        """A conditioning, prepared or not, with the spans of positions and the scales, each (B,), as the network's."""
        parts = [*spans, *([] if self.range is None else [1 - 1 / scale])]
        if not parts:
            return given
        numbers = torch.stack(parts, dim=1) * self.unit
        if isinstance(given, Prepared):
            return replace(given, conditioning=replace(given.conditioning, numbers=numbers))
        return replace(given, numbers=numbers)

    # ---- guidance at sampling

    @property
    def usual_guidance(self) -> float:
        """3 where the range has it."""
        return 1.0 if self.range is None else min(max(3.0, self.range[0]), self.range[1])

    def check_guidance(self, guidance: Guidance) -> None:
        """InputError for another scale than the network has or takes, and for what needs a second pass."""
        scale = guidance.scale
        if guidance.weak is not None or guidance.interval is not None or guidance.corrects:
            raise InputError(
                "guidance is inside this model's one pass, at a scale alone; leave out guidance_interval, "
                "guidance_rescale, guided_channels and weak_model."
            )
        if self.range is None and scale != 1:
            raise InputError(
                f"guidance_scale={scale}: this model's network has the fixed scale {self.guidance} inside; leave it "
                "out, or train with diffusion.guidance=[1,8] to choose it here."
            )
        if self.range is not None and not self.range[0] <= scale <= self.range[1]:
            low, high = self.range
            raise InputError(f"guidance_scale={scale} is outside {low} .. {high}, this model's; choose within.")

    def null(self, batch: dict[str, Any]) -> Conditioning:
        """As of other models, for training; sampling has one pass, so a `negative_prompt` is refused."""
        if batch.get("negative_prompt") and any(batch["negative_prompt"]):
            raise InputError("negative_prompt: this model has guidance inside its one pass; leave it out.")
        return super().null(batch)


def scales_of(guidance: Any) -> tuple[float, float] | None:
    """The range of an option `guidance`; None for a fixed scale."""
    low, high = guidance if isinstance(guidance, list | tuple) else (guidance, None)
    if not low > 0 or (high is not None and not low < high):
        raise InputError(f"diffusion.guidance={guidance} must be a scale above 0, or two of them: [1, 8].")
    return None if high is None else (float(low), float(high))
