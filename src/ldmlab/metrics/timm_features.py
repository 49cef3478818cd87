"""Image networks of timm as feature extractors, DINOv2 first of all (FD-DINOv2: Stein et al., NeurIPS 2023)."""

from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldmlab.errors import InputError, did_you_mean
from ldmlab.metrics.features import check_images, safe_file
from ldmlab.nn import numerics


class TimmFeatures(nn.Module):
    """A timm network without its classifier: the pooled features (for DINOv2 the class token after the last norm)."""

    gives = frozenset({"features"})

    def __init__(
        self,
        model: str,  # timm's name
        weights: Path | str,  # file of its weights: .safetensors, or .pth of tensors only
        image_size: int | None = None,  # px the images are resized to; None: the network's own
    ) -> None:
        super().__init__()
        if not timm.is_model(model):
            lists = "`python -c 'import timm; print(timm.list_models())'` lists."
            hint = did_you_mean(model, timm.list_models(), lists)
            raise InputError(f"features.model={model} is no model of timm; {hint}")
        path = Path(weights)
        self.name = f"timm {model}"
        self.weights_hash = safe_file(path, f"give the file of {model}'s weights")
        self.network = _loaded(model, path, image_size).eval().requires_grad_(False)
        given = self.network.pretrained_cfg
        self.image_size = image_size or int(given["input_size"][-1])
        self.preparation = f"8-bit RGB, bicubic with antialiasing to {self.image_size} px, clamped"
        self.register_buffer("mean", torch.tensor(given["mean"])[:, None, None], persistent=False)
        self.register_buffer("deviation", torch.tensor(given["std"])[:, None, None], persistent=False)
        self.width = int(self.network.num_features)

    @numerics.exact()
    @torch.inference_mode()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """features (B, D); images are resized to the network's size, bicubic with antialiasing."""
        check_images(images)
        x = images.to(self.get_buffer("mean").device).float() / 255
        size = (self.image_size, self.image_size)
        if x.shape[-2:] != size:
            x = F.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 1)
        return {"features": self.network((x - self.get_buffer("mean")) / self.get_buffer("deviation"))}


def _loaded(model: str, path: Path, image_size: int | None) -> Any:
    """The network with its weights; position embeddings are resampled to the size."""
    options: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    try:
        network = timm.create_model(model, pretrained=False, num_classes=0, **options)
        state = timm.models.load_state_dict(str(path), use_ema=False, weights_only=True)
        head = {name for name in state if name.startswith(("head.", "fc.", "classifier."))}
        kept = {name: tensor for name, tensor in state.items() if name not in head}
        prepare = getattr(__import__(type(network).__module__, fromlist=["_"]), "checkpoint_filter_fn", None)
        network.load_state_dict(prepare(kept, network) if prepare else kept)
    except (RuntimeError, TypeError, KeyError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"features.model={model} with features.weights={path} and features.image_size={image_size} cannot be "
            f"built ({reason}); give weights and a size that belong to this model."
        ) from error
    return network
