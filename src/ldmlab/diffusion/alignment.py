"""Alignment of a denoiser's middle features with those of a frozen encoder, while it trains.

REPA (Yu et al., ICLR 2025): the patches of an early block, projected, against the encoder's of the clean image, by
negative cosine. iREPA (Singh et al., arXiv 2512.10794): a convolution projects, and the encoder's features lose part of
their mean over places. U-REPA (Tian et al., arXiv 2503.18414): a U-Net's middle, projected and then enlarged to the
encoder's grid, and the likeness of places to each other as well.

Shapes: B batch, D width of the denoiser's features, h w their grid, E and h' w' those of an encoder.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldmlab.contracts import PatchEncoder
from ldmlab.errors import InputError
from ldmlab.nn.pixels import to_float
from ldmlab.stored_names import ENCODER_PREFIX, STATES_PREFIX

_EPSILON = 1e-6  # of the deviation over places, as iREPA's program


class Alignment(nn.Module):
    """The loss of one training batch; its projectors are trained with the denoiser and are no part of the model."""

    idle_without = "hidden: projector=mlp, until_step normalise manifold: weight"

    def __init__(
        self,
        backbone: nn.Module,  # with `aligned`; derived in wiring, as the next two
        widths: Mapping[str, int],  # E by encoder
        size: tuple[int, int],  # of latents
        projector: Literal["mlp", "conv"] = "mlp",  # mlp: three layers with SiLU | conv: 3 x 3
        hidden: int = 2048,  # width of the MLP
        block: int | None = None,  # of a transformer, from 1; None: its own choice; U-Nets have their middle
        weight: float = 0.5,  # of the term; 0: none at all
        until_step: int | None = None,  # the term ends before this step; None: never
        normalise: float | None = None,  # share of their mean over places that targets lose; None: as they are
        manifold: float = 0.0,  # weight of the likeness of places beside the cosine
    ) -> None:
        super().__init__()
        if not hasattr(backbone, "aligned"):
            raise InputError(
                f"alignment: the backbone {type(backbone).__name__} names no middle features (aligned() of "
                "ldmlab.contracts.Backbone); choose another backbone, or alignment=none."
            )
        if weight < 0 or manifold < 0 or hidden < 1:
            raise InputError(f"alignment: weight={weight}, manifold={manifold}, hidden={hidden}; give 0 or more, 1 up.")
        if (until_step is not None and until_step < 1) or not 0 <= (normalise or 0) <= 1:
            raise InputError(
                f"alignment: until_step={until_step}, normalise={normalise}; give a step of 1 or more and a share of 0 "
                "to 1, or null for each."
            )
        watched, width = backbone.aligned(block)  # type: ignore[operator]
        self._watched: tuple[nn.Module] = (watched,)  # no part of this module
        step = int(getattr(backbone, "size_step", 1))
        self.grid = (size[0] // step, size[1] // step)  # of a transformer's patches
        self.weight, self.until_step, self.normalise, self.manifold = weight, until_step, normalise, manifold
        self.encoders = nn.ModuleDict()
        self.projectors = Projectors(projector, width, hidden, widths)

    def run(self, encoders: Mapping[str, PatchEncoder]) -> None:
        """From now on the encoders are run on the images of batches, which store no features."""
        self.encoders.update(encoders)  # type: ignore[arg-type]

    def ended(self, step: int) -> bool:
        """Whether the update that follows `step` updates has the term no longer."""
        return self.until_step is not None and step >= self.until_step

    @contextmanager
    def watching(self) -> Iterator[list[Tensor]]:
        """Inside, the denoiser's features are added to the list, (B, D, h, w) each."""
        seen: list[Tensor] = []
        with self._watched[0].register_forward_hook(lambda module, inputs, output: seen.append(self._map(output))):
            yield seen

    def _map(self, output: Any) -> Tensor:
        """A feature map, or the last h w tokens as one; of several outputs the first."""
        found: Tensor = output[0] if isinstance(output, tuple) else output
        rows, columns = self.grid
        return found if found.ndim == 4 else found[:, -rows * columns :].transpose(1, 2).unflatten(2, self.grid)

    def forward(self, seen: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Features (B, D, h, w) of the batch => the term without its weight, the mean over encoders."""
        terms = []
        for name, guess in self.projectors(seen).items():
            target = self.target(name, batch)
            if guess.shape[2:] != target.shape[2:]:
                guess = F.interpolate(guess.float(), target.shape[2:], mode="bilinear")
            term = -F.cosine_similarity(guess.float(), target, dim=1).mean()
            terms.append(term + self.manifold * likeness(guess.float(), target) if self.manifold else term)
        return torch.stack(terms).mean()

    def unused(self, seen: Tensor) -> Tensor:
        """Zero, of which every projector has a gradient, as DDP expects of all that is trained."""
        found = self.projectors(torch.zeros_like(seen[:1, :, :1, :1]))
        return 0.0 * torch.stack([value.float().sum() for value in found.values()]).sum()

    @torch.no_grad()
    def target(self, name: str, batch: Mapping[str, Any]) -> Tensor:
        """The encoder's features (B, E, h', w'), stored or computed from the batch's images."""
        stored = batch.get(f"{STATES_PREFIX}{ENCODER_PREFIX}{name}")
        found: Tensor = self.encoders[name](to_float(batch["image"])) if stored is None else stored.float()
        if self.normalise is None:
            return found
        mean, deviation = (part(found, dim=(2, 3), keepdim=True) for part in (torch.mean, torch.std))
        return (found - self.normalise * mean) / (deviation + _EPSILON)


class Projectors(nn.Module):
    """The denoiser's features at the width of each encoder."""

    def __init__(self, kind: str, width: int, hidden: int, widths: Mapping[str, int]) -> None:
        super().__init__()
        parts = {
            name: mlp(width, hidden, out) if kind == "mlp" else nn.Conv2d(width, out, 3, padding=1)
            for name, out in widths.items()
        }
        self.parts = nn.ModuleDict(parts)

    def forward(self, maps: Tensor) -> dict[str, Tensor]:
        """(B, D, h, w) => (B, E, h, w) by encoder."""
        last = maps.movedim(1, -1)
        return {n: p(maps) if isinstance(p, nn.Conv2d) else p(last).movedim(-1, 1) for n, p in self.parts.items()}


def mlp(width: int, hidden: int, out: int) -> nn.Sequential:
    """REPA's projector of tokens (..., D) => (..., E): Glorot's uniform weights, no bias at the start."""
    middle = nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU()
    made = nn.Sequential(nn.Linear(width, hidden), *middle, nn.Linear(hidden, out))
    for layer in made:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return made


def likeness(guess: Tensor, target: Tensor) -> Tensor:
    """Mean square of the difference between two images' cosines of place i and place j; (B, E, h', w') twice."""
    a, b = (F.normalize(part.flatten(2), dim=1) for part in (guess, target))
    return (a.mT @ a - b.mT @ b).square().mean()
