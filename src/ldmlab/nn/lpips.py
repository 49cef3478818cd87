"""LPIPS v0.1 with VGG16: a distance between images in the features of a classifier.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018.
"""

import contextlib
import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmlab.errors import InputError
from ldmlab.nn.compiling import region

# Positions of VGG16's convolutions in torchvision's `features`; features are read after the last of each group.
_GROUPS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
_WIDTHS = (64, 128, 256, 512, 512)  # of each group
SMALLEST = 16  # px; the deepest features of smaller images are empty
_MEAN = (-0.030, -0.088, -0.188)  # of ImageNet's pixels in [-1, 1]
_DEVIATION = (0.458, 0.448, 0.450)


@region
class LPIPS(nn.Module):
    """Perceptual distance of images; its weights are constants: never trained, never in a state dict."""

    def __init__(self, vgg_weights: Path | None) -> None:
        """`vgg_weights`: torchvision's VGG16, None: zeros, to estimate a cost; the weights of channels are those that
        torchmetrics has."""
        super().__init__()
        self._constant("mean", torch.tensor(_MEAN)[:, None, None])
        self._constant("deviation", torch.tensor(_DEVIATION)[:, None, None])
        package = importlib.util.find_spec("torchmetrics")  # found without importing it
        assert package is not None
        assert package.origin is not None
        published = Path(package.origin).parent / "functional/image/lpips_models/vgg.pth"
        vgg, heads = _zeros() if vgg_weights is None else _read(vgg_weights), _read(published)
        for number, group in enumerate(_GROUPS):
            for index in group:
                for part in ("weight", "bias"):
                    self._constant(f"vgg_{index}_{part}", _entry(vgg, f"features.{index}.{part}", vgg_weights))
            self._constant(f"head_{number}", heads[f"lin{number}.model.1.weight"])

    def _constant(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value.detach().clone(), persistent=False)

    def forward(self, first: Tensor, second: Tensor, weighted: bool = True) -> Tensor:
        """Two batches (B, 3, H, W) in [-1, 1], at least 16 x 16 => distances (B,), float32.

        weighted: by the learned weights of the channels; else each counts 1.
        """
        if min(first.shape[2:]) < SMALLEST:
            raise InputError(
                f"LPIPS compares images of {SMALLEST} px and more, not {first.shape[2]}x{first.shape[3]}; "
                "use larger ones, or the squared error."
            )
        distance = torch.zeros(len(first), device=first.device)
        pairs = zip(self.features(first), self.features(second), strict=True)
        for number, (one, other) in enumerate(pairs):
            difference = (_unit_length(one.float()) - _unit_length(other.float())).square()  # (B, C, h, w)
            if weighted:
                difference = difference * self.get_buffer(f"head_{number}")
            distance = distance + difference.sum(dim=1).mean(dim=(1, 2))
        return distance

    def features(self, images: Tensor) -> list[Tensor]:
        """VGG's activations at five depths; each image batch by itself, so that constants keep no graph."""
        x = ((images - self.get_buffer("mean")) / self.get_buffer("deviation")).to(
            self.get_buffer("vgg_0_weight").dtype
        )
        found = []
        for number, group in enumerate(_GROUPS):
            x = F.max_pool2d(x, 2) if number else x
            for index in group:
                weight, bias = self.get_buffer(f"vgg_{index}_weight"), self.get_buffer(f"vgg_{index}_bias")
                x = F.relu(F.conv2d(x, weight, bias, padding=1))
            found.append(x)
        return found


def _unit_length(features: Tensor) -> Tensor:
    """Every position's vector divided by its length; the small number keeps the gradient finite at zero."""
    return features * torch.rsqrt(features.square().sum(dim=1, keepdim=True) + 1e-8)


def _read(path: Path) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise InputError(f"LPIPS weights {path} do not exist; run `ldmlab fetch lpips`, or set loss.lpips_weight=0.")
    weights = None
    with contextlib.suppress(Exception):  # of a damaged file
        weights = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise InputError(f"LPIPS weights {path} are not a file of tensors; remove it and run `ldmlab fetch lpips`.")
    return weights


def _zeros() -> dict[str, Tensor]:
    """Tensors of VGG16's shapes."""
    entries: dict[str, Tensor] = {}
    before = 3
    for group, width in zip(_GROUPS, _WIDTHS, strict=True):
        for index in group:
            entries |= {f"{index}.weight": torch.zeros(width, before, 3, 3), f"{index}.bias": torch.zeros(width)}
            before = width
    return entries


def _entry(weights: dict[str, Tensor], name: str, path: Path | None) -> Tensor:
    for key in (name, name.removeprefix("features.")):
        if key in weights:
            return weights[key]
    raise InputError(f"LPIPS weights {path} hold no {name}; give torchvision's VGG16 (`ldmlab fetch lpips` gets it).")
