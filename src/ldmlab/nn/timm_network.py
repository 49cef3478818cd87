"""Image networks of timm without their classifiers, with the preprocessing they were trained with."""

import hashlib
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldmlab.errors import InputError, did_you_mean, first_line


class TimmNetwork(nn.Module):
    """A timm network as `network`, frozen, with its `pixels`."""

    def __init__(
        self,
        model: str,  # timm's name
        weights: Path | str | None,  # file of its weights: .safetensors, or .pth of tensors only; None: fresh ones
        image_size: int | None,  # px the images are resized to; None: the network's own
        option: str,  # name of the part in messages
    ) -> None:
        super().__init__()
        if not timm.is_model(model):
            lists = "`python -c 'import timm; print(timm.list_models())'` lists."
            hint = did_you_mean(model, timm.list_models(), lists)
            raise InputError(f"{option}.model={model} is no model of timm; {hint}")
        path = None if weights is None else Path(weights)
        self.name = f"timm {model}"
        self.file_hash = None if path is None else safe_file(path, f"give the file of {model}'s weights", option)
        self.network = _loaded(model, path, image_size, option).eval().requires_grad_(False)
        given = self.network.pretrained_cfg
        self.image_size = image_size or int(given["input_size"][-1])
        self.register_buffer("mean", torch.tensor(given["mean"])[:, None, None], persistent=False)
        self.register_buffer("deviation", torch.tensor(given["std"])[:, None, None], persistent=False)

    def pixels(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1], any size => resized, bicubic with antialiasing, and normalised."""
        size = (self.image_size, self.image_size)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
        return (images - self.get_buffer("mean")) / self.get_buffer("deviation")


def safe_file(path: Path, way_out: str, option: str = "features") -> str:
    """The file's SHA-256, after making sure that it holds tensors only (torch-fidelity unpickles it freely)."""
    if not path.is_file():
        raise InputError(f"{option}.weights={path} does not exist; {way_out}.")
    try:
        if path.suffix != ".safetensors":  # which can hold nothing else
            torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"{option}.weights={path} cannot be read as a file of tensors; fetch it again.") from error
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _loaded(model: str, path: Path | None, image_size: int | None, option: str) -> Any:
    """The network with its weights; position embeddings are resampled to the size."""
    options: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    try:
        network = timm.create_model(model, pretrained=False, num_classes=0, **options)
        if path is None:
            return network
        state = timm.models.load_state_dict(str(path), use_ema=False, weights_only=True)
        head = {name for name in state if name.startswith(("head.", "fc.", "classifier."))}
        kept = {name: tensor for name, tensor in state.items() if name not in head}
        prepare = getattr(__import__(type(network).__module__, fromlist=["_"]), "checkpoint_filter_fn", None)
        network.load_state_dict(prepare(kept, network) if prepare else kept)
    except (RuntimeError, TypeError, KeyError, ValueError) as error:
        raise InputError(
            f"{option}.model={model} with {option}.weights={path} and {option}.image_size={image_size} cannot be "
            f"built ({first_line(error)}); give weights and a size that belong to this model."
        ) from error
    return network
