"""Feature extractors: 8-bit pictures to the features (and logits) that scores compare.

Shapes: B batch, D feature width, K logits; pictures are uint8 (B, 3, H, W).
"""

import hashlib
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ldmlab.checkpoints import fingerprint
from ldmlab.errors import InputError
from ldmlab.nn.openclip import OpenClip, build_clip
from ldmlab.nn.pixels import to_float


class FeatureExtractor(Protocol):
    """What a score needs to know about a network."""

    name: str
    weights_hash: str
    width: int
    has_logits: bool

    def __call__(self, pictures: Tensor) -> dict[str, Tensor]: ...  # features (B, D), logits (B, K) if it has them


def check_pictures(pictures: Tensor) -> None:
    """Refuse anything but uint8 (B, 3, H, W)."""
    if pictures.ndim != 4 or pictures.shape[1] != 3 or pictures.dtype != torch.uint8:
        raise InputError(
            f"pictures of shape {tuple(pictures.shape)} and type {pictures.dtype} cannot be scored; "
            "give (batch, 3, height, width) of uint8."
        )


class Inception2015(nn.Module):
    """The Inception network of 2015-12-05, the one of published FID and IS (torch-fidelity's port of the graph).

    Pooled features of 2048 and the 1008 logits without bias; any picture size, resized inside as TensorFlow 1 did.
    """

    name = "inception-2015-12-05"
    width = 2048
    has_logits = True

    def __init__(self, weights: Path | str) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        path = Path(weights)
        if not path.is_file():
            raise InputError(
                f"features.weights={path} does not exist; run `ldmlab fetch inception` or give another path."
            )
        self.weights_hash = _safe_file(path)
        try:
            self.network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
            )
        except (RuntimeError, TypeError) as error:
            raise InputError(f"features.weights={path} is not the Inception network's file; fetch it again.") from error

    @torch.inference_mode()
    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """features (B, 2048), logits (B, 1008)."""
        check_pictures(pictures)
        features, logits = self.network(pictures.to(next(self.network.parameters()).device))
        return {"features": features, "logits": logits}


def _safe_file(path: Path) -> str:
    """The file's SHA-256, after making sure that it holds tensors only (torch-fidelity unpickles it freely)."""
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"features.weights={path} cannot be read as a file of tensors; fetch it again.") from error
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


class OpenClipFeatures(nn.Module):
    """The image tower of an open_clip model: its embeddings before they are brought to unit length."""

    has_logits = False

    def __init__(self, clip: OpenClip, name: str) -> None:
        super().__init__()
        self.name = name
        self.model = clip.model.eval().requires_grad_(False)
        self.weights_hash = fingerprint(self.model.state_dict())
        self._pixels = clip.pixels
        self.eval()
        blank = torch.zeros(1, 3, clip.image_size, clip.image_size, dtype=torch.uint8)
        self.width = int(self(blank)["features"].shape[1])

    @torch.inference_mode()
    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """features (B, D); pictures of another size than the tower's are resized, bicubic with antialiasing."""
        check_pictures(pictures)
        encode = self.model.encode_image
        assert callable(encode)
        return {"features": encode(self._pixels(to_float(pictures.to(next(self.model.parameters()).device))))}


def published_clip(name: str, pretrained: str) -> OpenClipFeatures:
    """A published open_clip model by architecture and tag, such as ViT-B-32 and openai."""
    return OpenClipFeatures(build_clip(name, pretrained), f"open_clip {name} {pretrained}")


def clip_of_run(run: str, clip: OpenClip) -> OpenClipFeatures:
    """A CLIP that this laboratory trained; wiring reads it from the run folder."""
    return OpenClipFeatures(clip, f"clip run {Path(run).name}")
